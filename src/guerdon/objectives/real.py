"""Rewards as labels (REAL): a classification loss on how far the policy has moved towards right and from wrong samples.

It takes the place of advantage, ratio and clip: the weight of a sample is bounded, and largest where there is most left
to learn.
Z. Zhai et al. 2026, Rewards as Labels: Revisiting RLVR from a Classification Perspective, arXiv 2602.05630.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from guerdon.errors import NumericsError, RecipeError, ScoreError, check_shapes, nearest
from guerdon.objectives.loss import Loss
from guerdon.objectives.reduce import masked_mean

Variant = Literal["real", "bce", "product"]


def real(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    rewards: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G T"],
    *,
    tau: float = 0.5,
    variant: Variant = "real",
    threshold: float | tuple[float, float] | None = None,
    quantile: float | None = None,
) -> Loss:
    """Raise the right samples of a group and lower the wrong ones, each against the policy that sampled them.

    With s the mean over a sample's live steps of logp - logp_old, a group that has samples of both kinds costs
    log(1 + sum over right ones of exp(-s / tau)) + log(1 + sum over wrong ones of exp(s / tau)). The 1 is an anchor at
    s = 0 for each side. The weight |dL/ds| of a sample is below 1 / tau, and so is that of all right (all wrong) ones
    of a group together. Rewards are read as they are: no advantage stage is needed.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_old: [P, G, T], under the policy that sampled the steps.
        rewards: [P, G], 1 = right, 0 = wrong, NaN = not scored; other values need `threshold` or `quantile`.
        mask: [P, G, T], True = a live step.
        tau: temperature, in nats per step, above 0. It is to be read against the size of s: far above it all samples of
            a kind weigh the same, near it weights saturate as samples move, which does the work of a clip.
        variant: `real`, as above. `bce`, the mean of log(1 + exp(-+s / tau)) over the samples of live groups.
            `product`, log(1 + sum over pairs of exp((s_wrong - s_right) / tau)), without anchors.
        threshold: label other rewards: right above it, wrong below it, left out at it. A pair (low, high): right from
            high on, wrong up to low, left out between.
        quantile: label other rewards within their group: right from its quantile 1 - quantile on, wrong up to its
            quantile, left out between (and at them, where the two are equal); in (0, 0.5].

    Returns:
        The loss. count is P for `real` and `product` (groups of one kind count, and cost nothing), the number of
        samples of live groups for `bce`. Metrics: `live_groups`, the share of groups with both kinds; `left_out`, the
        share of samples without a label; `score_gap`, mean s of right minus mean s of wrong samples of live groups;
        `score_max`, the largest |s|.

    Raises:
        ShapeError: an argument has another shape.
        ScoreError: a reward is neither 0 nor 1, without threshold or quantile.
        NumericsError: a log-probability of a live step is not finite.
        RecipeError: an option is unknown, out of its range, or both labellers are given.

    Gradient:
        To logp only: dL/dlogp of a live step is that of its sample's s over the number of its live steps. Exactly 0 for
        masked steps, samples left out and groups of one kind.

    Edge cases:
        A sample that was not scored, or has no live step, is left out; its group is live only if the others are of both
        kinds. Without a live group the total is 0 and has a graph. Masked steps may hold anything, NaN included.

    Example:
        >>> logp = torch.zeros(1, 2, 1, requires_grad=True)
        >>> loss = real(logp, logp.detach(), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, 1).bool())
        >>> loss.total.backward()
        >>> round(loss.total.item(), 4), logp.grad.flatten().tolist()
        (1.3863, [-1.0, 1.0])

    Source:
        Zhai et al. 2026, Rewards as Labels: Revisiting RLVR from a Classification Perspective, arXiv 2602.05630; `bce`
        and `product` as in the authors' code. `threshold`, `quantile` and leaving out unscored and empty samples are
        our reading.
    """
    where = "objectives.real"
    _check_options(where, tau, variant, threshold, quantile)
    check_shapes(
        where,
        mask=(mask, "P G T"),
        logp=(logp, "P G T"),
        logp_old=(logp_old, "P G T"),
        rewards=(rewards, "P G"),
    )
    right, wrong = _labels(where, rewards.detach(), threshold, quantile)
    present = mask.any(-1)
    right, wrong = right & present, wrong & present
    live = right.any(-1, keepdim=True) & wrong.any(-1, keepdim=True)
    used = (right | wrong) & live

    scores = relative_scores(logp, logp_old, mask)
    if not scores.isfinite().all():
        raise NumericsError(
            f"{where}: a log-probability of a live step is not finite. Lower the learning rate, or look at the "
            "precision of the policy."
        )
    logits = scores / tau
    if variant == "bce":
        cost = binary_cross_entropy_with_logits(logits, right.to(logits.dtype), reduction="none")
        total, count = cost.where(used, 0.0).sum(), used.sum()
    else:
        lower = _log_sum(-logits, right | ~live)
        upper = _log_sum(logits, wrong | ~live)
        cost = _anchored(lower) + _anchored(upper) if variant == "real" else _anchored(lower + upper)
        total, count = cost.where(live.squeeze(-1), 0.0).sum(), torch.tensor(len(rewards), device=logits.device)

    gap = masked_mean(scores, right & live) - masked_mean(scores, wrong & live)
    metrics = {
        "live_groups": live.to(scores.dtype).mean(),
        "left_out": (~(right | wrong)).to(scores.dtype).mean(),
        "score_gap": gap,
        "score_max": torch.cat([scores.new_zeros(1), scores.detach().abs().flatten()]).amax(),
    }
    return Loss(total, count.to(torch.promote_types(logits.dtype, torch.float32)), metrics)


def relative_scores(
    logp: Float[Tensor, "P G T"], logp_old: Float[Tensor, "P G T"], mask: Bool[Tensor, "P G T"]
) -> Float[Tensor, "P G"]:
    """Mean over a sample's live steps of logp - logp_old, in nats; 0 without a live step. Gradient to logp only."""
    gap = logp.where(mask, 0.0) - logp_old.detach().where(mask, 0.0)
    return gap.sum(-1) / mask.sum(-1).clamp(min=1)


