"""What preference losses share: a sequence's log-probability, the checks, the smoothed logistic loss, the sum over pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import DataError, NumericsError, RecipeError, check_shapes
from guerdon.objectives.loss import Loss


class Sides(NamedTuple):
    """One number a pair for each side, [B]."""

    chosen: Tensor
    rejected: Tensor

    @property
    def gap(self) -> Tensor:
        """Chosen minus rejected, [B]."""
        return self.chosen - self.rejected

    def scaled(self, factor: float) -> Sides:
        """Both sides times `factor`."""
        return Sides(factor * self.chosen, factor * self.rejected)


def sequence_logp(
    where: str,
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    *,
    average: bool = False,
) -> Sides:
    """Sum over a sequence's live steps of its log-probabilities, in nats; or their mean.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        DataError: a mean is asked for of a sequence without a live step.
    """
    check_shapes(
        where,
        mask_chosen=(mask_chosen, "B T"),
        logp_chosen=(logp_chosen, "B T"),
        mask_rejected=(mask_rejected, "B S"),
        logp_rejected=(logp_rejected, "B S"),
    )
    given = (("chosen", logp_chosen, mask_chosen), ("rejected", logp_rejected, mask_rejected))
    return Sides(*(_reduced(where, side, logp, mask, average) for side, logp, mask in given))


def log_ratios(
    where: str,
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    *,
    average: bool = False,
) -> Sides:
    """Log-probability of each sequence less that of the reference, in nats (per step with `average`); see above."""
    masks = (mask_chosen, mask_rejected)
    policy = sequence_logp(where, logp_chosen, logp_rejected, *masks, average=average)
    reference = sequence_logp(
        f"{where} (reference)", logp_ref_chosen.detach(), logp_ref_rejected.detach(), *masks, average=average
    )
    return Sides(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def _reduced(where: str, side: str, logp: Tensor, mask: Tensor, average: bool) -> Tensor:
    live = logp.where(mask, 0.0)
    if not live.isfinite().all():
        row = (~live.isfinite()).any(-1).nonzero()[0].item()
        raise NumericsError(
            f"{where}: a log-probability of a live step of logp_{side}[{row}] is not finite. Lower the learning rate, "
            "or look at the precision of the policy."
        )
    total = live.sum(-1)
    if not average:
        return total
    lengths = mask.sum(-1)
    if (lengths == 0).any():
        row = (lengths == 0).nonzero()[0].item()
        raise DataError(
            f"{where}: mask_{side}[{row}] has no live step, so there is no mean log-probability. Leave out pairs with "
            "an empty side."
        )
    return total / lengths


def logistic(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) log sigmoid(logits) - eps log sigmoid(-logits), elementwise."""
    if not label_smoothing:
        return F.softplus(-logits)
    return (1 - label_smoothing) * F.softplus(-logits) + label_smoothing * F.softplus(logits)


def likelihood_cost(logp: Tensor, mask: Tensor, mean_length: Tensor | None) -> Tensor:
    """Minus the log-probability of chosen sequences, scaled so that its sum over B pairs is B times the mean per token.

    Args:
        logp: [B, T].
        mask: [B, T].
        mean_length: live steps of a chosen sequence, the mean over the whole batch; None = these are all of it.

    Returns:
        The sum, a scalar.
    """
    found = mask.sum(-1).to(logp.dtype).mean() if mean_length is None else mean_length.to(logp.dtype)
    return -logp.where(mask, 0.0).sum() / found.clamp(min=torch.finfo(logp.dtype).tiny)


def pair_loss(losses: Tensor, implicit: Sides, nll: Tensor | None = None, nll_weight: float = 0.0) -> Loss:
    """A loss over B pairs out of one number a pair, the pair's implicit rewards, and the term of the likelihood."""
    count = torch.tensor(len(losses), dtype=torch.promote_types(losses.dtype, torch.float32), device=losses.device)
    rewards = torch.stack(implicit, -1).detach()
    if nll is None:
        return Loss(losses.sum(), count, {}, rewards)
    metrics = {"nll": nll.detach() / count.clamp(min=1), "preference_loss": losses.detach().sum() / count.clamp(min=1)}
    return Loss(losses.sum() + nll_weight * nll, count, metrics, rewards)


def check_beta(where: str, beta: float) -> None:
    """Raise RecipeError unless beta is above 0."""
    if not beta > 0:
        raise RecipeError(f"{where}: beta must be above 0; got {beta}.")


def check_smoothing(where: str, label_smoothing: float, *, half: bool, zero: bool = True) -> None:
    """Raise RecipeError unless label_smoothing is in [0, 0.5], without the end points where `half`, `zero` say so."""
    low = label_smoothing >= 0 if zero else label_smoothing > 0
    high = label_smoothing <= 0.5 if half else label_smoothing < 0.5
    if not (low and high):
        interval = f"{'[' if zero else '('}0, 0.5{']' if half else ')'}"
        raise RecipeError(f"{where}: label_smoothing must be in {interval}; got {label_smoothing}.")


def check_not_negative(where: str, **options: float) -> None:
    """Raise RecipeError if one of the options is below 0."""
    for name, value in options.items():
        if not value >= 0:
            raise RecipeError(f"{where}: {name} must be 0 or more; got {value}.")
