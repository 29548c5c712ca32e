"""Finding proxy points within one run: a search over the thresholds of a Lagrangian, judged by what is only watched.

The policy is driven to a set of thresholds, its worth is measured, and a Nelder-Mead search says which thresholds come
next; policy, optimiser and multipliers are never reset in between.
Confronting Reward Model Overoptimization with Constrained RLHF, 2023, arXiv 2310.04373 (NM-PPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from guerdon.errors import BindingError, RecipeError
from guerdon.weighting.lagrangian import Lagrangian
from guerdon.weighting.nelder_mead import NelderMead
from guerdon.weighting.weighted import WeightedOutput

_WHERE = "weighting.proxy_point_search"


class ProxyPointSearch(nn.Module):
    """A `lagrangian` whose thresholds are searched while it trains.

    A point of the search is a set of thresholds. It lasts `steps_per_point` steps, or until every reward is within 5 % of
    its threshold; its value is minus the mean of the watched reward in its last step. After `steps` the thresholds are
    those of the best point.

    Args:
        box: component name -> [lowest, highest] threshold; the first K + 1 points are drawn uniformly in it.
        watched: position of the judge among the recipe's `watch`.
        steps_per_point: training steps a point lasts at most.
        steps: training steps of the search; after them the best thresholds stay.
        mode: `xi`, `mu` or `all`, as in `lagrangian`.
        lr: learning rate of the multipliers.
        momentum: of their gradient, in [0, 1).
        max_grad_norm: their gradient is shortened to it.
        seed: of the first points.
        updates: multiplier steps a training step, each on an equal share of the prompts.

    Raises:
        RecipeError: there is no box or an empty one, or a setting is out of range.

    Edge cases:
        A point within 0.005 of a known one costs no training. A value that is NaN counts as infinitely bad.

    Example:
        >>> stage = ProxyPointSearch(box={"right": [0.2, 0.6]}, steps=100)
        >>> 0.2 <= stage.lagrangian.multipliers.thresholds.item() <= 0.6
        True

    Source:
        arXiv 2310.04373 and the authors' code, which lasts a tenth of the run at most a point; that the watched reward of
        the training samples is the evaluation is ours.
    """

    def __init__(
        self,
        *,
        box: dict[str, list[float]],
        watched: int = 0,
        steps_per_point: int = 10,
        steps: int = 100,
        mode: Literal["mu", "xi", "all"] = "xi",
        lr: float = 0.1,
        momentum: float = 0.1,
        max_grad_norm: float = 0.5,
        seed: int = 0,
        updates: int = 1,
    ) -> None:
        super().__init__()
        if not box:
            raise RecipeError(f"{_WHERE}.box: must name a component and where its point may lie: {{NAME: [0.2, 0.6]}}.")
        for name, edges in box.items():
            if len(edges) != 2 or not edges[0] < edges[1]:
                raise RecipeError(f"{_WHERE}.box.{name}: must be [lowest, highest]; got {edges}.")
        if steps_per_point < 1 or steps < 1:
            raise RecipeError(
                f"{_WHERE}: steps and steps_per_point must be at least 1; got {steps}, {steps_per_point}."
            )
        low, high = (torch.tensor([edges[i] for edges in box.values()], dtype=torch.float64) for i in (0, 1))
        draws = torch.rand(len(box) + 1, len(box), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.search = NelderMead((low + draws * (high - low)).tolist())
        self.watched, self.steps_per_point, self.steps = watched, steps_per_point, steps
        first = self.search.ask()
        assert first is not None
        self.lagrangian = Lagrangian(
            thresholds=dict(zip(box, first, strict=True)),
            mode=mode, lr=lr, momentum=momentum, max_grad_norm=max_grad_norm, seed=seed, updates=updates,
        )  # fmt: skip
        self.counts: Tensor
        self.tried: Tensor
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))  # steps in all, and at this point
        self.register_buffer("tried", torch.zeros(0, len(box) + 1, dtype=torch.float64))  # thresholds and value

    def forward(self, scores: Float[Tensor, "P G K"], score_names: Sequence[str]) -> WeightedOutput:
        """Weigh the components as `lagrangian` does, with the thresholds of the point at hand; changes no state.

        Args:
            scores: [P, G, K], NaN = not scored.
            score_names: the K names.

        Returns:
            `rewards` [P, G] and `weights` [K].
        """
        return self.lagrangian(scores, score_names)

    @torch.no_grad()
    def observe(
        self,
        shaped: Float[Tensor, "P G K"],
        score_names: Sequence[str],
        lengths: Int[Tensor, "P G"],
        watched: Float[Tensor, "P G W"] | None = None,
    ) -> None:
        """Move the multipliers, and the thresholds once the point has been reached or has had its time.

        Args:
            shaped: [P, G, K], the scores that were weighed.
            score_names: the K names.
            lengths: [P, G], live steps of each sample.
            watched: [P, G, W], the watched rewards.

        Raises:
            BindingError: nothing is watched.
        """
        self.lagrangian.observe(shaped, score_names, lengths)
        self.counts += 1
        if self.counts[0] > self.steps:
            return
        if watched is None:
            raise BindingError(f"{_WHERE}: it is judged by a watched reward, and there is none. Add one to `watch`.")
        over = bool(self.counts[0] == self.steps)
        if over or self.counts[1] >= self.steps_per_point or self.lagrangian.satisfied:
            limits = self.lagrangian.multipliers.thresholds
            value = -watched[..., self.watched].double().nanmean()
            self.tried = torch.cat([self.tried, torch.cat([limits, value.to(limits).reshape(1)]).unsqueeze(0)])
            self.counts[1] = 0
            self._replay()
            following = None if over else self.search.ask()
            best = self.search.best[0] if following is None else following
            limits.copy_(torch.tensor(best, dtype=limits.dtype))
            if following is None:
                self.counts[0] = self.steps

    def metrics(self) -> dict[str, float]:
        """Multipliers, thresholds, and the best value so far."""
        limits = self.lagrangian.multipliers.thresholds.tolist()
        told = {f"threshold/{name}": value for name, value in zip(self.lagrangian.names, limits, strict=True)}
        best = {"best": -self.tried[:, -1].min().item(), "points": float(len(self.tried))} if len(self.tried) else {}
        return {**self.lagrangian.metrics(), **told, **best}

    def _replay(self) -> None:
        self.search.evaluated.clear()
        for *point, value in self.tried.tolist():
            self.search.tell(point, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **more: Any) -> None:
        # as many points as were tried, which a new search cannot know
        if prefix + "tried" in state_dict:
            self.tried = torch.empty_like(state_dict[prefix + "tried"], device=self.tried.device)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)
        self._replay()


proxy_point_search = ProxyPointSearch
