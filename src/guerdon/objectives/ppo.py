"""Proximal policy optimisation: the clipped surrogate with a critic's loss beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import BindingError, RecipeError, check_shapes, nearest
from guerdon.objectives.loss import Loss
from guerdon.objectives.reduce import masked_mean, reduce_steps
from guerdon.objectives.surrogate import check_clips, clipped_surrogate, probability_ratio, ratio_metrics


def ppo(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    advantages: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
    values: Float[Tensor, "P G T"] | Float[Tensor, "P G T K"],
    values_old: Float[Tensor, "P G T"] | Float[Tensor, "P G T K"],
    returns: Float[Tensor, "P G T"] | Float[Tensor, "P G T K"],
    mask: Bool[Tensor, "P G T"],
    entropy: Float[Tensor, "P G T"] | None = None,
    score_names: Sequence[str] = (),
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    value_clip: float | None = 0.2,
    value_coefficient: float = 0.5,
    value_coefficients: dict[str, float] | None = None,
    entropy_bonus: float = 0.0,
) -> Loss:
    """The clipped surrogate per step plus the squared error of the critic, averaged over all live steps.

    Per step m = -min(k A, clip(k) A) + value_coefficient * v - entropy_bonus * H, where v = max((V - R)^2, (V_c -
    R)^2) / 2 and V_c is V held within value_clip of the value at sampling time. Of a critic with K heads, such as the one
    that `gae_by_component` asks for, the K errors are added up, each with its coefficient.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_old: [P, G, T], under the policy that sampled the steps.
        advantages: [P, G, T], such as those of `gae`, or [P, G].
        values: [P, G, T] or [P, G, T, K], the critic's values now.
        values_old: shaped as values, those when the steps were sampled.
        returns: shaped as values, what they are fitted to.
        mask: [P, G, T], True = a live step.
        entropy: [P, G, T], entropy of the policy at each step, in nats; needed when entropy_bonus is not 0.
        score_names: the K components that the heads are of, for coefficients by name.
        clip_low: lower bound of the ratio is 1 - clip_low where the advantage is negative; None = no bound.
        clip_high: upper bound of the ratio is 1 + clip_high where the advantage is positive; None = no bound.
        value_clip: how far a value may move from the old one, in the unit of the rewards; None = no bound.
        value_coefficient: weight of the critic's loss, of each head.
        value_coefficients: component name -> that of its head, where it is another.
        entropy_bonus: weight of the entropy, subtracted from every step's loss.

    Returns:
        The loss; count is the number of live steps. Metrics over live steps: those of the ratio as in
        `policy_gradient`, `value_loss` and `value_clip_share` (means over heads), `value_loss/NAME` of each of several heads
        that have names, and `entropy` where it is given.

    Raises:
        ShapeError: an argument has another shape.
        BindingError: entropy_bonus without entropy.
        RecipeError: a bound is negative, or a coefficient is for no component.

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
    of_heads = per_step if values.ndim == 3 else "P G T K"
    check_shapes(
        where,
        mask=(mask, per_step),
        logp=(logp, per_step),
        logp_old=(logp_old, per_step),
        advantages=(advantages, per_step if advantages.ndim == 3 else "P G"),
        values=(values, of_heads),
        values_old=(values_old, of_heads),
        returns=(returns, of_heads),
    )
    logp, logp_old = logp.where(mask, 0.0), logp_old.detach().where(mask, 0.0)
    advantages = advantages.detach() if advantages.ndim == 3 else advantages.detach().unsqueeze(-1)
    advantages = advantages.where(mask, 0.0)
    # a critic with one head is one with several of which there is one
    values, values_old, returns = (
        (v if v.ndim == 4 else v.unsqueeze(-1)).where(mask.unsqueeze(-1), 0.0)
        for v in (values, values_old.detach(), returns.detach())
    )

    ratio = probability_ratio(logp - logp_old)
    loss = clipped_surrogate(ratio, advantages, clip_low, clip_high)
    metrics = ratio_metrics(ratio, advantages, mask, clip_low, clip_high)

    value_loss = (values - returns).square() / 2
    held = torch.zeros_like(value_loss)
    if value_clip is not None:
        near = values_old + (values - values_old).clamp(-value_clip, value_clip)
        clipped_loss = (near - returns).square() / 2
        held = (clipped_loss > value_loss).to(values.dtype)
        value_loss = torch.maximum(value_loss, clipped_loss)
    metrics["value_loss"] = masked_mean(value_loss.mean(-1), mask)
    metrics["value_clip_share"] = masked_mean(held.mean(-1), mask)
    heads = values.shape[-1]
    if heads == len(score_names) > 1:
        metrics |= {f"value_loss/{name}": masked_mean(value_loss[..., k], mask) for k, name in enumerate(score_names)}
    coefficients = _coefficients(where, value_coefficient, value_coefficients or {}, score_names, heads)
    loss = loss + (value_loss * value_loss.new_tensor(coefficients)).sum(-1)

    if entropy is not None:
        check_shapes(where, mask=(mask, per_step), entropy=(entropy, per_step))
        entropy = entropy.where(mask, 0.0)
        metrics["entropy"] = masked_mean(entropy, mask)
        loss = loss - entropy_bonus * entropy
    elif entropy_bonus:
        raise BindingError(f"{where}: entropy_bonus = {entropy_bonus} needs the field entropy, which is not there.")

    total, count = reduce_steps(loss, mask, "per_token")
    return Loss(total, count, metrics)


def _coefficients(where: str, usual: float, other: dict[str, float], names: Sequence[str], heads: int) -> list[float]:
    if not other:
        return [usual] * heads
    if len(names) != heads:
        raise RecipeError(
            f"{where}.value_coefficients: they need a critic with a head for each component; this one has {heads} for "
            f"{', '.join(names) or 'no named component'}. Use value_coefficient, or advantage: gae_by_component."
        )
    for name in other:
        if name not in names:
            raise RecipeError(
                f"{where}.value_coefficients.{name}: there is no such component.{nearest(name, names)} There are: "
                f"{', '.join(names)}."
            )
    return [other.get(name, usual) for name in names]
