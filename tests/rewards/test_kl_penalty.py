"""The divergence in the reward on numbers: of samples, of steps, and at a price that follows it."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.advantages import gae
from guerdon.errors import RecipeError, ShapeError
from guerdon.rewards import kl_penalty
from guerdon.rollout import Rollout
from guerdon.signal import Signal

OLD = torch.tensor([[[-1.0, -1.0, math.nan], [-2.0, math.nan, math.nan]]], requires_grad=True)
REF = torch.tensor([[[-2.0, -1.5, math.nan], [-1.0, 0.0, 0.0]]])
MASK = torch.tensor([[[True, True, False], [True, False, False]]])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [-1.5, 1.0]),
        ("k2", [-0.625, -0.5]),
        ("k3", [-(math.exp(-1) + math.exp(-0.5) - 0.5), -(math.e - 2)]),
    ],
)
def test_written_out(estimator, expected):
    found = kl_penalty(estimator=estimator)(OLD, REF, MASK)
    assert found.scores[0].tolist() == pytest.approx(expected)
    assert found.step_scores is None
    assert not found.scores.requires_grad


def test_steps_are_paid_where_they_are_taken():
    found = kl_penalty(steps=True, coefficient=0.5)(OLD, REF, MASK)
    assert found.step_scores is not None
    assert found.step_scores.tolist() == [[[-0.5, -0.25, 0.0], [0.5, 0.0, 0.0]]]
    assert found.scores.tolist() == [[-0.75, 0.5]]
    rollout = Rollout(["p"], [["ab", "c"]], MASK, OLD.detach(), logp_ref=REF, values=torch.zeros(1, 2, 3))

    def length(samples):
        return [[float(len(s)) for s in group] for group in samples]

    stage = kl_penalty(steps=True, coefficient=0.5)
    signal = Signal(rewards={"length": length, "kl": stage}, advantage=lambda rewards, values, mask: rewards)
    assert signal(rollout).rewards.tolist() == [[[-0.5, 1.75, 0.0], [1.5, 0.0, 0.0]]]
    # the same as the penalty that the estimator itself takes off
    plain = gae(torch.tensor([[2.0, 1.0]]), torch.zeros(1, 2, 3), MASK, OLD, REF, beta=0.5)
    assert torch.equal(gae(signal(rollout).rewards, torch.zeros(1, 2, 3), MASK).advantages, plain.advantages)


def test_the_coefficient_follows_the_divergence():
    stage = kl_penalty(coefficient=0.2, target=1.0)
    twice = torch.tensor([[[-1.0, -1.0]]]), torch.tensor([[[-3.0, -3.0]]]), torch.ones(1, 1, 2).bool()
    stage.observe(*twice)  # 2 nats a step, a hundred per cent too many: held at 0.2
    assert stage.metrics() == pytest.approx({"coefficient": 0.2 * 1.02, "divergence": 2.0})
    near = twice[0], torch.tensor([[[-2.1, math.nan]]]), torch.tensor([[[True, False]]])
    stage.observe(*near)  # a tenth too many
    assert stage.coefficient.item() == pytest.approx(0.2 * 1.02 * 1.01)
    stage.observe(twice[0], twice[0], twice[2])  # none: held at -0.2
    assert stage.coefficient.item() == pytest.approx(0.2 * 1.02 * 1.01 * 0.98)
    before = stage.coefficient.item()
    stage.observe(*twice[:2], torch.zeros(1, 1, 2).bool())
    assert stage.coefficient.item() == before
    assert stage(*twice).scores.item() == pytest.approx(-4 * before)


def test_the_coefficient_is_restored_if_it_moves_and_is_the_recipes_if_not():
    twice = torch.tensor([[[-1.0]]]), torch.tensor([[[-3.0]]]), torch.ones(1, 1, 1).bool()
    first, second = kl_penalty(target=1.0), kl_penalty(target=1.0)
    first.observe(*twice)
    second.load_state_dict(first.state_dict())
    first.observe(*twice)
    second.observe(*twice)
    assert first.coefficient.item() == second.coefficient.item() > 1
    fixed = kl_penalty(coefficient=0.3)
    fixed.observe(*twice)
    assert not fixed.state_dict()
    assert fixed.coefficient.item() == pytest.approx(0.3)
    assert fixed.metrics() == {}


def test_no_live_step():
    assert (kl_penalty()(OLD, REF, torch.zeros_like(MASK)).scores == 0).all()


def test_errors(friendly_errors):
    with pytest.raises(ShapeError, match=r"rewards.kl_penalty: logp_ref must be \[P, G, T\]; got \[2, 3\]"):
        kl_penalty()(OLD, REF[0], MASK)
    with pytest.raises(RecipeError, match=r"kl_penalty.coefficient: must be at least 0; got -1"):
        kl_penalty(coefficient=-1.0)
    with pytest.raises(RecipeError, match=r"kl_penalty.target: must be above 0"):
        kl_penalty(target=0.0)
    with pytest.raises(RecipeError, match=r"kl_penalty.coefficient: must be above 0 where the coefficient is steered"):
        kl_penalty(coefficient=0.0, target=1.0)
