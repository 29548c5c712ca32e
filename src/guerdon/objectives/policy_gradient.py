"""The clipped policy gradient: GRPO's, DAPO's, Dr. GRPO's and GSPO's losses.

One function with the choices as options (level of the ratio, clip bounds, divergence, denominator); the named functions
below it are its published settings.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import BindingError, RecipeError, ShapeError, check_shapes, nearest
from guerdon.objectives.kl import step_divergence
from guerdon.objectives.loss import Loss
from guerdon.objectives.reduce import Denominator, masked_mean, reduce_steps
from guerdon.objectives.surrogate import check_clips, clipped_surrogate, probability_ratio, ratio_metrics

Level = Literal["token", "sequence", "sequence_token"]
Divergence = Literal["k1", "k2", "k3", "exact"]


def policy_gradient(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    advantages: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
    mask: Bool[Tensor, "P G T"],
    logp_ref: Float[Tensor, "P G T"] | None = None,
    entropy: Float[Tensor, "P G T"] | None = None,
    truncated: Bool[Tensor, "P G"] | None = None,
    kl: Float[Tensor, "P G T"] | None = None,
    *,
    level: Level = "token",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    ratio_max: float | None = None,
    dual_clip: float | None = None,
    advantage_clip: float | None = None,
    beta: float = 0.0,
    kl_estimator: Divergence = "k3",
    entropy_bonus: float = 0.0,
    denominator: Denominator = "per_sample",
    max_length: int | None = None,
    mask_truncated: bool = False,
) -> Loss:
    """Raise the probability of steps with positive advantage, within bounds on how far the policy moves.

    Per step m = -min(k A, clip(k, 1 - clip_low, 1 + clip_high) A) + beta * KL - entropy_bonus * H, with the ratio k of
    new to old probability: of the step (`token`), or s = exp(mean over the sample's live steps of logp - logp_old) for
    all of its steps (`sequence`), or the value s with the gradient of the step's own probability (`sequence_token`).
    The defaults are GRPO's. With k = 1 (one update per rollout) the gradient is the plain policy gradient.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_old: [P, G, T], under the policy that sampled the steps.
        advantages: [P, G], or [P, G, T] per step.
        mask: [P, G, T], True = a live step.
        logp_ref: [P, G, T], under the reference; needed when beta > 0, unless the divergence is exact.
        entropy: [P, G, T], entropy of the policy at each step, in nats; needed when entropy_bonus is not 0.
        truncated: [P, G], True = the sample was cut off; needed with mask_truncated.
        kl: [P, G, T], the exact divergence of each step from the reference, with graph, in nats, from policies whose
            steps have one in closed form (Gaussian steps of diffusion and flow); needed when beta > 0 and exact.
        level: which probabilities the ratio compares.
        clip_low: lower bound of the ratio is 1 - clip_low where the advantage is negative; None = no bound.
        clip_high: upper bound of the ratio is 1 + clip_high where the advantage is positive; None = no bound.
        ratio_max: upper bound of the ratio where the advantage is negative (two-sided clipping), above 1 + clip_high.
        dual_clip: where the advantage is negative the loss is at most dual_clip * |A|; above 1, commonly 3.
        advantage_clip: advantages are held within +- this; None = as they are. Image models use 5.
        beta: weight of the divergence from the reference, added to every step's loss.
        kl_estimator: `k1`, `k2`, `k3` estimate it from logp and logp_ref, see `guerdon.objectives.kl.kl_estimate`;
            `exact` takes the field kl.
        entropy_bonus: weight of the entropy, subtracted from every step's loss.
        denominator: how steps are averaged, see `guerdon.objectives.reduce.reduce_steps`.
        max_length: steps, for the denominator `constant`.
        mask_truncated: leave the steps of cut-off samples out, as if masked.

    Returns:
        The loss. Metrics over live steps: `ratio_mean`, `ratio_max`, `clip_share` (steps without gradient because of
        the clip), `clip_low_share`, `clip_high_share`; `kl` where logp_ref (or, if exact, kl) is given, `entropy` where
        entropy is.

    Raises:
        ShapeError: an argument has another shape, or advantages per step meet level `sequence`.
        BindingError: an option needs logp_ref, kl, entropy or truncated, which is not given.
        RecipeError: an option is unknown or contradicts another.

    Gradient:
        To logp, and to entropy and kl where they are used; none to logp_old, logp_ref or advantages. A ratio
        beyond its bound passes none; nor does a log-ratio beyond +-20.

    Edge cases:
        Masked steps may hold anything, NaN included. A sample without live steps adds 0 but counts as a sample. With
        no live step at all the total is 0 and has a graph.

    Example:
        >>> logp = torch.zeros(1, 2, 1, requires_grad=True)
        >>> loss = policy_gradient(logp, torch.zeros(1, 2, 1), torch.tensor([[1.0, -2.0]]), torch.ones(1, 2, 1).bool())
        >>> (loss.total / loss.count).item()
        0.5

    Source:
        Schulman et al. 2017, Proximal Policy Optimization, arXiv 1707.06347; Shao et al. 2024, arXiv 2402.03300; Yu et
        al. 2025, DAPO, arXiv 2503.14476; Liu et al. 2025, arXiv 2503.20783; Zheng et al. 2025, GSPO, arXiv 2507.18071.
    """
    where = "objectives.policy_gradient"
    if level not in ("token", "sequence", "sequence_token"):
        raise RecipeError(
            f"{where}: level must be token, sequence or sequence_token; got {level!r}."
            f"{nearest(level, ('token', 'sequence', 'sequence_token'))}"
        )
    check_clips(where, clip_low, clip_high, ratio_max, dual_clip)
    if advantage_clip is not None and advantage_clip <= 0:
        raise RecipeError(f"{where}: advantage_clip must be above 0, or null for no bound; got {advantage_clip}.")
    per_step = "P G T"
    check_shapes(
        where,
        mask=(mask, per_step),
        logp=(logp, per_step),
        logp_old=(logp_old, per_step),
        advantages=(advantages, per_step if advantages.ndim == 3 else "P G"),
    )
    if level == "sequence" and advantages.ndim == 3:
        raise ShapeError(
            f"{where}: advantages must be [P, G] with level sequence, where all steps of a sample share one ratio; got "
            f"{list(advantages.shape)}. Use level sequence_token for advantages per step."
        )
    if mask_truncated:
        if truncated is None:
            raise BindingError(f"{where}: mask_truncated needs the field truncated [P, G], which is not there.")
        check_shapes(where, mask=(mask, per_step), truncated=(truncated, "P G"))
        mask = mask & ~truncated.unsqueeze(-1)

    # masked steps are replaced before any maths, so that what they hold reaches neither value nor gradient
    logp, logp_old = logp.where(mask, 0.0), logp_old.detach().where(mask, 0.0)
    advantages = advantages.detach() if advantages.ndim == 3 else advantages.detach().unsqueeze(-1)
    advantages = advantages.where(mask, 0.0)
    if advantage_clip is not None:
        advantages = advantages.clamp(-advantage_clip, advantage_clip)

    ratio = _ratio(logp, logp_old, mask, level)
    loss = clipped_surrogate(ratio, advantages, clip_low, clip_high, ratio_max, dual_clip)
    metrics = ratio_metrics(ratio, advantages, mask, clip_low, clip_high)

    divergence = step_divergence(where, logp, logp_ref, kl, mask, beta, kl_estimator)
    if divergence is not None:
        metrics["kl"] = masked_mean(divergence, mask)
        if beta:
            loss = loss + beta * divergence

    if entropy is not None:
        check_shapes(where, mask=(mask, per_step), entropy=(entropy, per_step))
        entropy = entropy.where(mask, 0.0)
        metrics["entropy"] = masked_mean(entropy, mask)
        if entropy_bonus:
            loss = loss - entropy_bonus * entropy
    elif entropy_bonus:
        raise BindingError(f"{where}: entropy_bonus = {entropy_bonus} needs the field entropy, which is not there.")

    total, count = reduce_steps(loss, mask, denominator, max_length)
    return Loss(total, count, metrics)


def _ratio(logp: Tensor, logp_old: Tensor, mask: Tensor, level: Level) -> Tensor:
    """New over old probability, [P, G, T] or [P, G, 1]; logp and logp_old are 0 at masked steps."""
    if level == "token":
        return probability_ratio(logp - logp_old)
    steps = mask.sum(-1, keepdim=True).clamp(min=1)
    sequence = probability_ratio((logp - logp_old).sum(-1, keepdim=True) / steps)
    if level == "sequence":
        return sequence
    return sequence.detach() * torch.exp(logp - logp.detach())


def dapo(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    advantages: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
    mask: Bool[Tensor, "P G T"],
    truncated: Bool[Tensor, "P G"] | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    mask_truncated: bool = False,
) -> Loss:
    """DAPO's loss: a higher upper clip bound, which keeps entropy, and the mean over all tokens of the batch.

    `policy_gradient` with clip_low 0.2, clip_high 0.28, denominator `per_token` and no divergence. Its other two parts
    are `sampling: dynamic` and the reward `overlong`.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_old: [P, G, T], under the policy that sampled the steps.
        advantages: [P, G], or [P, G, T] per step.
        mask: [P, G, T], True = a live step.
        truncated: [P, G], True = the sample was cut off; needed with mask_truncated.
        clip_low: the ratio is held above 1 - clip_low where the advantage is negative.
        clip_high: the ratio is held below 1 + clip_high where the advantage is positive.
        mask_truncated: leave cut-off samples out of the loss.

    Returns:
        The loss; metrics as in `policy_gradient`.

    Raises:
        ShapeError: an argument has another shape.
        BindingError: mask_truncated without truncated.

    Gradient:
        To logp only.

    Example:
        >>> logp = torch.zeros(1, 1, 2, requires_grad=True)
        >>> dapo(logp, logp.detach(), torch.ones(1, 1), torch.ones(1, 1, 2).bool()).total.item()
        -2.0

    Source:
        Yu et al. 2025, DAPO, arXiv 2503.14476.
    """
    return policy_gradient(
        logp,
        logp_old,
        advantages,
        mask,
        truncated=truncated,
        clip_low=clip_low,
        clip_high=clip_high,
        denominator="per_token",
        mask_truncated=mask_truncated,
    )


def dr_grpo(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    advantages: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
    mask: Bool[Tensor, "P G T"],
    *,
    max_length: int | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Loss:
    """Dr. GRPO's loss: every step weighs the same whatever its sample's length, so long wrong answers are not favoured.

    `policy_gradient` with denominator `constant`. It belongs with the advantage `dr_grpo`.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_old: [P, G, T], under the policy that sampled the steps.
        advantages: [P, G], or [P, G, T] per step.
        mask: [P, G, T], True = a live step.
        max_length: steps, the largest length a sample may have (max_new_tokens), not the longest of the batch; a loop
            fills it in.
        clip_low: the ratio is held above 1 - clip_low where the advantage is negative.
        clip_high: the ratio is held below 1 + clip_high where the advantage is positive.

    Returns:
        The loss; metrics as in `policy_gradient`.

    Raises:
        ShapeError: an argument has another shape.
        RecipeError: max_length is missing or not positive.

    Gradient:
        To logp only.

    Example:
        >>> logp = torch.zeros(1, 1, 2, requires_grad=True)
        >>> dr_grpo(logp, logp.detach(), torch.ones(1, 1), torch.ones(1, 1, 2).bool(), max_length=4).total.item()
        -0.5

    Source:
        Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv 2503.20783.
    """
    return policy_gradient(
        logp,
        logp_old,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        denominator="constant",
        max_length=max_length,
    )


def gspo(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    advantages: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
    mask: Bool[Tensor, "P G T"],
    *,
    level: Literal["sequence", "sequence_token"] = "sequence",
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Loss:
    """GSPO's loss: the ratio is that of whole samples, the level at which the reward is given.

    `policy_gradient` at level `sequence` with narrow bounds, denominator `per_sample` and no divergence.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_old: [P, G, T], under the policy that sampled the steps.
        advantages: [P, G], or [P, G, T] per step with level `sequence_token`.
        mask: [P, G, T], True = a live step.
        level: `sequence`, or `sequence_token` (GSPO-token) for advantages per step.
        clip_low: the ratio is held above 1 - clip_low where the advantage is negative.
        clip_high: the ratio is held below 1 + clip_high where the advantage is positive.

    Returns:
        The loss; metrics as in `policy_gradient`.

    Raises:
        ShapeError: an argument has another shape, or advantages per step meet level `sequence`.

    Gradient:
        To logp only; at level `sequence` that of the sample's ratio s to each of its n steps is s / n.

    Example:
        >>> logp = torch.zeros(1, 1, 2, requires_grad=True)
        >>> gspo(logp, logp.detach(), torch.ones(1, 1), torch.ones(1, 1, 2).bool()).total.item()
        -1.0

    Source:
        Zheng et al. 2025, Group Sequence Policy Optimization, arXiv 2507.18071.
    """
    return policy_gradient(
        logp, logp_old, advantages, mask, level=level, clip_low=clip_low, clip_high=clip_high, denominator="per_sample"
    )
