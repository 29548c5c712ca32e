"""Contrastive preference optimisation: a preference loss without reference, held by the likelihood of chosen samples.

Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation, arXiv 2401.08417.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import RecipeError, nearest
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import (
    check_beta,
    check_not_negative,
    check_smoothing,
    likelihood_cost,
    logistic,
    pair_loss,
    sequence_logp,
)


def cpo(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    mean_length_chosen: Float[Tensor, ""] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    nll_weight: float = 1.0,
) -> Loss:
    """Raise the log-probability of the chosen sample over that of the rejected one, and keep it likely.

    With w and l the summed log-probabilities a batch costs the mean over pairs of -log sigmoid(beta (w - l)), plus
    `nll_weight` times the mean cross-entropy of a token of the chosen samples. It is DPO with a uniform reference; the
    second term does the work of one. For the form on means with a margin see `simpo` and its `sft_weight`.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        mean_length_chosen: live steps of a chosen sample, the mean over the whole batch, where these pairs are a part
            of it. None = these pairs are the batch.
        beta: scale of the log-probabilities. Above 0.
        label_smoothing: eps, as in DPO; read by `sigmoid` only.
        loss_type: `sigmoid`; `hinge`, max(0, 1 - beta (w - l)); `ipo`, (a_chosen - a_rejected - 1 / (2 beta))^2 with a
            the mean over live steps.
        nll_weight: of the cross-entropy; the authors' alpha.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta w and beta l. Metrics: `nll`, the mean cross-entropy of
        a chosen token, and `preference_loss`, the rest.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        DataError: with `ipo`, a sample has no live step.
        RecipeError: an option is out of range or unknown.

    Gradient:
        To logp_chosen and logp_rejected at live steps.

    Edge cases:
        A side without live steps has log-probability 0. A batch without any chosen step has cross-entropy 0.

    Example:
        >>> import torch
        >>> logp = torch.full((1, 2), -1.0, requires_grad=True)
        >>> round(cpo(logp, logp, torch.ones(1, 2).bool(), torch.ones(1, 2).bool()).total.item(), 4)
        1.6931

    Source:
        Contrastive Preference Optimization, arXiv 2401.08417.
    """
    where = "objectives.cpo"
    check_beta(where, beta)
    check_smoothing(where, label_smoothing, half=True)
    check_not_negative(where, nll_weight=nll_weight)
    known = ("sigmoid", "hinge", "ipo")
    if loss_type not in known:
        raise RecipeError(
            f"{where}: loss_type must be one of {', '.join(known)}; got {loss_type!r}.{nearest(loss_type, known)}"
        )
    given = (logp_chosen, logp_rejected, mask_chosen, mask_rejected)
    scores = sequence_logp(where, *given, average=loss_type == "ipo")
    if loss_type == "ipo":
        losses = (scores.gap - 1 / (2 * beta)).square()
    elif loss_type == "hinge":
        losses = (1 - beta * scores.gap).relu()
    else:
        losses = logistic(beta * scores.gap, label_smoothing)
    nll = likelihood_cost(logp_chosen, mask_chosen, mean_length_chosen)
    return pair_loss(losses, scores.scaled(beta), nll, nll_weight)
