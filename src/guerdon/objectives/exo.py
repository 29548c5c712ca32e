"""Exact optimisation for pairs: the reverse divergence between the policy's belief about a pair and smoothed labels.

Towards Efficient Exact Optimization of Language Model Alignment, arXiv 2402.00856.
"""

from __future__ import annotations

import math

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import check_beta, check_smoothing, log_ratios, logistic, pair_loss


def exo(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Loss:
    """KL from the policy's q = sigmoid(beta (u_chosen - u_rejected)) to the label (1 - eps, eps), in that order.

    A pair costs q (log q - log(1 - eps)) + (1 - q) (log(1 - q) - log eps); DPO with label smoothing is the other order,
    up to a constant. u is log policy - log reference of a sample.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        logp_ref_chosen: [B, T], under the reference.
        logp_ref_rejected: [B, S], under the reference.
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        beta: price of leaving the reference. Above 0.
        label_smoothing: eps, the probability that a label is wrong; above 0, since log eps is needed.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta u of the chosen and the rejected sample.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        RecipeError: beta is not above 0, or label_smoothing outside (0, 0.5].

    Gradient:
        To logp_chosen and logp_rejected at live steps; the reference is detached.

    Edge cases:
        A side without live steps has log-probability 0.

    Example:
        >>> import torch
        >>> zero, live = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2).bool()
        >>> round(exo(zero, zero, zero, zero, live, live, label_smoothing=0.5).total.item(), 6)
        0.0

    Source:
        Towards Efficient Exact Optimization of Language Model Alignment, arXiv 2402.00856, pairs.
    """
    where = "objectives.exo"
    check_beta(where, beta)
    check_smoothing(where, label_smoothing, half=True, zero=False)
    masks = (mask_chosen, mask_rejected)
    ratios = log_ratios(where, logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, *masks)
    logits = beta * ratios.gap
    q = logits.sigmoid()
    right, wrong = math.log1p(-label_smoothing), math.log(label_smoothing)
    # log q and log(1 - q) are the logistic losses with their sign changed
    losses = q * (-logistic(logits) - right) + (1 - q) * (-logistic(-logits) - wrong)
    return pair_loss(losses, ratios.scaled(beta))
