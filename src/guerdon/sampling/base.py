"""What every sampler does."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from guerdon.errors import DataError


class Sampler(nn.Module):
    """Chooses prompts by their position in the data; subclasses say how.

    The loop calls `prepare` once, then per step `draw` and, after the rewards, `keep`; while too few groups are kept
    it draws again, at most `draws_max` times, and then calls `shortage`. What must survive a restart is in buffers.

    Attributes:
        draws_max: rollouts a step may take to fill its batch.
        size: number of prompts in the data; None for endless data, whose positions never repeat.
        seed: decides all that is random.
    """

    draws_max: int = 1

    def __init__(self) -> None:
        super().__init__()
        self.size: int | None = None
        self.seed = 0

    def prepare(self, size: int | None, seed: int) -> None:
        """Tell the sampler about the data; changes no buffer, so it may come before or after loading a state.

        Args:
            size: number of prompts; None for endless data.
            seed: of its permutations.

        Raises:
            DataError: there are no prompts.
        """
        if size is not None and size < 1:
            raise DataError(f"sampling: the data has {size} prompts; there must be at least one.")
        self.size = size
        self.seed = seed

    def draw(self, count: int) -> list[int]:
        """The positions of the next `count` prompts."""
        raise NotImplementedError

    def keep(self, scores: Float[Tensor, "P G K"]) -> Bool[Tensor, " P"]:
        """Which of the scored groups may be trained on.

        Args:
            scores: [P, G, K], NaN = not scored. Subclasses may name other fields.

        Returns:
            True for every group.
        """
        return torch.ones(scores.shape[0], dtype=torch.bool, device=scores.device)

    def metrics(self) -> dict[str, float]:
        """What the sampler has to tell of the step that it observed last; the loop logs it as `sampling/NAME`."""
        return {}

    def shortage(self, kept: int, wanted: int) -> None:
        """Called when fewer groups than wanted were kept after the last draw; returning means: train with those.

        Args:
            kept: number of groups that were kept.
            wanted: number that makes a full step.
        """
