"""Proximal policy optimisation: the clipped surrogate with a critic's loss beside it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import BindingError, RecipeError, check_shapes
from guerdon.objectives.loss import Loss
from guerdon.objectives.reduce import masked_mean, reduce_steps
from guerdon.objectives.surrogate import check_clips, clipped_surrogate, probability_ratio, ratio_metrics


def ppo(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    advantages: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
    values: Float[Tensor, "P G T"],
    values_old: Float[Tensor, "P G T"],
    returns: Float[Tensor, "P G T"],
    mask: Bool[Tensor, "P G T"],
    entropy: Float[Tensor, "P G T"] | None = None,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    value_clip: float | None = 0.2,
    value_coefficient: float = 0.5,
    entropy_bonus: float = 0.0,
) -> Loss:
    """The clipped surrogate per step plus the squared error of the critic, averaged over all live steps.

    Per step m = -min(k A, clip(k) A) + value_coefficient * v - entropy_bonus * H, where v = max((V - R)^2, (V_c -
    R)^2) / 2 and V_c is V held within value_clip of the value at sampling time.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_old: [P, G, T], under the policy that sampled the steps.
        advantages: [P, G, T], such as those of `gae`, or [P, G].
        values: [P, G, T], the critic's values now.
        values_old: [P, G, T], its values when the steps were sampled.
        returns: [P, G, T], what it is fitted to.
        mask: [P, G, T], True = a live step.
        entropy: [P, G, T], entropy of the policy at each step, in nats; needed when entropy_bonus is not 0.
        clip_low: lower bound of the ratio is 1 - clip_low where the advantage is negative; None = no bound.
        clip_high: upper bound of the ratio is 1 + clip_high where the advantage is positive; None = no bound.
        value_clip: how far a value may move from the old one, in the unit of the rewards; None = no bound.
        value_coefficient: weight of the critic's loss.
        entropy_bonus: weight of the entropy, subtracted from every step's loss.

    Returns:
        The loss; count is the number of live steps. Metrics over live steps: those of the ratio as in
        `policy_gradient`, `value_loss`, `value_clip_share`, and `entropy` where it is given.

    Raises:
        ShapeError: an argument has another shape.
        BindingError: entropy_bonus without entropy.
        RecipeError: a bound is negative.

    Gradient:
        To logp, values and entropy; none to what was computed at sampling time.

    Edge cases:
        Masked steps may hold anything, NaN included. With no live step the total is 0 and has a graph.

    Example:
        >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
        >>> ppo(zero, zero, one, zero, zero, one, one.bool()).total.item()
        -0.75

    Source:
        Schulman et al. 2017, Proximal Policy Optimization, arXiv 1707.06347; clipping of values as in its public code.
    """
    where = "objectives.ppo"
    check_clips(where, clip_low, clip_high)
    if value_clip is not None and value_clip < 0:
        raise RecipeError(f"{where}: value_clip must be >= 0, or null for no bound; got {value_clip}.")
    per_step = "P G T"
    check_shapes(
        where,
        mask=(mask, per_step),
        logp=(logp, per_step),
        logp_old=(logp_old, per_step),
        advantages=(advantages, per_step if advantages.ndim == 3 else "P G"),
        values=(values, per_step),
        values_old=(values_old, per_step),
        returns=(returns, per_step),
    )
    logp, logp_old = logp.where(mask, 0.0), logp_old.detach().where(mask, 0.0)
    advantages = advantages.detach() if advantages.ndim == 3 else advantages.detach().unsqueeze(-1)
    advantages = advantages.where(mask, 0.0)
    values, values_old, returns = values.where(mask, 0.0), values_old.detach().where(mask, 0.0), returns.detach()
    returns = returns.where(mask, 0.0)

    ratio = probability_ratio(logp - logp_old)
    loss = clipped_surrogate(ratio, advantages, clip_low, clip_high)
    metrics = ratio_metrics(ratio, advantages, mask, clip_low, clip_high)

    value_loss = (values - returns).square() / 2
    held = torch.zeros_like(mask)
    if value_clip is not None:
        near = values_old + (values - values_old).clamp(-value_clip, value_clip)
        clipped_loss = (near - returns).square() / 2
        held = (clipped_loss > value_loss).detach()
        value_loss = torch.maximum(value_loss, clipped_loss)
    metrics["value_loss"] = masked_mean(value_loss, mask)
    metrics["value_clip_share"] = masked_mean(held.to(values.dtype), mask)
    loss = loss + value_coefficient * value_loss

    if entropy is not None:
        check_shapes(where, mask=(mask, per_step), entropy=(entropy, per_step))
        entropy = entropy.where(mask, 0.0)
        metrics["entropy"] = masked_mean(entropy, mask)
        loss = loss - entropy_bonus * entropy
    elif entropy_bonus:
        raise BindingError(f"{where}: entropy_bonus = {entropy_bonus} needs the field entropy, which is not there.")

    total, count = reduce_steps(loss, mask, "per_token")
    return Loss(total, count, metrics)