def _log_sum(values: Tensor, chosen: Tensor) -> Tensor:
    """Log of the sum of exponentials over the chosen samples; at least one must be, for the gradient to be finite."""
    return values.where(chosen, -torch.inf).logsumexp(-1)


def _anchored(log_sum: Tensor) -> Tensor:
    """log(1 + exp(log_sum)), exact at any size."""
    return torch.logaddexp(log_sum, torch.zeros_like(log_sum))


def _labels(
    where: str, rewards: Tensor, threshold: float | tuple[float, float] | None, quantile: float | None
) -> tuple[Tensor, Tensor]:
    """Which samples are right and which are wrong; NaN is neither."""
    if quantile is not None:
        low = rewards.nanquantile(quantile, -1, keepdim=True)
        high = rewards.nanquantile(1 - quantile, -1, keepdim=True)
        # where the two meet, what lies at them is neither
        return (rewards >= high) & (rewards > low), (rewards <= low) & (rewards < high)
    if isinstance(threshold, (tuple, list)):
        return rewards >= threshold[1], rewards <= threshold[0]
    if threshold is not None:
        return rewards > threshold, rewards < threshold
    right, wrong = rewards == 1, rewards == 0
    bad = (~(right | wrong | rewards.isnan())).nonzero()
    if len(bad):
        p, g = bad[0].tolist()
        raise ScoreError(
            f"{where}: rewards must be 0 or 1, the labels wrong and right; got rewards[{p}, {g}] = "
            f"{rewards[p, g].item():g}. Use a reward that says right or wrong, or turn scores into labels with the "
            "option threshold (a number, or a pair low, high) or quantile (of each group); what is between is left out."
        )
    return right, wrong


def _check_options(
    where: str, tau: float, variant: str, threshold: float | tuple[float, float] | None, quantile: float | None
) -> None:
    if not tau > 0:
        raise RecipeError(f"{where}: tau must be above 0; got {tau}.")
    if variant not in ("real", "bce", "product"):
        raise RecipeError(
            f"{where}: variant must be real, bce or product; got {variant!r}."
            f"{nearest(variant, ('real', 'bce', 'product'))}"
        )
    if threshold is not None and quantile is not None:
        raise RecipeError(f"{where}: threshold and quantile are two ways to the same labels; give one of them.")
    if isinstance(threshold, (tuple, list)) and not threshold[0] < threshold[1]:
        raise RecipeError(f"{where}: threshold must be a number, or a pair low < high; got {threshold}.")
    if quantile is not None and not 0 < quantile <= 0.5:
        raise RecipeError(f"{where}: quantile must be above 0 and at most 0.5; got {quantile}.")
