"""Fields of random pairs, for tests of preference losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fields(b: int = 4, seed: int = 0, *, reference: bool = True) -> dict[str, Tensor]:
    """Pairs of other lengths on both sides, with NaN at masked steps."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for side, length in (("chosen", 5), ("rejected", 7)):
        lengths = torch.randint(1, length + 1, (b,), generator=generator)
        mask = torch.arange(length) < lengths[:, None]
        for name in ("logp", "logp_ref") if reference else ("logp",):
            value = -torch.rand(b, length, dtype=torch.float64, generator=generator) * 3 - 0.01
            found[f"{name}_{side}"] = value.masked_fill(~mask, math.nan)
        found[f"mask_{side}"] = mask
    for side in ("chosen", "rejected"):
        found[f"logp_{side}"].requires_grad_()
    return found


def sums(chosen: float, rejected: float, *, steps: int = 1, reference: bool = True) -> dict[str, Tensor]:
    """One pair whose log-ratios to a reference (of log-probability 0) are given."""
    live = torch.ones(1, steps).bool()
    found = {"mask_chosen": live, "mask_rejected": live}
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        found[f"logp_{side}"] = torch.full((1, steps), value / steps, dtype=torch.float64).requires_grad_()
        if reference:
            found[f"logp_ref_{side}"] = torch.zeros(1, steps, dtype=torch.float64)
    return found
