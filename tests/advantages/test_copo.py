"""Consistency-aware advantages: numbers by hand, the modes, identities and edge cases."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guerdon.advantages import copo, grpo
from guerdon.advantages.copo import Mode
from guerdon.errors import RecipeError, ScoreError, ShapeError
from guerdon.rollout import Rollout
from guerdon.signal import Signal

NAN = math.nan
# all right and agreed; all wrong and agreed; all wrong in four ways; half right, the wrong ones apart
REWARDS = [[1.0, 1, 1, 1], [0.0, 0, 0, 0], [0.0, 0, 0, 0], [1.0, 1, 0, 0]]
OUTCOMES = [["a"] * 4, ["b"] * 4, ["b", "c", "d", "e"], ["a", "a", "b", "c"]]


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class TestByHand:
    def test_entropy_in_bits(self):
        found = copo(double(REWARDS), OUTCOMES).consistency_entropy
        torch.testing.assert_close(found, double([0, 0, 2, 1.5]), atol=0, rtol=0)

    def test_entropy_is_between_nothing_and_the_logarithm_of_the_group_size(self):
        answers = [[1] * 6, [1, 1, 2, 2, 3, 3], [1, 2, 3, 4, 5, 6]]
        found = copo(double([[0, 0, 0, 1, 1, 1]] * 3), answers).consistency_entropy
        torch.testing.assert_close(found, double([0, math.log2(3), math.log2(6)]))

    def test_the_global_reward_is_the_accuracy(self):
        assert copo(double(REWARDS), OUTCOMES).global_reward.tolist() == [1, 0, 0, 0.5]

    def test_the_global_advantage(self):
        # R = 1, 0, 0, 1/2: mean 3/8, squares 25 + 9 + 9 + 1 = 44 sixty-fourths over 3
        found = copo(double(REWARDS), OUTCOMES).global_advantages
        std = math.sqrt(44 / 64 / 3)
        expected = double([0.625, -0.375, -0.375, 0.125]) / (std + 1e-6)
        torch.testing.assert_close(found, expected.unsqueeze(-1).expand(4, 4))
        assert found[:, 0].tolist() == pytest.approx([1.30558, -0.78335, -0.78335, 0.26112], abs=1e-5)

    def test_the_local_advantage(self):
        found = copo(double(REWARDS), OUTCOMES).local_advantages
        half = 0.5 / (math.sqrt(1 / 3) + 1e-6)
        torch.testing.assert_close(found, double([[0] * 4, [0] * 4, [0] * 4, [half, half, -half, -half]]))
        torch.testing.assert_close(found, grpo(double(REWARDS), eps=1e-6), atol=0, rtol=0)

    def test_the_local_weight(self):
        found = copo(double(REWARDS), OUTCOMES).local_weight
        agreed = sigmoid(-20 * 1.5)
        torch.testing.assert_close(found, double([[agreed] * 4, [0] * 4, [0] * 4, [0.5, 0.5, 0, 0]]))

    def test_the_blend(self):
        out = copo(double(REWARDS), OUTCOMES, gamma=3.0, rho=1.0)
        expected = out.local_weight * out.local_advantages + (1 - out.local_weight) * out.global_advantages
        torch.testing.assert_close(out.advantages, expected, atol=0, rtol=0)

    def test_the_defaults(self):
        out = copo(double(REWARDS), OUTCOMES)
        same = copo(double(REWARDS), OUTCOMES, gamma=20.0, rho=1.5, mode="soft_with_zero", eps=1e-6)
        assert torch.equal(out.advantages, same.advantages)


class TestModes:
    GATE = (sigmoid(-1.0), sigmoid(-1.0), sigmoid(3.0), sigmoid(2.0))  # gamma 2, rho 0.5

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            ("soft", [[GATE[0]] * 4, [GATE[1]] * 4, [GATE[2]] * 4, [GATE[3]] * 4]),
            ("soft_with_zero", [[GATE[0]] * 4, [0] * 4, [0] * 4, [GATE[3], GATE[3], 0, 0]]),
            ("soft_with_forced", [[0] * 4, [0] * 4, [0] * 4, [GATE[3]] * 4]),
            ("dead_only", [[0] * 4, [0] * 4, [0] * 4, [1] * 4]),
            ("zero_only", [[1] * 4, [0] * 4, [0] * 4, [1, 1, 0, 0]]),
            ("global", [[0] * 4] * 4),
            ("local", [[1] * 4] * 4),
        ],
    )
    def test_weights(self, mode, expected):
        found = copo(double(REWARDS), OUTCOMES, mode=mode, gamma=2.0, rho=0.5)
        torch.testing.assert_close(found.local_weight, double(expected))

    def test_local_is_grpo(self):
        found = copo(double(REWARDS), OUTCOMES, mode="local").advantages
        assert torch.equal(found, grpo(double(REWARDS), eps=1e-6))

    def test_global_is_the_same_for_all_samples_of_a_prompt(self):
        out = copo(double(REWARDS), OUTCOMES, mode="global")
        assert torch.equal(out.advantages, out.global_advantages)
        assert (out.advantages == out.advantages[:, :1]).all()

    def test_the_global_part_can_be_made_smaller(self):
        whole = copo(double(REWARDS), OUTCOMES, mode="soft")
        tenth = copo(double(REWARDS), OUTCOMES, mode="soft", global_coefficient=0.1)
        torch.testing.assert_close(tenth.global_advantages, 0.1 * whole.global_advantages)
        expected = whole.local_weight * whole.local_advantages + (1 - whole.local_weight) * tenth.global_advantages
        torch.testing.assert_close(tenth.advantages, expected)

    def test_the_modes_are_those_of_the_annotation(self):
        for mode in get_args(Mode):
            assert copo(double(REWARDS), OUTCOMES, mode=mode).advantages.isfinite().all()


class TestWhoIsPushedWhere:
    def test_a_group_that_is_all_right_is_pushed_up(self):
        out = copo(double(REWARDS), OUTCOMES)
        assert (out.local_advantages[0] == 0).all()
        assert out.consistency_entropy[0] == 0
        assert out.global_reward[0] == 1
        assert (out.local_weight[0] < 1e-12).all()
        assert (out.advantages[0] > 1).all()

    def test_a_group_that_is_all_wrong_is_pushed_down_whatever_its_entropy(self):
        out = copo(double(REWARDS), OUTCOMES)
        assert (out.local_advantages[1:3] == 0).all()
        assert (out.local_weight[1:3] == 0).all()
        assert (out.advantages[1:3] < -0.7).all()

    def test_without_the_indicator_a_wrong_group_of_many_answers_is_left_alone(self):
        assert (copo(double(REWARDS), OUTCOMES, mode="soft").advantages[2].abs() < 1e-4).all()

    def test_a_prompt_all_right_among_prompts_all_right_is_left_alone(self):
        assert (copo(double([[1, 1], [1, 1]]), [["a", "a"], ["b", "b"]]).advantages == 0).all()

    def test_a_wrong_sample_of_a_good_prompt_is_pushed_up_with_it(self):
        out = copo(double(REWARDS), OUTCOMES)
        assert (out.advantages[3, 2:] == out.global_advantages[3, 2:]).all()
        assert (out.advantages[3, 2:] > 0.2).all()

    def test_a_wrong_sample_does_not_hear_of_its_group(self):
        wrong = double(REWARDS) == 0
        first = copo(double(REWARDS), OUTCOMES)
        for options in ({"gamma": 1.0}, {"rho": 0.1}, {"gamma": 100.0, "rho": 3.0}):
            other = copo(double(REWARDS), OUTCOMES, **options)
            assert torch.equal(first.advantages[wrong], other.advantages[wrong])

    @pytest.mark.parametrize(("mode", "backwards"), [("soft_with_zero", True), ("soft", False), ("local", False)])
    def test_a_prompt_well_above_the_batch_is_pushed_backwards_by_the_indicator(self, mode, backwards):
        # right five times in six among prompts that are right half of the time; the gate of the first is half open
        rewards = double([[1, 1, 1, 1, 1, 0], *[[1, 1, 1, 0, 0, 0]] * 4])
        out = copo(rewards, [["a"] * 5 + ["b"], *["aaabcd"] * 4], mode=mode, rho=0.65)
        right, wrong = out.advantages[0, 0], out.advantages[0, -1]
        assert (right < wrong) == backwards
        # which is w (A_loc of a right sample - A_glo), where a wrong one has the global advantage alone
        if backwards:
            expected = out.local_weight[0, 0] * (out.local_advantages[0, 0] - out.global_advantages[0, 0])
            torch.testing.assert_close(right - wrong, expected)


class TestGate:
    @pytest.mark.parametrize(
        ("answers", "expected"), [("aabb", 0.5), ("aabc", 1.0), ("aaab", 0.0), ("abcd", 1.0), ("aaaa", 0.0)]
    )
    def test_steep_gates_are_steps(self, answers, expected):
        # entropies 1, 1.5, 0.811, 2 and 0 bits against rho = 1
        rewards = double([[1, 1, 0, 0], [1, 0, 0, 0]])
        weight = copo(rewards, [list(answers), list("aaaa")], gamma=1e6, rho=1.0).local_weight[0]
        assert weight.tolist() == pytest.approx([expected, expected, 0, 0])

    def test_half_at_rho(self):
        weight = copo(double([[1, 1, 1, 1]]), [list("aabb")], gamma=7.0, rho=1.0).local_weight
        assert weight.tolist() == [[0.5] * 4]

    def test_without_the_coefficient_agreement_enters_through_the_weight_alone(self):
        first = copo(double(REWARDS), OUTCOMES)
        other = copo(double(REWARDS), [list("abcd")] * 4)
        for name in ("local_advantages", "global_advantages", "global_reward"):
            assert torch.equal(getattr(first, name), getattr(other, name))
        assert not torch.equal(first.local_weight, other.local_weight)


class TestCoefficient:
    def test_by_hand(self):
        # lambda = (3/4) / 2 for G = 4
        out = copo(double(REWARDS), OUTCOMES, consistency_coefficient=True)
        torch.testing.assert_close(out.global_reward, double([1, 0, 0, 0.5 * (1 - 0.375 * 1.5)]))

    @pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
    def test_all_answers_different(self, size):
        rewards = double([[1] + [0] * (size - 1), [1] * size])
        answers = [list(range(size)), [0] * size]
        out = copo(rewards, answers, consistency_coefficient=True)
        torch.testing.assert_close(out.global_reward, double([1 / size**2, 1]))

    def test_it_falls_with_disagreement_at_the_same_accuracy(self):
        answers = [list("aaaa"), list("aaab"), list("aabb"), list("aabc"), list("abcd")]
        found = copo(double([[1, 0, 0, 0]] * 5), answers, consistency_coefficient=True).global_reward
        assert found[0] == 0.25
        assert (found.diff() < 0).all()

    def test_off_by_default(self):
        assert copo(double(REWARDS), OUTCOMES).global_reward[3] == 0.5


@given(rows=st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_identities(rows):
    rewards = double(rows)
    answers = [["right" if r else f"wrong {g % 2}" for g, r in enumerate(row)] for row in rows]
    out = copo(rewards, answers)
    assert out.global_advantages[:, 0].sum().item() == pytest.approx(0, abs=1e-9)
    assert out.local_advantages.sum(-1).abs().max().item() == pytest.approx(0, abs=1e-9)
    shifted = copo(rewards + 3.0, answers)
    torch.testing.assert_close(out.global_advantages, shifted.global_advantages, atol=1e-9, rtol=0)
    assert ((out.local_weight >= 0) & (out.local_weight <= 1)).all()
    assert torch.equal(out.global_reward, rewards.mean(-1))


class TestEdges:
    def test_a_single_prompt_has_no_global_advantage(self):
        out = copo(double([[1, 1, 0]]), [["a", "a", "b"]])
        assert (out.global_advantages == 0).all()
        assert out.advantages.isfinite().all()

    @pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
    def test_prompts_of_equal_reward_have_none(self, value):
        answers = [list("aab"), list("xyy"), list("abb")]
        for coefficient in (False, True):
            out = copo(torch.full((3, 3), value), answers, consistency_coefficient=coefficient)
            assert (out.global_advantages == 0).all()
            assert (out.advantages == 0).all()

    def test_none_is_one_shared_answer(self):
        out = copo(double([[0, 0, 0, 0]]), [[None, None, "a", "b"]])
        assert out.consistency_entropy.item() == 1.5

    def test_answers_are_compared_as_they_are(self):
        out = copo(double([[0, 0], [0, 0], [0, 0]]), [["", ""], ["a", "a "], [(1, 2), (1, 2)]])
        assert out.consistency_entropy.tolist() == [0, 1, 0]

    def test_an_unscored_sample_is_left_out(self):
        rewards, answers = double([[1, NAN, 0, 1], [0, 0, 0, 0]]), [list("azba"), list("cccc")]
        for coefficient in (False, True):
            out = copo(rewards, answers, gamma=2.0, rho=0.5, consistency_coefficient=coefficient)
            for value in out:
                assert value.isfinite().all()
            assert out.consistency_entropy[0].item() == pytest.approx(math.log2(3) - 2 / 3)
            for value in (out.advantages, out.local_advantages, out.global_advantages, out.local_weight):
                assert value[0, 1] == 0
            expected = 2 / 3 if not coefficient else 2 / 3 * (1 - (2 / 3) * (math.log2(3) - 2 / 3) / math.log2(3))
            assert out.global_reward.tolist() == pytest.approx([expected, 0])

    @pytest.mark.parametrize("coefficient", [False, True])
    def test_an_unscored_prompt_is_nothing_to_the_others(self, coefficient):
        answers = [list("aab"), list("ccd"), list("efg")]
        rows = [[1, 1, 0], [0, 0, 1], [NAN] * 3]
        out = copo(double(rows), answers, consistency_coefficient=coefficient)
        alone = copo(double(rows[:2]), answers[:2], consistency_coefficient=coefficient)
        torch.testing.assert_close(out.advantages[:2], alone.advantages)
        assert (out.advantages[2] == 0).all()
        assert out.global_reward[2].isnan()

    def test_a_prompt_with_one_scored_sample(self):
        out = copo(double([[1, NAN], [0, 1]]), [["a", "b"], ["c", "d"]], consistency_coefficient=True)
        assert out.consistency_entropy.tolist() == [0, 1]
        assert out.global_reward.tolist() == [1, 0.25]

    def test_zero_eps(self):
        assert copo(double([[1, 1], [1, 1]]), [["a", "a"]] * 2, eps=0.0).advantages.isfinite().all()

    def test_the_constant_inside_the_logarithm(self):
        found = copo(double([[1, 1], [1, 0]]), [["a", "a"], ["a", "b"]], log_eps=1e-8).consistency_entropy
        assert found.tolist() == pytest.approx([-math.log2(1 + 1e-8), -math.log2(0.5 + 1e-8)], rel=1e-12)
        assert found[0] < 0

    def test_no_gradient_and_no_mutation(self):
        rewards = double(REWARDS).requires_grad_()
        out = copo(rewards, OUTCOMES, consistency_coefficient=True)
        assert not any(value.requires_grad for value in out)
        assert torch.equal(rewards.detach(), double(REWARDS))
        assert out.advantages.dtype == torch.float64

    def test_single_precision(self):
        out = copo(torch.tensor(REWARDS), OUTCOMES)
        assert all(value.dtype == torch.float32 for value in out)


class TestErrors:
    def test_shapes(self, friendly_errors):
        with pytest.raises(ShapeError, match=r"advantages.copo: rewards must be \[P, G\]; got \[16\]"):
            copo(torch.zeros(16), [])
        with pytest.raises(ShapeError, match=r"G >= 2, as one answer cannot agree with itself; got \[4, 1\]"):
            copo(torch.zeros(4, 1), [["a"]] * 4)
        with pytest.raises(ShapeError, match=r"P = 2 lists of G = 3 answers; got 1 lists of \[3\]"):
            copo(torch.zeros(2, 3), [["a"] * 3])
        with pytest.raises(ShapeError, match=r"got 2 lists of \[2, 3\]"):
            copo(torch.zeros(2, 3), [["a"] * 3, ["a"] * 2])

    def test_rewards_and_answers(self):
        with pytest.raises(ScoreError, match=r"rewards\[0, 1\] is infinite"):
            copo(torch.tensor([[0.0, math.inf]]), [["a", "b"]])
        with pytest.raises(ScoreError, match=r"outcomes\[1\] holds an answer that cannot be hashed"):
            copo(torch.zeros(2, 2), [["a", "b"], [["c"], "d"]])

    def test_options(self, friendly_errors):
        with pytest.raises(RecipeError, match=r"mode must be one of .*; got 'sofd'. Did you mean 'soft'"):
            copo(torch.zeros(2, 2), [["a", "b"]] * 2, mode="sofd")  # pyright: ignore[reportArgumentType]
        with pytest.raises(RecipeError, match=r"gamma must be above 0; got 0"):
            copo(torch.zeros(2, 2), [["a", "b"]] * 2, gamma=0.0)
        with pytest.raises(RecipeError, match=r"global_coefficient must be >= 0; got -1"):
            copo(torch.zeros(2, 2), [["a", "b"]] * 2, global_coefficient=-1.0)


class TestOnTheRoad:
    SHAPE = (2, 2, 3)
    ROLLOUT = Rollout(
        ["p", "q"], [["a", "b"], ["c", "c"]], torch.ones(SHAPE).bool(), torch.zeros(SHAPE), indices=[0, 1]
    )

    def test_fields_of_the_rollout(self):
        def answers(samples):
            return [[(float(sample == "a"), sample) for sample in group] for group in samples]

        signal = Signal(rewards=[answers], advantage=copo)
        there = signal.check(set(self.ROLLOUT.available()))
        assert {"local_advantages", "global_advantages", "local_weight", "consistency_entropy"} <= there
        found = signal(self.ROLLOUT)
        assert found.extras["global_reward"].tolist() == [0.5, 0]
        assert found.select(slice(1, 2)).extras["local_weight"].shape == (1, 2)

    def test_a_reward_without_answers(self):
        def length(samples):
            return [[float(len(sample)) for sample in group] for group in samples]

        with pytest.raises(TypeError, match=r"advantages.copo needs the field 'outcomes'"):
            Signal(rewards=[length], advantage=copo)(self.ROLLOUT)
