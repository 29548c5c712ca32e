from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import RecipeError
from guerdon.weighting import tri_factor

NAMES = ("a", "b", "c")


def draws(seed: int = 0, size: int = 3) -> torch.Tensor:
    return torch.randn(4, 500, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_without_factors_the_prior_is_left():
    stage = tri_factor(base={"a": 1.0, "b": 2.0, "c": 5.0}, alpha=0.0, kappa=0.0, lam=0.0)
    assert stage(draws(), NAMES).weights.tolist() == pytest.approx([0.125, 0.25, 0.625])


def test_a_copy_shares_the_weight_of_its_original():
    z = draws()
    z[..., 1] = z[..., 0]
    weights = tri_factor(alpha=0.0)(z, NAMES).weights
    assert (weights[0] + weights[1]).item() == pytest.approx(weights[2].item(), rel=0.1)


def test_the_weakest_gets_the_whole_factor_and_none_if_all_targets_are_met():
    z = draws() + torch.tensor([0.0, 1.0, 3.0])
    stage = tri_factor(alpha=1.5, lam=0.0)
    stage.observe(z, NAMES)
    weakness, _, _ = stage.factors(stage.averages, NAMES)
    assert weakness[0].item() == pytest.approx(math.exp(1.5))
    assert weakness[0] > weakness[1] > weakness[2] == 1
    assert tri_factor(lam=0.0)(z + 9, NAMES).weights.tolist() == pytest.approx([1 / 3] * 3)


def test_risk_grows_with_the_share_below_the_floor():
    z = draws()
    for floor, ratio in ((-99.0, 1.0), (99.0, 3.0)):
        stage = tri_factor(floors={"a": floor}, alpha=0.0, lam=0.0)
        weights = stage(z, NAMES).weights
        assert (weights[0] / weights[1]).item() == pytest.approx(ratio)


def test_weights_go_with_their_components_and_state_is_restored():
    z = draws() * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 0.5, -1.0])
    order = [2, 0, 1]
    plain = tri_factor()(z, NAMES).weights
    torch.testing.assert_close(tri_factor()(z[..., order], NAMES).weights, plain[order])
    assert plain.sum().item() == pytest.approx(1.0)
    assert (plain > 0).all()
    first, second = tri_factor(eta=0.5), tri_factor(eta=0.5)
    first.observe(z, NAMES)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(draws(1), NAMES).weights, second(draws(1), NAMES).weights)


def test_what_cannot_be_is_an_error():
    with pytest.raises(RecipeError, match="severity: all are 0"):
        tri_factor(severity=dict.fromkeys(NAMES, 0.0))(draws(), NAMES)
    with pytest.raises(RecipeError, match="there is no component 'd'"):
        tri_factor(base={"d": 1.0})(draws(), NAMES)
    constant = draws()
    constant[..., 0] = 1.0
    assert tri_factor()(constant, NAMES).weights.isfinite().all()
