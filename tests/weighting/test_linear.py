"""Fixed weights on numbers."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import RecipeError, ShapeError
from guerdon.weighting import linear

NAN = math.nan
SCORES = torch.tensor([[[1.0, 4.0], [NAN, 2.0], [NAN, NAN]]])
NAMES = ("right", "short")


@pytest.mark.parametrize("weights", [{"short": 0.5, "right": 2.0}, [2.0, 0.5]], ids=["names", "order"])
def test_the_weighted_sum(weights):
    found = linear(SCORES, NAMES, weights=weights)
    assert found.rewards[0, :2].tolist() == [4.0, 1.0]
    assert found.rewards[0, 2].isnan()
    assert found.weights.tolist() == [2.0, 0.5]


def test_without_weights_each_counts_once():
    found = linear(SCORES)
    assert found.rewards[0, :2].tolist() == [5.0, 2.0]
    assert found.weights.tolist() == [1.0, 1.0]


def test_gradient_flows_to_scores():
    scores = SCORES.clone().requires_grad_()
    linear(scores, weights=[2.0, 0.5]).rewards[0, :2].sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[[2.0, 0.5], [0.0, 0.5], [0.0, 0.0]]]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (NAMES, {"right": 1.0}, "no weight for short"),
        (NAMES, {"right": 1.0, "short": 1.0, "shrot": 1.0}, "no component 'shrot' to weigh. Did you mean 'short'"),
        ((), {"right": 1.0}, "need the names of all 2 components"),
        (NAMES, [1.0], "must be 2 numbers, one per component; got 1"),
    ],
)
def test_wrong_weights(names, weights, message):
    with pytest.raises(RecipeError, match=message):
        linear(SCORES, names, weights=weights)


def test_wrong_shape(friendly_errors):
    with pytest.raises(ShapeError, match=r"weighting.linear: scores must be \[P, G, K\]; got \[2, 3\]"):
        linear(torch.zeros(2, 3))
