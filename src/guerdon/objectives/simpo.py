"""SimPO: a preference loss on the mean log-probability of a sample, with a margin to be kept and without a reference.

The reward is then the quantity that ranks generations, and a longer sample is not worth more for its length.
SimPO: Simple Preference Optimization with a Reference-Free Reward, 2024, arXiv 2405.14734.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import RecipeError, nearest
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import (
    Sides,
    check_beta,
    check_not_negative,
    check_smoothing,
    likelihood_cost,
    logistic,
    pair_loss,
    sequence_logp,
)


def simpo(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    mean_length_chosen: Float[Tensor, ""] | None = None,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
    label_smoothing: float = 0.0,
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid",
    sft_weight: float = 0.0,
    alpha: float = 0.0,
    length_normalised: bool = True,
) -> Loss:
    """Raise the mean log-probability of the chosen sample over that of the rejected one by a margin.

    With a the mean over live steps of logp and z = a_chosen - a_rejected - gamma / beta, a pair costs
    -log sigmoid(beta z). beta a is the implicit reward.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        mask_chosen: [B, T], True = a live step, the end of the sample included.
        mask_rejected: [B, S].
        mean_length_chosen: live steps of a chosen sample, the mean over the whole batch, where these pairs are a part
            of it; only `sft_weight` reads it. None = these pairs are the batch.
        beta: scale of the reward; above 0. Since it multiplies a mean, it is ten to a hundred times DPO's.
        gamma_beta_ratio: gamma / beta, the margin in nats per step.
        label_smoothing: eps: -(1 - eps) log sigmoid(beta z) - eps log sigmoid(-beta z). Not read by the hinge.
        loss_type: `sigmoid`, or `hinge`: max(0, 1 - beta z).
        sft_weight: of the mean cross-entropy of a chosen token, which is added (CPO-SimPO with 1).
        alpha: AlphaPO: a becomes (1 - exp(-alpha a)) / alpha; 0 = SimPO.
        length_normalised: False takes sums in place of means, for comparison: it favours short or long samples.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta a of the chosen and the rejected sample; the margin
        is not subtracted. With `sft_weight` the metrics `nll` and `preference_loss`.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        DataError: a sample has no live step.
        RecipeError: beta is not above 0; label_smoothing is outside [0, 0.5]; gamma_beta_ratio is not finite;
            sft_weight is negative; loss_type is unknown.

    Gradient:
        -beta sigmoid(-beta z) / |chosen| on each live step of the chosen sample, beta sigmoid(-beta z) / |rejected| on
        each of the rejected one (sigmoid, eps = 0).

    Edge cases:
        A negative margin is allowed, with a warning. Masked steps may hold anything, NaN included.

    Example:
        >>> logp = torch.full((1, 2), -1.0, requires_grad=True)
        >>> round(simpo(logp, logp, torch.ones(1, 2).bool(), torch.ones(1, 2).bool()).total.item(), 4)
        0.9741

    Source:
        SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv 2405.14734; hinge, label smoothing,
        the supervised term and alpha are of its code and of common code.
    """
    where = "objectives.simpo"
    _check_options(where, beta, gamma_beta_ratio, label_smoothing, loss_type)
    check_not_negative(where, sft_weight=sft_weight)
    given = (logp_chosen, logp_rejected, mask_chosen, mask_rejected)
    scores = sequence_logp(where, *given, average=length_normalised)
    if alpha:
        scores = Sides(*(-torch.expm1(-alpha * a) / alpha for a in scores))
    logits = beta * (scores.gap - gamma_beta_ratio)
    losses = (1 - logits).relu() if loss_type == "hinge" else logistic(logits, label_smoothing)
    nll = likelihood_cost(logp_chosen, mask_chosen, mean_length_chosen) if sft_weight else None
    return pair_loss(losses, scores.scaled(beta), nll, sft_weight)


def _check_options(where: str, beta: float, ratio: float, label_smoothing: float, loss_type: str) -> None:
    check_beta(where, beta)
    check_smoothing(where, label_smoothing, half=True)
    if not math.isfinite(ratio):
        raise RecipeError(f"{where}: gamma_beta_ratio must be finite; got {ratio}.")
    if ratio < 0:
        warnings.warn(
            f"{where}: gamma_beta_ratio = {ratio} asks that the rejected sample be ahead.", UserWarning, stacklevel=3
        )
    if loss_type not in ("sigmoid", "hinge"):
        raise RecipeError(
            f"{where}: loss_type must be sigmoid or hinge; got {loss_type!r}.{nearest(loss_type, ('sigmoid', 'hinge'))}"
        )
