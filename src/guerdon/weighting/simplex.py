"""Weights that are shares: positive or 0, and 1 together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from guerdon.errors import RecipeError, nearest

Weights = Mapping[str, float] | Sequence[float] | None


def shares(where: str, weights: Weights, names: Sequence[str], size: int) -> Tensor:
    """K weights in the order of the components, float64; None is 1 / K each.

    Raises:
        RecipeError: they are not K numbers on the simplex, or named for components that are not there.
    """
    if weights is None:
        return torch.full((size,), 1 / max(size, 1), dtype=torch.float64)
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in names:
                raise RecipeError(
                    f"{where}: there is no component {name!r} to weigh.{nearest(name, names)} There are: {', '.join(names)}."
                )
        weights = [weights.get(name, 0.0) for name in names]
    values = torch.tensor(list(weights), dtype=torch.float64)
    if len(values) != size:
        raise RecipeError(f"{where}: weights must be {size} numbers, one per component; got {len(values)}.")
    if not (bool((values >= 0).all()) and abs(float(values.sum()) - 1) <= 1e-6):
        raise RecipeError(f"{where}: weights must be 0 or more and add up to 1; got {values.tolist()}.")
    return values
