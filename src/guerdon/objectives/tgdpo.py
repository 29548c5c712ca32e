"""TGDPO: DPO whose tokens are weighted by the rewards that an already trained model gives them.

TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization, 2025, arXiv 2506.14574.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import RecipeError
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import (
    Sides,
    check_beta,
    check_not_negative,
    likelihood_cost,
    logistic,
    pair_loss,
    sequence_logp,
)


def tgdpo(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    logp_guide_chosen: Float[Tensor, "B T"],
    logp_guide_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    mean_length_chosen: Float[Tensor, ""] | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    min_weight: float | None = None,
    plain_end: bool = False,
    sft_weight: float = 0.0,
) -> Loss:
    """DPO that learns more from the tokens which a guide prefers in a chosen sample, and dislikes in a rejected one.

    With u = logp - logp_ref of a token and its reward r = beta (logp_guide - logp_ref), a token weighs w = 1 + alpha r in
    a chosen sample and 1 - alpha r in a rejected one, and a pair costs
    -log sigmoid(beta sum w u over the chosen - beta sum w u over the rejected). The guide is a model trained from the
    same reference, by DPO or SimPO on the same pairs, say.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        logp_ref_chosen: [B, T], under the reference.
        logp_ref_rejected: [B, S], under the reference.
        logp_guide_chosen: [B, T], under the guide.
        logp_guide_rejected: [B, S], under the guide.
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        mean_length_chosen: live steps of a chosen sample, the mean over the whole batch, where these pairs are a part
            of it; only `sft_weight` reads it. None = these pairs are the batch.
        beta: price of leaving the reference, and the scale of the guide's rewards; above 0.
        alpha: how much the guide's rewards count; 0 or more, 0 = DPO. It changes the speed more than the end.
        min_weight: smallest weight of a token. None = as it comes: a negative weight turns the token's direction round.
        plain_end: give the last live step of every sample, its end, the weight 1. Weights of that token differ between
            the sides, and may unlearn the ending of samples. A sample that was cut off has its last token treated so.
        sft_weight: of the mean cross-entropy of a chosen token, which is added.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta sum u of either sample, without weights. Metrics:
        `negative_weight_fraction`, the share of live tokens with a weight below 0 before `min_weight`; with `sft_weight`
        `nll` and `preference_loss`.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        RecipeError: beta is not above 0; alpha or sft_weight is negative.

    Gradient:
        -beta sigmoid(-m) w on each live step of the chosen sample, beta sigmoid(-m) w on each of the rejected one, m the
        argument of the sigmoid. The reference and the guide are detached.

    Edge cases:
        A side without live steps adds 0, with a warning. Masked steps may hold anything, NaN included. Where guide and
        reference agree the loss is DPO's. There is no normalisation by length.

    Example:
        >>> zero, live = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2).bool()
        >>> guide = torch.tensor([[1.0, -1.0]])
        >>> loss = tgdpo(zero, zero.detach(), zero, zero, guide, zero, live, live, alpha=2.0)
        >>> loss.total.backward()
        >>> [round(x, 4) for x in zero.grad[0].tolist()]
        [-0.06, -0.04]

    Source:
        TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization, arXiv 2506.14574;
        min_weight and plain_end are ours.
    """
    where = "objectives.tgdpo"
    check_beta(where, beta)
    check_not_negative(where, alpha=alpha, sft_weight=sft_weight)
    masks = (mask_chosen, mask_rejected)
    sequence_logp(f"{where} (guide)", logp_guide_chosen, logp_guide_rejected, *masks)
    loss = token_guided(
        logp_chosen,
        logp_rejected,
        logp_ref_chosen,
        logp_ref_rejected,
        beta * (logp_guide_chosen - logp_ref_chosen),
        beta * (logp_guide_rejected - logp_ref_rejected),
        *masks,
        beta=beta,
        weigh_chosen=partial(_linear, alpha),
        weigh_rejected=partial(_linear, -alpha),
        min_weight=min_weight,
        plain_end=plain_end,
        where=where,
    )
    if not sft_weight:
        return loss
    count = loss.count.clamp(min=1)
    nll = likelihood_cost(logp_chosen, mask_chosen, mean_length_chosen)
    more = {"nll": nll.detach() / count, "preference_loss": loss.total.detach() / count}
    return loss._replace(total=loss.total + sft_weight * nll, metrics=loss.metrics | more)


def token_guided(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    token_rewards_chosen: Float[Tensor, "B T"],
    token_rewards_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    *,
    weigh_chosen: Callable[[Tensor], Tensor],
    weigh_rejected: Callable[[Tensor], Tensor],
    beta: float = 0.1,
    min_weight: float | None = None,
    plain_end: bool = False,
    where: str = "objectives.token_guided",
) -> Loss:
    """The general form: token rewards of any origin, and any functions from a token's reward to its weight.

    Args:
        logp_chosen: [B, T]; the log-probabilities and masks are those of `tgdpo`.
        logp_rejected: [B, S].
        logp_ref_chosen: [B, T].
        logp_ref_rejected: [B, S].
        token_rewards_chosen: [B, T], of a process reward model, say.
        token_rewards_rejected: [B, S].
        mask_chosen: [B, T].
        mask_rejected: [B, S].
        weigh_chosen: from rewards to weights, elementwise; a constant c on both sides is DPO with c beta.
        weigh_rejected: the same for rejected samples.
        beta: price of leaving the reference; above 0.
        min_weight: smallest weight of a token; None = as it comes.
        plain_end: give the last live step of every sample the weight 1.
        where: what errors are said to come from.

    Returns:
        As `tgdpo` does.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability or a reward of a live step is not finite.
        RecipeError: beta is not above 0.

    Source:
        The general form is ours; see `tgdpo`.
    """
    check_beta(where, beta)
    if min_weight is not None and not min_weight >= 0:
        raise RecipeError(f"{where}: min_weight must be 0 or more, or null; got {min_weight}.")
    masks = (mask_chosen, mask_rejected)
    # for their checks: the sums below are weighted
    sequence_logp(where, logp_chosen, logp_rejected, *masks)
    sequence_logp(f"{where} (reference)", logp_ref_chosen, logp_ref_rejected, *masks)
    sequence_logp(f"{where} (token rewards)", token_rewards_chosen, token_rewards_rejected, *masks)
    if any(not mask.any(-1).all() for mask in masks):
        warnings.warn(f"{where}: a side of a pair has no live step, and adds 0.", UserWarning, stacklevel=3)
    sides = (
        (logp_chosen, logp_ref_chosen, token_rewards_chosen, mask_chosen, weigh_chosen),
        (logp_rejected, logp_ref_rejected, token_rewards_rejected, mask_rejected, weigh_rejected),
    )
    plain, weighted, negative = [], [], []
    for logp, logp_ref, rewards, mask, weigh in sides:
        ratio = (logp - logp_ref.detach()).where(mask, 0.0)
        weights = weigh(rewards.detach().where(mask, 0.0))
        negative.append(((weights < 0) & mask).sum())
        if min_weight is not None:
            weights = weights.clamp(min=min_weight)
        if plain_end:
            weights = weights.where(~_last(mask), 1.0)
        plain.append(ratio.sum(-1))
        weighted.append((weights * ratio).sum(-1))
    loss = pair_loss(logistic(beta * Sides(*weighted).gap), Sides(*plain).scaled(beta))
    live = (mask_chosen.sum() + mask_rejected.sum()).clamp(min=1)
    share = torch.stack(negative).sum().to(loss.count.dtype) / live
    return loss._replace(metrics={"negative_weight_fraction": share})


def _linear(slope: float, rewards: Tensor) -> Tensor:
    return 1 + slope * rewards


def _last(mask: Tensor) -> Tensor:
    """Where the last live step of each row is."""
    live = mask.long()
    return mask & (live.cumsum(-1) == live.sum(-1, keepdim=True))
