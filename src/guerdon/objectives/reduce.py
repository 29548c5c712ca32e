"""From a loss per step to a sum and a count: the one denominator rule."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import RecipeError, check_shapes, nearest

Denominator = Literal["per_sample", "per_token", "constant"]


def reduce_steps(
    per_step: Float[Tensor, "P G T"],
    mask: Bool[Tensor, "P G T"],
    denominator: Denominator,
    max_length: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum a loss over live steps, and count what it is divided by.

    With n the live steps of a sample, total / count is: `per_sample`, the mean over samples of their mean over steps
    (long samples count less per step); `per_token`, the mean over all live steps; `constant`, the sum over steps
    divided by samples times `max_length` (every step counts the same in every batch).

    Args:
        per_step: [P, G, T]; may hold NaN at masked steps, as long as no gradient flows back through it there.
        mask: [P, G, T], True = a live step.
        denominator: the rule.
        max_length: steps, for `constant`: the largest length a sample may have, not the longest of this batch.

    Returns:
        total (with graph) and count (without), scalars. Samples without a live step count for `per_sample` and
        `constant`.

    Raises:
        ShapeError: an argument is not [P, G, T].
        RecipeError: the rule is unknown, or `constant` has no positive max_length.
    """
    sizes = check_shapes("objectives.reduce_steps", per_step=(per_step, "P G T"), mask=(mask, "P G T"))
    live = per_step.where(mask, 0.0)
    precise = torch.promote_types(per_step.dtype, torch.float32)
    samples = torch.tensor(sizes["P"] * sizes["G"], dtype=precise, device=per_step.device)
    if denominator == "per_sample":
        return (live.sum(-1) / mask.sum(-1).clamp(min=1)).sum(), samples
    if denominator == "per_token":
        return live.sum(), mask.sum().to(precise)
    if denominator != "constant":
        known = ("per_sample", "per_token", "constant")
        raise RecipeError(
            f"denominator must be one of {', '.join(known)}; got {denominator!r}.{nearest(denominator, known)}"
        )
    if max_length is None or max_length < 1:
        raise RecipeError(
            f"denominator: constant needs max_length, the largest number of steps a sample may have; got {max_length}."
        )
    return live.sum() / max_length, samples


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over live steps without gradient, 0 if there is none."""
    return values.detach().where(mask, 0.0).sum() / mask.sum().clamp(min=1)
