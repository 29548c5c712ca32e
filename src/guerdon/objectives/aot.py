"""Alignment by optimal transport: all chosen samples together should stand above all rejected ones, quantile by quantile.

Distributional Preference Alignment of LLMs via Optimal Transport, arXiv 2406.05882.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import Sides, check_beta, check_smoothing, log_ratios, logistic, pair_loss, sequence_logp


def aot(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    paired: bool = True,
) -> Loss:
    """DPO on quantiles: the two sides are sorted over the batch before they are compared.

    `paired`: delta = sort(w - l) - sort(w_ref - l_ref), w and l the log-probabilities of chosen and rejected samples.
    Otherwise delta = sort(u_chosen) - sort(u_rejected), u = log policy - log reference. The cost is DPO's of delta.

    The sort is over what it is given. Micro-batches or processes would each sort their own part, which is another loss:
    leave `micro_batch` at null and train in one process.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        logp_ref_chosen: [B, T], under the reference.
        logp_ref_rejected: [B, S], under the reference.
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        beta: price of leaving the reference. Above 0.
        label_smoothing: eps, as in DPO.
        paired: compare margins with the reference's margins; False = chosen with rejected samples of the whole batch.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta u of the chosen and the rejected sample.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        RecipeError: beta is not above 0, or label_smoothing outside [0, 0.5].

    Gradient:
        To logp_chosen and logp_rejected at live steps; the reference is detached.

    Edge cases:
        With one pair it is DPO. A side without live steps has log-probability 0.

    Example:
        >>> import torch
        >>> zero, live = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2).bool()
        >>> round(aot(zero, zero, zero, zero, live, live).total.item(), 4)
        0.6931

    Source:
        Distributional Preference Alignment of LLMs via Optimal Transport, arXiv 2406.05882.
    """
    where = "objectives.aot"
    check_beta(where, beta)
    check_smoothing(where, label_smoothing, half=True)
    masks = (mask_chosen, mask_rejected)
    ratios = log_ratios(where, logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, *masks)
    if paired:
        sides = Sides(
            sequence_logp(where, logp_chosen, logp_rejected, *masks).gap,
            sequence_logp(where, logp_ref_chosen.detach(), logp_ref_rejected.detach(), *masks).gap,
        )
    else:
        sides = ratios
    delta = sides.chosen.sort().values - sides.rejected.sort().values
    return pair_loss(logistic(beta * delta, label_smoothing), ratios.scaled(beta))


aot.whole_batch = True  # pyright: ignore[reportFunctionMemberAccess] - the loop then refuses to cut a batch
