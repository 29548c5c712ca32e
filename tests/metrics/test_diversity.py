"""The Vendi score on sets with a known number of kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.errors import RecipeError, ShapeError
from guerdon.metrics import vendi_score


@pytest.mark.parametrize(("count", "expected"), [(200, 54.402059510), (1000, 61.909334792)])
def test_the_reference_values(count, expected):
    features = torch.tensor(np.random.default_rng(0).standard_normal((count, 64)))
    assert vendi_score(features) == pytest.approx(expected, abs=1e-9)


def test_equal_samples_count_once_and_orthogonal_ones_each():
    assert vendi_score(torch.ones(5, 3)) == pytest.approx(1.0)
    assert vendi_score(torch.eye(4)) == pytest.approx(4.0)
    # two kinds of two each
    assert vendi_score(torch.eye(2).repeat(2, 1)) == pytest.approx(2.0)


def test_an_uneven_set_by_hand():
    # shares 3/4 and 1/4: exp(-(0.75 ln 0.75 + 0.25 ln 0.25)); order 2: 1 / (9/16 + 1/16); infinity: 4 / 3
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert vendi_score(features) == pytest.approx(1.7547653506)
    assert vendi_score(features, order=2.0) == pytest.approx(1.6)
    assert vendi_score(features, order=float("inf")) == pytest.approx(4 / 3)
    assert vendi_score(features, order=0.0) == pytest.approx(2.0)


def test_rows_are_brought_to_length_one():
    features = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    assert vendi_score(features) == pytest.approx(2.0)
    assert vendi_score(torch.eye(2), normalise=False) == pytest.approx(2.0)


def test_either_gram_matrix_gives_the_same():
    wide = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).double()
    padded = torch.cat([wide, wide.new_zeros(5, 3)], 1)
    tall = torch.cat([wide @ torch.linalg.qr(wide.T).Q] * 3)
    assert vendi_score(wide) == pytest.approx(vendi_score(padded), abs=1e-12)
    assert vendi_score(tall) == pytest.approx(vendi_score(wide), abs=1e-9)


def test_errors(friendly_errors):
    with pytest.raises(ShapeError, match=r"metrics.vendi_score: features must be \[N, D\]"):
        vendi_score(torch.zeros(3))
    with pytest.raises(ShapeError, match="must have samples and dimensions"):
        vendi_score(torch.zeros(0, 3))
    with pytest.raises(RecipeError, match="order must be >= 0"):
        vendi_score(torch.eye(2), order=-1.0)
