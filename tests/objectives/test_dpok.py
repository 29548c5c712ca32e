"""DPOK's loss on hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import RecipeError, ShapeError
from guerdon.objectives import dpok, policy_gradient

LOGP = torch.tensor([[[-1.0, -2.0], [-0.5, -1.5]]], dtype=torch.float64)
REWARDS = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
MASK = torch.ones(1, 2, 2).bool()
KL = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]], dtype=torch.float64)


def test_value():
    found = dpok(LOGP, LOGP, REWARDS, MASK, KL, beta=0.1)
    # -(2 * -3) = 6 and -(-1 * -2) = -2; divergences 0.3 and 0.7
    assert found.total.item() == pytest.approx(6.0 - 2.0 + 0.1 * 1.0)
    assert found.count.item() == 2.0
    assert found.metrics["kl"].item() == pytest.approx(0.25)


def test_alpha_weighs_the_reward_alone():
    found = dpok(LOGP, LOGP, REWARDS, MASK, KL, alpha=3.0, beta=0.1)
    assert found.total.item() == pytest.approx(3 * 4.0 + 0.1)


def test_gradient_goes_to_logp_and_to_the_divergence():
    logp, kl = LOGP.clone().requires_grad_(), KL.clone().requires_grad_()
    dpok(logp, LOGP, REWARDS, MASK, kl, beta=0.1).total.backward()
    assert logp.grad.tolist() == [[[-2.0, -2.0], [1.0, 1.0]]]
    assert kl.grad.tolist() == [[[0.1, 0.1], [0.1, 0.1]]]


def test_importance_has_the_same_gradient_on_policy_and_follows_the_ratio_off_it():
    logp = LOGP.clone().requires_grad_()
    dpok(logp, LOGP, REWARDS, MASK, KL, importance=True).total.backward()
    assert logp.grad.tolist() == [[[-2.0, -2.0], [1.0, 1.0]]]
    moved = (LOGP + 0.5).requires_grad_()
    dpok(moved, LOGP, REWARDS, MASK, KL, importance=True).total.backward()
    torch.testing.assert_close(moved.grad, torch.tensor([[[-2.0, -2.0], [1.0, 1.0]]]).double() * math.exp(0.5))


def test_a_clipped_ratio_is_the_policy_gradients():
    moved = LOGP + torch.tensor([0.5, -0.5])
    found = dpok(moved, LOGP, REWARDS, MASK, KL, beta=0.0, importance=True, clip=0.1)
    other = policy_gradient(moved, LOGP, REWARDS, MASK, clip_low=0.1, clip_high=0.1, denominator="per_token")
    torch.testing.assert_close(found.total, other.total)
    assert found.metrics["clip_share"] > 0


def test_masked_steps_are_left_out():
    mask = torch.tensor([[[True, False], [True, True]]])
    broken = KL.clone()
    broken[0, 0, 1] = math.nan
    found = dpok(LOGP.masked_fill(~mask, math.nan), LOGP, REWARDS, mask, broken, beta=1.0)
    assert found.total.item() == pytest.approx(2.0 - 2.0 + 0.8)


def test_errors(friendly_errors):
    with pytest.raises(RecipeError, match="used with importance: true only"):
        dpok(LOGP, LOGP, REWARDS, MASK, KL, clip=0.1)
    with pytest.raises(ShapeError, match=r"objectives.dpok: kl must be \[P, G, T\]"):
        dpok(LOGP, LOGP, REWARDS, MASK, KL[0])
