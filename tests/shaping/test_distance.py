"""Scores that are best at a target."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import RecipeError, ScoreError
from guerdon.shaping import distance


def test_best_at_the_target_and_the_same_on_both_sides():
    scores = torch.tensor([[7.0, 10.0, 13.0, float("nan")]], requires_grad=True)
    shaped = distance(scores, target=10.0, scale=3.0)
    torch.testing.assert_close(shaped[0, :3], torch.tensor([-1.0, 0.0, -1.0]))
    assert shaped[0, 3].isnan()
    (gradient,) = torch.autograd.grad(shaped[0, :3].sum(), scores)
    torch.testing.assert_close(gradient[0, :3], torch.tensor([1 / 3, 0.0, -1 / 3]))


def test_bad_options():
    for options in ({"target": float("inf")}, {"target": 0.0, "scale": 0.0}):
        with pytest.raises(RecipeError):
            distance(torch.zeros(1, 2), **options)
    with pytest.raises(ScoreError):
        distance(torch.tensor([[float("inf")]]), target=0.0)
