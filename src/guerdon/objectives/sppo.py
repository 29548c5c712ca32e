"""Self-play preference optimisation's hard form: each log-ratio is regressed on a target of its own.

Self-Play Preference Optimization for Language Model Alignment, arXiv 2405.00675.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import check_beta, log_ratios, pair_loss


def sppo(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    *,
    beta: float = 0.1,
) -> Loss:
    """Hold the chosen log-ratio at 1 / (2 beta) and the rejected one at -1 / (2 beta).

    With u = log policy - log reference of a sample a pair costs (u_chosen - 1 / (2 beta))^2 + (u_rejected + 1 / (2 beta))^2.
    Unlike losses of the margin alone, it does not let both sides fall together.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        logp_ref_chosen: [B, T], under the reference.
        logp_ref_rejected: [B, S], under the reference.
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        beta: the targets are plus and minus 1 / (2 beta), in nats. Above 0.

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
        >>> sppo(zero, zero, zero, zero, live, live, beta=0.5).total.item()
        2.0

    Source:
        Self-Play Preference Optimization for Language Model Alignment, arXiv 2405.00675; the hard form for given pairs
        is that of common code.
    """
    where = "objectives.sppo"
    check_beta(where, beta)
    masks = (mask_chosen, mask_rejected)
    ratios = log_ratios(where, logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, *masks)
    target = 1 / (2 * beta)
    losses = (ratios.chosen - target).square() + (ratios.rejected + target).square()
    return pair_loss(losses, ratios.scaled(beta))
