"""The loss of consistency-aware policy optimisation (COPO): two clipped surrogates, blended sample by sample.

The local and the global advantage of a sample may differ in sign, so that each is clipped on its own side.
J. Han et al. 2025, COPO: Consistency-Aware Policy Optimization, arXiv 2508.04138.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import BindingError, check_shapes
from guerdon.objectives.kl import KlEstimator, kl_estimate
from guerdon.objectives.loss import Loss
from guerdon.objectives.reduce import Denominator, masked_mean, reduce_steps
from guerdon.objectives.surrogate import check_clips, clipped_surrogate, probability_ratio, ratio_metrics


def copo_loss(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    local_advantages: Float[Tensor, "P G"],
    global_advantages: Float[Tensor, "P G"],
    local_weight: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G T"],
    logp_ref: Float[Tensor, "P G T"] | None = None,
    rewards: Float[Tensor, "P G"] | None = None,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = 3.0,
    beta: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    denominator: Denominator = "per_sample",
    max_length: int | None = None,
) -> Loss:
    """Follow a sample's own advantage by its local weight, and its prompt's by the rest.

    Per step m = w l(A_local) + (1 - w) l(A_global) + beta * KL, where l(A) = max(-A k, -A clip(k, 1 - clip_low, 1 +
    clip_high)), held below dual_clip * |A| where A < 0, and k = exp(logp - logp_old).

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_old: [P, G, T], under the policy that sampled the steps.
        local_advantages: [P, G], against the group; as from `guerdon.advantages.copo`.
        global_advantages: [P, G], the prompt against the batch.
        local_weight: [P, G], in [0, 1].
        mask: [P, G, T], True = a live step.
        logp_ref: [P, G, T], under the reference; needed when beta > 0.
        rewards: [P, G], read for one metric only.
        clip_low: lower bound of the ratio is 1 - clip_low where the advantage is negative; None = no bound.
        clip_high: upper bound of the ratio is 1 + clip_high where the advantage is positive; None = no bound.
        dual_clip: where an advantage is negative its loss is at most dual_clip * |A|; above 1; None = no bound.
        beta: weight of the divergence from the reference, added to every step's loss.
        kl_estimator: how it is estimated, see `guerdon.objectives.kl.kl_estimate`.
        denominator: how steps are averaged, see `guerdon.objectives.reduce.reduce_steps`.
        max_length: steps, for the denominator `constant`.

    Returns:
        The loss. Metrics: `ratio_mean`, `ratio_max` and the clip shares (by the sign of the blended advantage), over
        live steps; `local_weight`, its mean over samples; `wrong_raised`, the share of the samples with reward 0 whose
        blended advantage is positive (0 if there are none), where rewards are given; `kl` where logp_ref is.

    Raises:
        ShapeError: an argument has another shape.
        BindingError: beta > 0 without logp_ref.
        RecipeError: an option is unknown or a bound contradicts another.

    Gradient:
        To logp only. A part beyond its bound passes none, nor does a log-ratio beyond +-20.

    Edge cases:
        Masked steps may hold anything, NaN included. A sample without live steps adds 0 but counts as a sample. With
        no live step at all the total is 0 and has a graph.

    Example:
        >>> import torch
        >>> logp, mask = torch.zeros(1, 2, 1, requires_grad=True), torch.ones(1, 2, 1).bool()
        >>> local, across, weight = torch.tensor([[1.0, -1.0]]), torch.full((1, 2), 0.5), torch.tensor([[0.5, 0.0]])
        >>> loss = copo_loss(logp, logp.detach(), local, across, weight, mask)
        >>> (loss.total / loss.count).item()
        -0.625

    Source:
        Han et al. 2025, COPO: Consistency-Aware Policy Optimization, arXiv 2508.04138; clip and dual clip as in the
        authors' code.
    """
    where = "objectives.copo_loss"
    check_clips(where, clip_low, clip_high, dual_clip=dual_clip)
    per_step = "P G T"
    check_shapes(
        where,
        mask=(mask, per_step),
        logp=(logp, per_step),
        logp_old=(logp_old, per_step),
        local_advantages=(local_advantages, "P G"),
        global_advantages=(global_advantages, "P G"),
        local_weight=(local_weight, "P G"),
    )
    logp, logp_old = logp.where(mask, 0.0), logp_old.detach().where(mask, 0.0)
    local, across, weight = (
        values.detach().unsqueeze(-1) for values in (local_advantages, global_advantages, local_weight)
    )
    ratio = probability_ratio(logp - logp_old)
    local_loss = clipped_surrogate(ratio, local, clip_low, clip_high, dual_clip=dual_clip)
    global_loss = clipped_surrogate(ratio, across, clip_low, clip_high, dual_clip=dual_clip)
    loss = weight * local_loss + (1 - weight) * global_loss

    blend = weight * local + (1 - weight) * across
    metrics = ratio_metrics(ratio, blend, mask, clip_low, clip_high)
    metrics["local_weight"] = weight.mean()
    if rewards is not None:
        check_shapes(where, local_weight=(local_weight, "P G"), rewards=(rewards, "P G"))
        metrics["wrong_raised"] = masked_mean((blend.squeeze(-1) > 0).to(blend.dtype), rewards == 0)
    if logp_ref is not None:
        check_shapes(where, mask=(mask, per_step), logp_ref=(logp_ref, per_step))
        divergence = kl_estimate(logp, logp_ref.detach().where(mask, 0.0), kl_estimator)
        metrics["kl"] = masked_mean(divergence, mask)
        if beta:
            loss = loss + beta * divergence
    elif beta:
        raise BindingError(f"{where}: beta = {beta} needs the field logp_ref, which is not there; set beta: 0.")

    total, count = reduce_steps(loss, mask, denominator, max_length)
    return Loss(total, count, metrics)
