"""The steered price of divergence: against the rule by hand, and against `gae` at the price of the moment."""

from __future__ import annotations

import pytest
import torch

from guerdon.advantages import adaptive_gae, gae
from guerdon.errors import RecipeError

MASK = torch.tensor([[[True, True, False], [True, False, False]]])


def divergence(of_sample: float) -> torch.Tensor:
    """So much a sample on average: masked steps hold NaN."""
    found = torch.full(MASK.shape, torch.nan)
    found[0, 0, :2], found[0, 1, 0] = of_sample / 2, of_sample
    return found


def test_it_is_gae_at_the_price_of_the_moment():
    stage = adaptive_gae(beta=0.3, gamma=0.9, lam=0.5, whiten=False)
    rewards, values, kl = torch.tensor([[1.0, 2.0]]), torch.rand(1, 2, 3), divergence(1.5)
    found = stage(rewards, values, MASK, kl)
    options = {"kl_estimator": "exact", "gamma": 0.9, "lam": 0.5, "whiten": False}
    expected = gae(rewards, values, MASK, kl_old=kl, beta=stage.beta.item(), **options)
    assert torch.equal(found.advantages, expected.advantages)
    assert torch.equal(found.returns, expected.returns)


@pytest.mark.parametrize(
    ("of_sample", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 2 / 50), (60.0, 1 + 0.2 * 2 / 50), (0.0, 1 - 0.2 * 2 / 50)],
)
def test_the_rule(of_sample, factor):
    stage = adaptive_gae(beta=0.2, target=6.0, horizon=50.0)
    stage.observe(MASK, divergence(of_sample))
    assert stage.beta.item() == pytest.approx(0.2 * factor)
    assert stage.metrics()["kl"] == pytest.approx(of_sample)


def test_a_steady_divergence_above_the_target_raises_the_price_without_end():
    stage = adaptive_gae(beta=0.01, target=1.0, horizon=10.0)
    for _ in range(100):
        stage.observe(MASK, divergence(3.0))
    assert stage.beta.item() == pytest.approx(0.01 * 1.04**100, rel=1e-4)


@pytest.mark.parametrize("name", ["beta", "target", "horizon"])
def test_errors(name, friendly_errors):
    with pytest.raises(RecipeError, match=f"adaptive_gae.{name}: must be above 0; got 0"):
        adaptive_gae(**{name: 0})
