"""Pareto fronts and the volume they dominate: how good a set of trade-offs between several objectives is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from guerdon.errors import ShapeError, require


def hypervolume(points: Any, reference: Any, *, maximise: Sequence[bool] | None = None) -> float:
    """Volume of the union of the boxes that lie between a reference and each point.

    Args:
        points: [N, K], rows of a tensor, array or list; N may be 0.
        reference: [K]; a point that is not better in every objective adds nothing.
        maximise: [K], False where less is better; None = more is better in all.

    Returns:
        The volume, in the product of the objectives' units; 0 of no points.

    Raises:
        ShapeError: the parts do not agree on K, or a number is not finite.

    Example:
        >>> hypervolume([[1.0, 2.0], [2.0, 1.0], [0.5, 0.5]], [0.0, 0.0])
        3.0

    Source:
        Zitzler and Thiele 1998, the S-metric; computed exactly by moocore.
    """
    found, origin = _oriented(points, reference, maximise)
    better = found[(found > origin).all(1)]
    if not len(better):
        return 0.0
    return float(require("moocore", "metrics").hypervolume(-better, ref=-origin))


def hypervolume_contribution(
    front: Any, point: Any, reference: Any, *, maximise: Sequence[bool] | None = None
) -> float:
    """How much volume a point adds to those of a front; at least 0.

    Args:
        front: [N, K]; N may be 0.
        point: [K].
        reference: [K].
        maximise: [K], as for `hypervolume`.

    Returns:
        Volume with the point minus volume without.

    Raises:
        ShapeError: the parts do not agree on K, or a number is not finite.

    Example:
        >>> hypervolume_contribution([[1.0, 2.0]], [2.0, 1.0], [0.0, 0.0])
        1.0
    """
    rows = [*_array(front).reshape(-1, len(_array(reference))), _array(point)]
    with_point = hypervolume(rows, reference, maximise=maximise)
    return max(with_point - hypervolume(rows[:-1], reference, maximise=maximise), 0.0)


def pareto_mask(points: Any, *, maximise: Sequence[bool] | None = None) -> list[bool]:
    """Which points no other point beats: at least as good in every objective and better in one; of equals the first.

    Args:
        points: [N, K].
        maximise: [K], as for `hypervolume`.

    Returns:
        N times True or False.

    Raises:
        ShapeError: points is not [N, K], or a number is not finite.

    Example:
        >>> pareto_mask([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
        [True, True, False]
    """
    array = _array(points)
    if array.size == 0:
        return []
    found, _ = _oriented(array, np.zeros(array.shape[-1]), maximise)
    return [bool(kept) for kept in require("moocore", "metrics").is_nondominated(-found)]


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.tolist() if hasattr(values, "tolist") else values, dtype=np.float64)


def _oriented(points: Any, reference: Any, maximise: Sequence[bool] | None) -> tuple[np.ndarray, np.ndarray]:
    """Points and reference with more being better."""
    origin = _array(reference)
    found = _array(points).reshape(-1, max(len(origin), 1)) if len(_array(points)) == 0 else _array(points)
    signs = np.where([True] * len(origin) if maximise is None else list(maximise), 1.0, -1.0)
    if origin.ndim != 1 or found.ndim != 2 or not found.shape[1] == len(origin) == len(signs):
        raise ShapeError(
            f"metrics.hypervolume: points must be [N, K], reference and maximise [K]; got {list(found.shape)}, "
            f"{list(origin.shape)} and {len(signs)} flags."
        )
    if not (np.isfinite(found).all() and np.isfinite(origin).all()):
        raise ShapeError("metrics.hypervolume: every number must be finite.")
    return found * signs, origin * signs
