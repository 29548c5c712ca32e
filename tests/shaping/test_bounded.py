from __future__ import annotations

import pytest
import torch

from guerdon.errors import RecipeError, ScoreError
from guerdon.shaping import ceil, length_penalty, par, poly, sigmoid, tanh
from guerdon.shaping.bounded import sigmoid_polynomial


def test_the_polynomial_is_near_the_sigmoid_and_overshoots_at_its_end():
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64)[1:-1]
    assert (sigmoid_polynomial(x) - torch.sigmoid(x)).abs().max() < 0.02
    torch.testing.assert_close(sigmoid_polynomial(-x) + sigmoid_polynomial(x), torch.ones_like(x))
    assert sigmoid_polynomial(torch.tensor(4.9999, dtype=torch.float64)).item() == pytest.approx(1.011, abs=1e-3)
    assert sigmoid_polynomial(torch.tensor([5.0, 80.0, -5.0])).tolist() == [1.0, 1.0, 0.0]


def test_plain_maps():
    scores = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64)
    assert sigmoid(scores, k=2.0).tolist()[0] == pytest.approx([0.5, 0.8807970779778823, 0.01798620996209156])
    assert tanh(scores).tolist()[0] == pytest.approx([0.0, 0.7615941559557649, -0.9640275800758169])
    assert poly(scores)[0, 1].item() == pytest.approx(0.5 + 0.228788512 - 0.0101309121 + 0.000202669170)
    assert ceil(scores, c=0.5).tolist() == [[0.0, 0.5, -2.0]]
    with pytest.raises(RecipeError, match="k: must be above 0; got -1"):
        sigmoid(scores, k=-1.0)
    with pytest.raises(ScoreError, match=r"shaping.ceil: scores\[0, 0\] is infinite"):
        ceil(torch.tensor([[float("inf")]]), c=1.0)


def test_length_costs_beyond_the_limit_only_and_before_the_shaping():
    scores = torch.zeros(1, 3, dtype=torch.float64)
    found = length_penalty(scores, torch.tensor([[299, 300, 310]]))
    assert found.tolist()[0] == pytest.approx([0.0, 0.0, -0.1])
    inside = par(found, torch.zeros(1, 1, dtype=torch.float64))
    assert inside[0, 2].item() == pytest.approx(0.47502081252106)
