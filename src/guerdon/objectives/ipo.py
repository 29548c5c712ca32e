"""Identity preference optimisation: the log-ratio's margin is regressed on a finite target, so it cannot run away.

M. G. Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv 2310.12036.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import check_beta, log_ratios, pair_loss


def ipo(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    *,
    beta: float = 0.1,
    average_log_prob: bool = True,
) -> Loss:
    """Hold the margin D = u_chosen - u_rejected at 1 / (2 beta): a pair costs (D - 1 / (2 beta))^2.

    u is log policy - log reference of a sample. Where labels are certain, DPO's margin grows without end; this one has
    a minimum.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        logp_ref_chosen: [B, T], under the reference.
        logp_ref_rejected: [B, S], under the reference.
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        beta: the paper's tau: the margin aimed at is 1 / (2 beta), in nats (per step with `average_log_prob`). Above 0.
        average_log_prob: u is the mean over live steps, as in the code that the authors confirmed; False = the sum, as
            the paper writes it.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta u of the chosen and the rejected sample.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        DataError: with `average_log_prob`, a sample has no live step.
        RecipeError: beta is not above 0.

    Gradient:
        To logp_chosen and logp_rejected at live steps; the reference is detached.

    Edge cases:
        With `average_log_prob=False` a side without live steps has log-probability 0.

    Example:
        >>> import torch
        >>> zero, live = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2).bool()
        >>> round(ipo(zero, zero, zero, zero, live, live, beta=0.5).total.item(), 4)
        1.0

    Source:
        A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv 2310.12036.
    """
    where = "objectives.ipo"
    check_beta(where, beta)
    given = (logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, mask_chosen, mask_rejected)
    ratios = log_ratios(where, *given, average=average_log_prob)
    return pair_loss((ratios.gap - 1 / (2 * beta)).square(), ratios.scaled(beta))
