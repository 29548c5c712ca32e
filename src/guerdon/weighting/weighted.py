"""What every weighting returns, and the sum that leaves unscored components out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class WeightedOutput(NamedTuple):
    """Rewards [P, G] (NaN where no component was scored) and the weights used, [K] or [P, G, K]."""

    rewards: Float[Tensor, "P G"]
    weights: Float[Tensor, " K"] | Float[Tensor, "P G K"]


def weighted_sum(scores: Tensor, weights: Tensor) -> Tensor:
    """Sum over components, [P, G]: a component that was not scored adds nothing, NaN if none was scored."""
    unscored = scores.isnan()
    total = (scores.masked_fill(unscored, 0.0) * weights).sum(-1)
    return total.masked_fill(unscored.all(-1), torch.nan)
