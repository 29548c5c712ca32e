"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from guerdon.errors import RecipeError
from guerdon.training.average import WeightAverage


def test_the_average_by_hand():
    weight = nn.Parameter(torch.tensor([0.0]))
    average = WeightAverage([weight], decay=0.15)
    for value in (1.0, 2.0, 3.0):
        weight.data.fill_(value)
        average.update()
    # decays 1/10, then 0.15 twice (2/11 and 3/12 are more): 0.9; 0.15 * 0.9 + 0.85 * 2; 0.15 * 1.835 + 0.85 * 3
    with average.applied():
        assert weight.item() == pytest.approx(0.15 * 1.835 + 0.85 * 3.0)
    assert weight.item() == 3.0
    average.copy_to_weights()
    assert weight.item() == pytest.approx(2.82525)


def test_the_weights_come_back_after_an_error():
    weight = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage([weight], decay=0.9)
    weight.data.fill_(5.0)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert weight.item() == 5.0


def test_its_state_is_the_averages_and_not_the_weights():
    weight = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage([weight], decay=0.9)
    weight.data.fill_(2.0)
    average.update()
    assert set(average.state_dict()) == {"updates", "weight_0"}
    other = WeightAverage([nn.Parameter(torch.tensor([7.0]))], decay=0.9)
    other.load_state_dict(average.state_dict())
    assert other.weight_0.item() == average.weight_0.item() == pytest.approx(1.9)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_out_of_range(decay):
    with pytest.raises(RecipeError, match=r"optim.ema: must be above 0 and below 1"):
        WeightAverage([], decay=decay)
