"""The family of divergences that a supervised loss can be made of, each as what it makes of an implicit reward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import RecipeError, nearest

Divergence = Literal["total_variation", "pearson", "hellinger", "reverse_kl", "jensen_shannon"]


class Phi(NamedTuple):
    """phi(x) = -f*(-x), its derivative, and the edge below which it goes on along its tangent."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[float], float]
    edge: float = -math.inf


PHI: dict[str, Phi] = {
    "total_variation": Phi(lambda x: x, lambda x: 1.0),
    "pearson": Phi(lambda x: x - x.square() / 4, lambda x: 1 - x / 2),
    "hellinger": Phi(lambda x: x / (1 + x), lambda x: (1 + x) ** -2, -0.5),
    "reverse_kl": Phi(lambda x: -(-x - 1).exp(), lambda x: math.exp(-x - 1), -10.0),
    "jensen_shannon": Phi(lambda x: (2 - (-x).exp()).log(), lambda x: 1 / (2 * math.exp(x) - 1), -0.5),
}


def phi(x: Float[Tensor, ...], divergence: str = "pearson", *, clamp_positive: bool = False) -> Float[Tensor, ...]:
    """How much an implicit reward is worth: concave, phi(x) = -f*(-x) with f* the conjugate of the divergence's f.

    total_variation: x (without its bound); pearson: x - x^2 / 4; hellinger: x / (1 + x); reverse_kl: -exp(-x - 1);
    jensen_shannon: log(2 - exp(-x)). The supervised gradient is multiplied by phi'(x).

    Args:
        x: implicit rewards, any shape.
        divergence: which of them.
        clamp_positive: pearson has its maximum at x = 2 and pushes back beyond; True = it is constant there.

    Returns:
        The same shape.

    Raises:
        RecipeError: the divergence is unknown.

    Edge cases:
        Below -0.5 (hellinger, jensen_shannon) and -10 (reverse_kl) it goes on along its tangent: once differentiable, and
        without the pole.

    Example:
        >>> phi(torch.tensor([0.0, 1.0, 2.0])).tolist()
        [0.0, 0.75, 1.0]

    Source:
        Standard theory of f-divergences; the tangent is ours.
    """
    if divergence not in PHI:
        raise RecipeError(
            f"objectives.phi: divergence must be one of {', '.join(PHI)}; got {divergence!r}.{nearest(divergence, PHI)}"
        )
    known = PHI[divergence]
    if clamp_positive and divergence == "pearson":
        x = x.clamp(max=2.0)
    if known.edge == -math.inf:
        return known.value(x)
    edge = x.new_tensor(known.edge)
    below = known.value(edge) + known.slope(known.edge) * (x - edge)
    return torch.where(x < edge, below, known.value(torch.where(x < edge, edge, x)))
