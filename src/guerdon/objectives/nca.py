"""Noise contrastive alignment for pairs: each side is told from the reference as well, so the chosen one cannot fall.

Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv 2402.05369.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import check_beta, log_ratios, logistic, pair_loss


def nca(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    *,
    beta: float = 0.1,
) -> Loss:
    """Raise the chosen log-ratio, and pay half a logistic loss for the size of either.

    With u = log policy - log reference of a sample a pair costs
    -log sigmoid(beta u_chosen) - log sigmoid(-beta u_chosen) / 2 - log sigmoid(-beta u_rejected) / 2.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        logp_ref_chosen: [B, T], under the reference.
        logp_ref_rejected: [B, S], under the reference.
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        beta: scale of the log-ratios. Above 0.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta u of the chosen and the rejected sample.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        RecipeError: beta is not above 0.

    Gradient:
        To logp_chosen and logp_rejected at live steps; the reference is detached.

    Edge cases:
        A side without live steps has log-probability 0.

    Example:
        >>> import torch
        >>> zero, live = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2).bool()
        >>> round(nca(zero, zero, zero, zero, live, live).total.item(), 4)
        1.3863

    Source:
        Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv 2402.05369, pairs.
    """
    where = "objectives.nca"
    check_beta(where, beta)
    masks = (mask_chosen, mask_rejected)
    ratios = log_ratios(where, logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, *masks)
    rewards = ratios.scaled(beta)
    losses = logistic(rewards.chosen) + 0.5 * logistic(-rewards.chosen) + 0.5 * logistic(-rewards.rejected)
    return pair_loss(losses, rewards)
