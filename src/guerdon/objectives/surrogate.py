"""The clipped surrogate of policy gradient methods, per step."""

from __future__ import annotations

import torch
from torch import Tensor

from guerdon.errors import RecipeError
from guerdon.objectives.reduce import masked_mean

_LARGEST_LOG_RATIO = 20.0


def probability_ratio(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio held within +-20, so that no ratio is infinite."""
    return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def check_clips(
    where: str,
    clip_low: float | None,
    clip_high: float | None,
    ratio_max: float | None = None,
    dual_clip: float | None = None,
) -> None:
    """Raise where the bounds of a ratio contradict each other."""
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if value is not None and value < 0:
            raise RecipeError(f"{where}: {name} must be >= 0, or null for no bound; got {value}.")
    if ratio_max is not None and ratio_max <= 1 + (clip_high or 0.0):
        raise RecipeError(
            f"{where}: ratio_max must be above 1 + clip_high = {1 + (clip_high or 0.0)}; got {ratio_max}."
        )
    if dual_clip is not None and dual_clip <= 1:
        raise RecipeError(f"{where}: dual_clip must be above 1; got {dual_clip}.")


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float | None,
    clip_high: float | None,
    ratio_max: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """-min(k A, clip(k, 1 - clip_low, 1 + clip_high) A).

    k in the first term is held below ratio_max, and the loss below dual_clip * |A| where A is negative.
    """
    bounded = ratio if ratio_max is None else ratio.clamp(max=ratio_max)
    loss = -bounded * advantages
    if clip_low is not None or clip_high is not None:
        low = None if clip_low is None else 1 - clip_low
        high = None if clip_high is None else 1 + clip_high
        loss = torch.maximum(loss, -ratio.clamp(low, high) * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def ratio_metrics(
    ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float | None, clip_high: float | None
) -> dict[str, Tensor]:
    """Mean and maximum of the ratio over live steps, and the shares of live steps whose gradient the clip took away."""
    ratio = ratio.detach().expand_as(mask)
    never = torch.zeros_like(mask)
    low = never if clip_low is None else (ratio < 1 - clip_low) & (advantages < 0)
    high = never if clip_high is None else (ratio > 1 + clip_high) & (advantages > 0)
    nothing = ratio.new_zeros(1)
    return {
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_max": torch.cat([nothing, ratio.where(mask, 0.0).flatten()]).amax(),
        "clip_share": masked_mean((low | high).to(ratio.dtype), mask),
        "clip_low_share": masked_mean(low.to(ratio.dtype), mask),
        "clip_high_share": masked_mean(high.to(ratio.dtype), mask),
    }
