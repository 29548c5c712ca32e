"""The loss of consistency-aware policy optimisation: values and gradients by hand, clips, identities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.advantages import copo, grpo
from guerdon.errors import BindingError, RecipeError, ShapeError
from guerdon.objectives import copo_loss, policy_gradient

MASK = torch.arange(4) < torch.tensor([[4, 1], [3, 2], [2, 4]]).unsqueeze(-1)  # [3, 2, 4]
REWARDS = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
OUTCOMES = [["7", "7"], ["1", "2"], ["7", "8"]]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


LOGP_OLD = -random(3, 2, 4, seed=1).abs()
NEAR = LOGP_OLD + random(3, 2, 4, seed=2, scale=0.05)
FAR = LOGP_OLD + random(3, 2, 4, seed=2, scale=1.5)


def run(logp: Tensor, parts: Any, mask: Tensor = MASK, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss / count, and its gradient with respect to logp."""
    variable = logp.clone().requires_grad_()
    loss = copo_loss(
        variable, LOGP_OLD, parts.local_advantages, parts.global_advantages, parts.local_weight, mask, **options
    )
    value = loss.total / loss.count
    (grad,) = torch.autograd.grad(value, variable)
    return value.detach(), grad


def single(ratio: float, local: float, across: float, weight: float, **options: Any) -> tuple[float, float]:
    """Loss of one step, and its derivative with respect to the logarithm of the ratio."""
    logp = torch.tensor([[[math.log(ratio)]]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    parts = (torch.tensor([[value]], dtype=torch.float64) for value in (local, across, weight))
    loss = copo_loss(logp, zero, *parts, zero == 0, **options)
    loss.total.backward()
    assert logp.grad is not None
    return loss.total.item(), logp.grad.item()


class TestByHand:
    @pytest.mark.parametrize(
        ("ratio", "local", "across", "weight", "loss", "slope"),
        [
            (1.0, 2.0, -1.0, 0.25, 0.25, 0.25),  # 0.25 * -2 + 0.75 * 1
            (1.1, 2.0, -1.0, 0.25, 0.275, 0.275),
            (1.5, 2.0, -1.0, 0.25, 0.525, 1.125),  # local held at 1.2, global goes on
            (0.5, 2.0, -1.0, 0.25, 0.35, -0.25),  # local goes on, global held at 0.8
            (4.0, 2.0, -1.0, 0.25, 1.65, 0.0),  # global held by the dual clip at 3
            (4.0, -2.0, -1.0, 0.5, 4.5, 0.0),  # both held: 3 * 1.5
            (2.5, -2.0, -1.0, 0.5, 3.75, 3.75),
            (0.5, 2.0, 1.0, 0.0, -0.5, -0.5),
            (0.5, 2.0, 1.0, 1.0, -1.0, -1.0),
        ],
    )
    def test_values_and_slopes(self, ratio, local, across, weight, loss, slope):
        assert single(ratio, local, across, weight) == pytest.approx((loss, slope), abs=1e-12)

    def test_other_bounds(self):
        assert single(1.5, 1.0, 0.0, 1.0, clip_high=0.28) == pytest.approx((-1.28, 0))
        assert single(1.5, 1.0, 0.0, 1.0, clip_high=None) == pytest.approx((-1.5, -1.5))
        assert single(4.0, -1.0, 0.0, 1.0, dual_clip=None) == pytest.approx((4, 4))
        assert single(4.0, -1.0, 0.0, 1.0, dual_clip=3.5) == pytest.approx((3.5, 0))

    def test_mean_over_samples_of_means_over_steps(self):
        parts = copo(REWARDS, OUTCOMES, mode="soft", gamma=2.0, rho=0.5)
        value, grad = run(LOGP_OLD, parts)
        torch.testing.assert_close(value, -parts.advantages.mean())
        lengths = MASK.sum(-1, keepdim=True)
        torch.testing.assert_close(grad, -parts.advantages.unsqueeze(-1) * MASK / (6 * lengths))

    def test_dual_clip_has_no_gradient(self):
        """Beyond a ratio of 3 a step with a negative advantage costs 3 |A|, whatever the ratio."""
        for ratio in (3.1, 5.0, 50.0):
            assert single(ratio, -0.7, 0.0, 1.0) == pytest.approx((2.1, 0))


class TestAgainstGrpo:
    @pytest.mark.parametrize("logp", [LOGP_OLD, NEAR, FAR], ids=["on_policy", "near", "far"])
    def test_the_local_mode_is_grpo_with_a_dual_clip(self, logp):
        parts = copo(REWARDS, OUTCOMES, mode="local")
        value, grad = run(logp, parts)
        variable = logp.clone().requires_grad_()
        loss = policy_gradient(variable, LOGP_OLD, grpo(REWARDS, eps=1e-6), MASK, dual_clip=3.0)
        (expected,) = torch.autograd.grad(loss.total / loss.count, variable)
        torch.testing.assert_close(value, (loss.total / loss.count).detach())
        torch.testing.assert_close(grad, expected)

    def test_within_the_trust_region_it_is_grpo(self):
        parts = copo(REWARDS, OUTCOMES, mode="local")
        value, grad = run(NEAR, parts)
        variable = NEAR.clone().requires_grad_()
        loss = policy_gradient(variable, LOGP_OLD, grpo(REWARDS, eps=1e-6), MASK)
        loss.total.backward()
        torch.testing.assert_close(value * 6, loss.total.detach())
        torch.testing.assert_close(grad * 6, variable.grad)

    def test_on_policy_the_blend_with_any_objective_is_the_same(self):
        parts = copo(REWARDS, OUTCOMES, gamma=2.0, rho=0.5)
        value, grad = run(LOGP_OLD, parts)
        variable = LOGP_OLD.clone().requires_grad_()
        loss = policy_gradient(variable, LOGP_OLD, parts.advantages, MASK)
        loss.total.backward()
        torch.testing.assert_close(value * 6, loss.total.detach())
        torch.testing.assert_close(grad * 6, variable.grad)

    def test_off_policy_each_part_is_clipped_apart(self):
        assert single(1.5, 2.0, -1.0, 0.5)[1] == pytest.approx(0.75)
        zero = torch.zeros(1, 1, 1)
        logp = torch.full((1, 1, 1), math.log(1.5), requires_grad=True)
        policy_gradient(logp, zero, torch.tensor([[0.5]]), zero == 0).total.backward()
        assert logp.grad is not None
        assert logp.grad.item() == 0

    def test_groups_of_one_kind_are_not_wasted(self):
        dead = (REWARDS[:, :1] == REWARDS).all(-1)
        _, grad = run(NEAR, copo(REWARDS, OUTCOMES))
        _, plain = run(NEAR, copo(REWARDS, OUTCOMES, mode="local"))
        assert dead.tolist() == [True, True, False]
        assert (grad[dead][MASK[dead]] != 0).all()
        assert (plain[dead] == 0).all()
        assert (grad[0][MASK[0]] < 0).all()  # all right: made likelier
        assert (grad[1][MASK[1]] > 0).all()  # all wrong: made less likely

    def test_a_scale_of_the_global_part_is_a_scale_of_its_loss(self):
        parts = copo(REWARDS, OUTCOMES, mode="soft")
        scaled = copo(REWARDS, OUTCOMES, mode="soft", global_coefficient=0.1)
        alone = parts._replace(local_advantages=torch.zeros_like(REWARDS))
        local = parts._replace(global_advantages=torch.zeros_like(REWARDS))
        torch.testing.assert_close(run(FAR, scaled)[0], run(FAR, local)[0] + 0.1 * run(FAR, alone)[0])


def test_a_wrong_sample_learns_from_the_batch_alone():
    wrong = REWARDS == 0
    first = run(NEAR, copo(REWARDS, OUTCOMES))[1]
    parts = copo(REWARDS, OUTCOMES, gamma=0.3, rho=0.1)
    parts = parts._replace(local_advantages=parts.local_advantages * 5 - 1)
    other = run(NEAR, parts)[1]
    assert torch.equal(first[wrong], other[wrong])
    assert not torch.equal(first[~wrong], other[~wrong])


class TestMetrics:
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        out = copo(REWARDS, OUTCOMES, mode="zero_only")
        return out.local_advantages, out.global_advantages, out.local_weight

    def test_wrong_samples_that_are_pushed_up(self):
        # zero_only: the three wrong samples have the global advantage of their prompt, -1, -1 and 0
        local, across, weight = self.parts()
        found = copo_loss(LOGP_OLD, LOGP_OLD, local, across, weight, MASK, None, REWARDS).metrics
        assert found["wrong_raised"] == 0
        found = copo_loss(LOGP_OLD, LOGP_OLD, local, across + 0.5, weight, MASK, None, REWARDS).metrics
        assert found["wrong_raised"].item() == pytest.approx(1 / 3)
        right = torch.ones_like(REWARDS)
        assert copo_loss(LOGP_OLD, LOGP_OLD, local, across, weight, MASK, None, right).metrics["wrong_raised"] == 0
        assert "wrong_raised" not in copo_loss(LOGP_OLD, LOGP_OLD, local, across, weight, MASK).metrics

    def test_the_others(self):
        local, across, weight = self.parts()
        found = copo_loss(LOGP_OLD, LOGP_OLD, local, across, weight, MASK, LOGP_OLD - 0.1).metrics
        assert found["local_weight"].item() == pytest.approx(0.5)
        assert found["ratio_mean"] == 1
        assert found["kl"].item() == pytest.approx(math.exp(-0.1) + 0.1 - 1)


class TestDivergence:
    def test_it_is_added_to_every_step(self):
        parts = copo(REWARDS, OUTCOMES)
        ref = LOGP_OLD - 0.3
        plain, _ = run(LOGP_OLD, parts)
        found, grad = run(LOGP_OLD, parts, logp_ref=ref, beta=0.5, kl_estimator="k2")
        torch.testing.assert_close(found - plain, torch.tensor(0.5 * 0.09 / 2, dtype=torch.float64))
        lengths = MASK.sum(-1, keepdim=True)
        torch.testing.assert_close(grad - run(LOGP_OLD, parts)[1], 0.5 * 0.3 * MASK.double() / (6 * lengths))

    def test_it_needs_a_reference(self):
        with pytest.raises(BindingError, match=r"beta = 0.1 needs the field logp_ref"):
            run(LOGP_OLD, copo(REWARDS, OUTCOMES), beta=0.1)


class TestEdges:
    def test_masked_steps_are_nothing(self):
        parts = copo(REWARDS, OUTCOMES)
        value, grad = run(FAR, parts)
        poisoned_value, poisoned_grad = run(FAR.masked_fill(~MASK, math.nan), parts)
        assert torch.equal(value, poisoned_value)
        assert torch.equal(grad, poisoned_grad)
        assert (grad[~MASK] == 0).all()

    def test_a_sample_without_steps_counts_and_adds_nothing(self):
        parts = copo(REWARDS, OUTCOMES)
        mask = MASK.clone()
        mask[0, 0] = False
        value, _ = run(LOGP_OLD, parts, mask)
        torch.testing.assert_close(value, -(parts.advantages.sum() - parts.advantages[0, 0]) / 6)

    def test_no_gradient_to_the_advantages(self):
        parts = [value.clone().requires_grad_() for value in TestMetrics().parts()]
        assert not copo_loss(LOGP_OLD, LOGP_OLD, *parts, MASK).total.requires_grad

    def test_errors(self, friendly_errors):
        local, across, weight = TestMetrics().parts()
        with pytest.raises(ShapeError, match=r"objectives.copo_loss: global_advantages must be \[P, G\]"):
            copo_loss(LOGP_OLD, LOGP_OLD, local, across[:, 0], weight, MASK)
        with pytest.raises(RecipeError, match=r"dual_clip must be above 1"):
            copo_loss(LOGP_OLD, LOGP_OLD, local, across, weight, MASK, dual_clip=0.5)
        with pytest.raises(RecipeError, match=r"clip_low must be >= 0"):
            copo_loss(LOGP_OLD, LOGP_OLD, local, across, weight, MASK, clip_low=-0.1)
