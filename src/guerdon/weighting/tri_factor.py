"""Three factors of a component's weight: how weak it is, how risky, and how much it repeats the others.

Quark Medical Alignment, 2026, arXiv 2602.11661. The formulas are our reading: the paper's were not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guerdon.errors import RecipeError, check_shapes
from guerdon.weighting.weighted import WeightedOutput, weighted_sum

_WHERE = "weighting.tri_factor"


class TriFactor(nn.Module):
    """w_k = w0_k a_k b_k d_k / sum: weakness, risk and redundancy, from exponential averages that include this batch.

    a_k = exp(alpha gap_k / max_j gap_j) with gap_k = max(0, target_k - m_k), m_k the average z-score;
    b_k = severity_k (1 + kappa v_k), v_k the share of samples below the component's floor;
    d_k = 1 / (1 + lam sum_{j != k} max(0, R_kj)), R the correlations. A factor is switched off by alpha, kappa or lam 0.

    Args:
        base: w0, component -> prior weight; None = alike.
        severity: component -> at least 0, by default 1.
        floors: component -> least acceptable raw score (with `sign` 1; greatest with -1); none = no risk.
        sign: component -> 1 (by default) or -1 for its raw score.
        target: component -> in reference standard deviations, by default `default_target`.
        default_target: two standard deviations above the reference.
        alpha: of weakness.
        kappa: of risk.
        lam: of redundancy.
        decay: of the averages, in [0, 1).
        eta: share of the new weights, in (0, 1].

    Raises:
        RecipeError: an option is out of range, or all severities are 0.
        ShapeError: scores is not [P, G, K].

    Edge cases:
        NaN scores are left out of means and shares, and such rows of the correlations. A constant column has correlation 0.

    Example:
        >>> stage = TriFactor(lam=0.0)
        >>> stage(torch.tensor([[[0.0, 2.0], [0.0, 2.0]]])).weights.round(decimals=3)
        tensor([0.7310, 0.2690])

    Source:
        arXiv 2602.11661; our reading: three factors as a product.
    """

    def __init__(
        self,
        *,
        base: dict[str, float] | None = None,
        severity: dict[str, float] | None = None,
        floors: dict[str, float] | None = None,
        sign: dict[str, int] | None = None,
        target: dict[str, float] | None = None,
        default_target: float = 2.0,
        alpha: float = 1.0,
        kappa: float = 2.0,
        lam: float = 1.0,
        decay: float = 0.9,
        eta: float = 1.0,
    ) -> None:
        super().__init__()
        if min(alpha, kappa, lam) < 0 or not 0 <= decay < 1 or not 0 < eta <= 1:
            raise RecipeError(f"{_WHERE}: alpha, kappa and lam must be at least 0, decay in [0, 1), eta in (0, 1].")
        if min((severity or {"": 1.0}).values()) < 0:
            raise RecipeError(f"{_WHERE}.severity: must be at least 0; got {severity}.")
        self.base, self.severity, self.floors = base or {}, severity or {}, floors or {}
        self.sign, self.target, self.default_target = sign or {}, target or {}, default_target
        self.alpha, self.kappa, self.lam, self.decay, self.eta = alpha, kappa, lam, decay, eta
        self.averages: Tensor
        # [K + 3, K]: correlations, then mean z, share below the floor, weights; empty until the first batch
        self.register_buffer("averages", torch.zeros(0, 0, dtype=torch.float64))

    def forward(
        self,
        scores: Float[Tensor, "P G K"],
        score_names: Sequence[str] = (),
        raw_scores: Float[Tensor, "P G K"] | None = None,
    ) -> WeightedOutput:
        """Weigh the components; changes no state.

        Args:
            scores: [P, G, K], z-scores; NaN = not scored.
            score_names: the K names, needed for options by name.
            raw_scores: [P, G, K], what floors are compared with; None = scores.

        Returns:
            `rewards` [P, G] and `weights` [K].
        """
        check_shapes(_WHERE, scores=(scores, "P G K"))
        weights = self._merged(scores.detach(), score_names, raw_scores)[-1].to(scores)
        return WeightedOutput(weighted_sum(scores, weights), weights)

    @torch.no_grad()
    def observe(
        self,
        shaped: Float[Tensor, "P G K"],
        score_names: Sequence[str] = (),
        scores: Float[Tensor, "P G K"] | None = None,
    ) -> None:
        """Take a finished step in.

        Args:
            shaped: [P, G, K], the z-scores that were weighed.
            score_names: the K names.
            scores: [P, G, K], raw scores.
        """
        self.averages = self._merged(shaped, score_names, scores)

    def factors(self, averages: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Weakness, risk and redundancy [K] of averages [K + 3, K]."""
        size = averages.shape[1]
        correlation, mean, share = averages[:size], averages[size], averages[size + 1]
        gap = (self._options(self.target, self.default_target, names, size) - mean).clamp(min=0)
        weakness = torch.exp(self.alpha * gap / gap.max()) if gap.max() > 0 else torch.ones_like(gap)
        risk = self._options(self.severity, 1.0, names, size) * (1 + self.kappa * share)
        if not risk.sum() > 0:
            raise RecipeError(f"{_WHERE}.severity: all are 0; at least one must be above.")
        repeats = correlation.clamp(min=0)
        redundancy = 1 / (1 + self.lam * (repeats.sum(-1) - repeats.diagonal()))
        return weakness, risk, redundancy

    def metrics(self) -> dict[str, float]:
        """The mean correlation of components with one another."""
        size = self.averages.shape[1]
        if size < 2:
            return {}
        between = self.averages[:size].sum() - self.averages[:size].diagonal().sum()
        return {"correlation": between.item() / (size * (size - 1))}

    def _merged(self, z: Tensor, names: Sequence[str], raw: Tensor | None) -> Tensor:
        size = z.shape[-1]
        rows = z.flatten(0, 1).double()
        below = (z if raw is None else raw).flatten(0, 1).double()
        whole = rows[~rows.isnan().any(-1)]
        if not len(whole):
            if len(self.averages):
                return self.averages
            raise RecipeError(f"{_WHERE}: no sample has all its scores, so there is nothing to start from.")
        sign = self._options({k: float(v) for k, v in self.sign.items()}, 1.0, names, size)
        floor = self._options(self.floors, -torch.inf, names, size)
        floor = torch.where(floor.isinf(), -torch.inf * sign, floor)
        scored = ~below.isnan()
        share = ((sign * (below - floor) < 0) & scored).sum(0) / scored.sum(0).clamp(min=1)
        centred = whole - whole.mean(0)
        norm = centred.norm(dim=0)
        centred = torch.where(norm > 1e-12, centred / norm.clamp(min=1e-12), 0.0)
        found = torch.cat([centred.T @ centred, rows.nanmean(0)[None], share[None].double()])
        if len(self.averages):
            found = self.decay * self.averages[:-1] + (1 - self.decay) * found
        weakness, risk, redundancy = self.factors(torch.cat([found, found[:1]]), names)
        weights = self._options(self.base, 1.0, names, size) * weakness * risk * redundancy
        weights = weights / weights.sum()
        if len(self.averages):
            weights = (1 - self.eta) * self.averages[-1] + self.eta * weights
        return torch.cat([found, weights[None]])

    def _options(self, given: dict[str, float], default: float, names: Sequence[str], size: int) -> Tensor:
        if unknown := [name for name in given if name not in names]:
            raise RecipeError(f"{_WHERE}: there is no component {unknown[0]!r}. There are: {', '.join(names)}.")
        values = [given.get(name, default) for name in names] if names else [default] * size
        return torch.tensor(values, dtype=torch.float64, device=self.averages.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **more: Any) -> None:
        # as many components as were seen, which a new stage cannot know
        if prefix + "averages" in state_dict:
            self.averages = torch.empty_like(state_dict[prefix + "averages"], device=self.averages.device)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


tri_factor = TriFactor
