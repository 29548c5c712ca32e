"""Hypervolume: known volumes, invariances, and what adds nothing."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import ShapeError
from guerdon.metrics import hypervolume, hypervolume_contribution, pareto_mask


def test_one_point_is_the_product_of_its_gaps():
    assert hypervolume([[2.0, 3.0, 4.0]], [1.0, 1.0, 1.0]) == pytest.approx(6.0)
    assert hypervolume([[5.0]], [2.0]) == pytest.approx(3.0)
    assert hypervolume([], [0.0, 0.0]) == 0.0


def test_three_points_in_three_dimensions():
    points = torch.rand(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def box(*chosen: int) -> float:
        return float(points[list(chosen)].amin(0).prod())

    wanted = box(0) + box(1) + box(2) - box(0, 1) - box(0, 2) - box(1, 2) + box(0, 1, 2)
    assert hypervolume(points, [0.0] * 3) == pytest.approx(wanted)
    draws = torch.rand(200_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = (draws.unsqueeze(1) <= points).all(-1).any(-1).double().mean()
    assert hypervolume(points, [0.0] * 3) == pytest.approx(float(share), rel=0.03)


def test_what_changes_nothing_and_what_scales():
    points = [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]
    assert hypervolume(points, [0.0, 0.0]) == hypervolume(points[::-1], [0.0, 0.0]) == 6.0
    assert hypervolume([*points, [1.5, 1.5]], [0.0, 0.0]) == 6.0
    assert hypervolume([[5 * a, b] for a, b in points], [0.0, 0.0]) == pytest.approx(30.0)
    assert hypervolume([[-a, b] for a, b in points], [0.0, 0.0], maximise=[False, True]) == 6.0


def test_points_not_better_everywhere_add_nothing():
    assert hypervolume_contribution([], [2.0, -1.0], [0.0, 0.0]) == 0.0
    assert hypervolume_contribution([[1.0, 1.0]], [1.0, 1.0], [0.0, 0.0]) == 0.0
    assert hypervolume_contribution([[1.0, 2.0]], [2.0, 1.0], [0.0, 0.0]) == 1.0


def test_the_front():
    assert pareto_mask([[1.0, 1.0], [2.0, 0.5], [1.0, 1.0], [0.5, 0.5]]) == [True, True, False, False]
    assert pareto_mask([[0.5, 700.0], [0.6, 650.0]], maximise=[True, False]) == [False, True]
    assert pareto_mask([]) == []


def test_errors():
    with pytest.raises(ShapeError, match=r"points must be \[N, K\]"):
        hypervolume([[1.0, 2.0]], [0.0])
    with pytest.raises(ShapeError, match="finite"):
        hypervolume([[float("nan"), 2.0]], [0.0, 0.0])
