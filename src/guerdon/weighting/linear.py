"""Fixed weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import RecipeError, check_shapes, nearest
from guerdon.weighting.weighted import WeightedOutput, weighted_sum


def linear(
    scores: Float[Tensor, "P G K"],
    score_names: Sequence[str] = (),
    *,
    weights: Mapping[str, float] | Sequence[float] | None = None,
) -> WeightedOutput:
    """The weighted sum of a sample's scores: r = sum_k w_k s_k.

    Args:
        scores: [P, G, K], each component in its own unit; NaN = not scored.
        score_names: the K component names; needed when weights go by name.
        weights: component name -> weight for all K of them, or K weights in order, or None for 1 each. Negative ones
            are allowed.

    Returns:
        `rewards` [P, G] and `weights` [K].

    Raises:
        ShapeError: scores is not [P, G, K].
        RecipeError: a weight is missing, too many, or for a component that is not there.

    Gradient:
        To scores, for rewards that can be differentiated.

    Edge cases:
        A component that was not scored adds nothing to that sample; a sample with no score at all gets NaN.

    Example:
        >>> linear(torch.tensor([[[1.0, 4.0]]]), ("right", "short"), weights={"right": 1.0, "short": 0.5}).rewards
        tensor([[3.]])

    Source:
        Roijers et al. 2013, A Survey of Multi-Objective Sequential Decision-Making (linear scalarisation).
    """
    size = check_shapes("weighting.linear", scores=(scores, "P G K"))["K"]
    if weights is None:
        values = [1.0] * size
    elif isinstance(weights, Mapping):
        values = _by_name(weights, score_names, size)
    else:
        values = list(weights)
        if len(values) != size:
            raise RecipeError(
                f"weighting.linear: weights must be {size} numbers, one per component; got {len(values)}."
            )
    chosen = torch.tensor(values, dtype=scores.dtype, device=scores.device)
    return WeightedOutput(weighted_sum(scores, chosen), chosen)


def _by_name(weights: Mapping[str, float], names: Sequence[str], size: int) -> list[float]:
    if len(names) != size:
        raise RecipeError(
            f"weighting.linear: weights by name need the names of all {size} components; got {list(names)}."
        )
    for name in weights:
        if name not in names:
            raise RecipeError(
                f"weighting.linear: there is no component {name!r} to weigh.{nearest(name, names)} "
                f"There are: {', '.join(names)}."
            )
    missing = [name for name in names if name not in weights]
    if missing:
        raise RecipeError(
            f"weighting.linear: no weight for {', '.join(missing)}. Give every component a weight (0 to ignore it)."
        )
    return [weights[name] for name in names]
