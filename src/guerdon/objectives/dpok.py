"""REINFORCE with the exact divergence from the reference: DPOK's loss.

The reward is weighed against how far every denoising step has moved, which keeps images close to the pretrained model's.
Y. Fan et al. 2023, DPOK, arXiv 2305.16381.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import RecipeError, check_shapes
from guerdon.objectives.loss import Loss
from guerdon.objectives.reduce import masked_mean, reduce_steps
from guerdon.objectives.surrogate import check_clips, clipped_surrogate, probability_ratio, ratio_metrics


def dpok(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    advantages: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G T"],
    kl: Float[Tensor, "P G T"],
    *,
    alpha: float = 1.0,
    beta: float = 0.01,
    importance: bool = False,
    clip: float | None = None,
) -> Loss:
    """Minus reward times log-probability of the whole sample, plus the divergence of the whole sample.

    Per sample l = -alpha A sum_t logp_t + beta sum_t KL(p_t || p_ref_t), the mean over samples. With `importance`, logp_t
    is replaced by the ratio k_t = exp(logp_t - logp_old_t), which has the same gradient where k_t = 1 and stays right
    in further updates from the same samples; with `clip`, by PPO's clipped ratio.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_old: [P, G, T], under the policy that sampled the steps; read with `importance` and for metrics.
        advantages: [P, G], the reward itself (`advantage: reinforce`), or less a baseline.
        mask: [P, G, T], True = a live step.
        kl: [P, G, T], exact divergence of each step from the reference, with graph, in nats, which
            policies with Gaussian steps (diffusion and flow) give.
        alpha: weight of the reward.
        beta: weight of the divergence.
        importance: weigh steps by the ratio of new to old probability.
        clip: hold the ratio within 1 - clip and 1 + clip; needs `importance`; None = no bound.

    Returns:
        The loss; count is the number of samples. Metrics over live steps: those of the ratio as in `policy_gradient`,
        and `kl`.

    Raises:
        ShapeError: an argument has another shape.
        RecipeError: clip without importance, or below 0.

    Gradient:
        To logp and kl; none to logp_old or advantages. A log-ratio beyond +-20 passes none.

    Edge cases:
        Masked steps may hold anything, NaN included. A sample without live steps adds 0 but counts.

    Example:
        >>> import torch
        >>> logp, mask = torch.full((1, 2, 2), -1.0, requires_grad=True), torch.ones(1, 2, 2).bool()
        >>> loss = dpok(logp, logp.detach(), torch.tensor([[1.0, 2.0]]), mask, torch.full((1, 2, 2), 0.5), beta=0.1)
        >>> round((loss.total / loss.count).item(), 4)
        3.1

    Source:
        Fan et al. 2023, DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models, arXiv 2305.16381.
        The clipped form is our reading of its importance weights.
    """
    where = "objectives.dpok"
    check_clips(where, clip, clip)
    if clip is not None and not importance:
        raise RecipeError(f"{where}: clip = {clip} bounds the ratio, which is used with importance: true only.")
    per_step = "P G T"
    check_shapes(
        where,
        mask=(mask, per_step),
        logp=(logp, per_step),
        logp_old=(logp_old, per_step),
        advantages=(advantages, "P G"),
        kl=(kl, per_step),
    )
    logp, logp_old = logp.where(mask, 0.0), logp_old.detach().where(mask, 0.0)
    weight = advantages.detach().unsqueeze(-1).where(mask, 0.0)
    ratio = probability_ratio(logp - logp_old)
    loss = alpha * (clipped_surrogate(ratio, weight, clip, clip) if importance else -weight * logp)
    metrics = ratio_metrics(ratio, weight, mask, clip, clip)
    divergence = kl.where(mask, 0.0)
    metrics["kl"] = masked_mean(divergence, mask)
    loss = loss + beta * divergence
    total, count = reduce_steps(loss, mask, "constant", max_length=1)
    return Loss(total, count, metrics)
