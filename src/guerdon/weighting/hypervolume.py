"""Fixed weights, and a factor that grows where the policy finds new trade-offs between the rewards.

After every validation the volume that the policy adds to the Pareto front so far decides how strongly the next steps are
learnt from. Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting, 2025, arXiv 2509.11452.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guerdon.errors import RecipeError, check_shapes, nearest
from guerdon.metrics.hypervolume import hypervolume as volume
from guerdon.metrics.hypervolume import hypervolume_contribution, pareto_mask
from guerdon.weighting.simplex import Weights, shares
from guerdon.weighting.weighted import weighted_sum


class ScaledOutput(NamedTuple):
    """Rewards [P, G], weights [K], and the factor [P] by which the signal multiplies advantages."""

    rewards: Float[Tensor, "P G"]
    weights: Float[Tensor, " K"]
    advantage_scale: Float[Tensor, " P"]


def meta_reward(contribution: float) -> float:
    """The factor for an added volume: 0.5 + 1.5 tanh(volume), 0.5 for none and below 2 for any.

    Example:
        >>> meta_reward(0.0), round(meta_reward(0.5), 4)
        (0.5, 1.1932)
    """
    return 0.5 + 1.5 * math.tanh(contribution)


class Hypervolume(nn.Module):
    """The weighted sum of the scores, learnt from more where the policy has just extended its Pareto front.

    The first validation vector (mean scores on held-out prompts) is the reference. Each later one, v, has the
    contribution dHV = HV(front + v) - HV(front) and gives the factor 0.5 + 1.5 tanh(dHV) for the steps until the next; it
    joins the front if dHV > 0. Before the second the factor is 1.

    Args:
        weights: component name -> share, or K shares in order, adding up to 1; None = equal.
        maximise: component name -> False where less of it is better; those not named are maximised.
        apply_to: `advantage` multiplies advantages after they were normalised. `reward` multiplies rewards, as the paper
            has it; an advantage that divides by a std (GRPO) takes that factor out again, and Adam nearly so.
        normalise: divide each objective's gain over the reference by |reference| (1 where that is 0) or by its range.
            Without it the volume of raw token counts is in the hundreds, and the factor always at an end.
        ranges: component name -> unit to divide by, in place of |reference|.

    Raises:
        RecipeError: apply_to is neither, or a range is not above 0.

    Edge cases:
        A score that is NaN adds nothing to its sample. Points not better than the reference in every objective have no
        volume. The state is reference, front and factor. An objective without advantages needs `apply_to: reward`.

    Example:
        >>> stage = Hypervolume(weights=[0.5, 0.5])
        >>> stage.validate(torch.tensor([0.5, 0.5]))
        >>> stage.validate(torch.tensor([1.0, 1.0]))
        >>> round(stage.scale, 4)
        1.6424

    Source:
        Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting, 2025, arXiv 2509.11452, and the
        authors' code. `apply_to: advantage` and normalising are our reading.
    """

    reference: Tensor
    units: Tensor
    front: Tensor
    factor: Tensor

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        maximise: Mapping[str, bool] | None = None,
        apply_to: Literal["advantage", "reward"] = "advantage",
        normalise: bool = True,
        ranges: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if apply_to not in ("advantage", "reward"):
            raise RecipeError(f"weighting.hypervolume: apply_to must be advantage or reward; got {apply_to!r}.")
        for name, unit in (ranges or {}).items():
            if not unit > 0:
                raise RecipeError(f"weighting.hypervolume: the range of {name} must be above 0; got {unit}.")
        self.given: Weights = weights
        self.maximise, self.ranges = dict(maximise or {}), dict(ranges or {})
        self.apply_to, self.normalise = apply_to, normalise
        self.register_buffer("reference", torch.zeros(0, dtype=torch.float64))
        # what gains are multiplied by: the sign over the unit
        self.register_buffer("units", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("front", torch.zeros(0, 0, dtype=torch.float64))
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))

    @property
    def scale(self) -> float:
        """The factor for the next step."""
        return float(self.factor)

    def forward(self, scores: Float[Tensor, "P G K"], score_names: Sequence[str] = ()) -> ScaledOutput:
        """Weigh the scores; changes no state.

        Args:
            scores: [P, G, K], NaN = not scored.
            score_names: the K component names; needed when weights go by name.

        Returns:
            `rewards` [P, G], `weights` [K] as applied to them, `advantage_scale` [P].
        """
        size = check_shapes("weighting.hypervolume", scores=(scores, "P G K"))["K"]
        weights = shares("weighting.hypervolume", self.given, score_names, size).to(scores)
        scale = scores.new_full((len(scores),), self.scale)
        if self.apply_to == "reward":
            weights, scale = weights * self.scale, torch.ones_like(scale)
        return ScaledOutput(weighted_sum(scores, weights), weights, scale)

    @torch.no_grad()
    def validate(self, validation: Float[Tensor, " K"], score_names: Sequence[str] = ()) -> None:
        """Take the mean scores of the policy as it is now; the first time they become the reference.

        Args:
            validation: [K], raw mean scores on held-out prompts.
            score_names: the K component names; needed when maximise or ranges name any.
        """
        point = validation.detach().double().to(self.reference.device)
        if not len(self.reference):
            self.reference, self.front = point, point.new_zeros(0, len(point))
            self.units = self._units(point, score_names)
            return
        gained, front = self._gains(point[None])[0], self._gains(self.front)
        contribution = hypervolume_contribution(front, gained, torch.zeros_like(point))
        self.factor.fill_(meta_reward(contribution))
        if contribution > 0:
            self.front = torch.cat([self.front, point[None]])

    def metrics(self) -> dict[str, float]:
        """`scale`, `hypervolume` and `front` (points on it)."""
        return {"scale": self.scale, "hypervolume": self.hypervolume(), "front": float(len(self.pareto_front()))}

    def hypervolume(self) -> float:
        """Volume between the reference and the points so far, in units of gains."""
        return volume(self._gains(self.front), torch.zeros_like(self.reference)) if len(self.front) else 0.0

    def pareto_front(self) -> Float[Tensor, "N K"]:
        """The points that no other one beats, in the order in which they came, as they were validated."""
        return self.front[torch.tensor(pareto_mask(self._gains(self.front)), dtype=torch.bool)]

    def _gains(self, points: Tensor) -> Tensor:
        """How much better than the reference, per objective: [N, K]."""
        return (points - self.reference) * self.units

    def _units(self, reference: Tensor, score_names: Sequence[str]) -> Tensor:
        names = list(score_names) or [str(k) for k in range(len(reference))]
        unknown = [name for name in (*self.maximise, *self.ranges) if name not in names]
        if unknown:
            raise RecipeError(
                f"weighting.hypervolume: there is no component {unknown[0]!r}.{nearest(unknown[0], names)} "
                f"There are: {', '.join(names)}."
            )
        signs = reference.new_tensor([1.0 if self.maximise.get(name, True) else -1.0 for name in names])
        if not self.normalise:
            return signs
        usual = torch.where(reference == 0, 1.0, reference.abs()).tolist()
        return signs / reference.new_tensor([self.ranges.get(n, unit) for n, unit in zip(names, usual, strict=True)])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **more: Any) -> None:
        # as many objectives and points as there were, which a new stage cannot know
        for name in ("reference", "units", "front"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.factor.device))
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


hypervolume = Hypervolume
