"""Generalised advantage estimation against numbers by hand and against the closed sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guerdon.advantages import gae
from guerdon.errors import BindingError, RecipeError, ScoreError, ShapeError


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one(values: list) -> Tensor:
    """A single sample: [1, 1, T]."""
    return double(values).view(1, 1, -1)


def live(values: list[int]) -> Tensor:
    return torch.tensor(values).bool().view(1, 1, -1)


def test_by_hand():
    # gamma 0.5, lam 0.5; rewards 1 2 3, values 4 5 6
    # delta = 1 + 2.5 - 4, 2 + 3 - 5, 3 - 6 = -0.5, 0, -3; A_2 = -3, A_1 = -0.75, A_0 = -0.5 + 0.25 * -0.75
    out = gae(one([1, 2, 3]), one([4, 5, 6]), live([1, 1, 1]), gamma=0.5, lam=0.5, whiten=False)
    torch.testing.assert_close(out.advantages, one([-0.6875, -0.75, -3]))
    torch.testing.assert_close(out.returns, one([3.3125, 4.25, 3]))


def test_masked_steps_are_skipped_wherever_they_are():
    dense = gae(one([1, 2, 3]), one([4, 5, 6]), live([1, 1, 1]), gamma=0.5, lam=0.5, whiten=False)
    n = math.nan
    sparse = gae(
        one([n, 1, n, n, 2, 3, n]),
        one([n, 4, n, n, 5, 6, n]),
        live([0, 1, 0, 0, 1, 1, 0]),
        gamma=0.5,
        lam=0.5,
        whiten=False,
    )
    where = [1, 4, 5]
    torch.testing.assert_close(sparse.advantages[..., where], dense.advantages)
    torch.testing.assert_close(sparse.returns[..., where], dense.returns)
    masked = [0, 2, 3, 6]
    assert (sparse.advantages[..., masked] == 0).all()
    assert (sparse.returns[..., masked] == 0).all()


def test_a_reward_per_sample_is_paid_at_its_last_live_step():
    mask = live([1, 0, 1, 0])
    values = one([0.5, 0, 0.25, 0])
    once = gae(double([[2.0]]), values, mask, whiten=False)
    spread = gae(one([0, 0, 2.0, 0]), values, mask, whiten=False)
    assert torch.equal(once.advantages, spread.advantages)


def test_lam_one_is_the_return_minus_the_value():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    out = gae(rewards, values, torch.ones(2, 3, 5).bool(), gamma=0.9, lam=1.0, whiten=False)
    discounts = double([0.9**t for t in range(5)])
    for t in range(5):
        expected = (rewards[..., t:] * discounts[: 5 - t]).sum(-1)
        torch.testing.assert_close(out.returns[..., t], expected)
    torch.testing.assert_close(out.advantages, out.returns - values)


def test_lam_zero_is_the_temporal_difference():
    rewards, values = one([1, 2, 3]), one([4, 5, 6])
    out = gae(rewards, values, live([1, 1, 1]), gamma=0.9, lam=0.0, whiten=False)
    torch.testing.assert_close(out.advantages, one([1 + 0.9 * 5 - 4, 2 + 0.9 * 6 - 5, 3 - 6]))


def test_perfect_values_leave_no_advantage():
    out = gae(one([0, 0, 1]), one([1, 1, 1]), live([1, 1, 1]), whiten=True)
    assert (out.advantages == 0).all()
    torch.testing.assert_close(out.returns, one([1, 1, 1]))


def test_the_penalty_is_taken_from_every_live_step():
    mask = live([1, 1, 0])
    logp_old, logp_ref = one([-1, -2, math.nan]), one([-1.5, -1, math.nan])
    found = gae(double([[1.0]]), one([0, 0, 0]), mask, logp_old, logp_ref, beta=0.1, whiten=False)
    by_hand = gae(one([-0.05, 1.1, 0]), one([0, 0, 0]), mask, whiten=False)
    torch.testing.assert_close(found.advantages, by_hand.advantages)


def test_the_exact_divergence_takes_the_place_of_the_sampled_one():
    mask, kl = live([1, 1, 0]), one([0.25, 1.5, math.nan])
    found = gae(double([[1.0]]), one([0, 0, 0]), mask, kl_old=kl, beta=0.1, kl_estimator="exact", whiten=False)
    by_hand = gae(one([-0.025, 0.85, 0]), one([0, 0, 0]), mask, whiten=False)
    torch.testing.assert_close(found.advantages, by_hand.advantages)


def test_nothing_but_spans_is_pure_local_credit():
    rewards, values = one([1, 0, -1]), one([0.5, 0.25, 0])
    out = gae(rewards, values, live([1, 1, 1]), gamma=0.0, lam=0.0, whiten=False)
    assert torch.equal(out.advantages, rewards - values)
    nothing = gae(one([0, 0, 0]), one([0, 0, 0]), live([1, 1, 1]))
    assert (nothing.advantages == 0).all()
    assert (nothing.returns == 0).all()
    scalar = gae(double([[3.0]]), one([0, 0, 0]), live([1, 1, 1]), lam=1.0, whiten=False)
    assert torch.equal(scalar.advantages, one([3, 3, 3]))


def test_whitening_is_over_live_steps():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.rand(2, 3, 5, generator=generator) < 0.6
    plain, white = (gae(rewards, values, mask, whiten=whiten) for whiten in (False, True))
    assert torch.equal(plain.returns, white.returns)
    torch.testing.assert_close(white.advantages[mask].mean(), double(0.0), atol=1e-12, rtol=0)
    torch.testing.assert_close(white.advantages[mask].std(), double(1.0), atol=1e-6, rtol=0)
    assert (white.advantages[~mask] == 0).all()


def test_an_unscored_sample_changes_nothing_for_the_others():
    values = torch.rand(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 3, 4).bool()
    out = gae(double([[1, math.nan, 0]]), values, mask)
    others = gae(double([[1, 0]]), values[:, [0, 2]], mask[:, [0, 2]])
    torch.testing.assert_close(out.advantages[:, [0, 2]], others.advantages)
    assert (out.advantages[:, 1] == 0).all()
    assert torch.equal(out.returns[:, 1], values[:, 1])


def test_no_live_step():
    out = gae(double([[1.0]]), one([math.nan, math.nan]), live([0, 0]))
    assert (out.advantages == 0).all()
    assert (out.returns == 0).all()


def test_no_gradient():
    values = one([1, 2]).requires_grad_()
    out = gae(double([[1.0]]), values, live([1, 1]))
    assert not out.advantages.requires_grad
    assert not out.returns.requires_grad


def test_errors(friendly_errors):
    values, mask = torch.zeros(2, 3, 4), torch.ones(2, 3, 4).bool()
    with pytest.raises(ShapeError, match=r"advantages.gae: rewards must be \[P, G\] with G = 3; got \[2, 4\]"):
        gae(torch.zeros(2, 4), values, mask)
    with pytest.raises(BindingError, match=r"beta = 0.1 needs logp_old and logp_ref"):
        gae(torch.zeros(2, 3), values, mask, beta=0.1)
    with pytest.raises(BindingError, match=r"kl_estimator: exact needs kl_old"):
        gae(torch.zeros(2, 3), values, mask, beta=0.1, kl_estimator="exact")
    with pytest.raises(RecipeError, match=r"kl_estimator: must be k1 or exact; got 'k9'"):
        gae(torch.zeros(2, 3), values, mask, beta=0.1, kl_estimator="k9")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ScoreError, match=r"rewards\[0, 1\] is infinite"):
        gae(torch.tensor([[0.0, math.inf, 0.0]] * 2), values, mask)
