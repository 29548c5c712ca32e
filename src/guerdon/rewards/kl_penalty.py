"""Staying near the reference as a reward component, of samples or of their steps, at a price that may be steered."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from guerdon.errors import RecipeError, check_shapes
from guerdon.objectives.kl import KlEstimator, kl_estimate, steered


class KlPenaltyOutput(NamedTuple):
    """Rewards [P, G], and those of each step, [P, G, T], where they are paid at every step."""

    scores: Float[Tensor, "P G"]
    step_scores: Float[Tensor, "P G T"] | None


class KlPenalty(nn.Module):
    """Minus the estimated divergence from the reference, summed over a sample's steps, times a coefficient.

    The divergence in the reward, as PPO and RLOO use it: r - beta * sum_t (logp_old - logp_ref) is this component with
    weight (or coefficient) beta. In the reward k1 has the right gradient, which it has not in the loss.

    With a `target` the coefficient is multiplied by 1 + rate * clip(KL / target - 1, -0.2, 0.2) after each step, KL being
    the mean estimate over live steps: it rises while the policy diverges more than wanted. It is saved with a run.

    Args:
        estimator: of the divergence per step, see `guerdon.objectives.kl.kl_estimate`.
        coefficient: multiplies the divergence; with a target, what the run starts with.
        steps: pay each step where it is taken, for advantages that read rewards of steps (`gae`, `gae_by_component`); false =
            the sum at the end.
        target: divergence per step, in nats; None = the coefficient stays.
        rate: how fast the coefficient follows; at most 0.2 * rate of it a step.

    Raises:
        RecipeError: coefficient is negative, or target, rate, or a coefficient that is steered is not above 0.

    Edge cases:
        Masked steps may hold anything, NaN included; a sample without live steps gets 0.

    Example:
        >>> logp_old, logp_ref = torch.tensor([[[-1.0, -1.0]]]), torch.tensor([[[-2.0, -1.5]]])
        >>> KlPenalty()(logp_old, logp_ref, torch.ones(1, 1, 2).bool()).scores
        tensor([[-1.5000]])

    Source:
        Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593, section 2.2; estimators
        by Schulman 2020, Approximating KL Divergence (note). The rate that does not depend on the batch is that of
        Confronting Reward Model Overoptimization with Constrained RLHF, 2023, arXiv 2310.04373; that its target is of a
        step is our reading.
    """

    def __init__(
        self,
        *,
        estimator: KlEstimator = "k1",
        coefficient: float = 1.0,
        steps: bool = False,
        target: float | None = None,
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        where = "rewards.kl_penalty"
        if not coefficient >= 0:
            raise RecipeError(f"{where}.coefficient: must be at least 0; got {coefficient}.")
        for name, value in (("target", target), ("rate", rate), ("coefficient", coefficient)):
            if target is not None and not (value or 0) > 0:
                raise RecipeError(f"{where}.{name}: must be above 0 where the coefficient is steered; got {value}.")
        self.estimator: KlEstimator = estimator
        self.steps, self.target, self.rate = steps, target, rate
        self.coefficient: Tensor
        self.divergence: Tensor
        moves = target is not None  # what does not is the recipe's alone, also when a run goes on
        self.register_buffer("coefficient", torch.tensor(coefficient, dtype=torch.float64), persistent=moves)
        self.register_buffer("divergence", torch.tensor(torch.nan, dtype=torch.float64), persistent=moves)

    def forward(
        self,
        logp_old: Float[Tensor, "P G T"],
        logp_ref: Float[Tensor, "P G T"],
        mask: Bool[Tensor, "P G T"],
    ) -> KlPenaltyOutput:
        """Rewards at the present coefficient; changes no state.

        Args:
            logp_old: [P, G, T], log-probability of each step under the policy that sampled it, in nats.
            logp_ref: [P, G, T], under the reference.
            mask: [P, G, T], True = a live step.

        Returns:
            `scores` [P, G] in nats, and `step_scores` [P, G, T] where steps are paid, without gradient.

        Raises:
            ShapeError: an argument is not [P, G, T].
            RecipeError: the estimator is unknown.
        """
        paid = -self.coefficient.item() * self._estimate(logp_old, logp_ref, mask)
        return KlPenaltyOutput(paid.sum(-1), paid if self.steps else None)

    @torch.no_grad()
    def observe(
        self,
        logp_old: Float[Tensor, "P G T"],
        logp_ref: Float[Tensor, "P G T"],
        mask: Bool[Tensor, "P G T"],
    ) -> None:
        """Move the coefficient by the divergence of a step's samples, if there is a target.

        Args:
            logp_old: [P, G, T], as in `forward`.
            logp_ref: [P, G, T].
            mask: [P, G, T]; with no live step nothing moves.
        """
        if self.target is None or not mask.any():
            return
        self.divergence.copy_(self._estimate(logp_old, logp_ref, mask).double().sum() / mask.sum())
        self.coefficient.copy_(steered(self.coefficient, self.divergence, self.target, self.rate))

    def metrics(self) -> dict[str, float]:
        """Where it is steered, the coefficient for the next step and the divergence per step in this one."""
        if self.target is None:
            return {}
        return {"coefficient": self.coefficient.item(), "divergence": self.divergence.item()}

    def _estimate(self, logp_old: Tensor, logp_ref: Tensor, mask: Tensor) -> Tensor:
        check_shapes(
            "rewards.kl_penalty", mask=(mask, "P G T"), logp_old=(logp_old, "P G T"), logp_ref=(logp_ref, "P G T")
        )
        found = kl_estimate(logp_old.detach().where(mask, 0.0), logp_ref.detach().where(mask, 0.0), self.estimator)
        return found.where(mask, 0.0)


kl_penalty = KlPenalty
