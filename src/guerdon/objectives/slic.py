"""Sequence likelihood calibration's hinge, on log-ratios: pairs whose margin is large enough no longer teach.

SLiC-HF, arXiv 2305.10425; on log-ratios to a reference as in Statistical Rejection Sampling (RSO), arXiv 2309.06657.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import check_beta, log_ratios, pair_loss


def slic(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    *,
    beta: float = 0.1,
) -> Loss:
    """Ask for a margin of 1 / beta and no more: a pair costs max(0, 1 - beta (u_chosen - u_rejected)).

    u is log policy - log reference of a sample.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        logp_ref_chosen: [B, T], under the reference.
        logp_ref_rejected: [B, S], under the reference.
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        beta: one over the margin asked for, in nats. Above 0.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta u of the chosen and the rejected sample.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        RecipeError: beta is not above 0.

    Gradient:
        To logp_chosen and logp_rejected at live steps; the reference is detached.

    Edge cases:
        A side without live steps has log-probability 0. At a margin of exactly 1 / beta the gradient is 0.

    Example:
        >>> import torch
        >>> zero, live = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2).bool()
        >>> slic(zero, zero, zero, zero, live, live).total.item()
        1.0

    Source:
        SLiC-HF, arXiv 2305.10425; Statistical Rejection Sampling Improves Preference Optimization, arXiv 2309.06657.
    """
    where = "objectives.slic"
    check_beta(where, beta)
    masks = (mask_chosen, mask_rejected)
    ratios = log_ratios(where, logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, *masks)
    return pair_loss((1 - beta * ratios.gap).relu(), ratios.scaled(beta))
