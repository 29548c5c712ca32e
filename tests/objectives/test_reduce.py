"""The denominator rule on numbers."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import RecipeError, ShapeError
from guerdon.objectives.reduce import masked_mean, reduce_steps

STEPS = torch.tensor([[[1.0, 2.0, 3.0], [4.0, math.nan, math.nan], [math.nan] * 3]], dtype=torch.float64)
MASK = torch.tensor([[[True, True, True], [True, False, False], [False] * 3]])


def test_written_out():
    assert [x.item() for x in reduce_steps(STEPS, MASK, "per_sample")] == [2.0 + 4.0, 3.0]
    assert [x.item() for x in reduce_steps(STEPS, MASK, "per_token")] == [10.0, 4.0]
    assert [x.item() for x in reduce_steps(STEPS, MASK, "constant", max_length=5)] == [2.0, 3.0]


def test_the_count_is_exact_in_low_precision():
    ones = torch.ones(1, 1, 1001, dtype=torch.bfloat16)
    assert reduce_steps(ones, ones.bool(), "per_token")[1] == 1001


def test_masked_mean():
    assert masked_mean(STEPS, MASK) == 2.5
    assert masked_mean(STEPS, torch.zeros_like(MASK)) == 0.0


def test_errors(friendly_errors):
    with pytest.raises(RecipeError, match="per_sample, per_token, constant; got 'mean'"):
        reduce_steps(STEPS, MASK, "mean")
    for length in (None, 0):
        with pytest.raises(RecipeError, match=f"constant needs max_length.*got {length}"):
            reduce_steps(STEPS, MASK, "constant", length)
    with pytest.raises(ShapeError, match=r"objectives.reduce_steps: mask must be \[P, G, T\]; got \[3\]"):
        reduce_steps(STEPS, MASK[0, 0], "per_token")
