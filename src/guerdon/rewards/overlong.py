"""A penalty that grows as a sample comes near the largest length, instead of a cliff at it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guerdon.errors import RecipeError, check_shapes


def overlong(lengths: Int[Tensor, "P G"], *, max_length: int, cache: int) -> Float[Tensor, "P G"]:
    """A reward of 0 up to max_length - cache steps, then falling linearly to -1 at max_length, and -1 beyond.

    A sample that is cut off is punished whatever it said, which is noise; a soft limit tells the policy before that.

    Args:
        lengths: [P, G], live steps of each sample.
        max_length: steps, the length at which the penalty is full.
        cache: steps over which it grows, 1 to max_length.

    Returns:
        Rewards [P, G] in [-1, 0], to be added to that for the answer.

    Raises:
        ShapeError: lengths is not [P, G].
        RecipeError: cache is not within 1 to max_length.

    Gradient:
        None; lengths are integers.

    Example:
        >>> overlong(torch.tensor([[2, 3, 4, 9]]), max_length=4, cache=2)
        tensor([[ 0.0000, -0.5000, -1.0000, -1.0000]])

    Source:
        Yu et al. 2025, DAPO, arXiv 2503.14476 (soft overlong punishment).
    """
    check_shapes("rewards.overlong", lengths=(lengths, "P G"))
    if not 1 <= cache <= max_length:
        raise RecipeError(f"rewards.overlong: cache must be from 1 to max_length = {max_length} steps; got {cache}.")
    excess = (lengths - (max_length - cache)).clamp(min=0, max=cache)
    return (-excess).to(torch.get_default_dtype()) / cache
