"""A score that is best at a target, not as high as possible."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from guerdon.errors import RecipeError
from guerdon.shaping.bounded import check_scores


def distance(scores: Float[Tensor, "P G"], *, target: float, scale: float = 1.0) -> Float[Tensor, "P G"]:
    """s = -|r - target| / scale: what lies beyond the target is no better than what falls short of it.

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        target: in the unit of the scores.
        scale: above 0, in the unit of the scores.

    Returns:
        Shaped scores [P, G], at most 0.

    Raises:
        ShapeError: scores is not [P, G].
        ScoreError: a score is infinite.
        RecipeError: target is not finite, or scale is not above 0.

    Gradient:
        To scores; 0 at the target itself.

    Edge cases:
        NaN stays NaN.

    Example:
        >>> import torch
        >>> distance(torch.tensor([[8.0, 10.0, 13.0]]), target=10.0)
        tensor([[-2., -0., -3.]])

    Source:
        The released code of AlignProp, arXiv 2310.03739, for aesthetic scores (target 10).
    """
    if not math.isfinite(target) or not scale > 0:
        raise RecipeError(f"shaping.distance: target must be finite and scale above 0; got {target} and {scale}.")
    check_scores("shaping.distance", scores)
    return -(scores - target).abs() / scale
