"""Dynamic sampling: which groups are kept, and what happens when they do not suffice."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import DataError, RecipeError, ShapeError
from guerdon.sampling import dynamic, uniform
from guerdon.sampling.mixed import mixed_groups

NAN = math.nan


def test_mixed_groups():
    rewards = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, 0], [NAN, 1, 1], [NAN, 0, 1], [NAN, NAN, 1], [NAN] * 3])
    assert mixed_groups(rewards).tolist() == [False, False, True, False, True, False, False]


def test_equal_rewards_whose_std_is_not_zero():
    rewards = torch.full((1, 7), 0.1)
    assert rewards.std() > 0
    assert mixed_groups(rewards).tolist() == [False]


def test_the_smallest_difference_counts():
    one = torch.tensor(1.0)
    assert mixed_groups(torch.stack([one, torch.nextafter(one, one * 2)]).unsqueeze(0)).tolist() == [True]


def test_the_first_or_the_named_component_decides():
    scores = torch.tensor([[[1.0, 0.2], [1.0, 0.1]], [[0.0, 0.3], [1.0, 0.3]]])
    names = ("correct", "short")
    assert dynamic().keep(scores, names).tolist() == [False, True]
    assert dynamic().keep(scores).tolist() == [False, True]
    assert dynamic(component="short").keep(scores, names).tolist() == [True, False]


def test_prompts_are_drawn_as_by_uniform():
    one, other = dynamic(), uniform()
    for sampler in (one, other):
        sampler.prepare(7, 1)
    assert one.draw(20) == other.draw(20)


def test_shortage():
    assert dynamic(max_draws=4).draws_max == 4
    with pytest.raises(DataError, match=r"only 3 of 8 groups .* after 4 draws.*set on_shortage: train"):
        dynamic(max_draws=4).shortage(kept=3, wanted=8)
    dynamic(on_shortage="train").shortage(kept=3, wanted=8)


def test_errors(friendly_errors):
    with pytest.raises(RecipeError, match="max_draws must be at least 1; got 0"):
        dynamic(max_draws=0)
    with pytest.raises(RecipeError, match="on_shortage must be 'raise' or 'train'; got 'stop'"):
        dynamic(on_shortage="stop")
    with pytest.raises(RecipeError, match=r"no component 'corect'\. Did you mean 'correct'"):
        dynamic(component="corect").keep(torch.zeros(1, 2, 1), ("correct",))
    with pytest.raises(ShapeError, match=r"sampling.dynamic: scores must be \[P, G, K\]; got \[1, 2\]"):
        dynamic().keep(torch.zeros(1, 2))
    with pytest.raises(ShapeError, match=r"sampling.mixed_groups: rewards must be \[P, G\]; got \[2\]"):
        mixed_groups(torch.zeros(2))
