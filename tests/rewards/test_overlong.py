"""The soft length penalty on numbers."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import RecipeError, ShapeError
from guerdon.rewards.overlong import overlong


def test_written_out():
    lengths = torch.tensor([[0, 6, 7, 8, 9, 10, 11, 99]])
    expected = [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0]
    assert overlong(lengths, max_length=10, cache=4).tolist() == [expected]


@pytest.mark.parametrize("cache", [0, 11])
def test_a_cache_that_does_not_fit(cache):
    with pytest.raises(RecipeError, match=f"cache must be from 1 to max_length = 10 steps; got {cache}"):
        overlong(torch.tensor([[1]]), max_length=10, cache=cache)


def test_wrong_shape(friendly_errors):
    with pytest.raises(ShapeError, match=r"rewards.overlong: lengths must be \[P, G\]; got \[3\]"):
        overlong(torch.tensor([1, 2, 3]), max_length=10, cache=2)
