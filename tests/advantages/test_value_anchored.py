"""Value-anchored advantages: values, weights and forms by hand, what is invariant, scores that are missing or negative."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guerdon.advantages import group_advantages, value_anchored
from guerdon.advantages.value_anchored import action_values, adae, step_weights
from guerdon.errors import RecipeError, ScoreError, ShapeError
from guerdon.objectives import policy_gradient

NAN = math.nan
P, G, T = 2, 4, 6
ALL = torch.ones(P, G, T).bool()
REWARDS = torch.rand(P, G, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MASK = torch.arange(T) < torch.tensor([[6, 2, 3, 4], [4, 6, 1, 6]]).unsqueeze(-1)


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(rewards: Tensor = REWARDS, mask: Tensor = ALL, **options: Any) -> Tensor:
    return value_anchored(**options)(rewards, mask).advantages


def form_5(q: Tensor, omega: Tensor, k: float, eps: float) -> Tensor:
    """The quotient as it is written, with alpha = k std."""
    std = q.std(1, unbiased=False, keepdim=True)
    return omega * ((1 + k * std) * q - q.mean(1, keepdim=True)) / (std + eps)


class TestParts:
    def test_values(self):
        assert action_values(double([[1, 2, 4], [0, 0, 1]]), 0.5).tolist() == [[3.0, 4.0, 4.0], [0.25, 0.5, 1.0]]

    def test_values_follow_their_recurrence(self):
        q = action_values(REWARDS, 0.9)
        torch.testing.assert_close(q[..., :-1], REWARDS[..., :-1] + 0.9 * q[..., 1:])
        assert torch.equal(action_values(REWARDS, 0.0), REWARDS)
        torch.testing.assert_close(q[..., 0], sum(0.9**i * REWARDS[..., i] for i in range(T)))

    def test_weights(self):
        assert step_weights(double([[3.0, 2.0, 1.0]])).tolist() == [[1.5, 1.0, 0.5]]
        assert step_weights(double([[0.0, 0.0]])).tolist() == [[1.0, 1.0]]
        assert step_weights(double([[4.0, 0.0, 0.0, 0.0]])).tolist() == [[4.0, 0.0, 0.0, 0.0]]  # at most T
        assert step_weights(double([[4.0, 0.0, 0.0, 0.0]]), omega_max=2.0).tolist() == [[2.0, 0.0, 0.0, 0.0]]
        assert step_weights(double([[3.0, 1.0, 8.0]]), torch.tensor([[True, True, False]]))[0, :2].tolist() == [
            1.5,
            0.5,
        ]

    @given(scale=st.floats(1e-3, 1e3))
    @settings(max_examples=20, deadline=None)
    def test_weights_have_mean_1_and_no_unit(self, scale):
        q = action_values(REWARDS, 0.95)
        torch.testing.assert_close(step_weights(q).mean(-1), torch.ones(P, G, dtype=torch.float64))
        torch.testing.assert_close(step_weights(scale * q), step_weights(q))


class TestForms:
    def test_by_hand(self):
        # one step, two samples: mean 2, std 1
        q = double([[[1.0], [3.0]]])
        one = torch.ones_like(q)
        assert adae(q, one, k=0.5, eps=0.0).flatten().tolist() == [-0.5, 2.5]
        assert adae(q, 2 * one, k=0.5, eps=1.0).flatten().tolist() == [0.0, 4.0]
        assert adae(q, one, k=0.5, eps=0.0, mix="convex").flatten().tolist() == [0.0, 2.0]
        assert adae(-q, one, k=0.5, eps=0.0).flatten().tolist() == [0.5, -2.5]
        assert adae(-q, one, k=0.5, eps=0.0, absolute="abs").flatten().tolist() == [1.5, 0.5]
        assert adae(-q, one, k=0.5, eps=0.0, absolute="abs", mix="convex").flatten().tolist() == [2.0, 0.0]

    def test_it_is_the_quotient_with_alpha_k_times_std(self):
        q = action_values(REWARDS, 0.9)
        omega = step_weights(q)
        torch.testing.assert_close(adae(q, omega, k=0.3, first_n=None, eps=0.0), form_5(q, omega, 0.3, 0.0))
        large = 1e4 * q
        found = adae(large, omega, k=0.3, first_n=None, eps=1e-6)
        torch.testing.assert_close(found, form_5(large, omega, 0.3, 1e-6), rtol=1e-6, atol=0)

    def test_the_convex_form_is_the_convex_mixture(self):
        q = action_values(REWARDS, 0.9)
        mean, std = q.mean(1, keepdim=True), q.std(1, unbiased=False, keepdim=True)
        alpha = 0.3 * std
        expected = ((1 - alpha) * (q - mean) + alpha * q) / std
        torch.testing.assert_close(adae(q, torch.ones_like(q), k=0.3, first_n=None, eps=0.0, mix="convex"), expected)

    def test_convex_minus_additive(self):
        q = action_values(REWARDS, 0.9)
        omega = step_weights(q)
        options: dict[str, Any] = {"k": 0.2, "first_n": 2, "eps": 1e-4}
        gap = adae(q, omega, mix="convex", **options) - adae(q, omega, **options)
        expected = omega * 0.2 * (q.mean(1, keepdim=True) - q)
        torch.testing.assert_close(gap[..., :2], expected[..., :2])
        assert (gap[..., 2:].abs() < 1e-14).all()

    def test_they_have_one_limit(self):
        """As the std goes to 0 all that is left is omega k Q."""
        q = 0.7 + 1e-9 * action_values(REWARDS, 0.9)
        one = torch.ones_like(q)
        for form in ({}, {"mix": "convex"}, {"absolute": "abs"}):
            found = adae(q, one, k=0.5, first_n=None, eps=1e-4, **form)
            torch.testing.assert_close(found, 0.5 * q, rtol=1e-4, atol=1e-4)


class TestStage:
    def test_one_terminal_reward_is_grpo_at_every_step(self):
        rewards = REWARDS[..., 0]
        expected = group_advantages(rewards, bessel=False)
        sparse = torch.zeros(P, G, T, dtype=torch.float64)
        sparse[..., -1] = rewards
        for given_rewards in (rewards, sparse):
            found = value_anchored(gamma=1.0, k=0.0)(given_rewards, ALL)
            torch.testing.assert_close(found.action_values, rewards.unsqueeze(-1).expand(P, G, T))
            torch.testing.assert_close(found.step_weights, torch.ones(P, G, T, dtype=torch.float64))
            torch.testing.assert_close(found.advantages, expected.unsqueeze(-1).expand(P, G, T))

    def test_so_it_is_for_samples_of_different_lengths(self):
        rewards = REWARDS[..., 0]
        expected = group_advantages(rewards, bessel=False).unsqueeze(-1) * MASK
        torch.testing.assert_close(run(rewards, MASK, gamma=1.0, k=0.0), expected)

    def test_a_reward_at_the_end_is_discounted_by_the_live_steps_to_come(self):
        mask = torch.tensor([[[True, True, False, True], [True, False, False, False]]])
        found = value_anchored(gamma=0.5, k=0.0)(double([[8.0, 4.0]]), mask)
        assert found.action_values.tolist() == [[[2.0, 4.0, 0.0, 8.0], [4.0, 0.0, 0.0, 0.0]]]
        # step 0: 2 against 4; step 1: 4 against the 4 that the other has kept since its end; step 3: 8 against 4
        weights = [2 / (14 / 3), 4 / (14 / 3), 8 / (14 / 3)]
        expected = [[-weights[0], 0.0, 0.0, weights[2]], [1.0, 0.0, 0.0, 0.0]]
        torch.testing.assert_close(found.advantages[0], double(expected), atol=1e-3, rtol=0)

    def test_no_discount_of_the_future_leaves_the_rewards(self):
        assert torch.equal(value_anchored(gamma=0.0)(REWARDS, ALL).action_values, REWARDS)

    def test_the_relative_part_has_no_unit_and_the_absolute_one_has(self):
        options: dict[str, Any] = {"eps": 0.0, "first_n": None}
        relative = run(k=0.0, **options)
        torch.testing.assert_close(run(8 * REWARDS, k=0.0, **options), relative)
        absolute = run(k=0.1, **options) - relative
        torch.testing.assert_close(run(8 * REWARDS, k=0.1, **options) - relative, 8 * absolute)

    def test_a_group_of_equal_samples_keeps_an_advantage_in_the_first_steps(self):
        rewards = REWARDS[:, :1].expand(P, G, T)
        found = value_anchored(k=0.2, first_n=2)(rewards, ALL)
        torch.testing.assert_close(found.advantages[..., :2], (0.2 * found.step_weights * found.action_values)[..., :2])
        assert (found.advantages[..., :2] > 0).all()
        assert (found.advantages[..., 2:] == 0).all()

    def test_equal_samples_of_no_value_have_none(self):
        assert (run(torch.zeros(P, G, T)) == 0).all()
        assert (run(torch.zeros(P, G)) == 0).all()

    def test_one_step(self):
        rewards = REWARDS[..., 0]
        expected = group_advantages(rewards, bessel=False) + 0.05 * rewards
        torch.testing.assert_close(run(rewards.unsqueeze(-1), ALL[..., :1]).squeeze(-1), expected)

    def test_masked_steps_are_left_out_but_what_they_earn_counts(self):
        mask = ALL.clone()
        mask[..., -1] = False  # as where the last step of a sampler is not random
        found = value_anchored(k=0.0)(REWARDS, mask)
        q = action_values(REWARDS, 0.95)
        torch.testing.assert_close(found.action_values[..., :-1], q[..., :-1])
        torch.testing.assert_close(found.step_weights[..., :-1].mean(-1), torch.ones(P, G, dtype=torch.float64))
        for part in found:
            assert (part[..., -1] == 0).all()

    def test_step_rewards_take_the_place_of_the_samples_own(self):
        stage = value_anchored()
        assert torch.equal(stage(REWARDS[..., 0], ALL, REWARDS).advantages, stage(REWARDS, ALL).advantages)

    def test_a_sample_that_was_not_scored_is_left_out(self):
        scores = REWARDS[..., 0].clone()
        scores[0, 1] = NAN
        dense = REWARDS.clone()
        dense[0, 1, 2] = NAN
        found = value_anchored()(scores, ALL, dense).advantages
        assert (found[0, 1] == 0).all()
        others = [0, 2, 3]
        alone = value_anchored()(REWARDS[:1, others], ALL[:1, others]).advantages
        torch.testing.assert_close(found[:1, others], alone)

    def test_a_clip_of_weights(self):
        sparse = torch.zeros(1, 2, 4)
        sparse[..., 0] = torch.tensor([1.0, 2.0])
        assert value_anchored(gamma=0.0)(sparse, ALL[:1, :2, :4]).step_weights.amax() == 4
        assert value_anchored(gamma=0.0, omega_max=1.5)(sparse, ALL[:1, :2, :4]).step_weights.amax() == 1.5

    def test_what_is_logged(self):
        stage = value_anchored(gamma=0.0, k=0.0, use_step_weights=False, eps=0.0)
        assert stage.metrics() == {}
        stage(double([[[1.0, 5.0], [3.0, 5.0]]]), torch.ones(1, 2, 2).bool())
        assert stage.metrics() == {"equal_values": 0.5, "size_0": 1.0, "omega_0": 1.0, "size_1": 0.0, "omega_1": 1.0}
        assert stage.state_dict() == {}

    def test_the_loss_takes_it(self):
        logp = torch.zeros(P, G, T, dtype=torch.float64, requires_grad=True)
        found = run(mask=MASK)
        loss = policy_gradient(logp, logp.detach(), found, MASK, denominator="per_token", advantage_clip=5.0)
        loss.total.backward()
        assert logp.grad is not None
        torch.testing.assert_close(logp.grad, -found.clamp(-5, 5))


class TestNegativeRewards:
    def test_are_refused_while_steps_are_weighed(self):
        rewards = REWARDS - 0.5
        with pytest.raises(ScoreError, match=r"a reward is negative \(-0\.\d+\).*use_step_weights: false"):
            run(rewards)
        assert run(rewards, use_step_weights=False).isfinite().all()

    def test_can_be_shifted(self):
        rewards = REWARDS - 2.0
        found = run(rewards, shift_to_nonnegative=True)
        torch.testing.assert_close(found, run(REWARDS - REWARDS.amin()))
        assert torch.equal(run(shift_to_nonnegative=True), run())

    def test_of_unscored_samples_there_are_none(self):
        rewards = REWARDS[..., 0].clone()
        rewards[0, 0] = NAN
        assert run(rewards).isfinite().all()


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"gamma": 1.5}, r"advantages.value_anchored: gamma must be from 0 to 1; got 1.5"),
            ({"k": -1.0}, "k must be >= 0; got -1.0"),
            ({"first_n": -1}, "first_n must be >= 0"),
            ({"eps": -1.0}, "eps must be >= 0"),
            ({"omega_max": 0.5}, "omega_max must be >= 1"),
            ({"absolute": "no"}, "absolute must be signed or abs; got 'no'"),
            ({"mix": "no"}, "mix must be additive or convex; got 'no'"),
        ],
    )
    def test_options(self, options, message, friendly_errors):
        with pytest.raises(RecipeError, match=message):
            value_anchored(**options)

    def test_a_missing_reward_of_a_step_names_sample_and_step(self):
        dense = REWARDS.clone()
        dense[1, 2, 3] = NAN
        with pytest.raises(ScoreError, match="prompt 1, sample 2 has no reward for step 3"):
            run(dense)
        with pytest.raises(ScoreError, match=r"step_rewards\[1, 2, 3\] is nan"):
            value_anchored()(REWARDS[..., 0], ALL, dense)

    def test_infinite(self):
        with pytest.raises(ScoreError, match=r"rewards\[0, 1\] is infinite"):
            run(torch.tensor([[0.0, math.inf]]), ALL[:1, :2])

    def test_shapes(self, friendly_errors):
        with pytest.raises(ShapeError, match=r"rewards must be \[P, G\]; got \[8\]"):
            run(torch.rand(8))
        with pytest.raises(ShapeError, match=r"step_rewards must be \[P, G, T\] with T = 6"):
            value_anchored()(REWARDS[..., 0], ALL, REWARDS[..., :3])
