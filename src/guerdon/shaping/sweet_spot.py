"""Sweet spot learning: how close a sample came, in a few tiers, added to a reward for being right.

A binary reward hides how good a failure was, a continuous one is mostly noise; a handful of zones around the ideal
solution lies between. R = C + alpha * tier(closeness).
SSL: Sweet Spot Learning for Differentiated Guidance in Agentic Optimization, 2026, arXiv 2601.22491.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import BindingError, RecipeError, ScoreError, check_shapes

Top = Literal["exclusive", "inclusive"]
Aggregate = Literal["score", "mean", "last", "tiers"]
_WHERE = "shaping.sweet_spot"


def sweet_spot(
    scores: Float[Tensor, "P G"],
    closeness: Sequence[Sequence[Sequence[float]]] | None = None,
    *,
    zones: int = 4,
    alpha: float = 0.5,
    amplification: float = 1.0,
    tiers: Sequence[float] | None = None,
    top: Top = "exclusive",
    aggregate: Aggregate = "score",
) -> Float[Tensor, "P G"]:
    """alpha times the tier of a closeness in [0, 1]: to be added to a reward C of 1 for a right sample.

    Zone z = floor(K S) of K zones, tier (z / K)^m; the last tier, 1, is for S = 1 only. With amplification m = 1 the
    tiers are evenly spaced, with m > 1 the steps grow towards the ideal. Any right sample outranks any wrong one if
    alpha < 1, or if alpha * (largest tier of a wrong sample - smallest tier of a right one) < 1.

    In a recipe the closeness is a component of its own, shaped by this, beside one that says what is right;
    `weighting: linear` adds the two up.

    Args:
        scores: [P, G], closeness S in [0, 1], 1 = ideal; NaN = not scored.
        closeness: [P][G][n], closeness of every step, sub-goal or part of a sample; as rewards such as
            `block_closeness` produce it. Read unless aggregate is `score`. NaN counts as 0.
        zones: K; few are nearly a binary reward, many a continuous one.
        alpha: weight of the tiers, at least 0.
        amplification: m, above 0. 1 for progress, 2 for distances.
        tiers: the K + 1 tiers from 0 to 1 in rising order, in place of (z / K)^m; K of them with top `inclusive`.
        top: `exclusive`: the last tier is for S = 1 only. `inclusive`: for S of at least (K - 1) / K; there are then K
            tiers, (z / (K - 1))^m, and K must be 2 or more.
        aggregate: `score` takes the tier of `scores`, `mean` that of the mean over steps (sub-goals reached), `last` that
            of the last step, `tiers` the mean of the parts' own tiers (blocks of a grid).

    Returns:
        alpha * tier, [P, G].

    Raises:
        ShapeError: scores is not [P, G].
        ScoreError: a closeness is outside [0, 1] by more than 1e-6.
        RecipeError: an option is out of range, or the tiers do not rise from 0 to 1.
        BindingError: aggregate needs the field `closeness`, which is not there.

    Gradient:
        None; tiers are constant but for jumps.

    Edge cases:
        NaN (not scored) stays NaN. A sample without steps has closeness 0. A closeness below a border by less than
        1e-9 / K is above it.

    Example:
        >>> sweet_spot(torch.tensor([[0.0, 0.3, 0.6, 1.0]]), alpha=1.0)
        tensor([[0.0000, 0.2500, 0.5000, 1.0000]])
        >>> sweet_spot(torch.zeros(1, 1), [[[1.0, 0.5]]], aggregate="mean")
        tensor([[0.3750]])

    Source:
        SSL, arXiv 2601.22491: R = C + alpha S with S discretised, K = 4. The values of the tiers, alpha, m and the
        aggregation are our reading, as only the abstract and summaries of the paper were at hand.
    """
    check_shapes(_WHERE, scores=(scores, "P G"))
    table = scores.new_tensor(tier_values(zones, amplification, tiers, top))
    if not alpha >= 0:
        raise RecipeError(f"{_WHERE}.alpha: must be at least 0; got {alpha}.")
    if aggregate not in ("score", "mean", "last", "tiers"):
        raise RecipeError(f"{_WHERE}.aggregate: must be score, mean, last or tiers; got {aggregate!r}.")
    scores = scores.detach()
    if aggregate == "score":
        tier = _tiers(scores.nan_to_num(nan=0.0), table, zones, top)
    elif closeness is None:
        raise BindingError(
            f"{_WHERE}: aggregate {aggregate!r} needs the field closeness [P][G][n], which is not there. Use a reward "
            "that produces it, such as block_closeness, or aggregate: score."
        )
    else:
        rows = [[_aggregated(scores.new_tensor(steps), aggregate, table, zones, top) for steps in g] for g in closeness]
        tier = torch.stack([torch.stack(row) for row in rows])
    return (alpha * tier).masked_fill(scores.isnan(), torch.nan)


def zone_of(closeness: Tensor, zones: int, top: Top = "exclusive") -> Tensor:
    """The zone of a closeness: floor(K S) from 0 to K, or to K - 1 with top `inclusive`.

    Example:
        >>> zone_of(torch.tensor([0.0, 0.25, 0.99, 1.0]), 4).tolist()
        [0, 1, 3, 4]
    """
    wrong = (closeness < -1e-6) | (closeness > 1 + 1e-6)
    if wrong.any():
        raise ScoreError(
            f"{_WHERE}: closeness must be from 0 to 1; got {closeness[wrong][0].item():g}. Scale the reward, 1 = ideal."
        )
    # in double precision, so that 1e-9 is more than rounding
    return (zones * closeness.double() + 1e-9).floor().clamp(0, zones - (top == "inclusive")).long()


def tier_values(
    zones: int, amplification: float = 1.0, tiers: Sequence[float] | None = None, top: Top = "exclusive"
) -> list[float]:
    """The tier of every zone, from 0 to 1.

    Example:
        >>> tier_values(4, 2.0)
        [0.0, 0.0625, 0.25, 0.5625, 1.0]
    """
    if top not in ("exclusive", "inclusive"):
        raise RecipeError(f"{_WHERE}.top: must be exclusive or inclusive; got {top!r}.")
    last = zones - (top == "inclusive")
    if last < 1:
        raise RecipeError(f"{_WHERE}.zones: must be at least {1 + (top == 'inclusive')} with top {top}; got {zones}.")
    if not amplification > 0:
        raise RecipeError(f"{_WHERE}.amplification: must be above 0; got {amplification}.")
    values = [(z / last) ** amplification for z in range(last + 1)] if tiers is None else list(tiers)
    rising = all(low < high for low, high in pairwise(values))
    if len(values) != last + 1 or not rising or values[0] != 0 or values[-1] != 1:
        raise RecipeError(f"{_WHERE}.tiers: must be {last + 1} numbers rising from 0 to 1; got {values}.")
    return values


def _tiers(closeness: Tensor, table: Tensor, zones: int, top: Top) -> Tensor:
    return table[zone_of(closeness, zones, top)]


def _aggregated(steps: Tensor, aggregate: Aggregate, table: Tensor, zones: int, top: Top) -> Tensor:
    steps = steps.nan_to_num(nan=0.0)
    if not len(steps):
        return table[0]
    if aggregate == "tiers":
        return _tiers(steps, table, zones, top).mean()
    return _tiers(steps.mean() if aggregate == "mean" else steps[-1], table, zones, top)
