"""Draw again until the batch is full of groups that carry a signal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import DataError, RecipeError, check_shapes, nearest
from guerdon.sampling.mixed import mixed_groups
from guerdon.sampling.uniform import Uniform


class Dynamic(Uniform):
    """Keep a group only if its samples are not all scored alike, and draw on until there are enough.

    A group whose samples all fail, or all succeed, has advantage 0; without it every step has the same number of
    prompts to learn from. Prompts are drawn as by `uniform`.

    Args:
        max_draws: rollouts a step may take.
        on_shortage: what to do if they do not suffice: `raise`, or `train` with the groups that were kept.
        component: name of the component that decides (the accuracy, not a bonus); None = the first.
        shuffle: as in `uniform`.

    Raises:
        RecipeError: max_draws is below 1, or on_shortage is unknown.

    Edge cases:
        Groups with fewer than two scored samples are not kept. A kept group's prompt is not drawn again in this epoch;
        neither is a refused one.

    Example:
        >>> import torch
        >>> Dynamic().keep(torch.tensor([[[0.0], [1.0]], [[1.0], [1.0]]]), ("correct",))
        tensor([ True, False])

    Source:
        Yu et al. 2025, DAPO, arXiv 2503.14476 (dynamic sampling).
    """

    def __init__(
        self,
        *,
        max_draws: int = 10,
        on_shortage: Literal["raise", "train"] = "raise",
        component: str | None = None,
        shuffle: bool = True,
    ) -> None:
        super().__init__(shuffle=shuffle)
        if max_draws < 1:
            raise RecipeError(f"sampling.dynamic: max_draws must be at least 1; got {max_draws}.")
        if on_shortage not in ("raise", "train"):
            raise RecipeError(f"sampling.dynamic: on_shortage must be 'raise' or 'train'; got {on_shortage!r}.")
        self.draws_max = max_draws
        self.on_shortage = on_shortage
        self.component = component

    def keep(self, scores: Float[Tensor, "P G K"], score_names: Sequence[str] = ()) -> Bool[Tensor, " P"]:
        """Which groups are mixed in the deciding component.

        Args:
            scores: [P, G, K], raw scores, NaN = not scored.
            score_names: the K names; needed when `component` is set.

        Returns:
            bool [P].

        Raises:
            ShapeError: scores is not [P, G, K].
            RecipeError: there is no component of that name.
        """
        check_shapes("sampling.dynamic", scores=(scores, "P G K"))
        if self.component is not None and self.component not in score_names:
            raise RecipeError(
                f"sampling.dynamic: there is no component {self.component!r}.{nearest(self.component, score_names)} "
                f"There are: {', '.join(score_names)}."
            )
        chosen = 0 if self.component is None else list(score_names).index(self.component)
        return mixed_groups(scores[..., chosen])

    def shortage(self, kept: int, wanted: int) -> None:
        """Raise, or let the loop train with what there is.

        Raises:
            DataError: with `on_shortage="raise"`.
        """
        if self.on_shortage == "raise":
            raise DataError(
                f"sampling.dynamic: only {kept} of {wanted} groups had samples that were scored differently, after "
                f"{self.draws_max} draws. The prompts are too easy or too hard for the policy: raise max_draws or "
                "group_size, change the data, or set on_shortage: train."
            )


dynamic = Dynamic
