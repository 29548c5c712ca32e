"""Which groups carry a signal."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import check_shapes


def mixed_groups(rewards: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """Whether two scored samples of a group have different rewards.

    By comparison, not by a standard deviation above 0: that of equal numbers is often a rounding error.

    Args:
        rewards: [P, G], NaN = not scored.

    Returns:
        bool [P]; False for constant groups and for those with fewer than two scored samples.

    Raises:
        ShapeError: rewards is not [P, G].

    Example:
        >>> mixed_groups(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        tensor([ True, False])
    """
    check_shapes("sampling.mixed_groups", rewards=(rewards, "P G"))
    scored = ~rewards.isnan()
    low = rewards.where(scored, torch.inf).amin(-1)
    high = rewards.where(scored, -torch.inf).amax(-1)
    return high > low
