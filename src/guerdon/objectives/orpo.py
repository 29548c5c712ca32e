"""Odds ratio preference optimisation: supervised fine-tuning on chosen samples with a penalty for likely rejected ones.

ORPO: Monolithic Preference Optimization without Reference Model, arXiv 2403.07691.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import NumericsError
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import Sides, check_beta, likelihood_cost, logistic, pair_loss, sequence_logp

_CERTAIN = -1e-12  # a mean log-probability above this is taken to be this


def orpo(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    mean_length_chosen: Float[Tensor, ""] | None = None,
    *,
    beta: float = 0.1,
) -> Loss:
    """Learn the chosen samples, and raise their odds over those of the rejected ones.

    With a the mean over live steps of logp, log odds(a) = a - log(1 - exp(a)) and R = log odds(a_chosen) -
    log odds(a_rejected), a batch costs the mean cross-entropy of a chosen token minus beta times the mean over pairs of
    log sigmoid(R). No reference, and no supervised run before it.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        mean_length_chosen: live steps of a chosen sample, the mean over the whole batch, where these pairs are a part
            of it. None = these pairs are the batch.
        beta: weight of the odds term. Above 0.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta a of the chosen and the rejected sample. Metrics:
        `nll`, `preference_loss` (the odds term without beta) and `log_odds_ratio`, the mean R.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite, or a mean is above 0.
        DataError: a sample has no live step.
        RecipeError: beta is not above 0.

    Gradient:
        To logp_chosen and logp_rejected at live steps.

    Edge cases:
        A sample of probability 1 has a = 0 and infinite odds: a is held at -1e-12 there, without gradient.

    Example:
        >>> logp = torch.full((1, 2), -1.0, requires_grad=True)
        >>> round(orpo(logp, logp, torch.ones(1, 2).bool(), torch.ones(1, 2).bool()).total.item(), 4)
        1.0693

    Source:
        ORPO: Monolithic Preference Optimization without Reference Model, arXiv 2403.07691. The cross-entropy is over the
        response, as in the paper; some code takes prompt and response.
    """
    where = "objectives.orpo"
    check_beta(where, beta)
    given = (logp_chosen, logp_rejected, mask_chosen, mask_rejected)
    scores = sequence_logp(where, *given, average=True)
    odds = Sides(*(_log_odds(where, side, a) for side, a in zip(Sides._fields, scores, strict=True)))
    nll = likelihood_cost(logp_chosen, mask_chosen, mean_length_chosen)
    penalty = logistic(odds.gap)
    found = pair_loss(beta * penalty, scores.scaled(beta), nll, 1.0)
    metrics = {
        **found.metrics,
        "preference_loss": penalty.detach().mean(),
        "log_odds_ratio": odds.gap.detach().mean(),
    }
    return found._replace(metrics=metrics)


def _log_odds(where: str, side: str, a: Tensor) -> Tensor:
    if (a > 0).any():
        row = int((a > 0).nonzero()[0])
        raise NumericsError(
            f"{where}: the mean of logp_{side}[{row}] is {a[row].item():g}, above 0: that is no log-probability."
        )
    a = a.clamp(max=_CERTAIN)
    # log(1 - exp(a)), each form where it keeps its digits
    near = torch.log(-torch.expm1(a.clamp(min=-math.log(2))))
    far = torch.log1p(-torch.exp(a.clamp(max=-math.log(2))))
    return a - torch.where(a > -math.log(2), near, far)
