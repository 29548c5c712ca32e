"""Reward-weighted regression on hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import BindingError, RecipeError, ShapeError
from guerdon.objectives import reward_weighted

REWARDS = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]], dtype=torch.float64)
IMITATION = torch.tensor([[1.0, 5.0], [2.0, 4.0]], dtype=torch.float64)


def weights(rewards=REWARDS, **options):
    imitation = IMITATION.clone().requires_grad_()
    reward_weighted(rewards, imitation, **options).total.backward()
    return imitation.grad


def test_softmax_weights_sum_to_one_in_every_group():
    torch.testing.assert_close(weights(), torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64))
    loss = reward_weighted(REWARDS, IMITATION)
    assert (loss.total / loss.count).item() == pytest.approx((0.25 + 3.75 + 3.0) / 2)


def test_a_high_temperature_is_plain_fine_tuning_and_a_low_one_keeps_the_best():
    torch.testing.assert_close(weights(temperature=1e9), torch.full((2, 2), 0.5).double())
    torch.testing.assert_close(weights(temperature=1e-3)[0], torch.tensor([0.0, 1.0]).double())


def test_exponential_and_sparse():
    expected = torch.tensor([[0.5, 1.5], [math.e / 2, math.e / 2]], dtype=torch.float64)
    torch.testing.assert_close(weights(weighting="exponential"), expected)
    torch.testing.assert_close(weights(weighting="exponential", largest=0.75)[0], torch.tensor([0.5, 0.75]).double())
    assert weights(weighting="sparse", threshold=1.05).tolist() == [[0.0, 0.5], [0.0, 0.0]]


def test_the_metrics():
    metrics = reward_weighted(REWARDS, IMITATION).metrics
    assert metrics["imitation"].item() == 3.0
    assert metrics["weight_max"].item() == pytest.approx(0.75)
    # (sum w)^2 / sum w^2 = 4 / (1/16 + 9/16 + 1/2), over two prompts
    assert metrics["effective_samples"].item() == pytest.approx(4 / 1.125 / 2)


def test_drift_is_added_for_every_sample_alike():
    drift = torch.tensor([[0.2, 0.4], [0.0, 0.2]], dtype=torch.float64)
    found = reward_weighted(REWARDS, IMITATION, drift, beta=0.5)
    plain = reward_weighted(REWARDS, IMITATION)
    assert (found.total - plain.total).item() == pytest.approx(0.5 * 0.8 / 2)
    assert found.metrics["drift"].item() == pytest.approx(0.2)


def test_unscored_samples_have_no_weight():
    rewards = torch.tensor([[0.0, math.nan], [math.nan, math.nan]], dtype=torch.float64)
    for weighting in ("softmax", "exponential", "sparse"):
        found = weights(rewards, weighting=weighting, threshold=-1.0)
        assert found[0, 0] > 0
        assert found[0, 1] == 0
        assert found[1].tolist() == [0.0, 0.0]


def test_errors(friendly_errors):
    with pytest.raises(RecipeError, match="weighting must be one of softmax, exponential, sparse; got 'softmx'"):
        reward_weighted(REWARDS, IMITATION, weighting="softmx")
    with pytest.raises(RecipeError, match="temperature must be above 0"):
        reward_weighted(REWARDS, IMITATION, temperature=0.0)
    with pytest.raises(BindingError, match=r"beta = 0.1 needs the field drift"):
        reward_weighted(REWARDS, IMITATION, beta=0.1)
    with pytest.raises(ShapeError, match=r"imitation must be \[P, G\]"):
        reward_weighted(REWARDS, IMITATION[0])
