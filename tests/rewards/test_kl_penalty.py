"""The divergence in the reward on numbers."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import ShapeError
from guerdon.rewards.kl_penalty import kl_penalty

OLD = torch.tensor([[[-1.0, -1.0, math.nan], [-2.0, math.nan, math.nan]]], requires_grad=True)
REF = torch.tensor([[[-2.0, -1.5, math.nan], [-1.0, 0.0, 0.0]]])
MASK = torch.tensor([[[True, True, False], [True, False, False]]])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [-1.5, 1.0]),
        ("k2", [-0.625, -0.5]),
        ("k3", [-(math.exp(-1) + math.exp(-0.5) - 0.5), -(math.e - 2)]),
    ],
)
def test_written_out(estimator, expected):
    found = kl_penalty(OLD, REF, MASK, estimator=estimator)
    assert found[0].tolist() == pytest.approx(expected)
    assert not found.requires_grad


def test_no_live_step():
    assert (kl_penalty(OLD, REF, torch.zeros_like(MASK)) == 0).all()


def test_wrong_shape(friendly_errors):
    with pytest.raises(ShapeError, match=r"rewards.kl_penalty: logp_ref must be \[P, G, T\]; got \[2, 3\]"):
        kl_penalty(OLD, REF[0], MASK)
