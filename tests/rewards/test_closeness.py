"""Clicks against boxes, and grids block by block."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import DataError, RecipeError
from guerdon.rewards import block_closeness, box_closeness, box_hit
from guerdon.rewards.closeness import block_shares, box_field


def test_the_field_of_a_box():
    box = torch.tensor([[10.0, 20.0, 4.0, 2.0]], dtype=torch.float64)  # centre (12, 21)
    points = torch.tensor([[[12.0, 21.0], [14.0, 21.0], [12.0, 22.0], [14.0, 22.0], [14.1, 21.0]]], dtype=torch.float64)
    found = box_field(points, box)
    assert torch.allclose(found.distance[0, :4], torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=torch.float64))
    assert found.closeness[0, :4].tolist() == pytest.approx([1.0, math.exp(-0.5), math.exp(-0.5), math.exp(-1)])
    assert found.inside.tolist() == [[True, True, True, True, False]]
    # box and point scaled together
    scaled = box_field(points * 7, box * 7)
    assert torch.allclose(scaled.closeness, found.closeness)
    wide = box_field(points, box, sigma_scale=2.0)
    assert torch.allclose(wide.distance, found.distance / 4)
    assert torch.equal(wide.inside, found.inside)


def test_points_in_texts():
    box = [[0, 0, 10, 10]]
    samples = [["click(5, 5)", "first 1,1 then (5.0  10)", "none 7", "-3,5", "10;10"]]
    assert box_hit(samples, box) == [[1.0, 1.0, 0.0, 0.0, 1.0]]
    assert box_closeness(samples, box)[0] == pytest.approx(
        [1.0, math.exp(-0.5), 0.0, math.exp(-((8 / 5) ** 2) / 2), math.exp(-1)]
    )
    assert box_closeness([["1,1"]], [None]) == [[None]]


@pytest.mark.parametrize("box", [[0, 0, 0, 4], [0, 0, 4, -1]])
def test_a_box_without_area(box):
    with pytest.raises(DataError, match="must have a width and a height above 0"):
        box_hit([["1,1"]], [box])


@pytest.mark.parametrize("box", [[0, 0, 4], "box", [0, 0, None, 4]])
def test_what_is_no_box(box):
    with pytest.raises(DataError, match="box 0 must be four numbers x0, y0, width, height"):
        box_closeness([["1,1"]], [box])


def test_sigma_scale_out_of_range():
    with pytest.raises(RecipeError, match="sigma_scale: must be above 0; got 0"):
        box_closeness([["1,1"]], [[0, 0, 1, 1]], sigma_scale=0.0)


def test_runs():
    found = block_closeness([["123456", "12 3\n9", "", "123456789"]], ["123457"], block=3)
    assert found.closeness == [[[1.0, 2 / 3], [1.0, 0.0], [0.0, 0.0], [1.0, 2 / 3]]]
    assert found.scores[0] == pytest.approx([5 / 6, 0.5, 0.0, 5 / 6])
    assert block_shares("12345", "12399", 2) == [1.0, 0.5, 0.0]


def test_squares_of_a_grid():
    truth = [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    found = list(truth)
    found[0], found[15] = 9, 9
    assert block_shares(found, truth, 2, 4) == [0.75, 1.0, 1.0, 0.75]
    assert block_closeness([["1234"]], ["1934"], block=1, width=2).closeness == [[[1.0, 0.0, 1.0, 1.0]]]


def test_no_answer_and_an_empty_one():
    found = block_closeness([["1"], ["1"]], [None, ""])
    assert found.scores == [[None], [0.0]]
    assert found.closeness == [[[]], [[]]]


def test_sizes_out_of_range():
    with pytest.raises(RecipeError, match="block and width must be at least 1; got 0 and None"):
        block_closeness([["1"]], ["1"], block=0)
