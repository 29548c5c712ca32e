"""Group advantages: numbers, identities and edge cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guerdon.advantages import dr_grpo, group_advantages, grpo, normalise_then_sum, reinforce, rloo
from guerdon.errors import RecipeError, ScoreError, ShapeError

NAN = math.nan
GROUP_BASED = [grpo, dr_grpo, rloo, lambda r: group_advantages(r, scale="batch"), lambda r: rloo(r, normalise=True)]
GROUP_NAMES = ["grpo", "dr_grpo", "rloo", "batch", "rloo_normalised"]


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def rewards() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_two_samples_zero_and_one():
    # 0.5 / (0.70710678 + 1e-4)
    torch.testing.assert_close(grpo(double([[0, 1]])), double([[-0.7070068, 0.7070068]]), atol=1e-7, rtol=0)
    torch.testing.assert_close(dr_grpo(double([[0, 1]])), double([[-0.5, 0.5]]))
    torch.testing.assert_close(rloo(double([[0, 1]])), double([[-1.0, 1.0]]))


def test_three_samples_written_out():
    r = double([[1, 1, 0], [1, 1, 1]])
    std = math.sqrt(1 / 3)
    expected = double([[1 / 3, 1 / 3, -2 / 3], [0, 0, 0]])
    torch.testing.assert_close(dr_grpo(r), expected)
    torch.testing.assert_close(grpo(r), expected / (std + 1e-4))
    torch.testing.assert_close(rloo(r), double([[0.5, 0.5, -1], [0, 0, 0]]))
    batch_std = math.sqrt((5 * (1 / 6) ** 2 + (5 / 6) ** 2) / 5)
    torch.testing.assert_close(group_advantages(r, scale="batch"), expected / (batch_std + 1e-4))
    rloo_std = math.sqrt((0.25 + 0.25 + 1) / 5)
    torch.testing.assert_close(rloo(r, normalise=True), double([[0.5, 0.5, -1], [0, 0, 0]]) / (rloo_std + 1e-4))


def test_reinforce_baselines():
    r = double([[0, 1], [2, NAN]])
    torch.testing.assert_close(reinforce(r), double([[0, 1], [2, 0]]))
    torch.testing.assert_close(reinforce(r, baseline="batch"), double([[-1, 0], [1, 0]]))
    torch.testing.assert_close(reinforce(r, baseline=0.5), double([[-0.5, 0.5], [1.5, 0]]))


@pytest.mark.parametrize("advantage", GROUP_BASED, ids=GROUP_NAMES)
def test_a_group_sums_to_zero(advantage, rewards):
    torch.testing.assert_close(advantage(rewards).sum(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_rloo_is_a_multiple_of_the_centred_reward(rewards):
    torch.testing.assert_close(rloo(rewards), 4 / 3 * dr_grpo(rewards))


def test_rloo_leaves_the_sample_itself_out(rewards):
    for g in range(4):
        others = [h for h in range(4) if h != g]
        torch.testing.assert_close(rloo(rewards)[:, g], rewards[:, g] - rewards[:, others].mean(-1))


def test_normalised_rloo_has_unit_deviation(rewards):
    torch.testing.assert_close(rloo(rewards, normalise=True, eps=0.0).std(), double(1.0))


@given(scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
@settings(max_examples=25, deadline=None)
def test_the_z_score_ignores_scale_and_shift(scale, shift):
    r = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(grpo(scale * r + shift, eps=1e-12), grpo(r, eps=1e-12), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("advantage", GROUP_BASED, ids=GROUP_NAMES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8 + 0.1, -7.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_group_is_exactly_zero(advantage, value, dtype):
    # seven equal numbers have a mean that differs from them by rounding
    r = torch.cat([torch.full((1, 7), value, dtype=dtype), torch.arange(7.0, dtype=dtype).unsqueeze(0)])
    assert (advantage(r)[0] == 0).all()
    assert (advantage(r)[1] != 0).any()


@pytest.mark.parametrize("advantage", GROUP_BASED, ids=GROUP_NAMES)
def test_a_constant_batch_is_exactly_zero(advantage):
    assert (advantage(torch.full((3, 7), 0.1)) == 0).all()


def test_zero_eps_does_not_divide_zero_by_zero():
    assert (grpo(double([[2, 2]]), eps=0.0) == 0).all()
    assert (group_advantages(double([[2, 2]]), scale="batch", eps=0.0) == 0).all()


@pytest.mark.parametrize("advantage", [grpo, dr_grpo, rloo], ids=["grpo", "dr_grpo", "rloo"])
def test_an_unscored_sample_is_left_out(advantage):
    found = advantage(double([[0, NAN, 1, 3], [NAN, NAN, NAN, NAN], [NAN, 5, NAN, NAN]]))
    expected = advantage(double([[0, 1, 3]]))[0]
    torch.testing.assert_close(found[0], double([expected[0], 0, expected[1], expected[2]]))
    assert (found[1:] == 0).all()


def test_unscored_samples_are_left_out_of_the_batch_std():
    r = double([[0, NAN, 1], [2, 5, NAN]])
    std = math.sqrt((4 + 1 + 0 + 9) / 3)  # of 0, 1, 2, 5 about 2
    torch.testing.assert_close(
        group_advantages(r, scale="batch"), double([[-0.5, 0, 0.5], [-1.5, 1.5, 0]]) / (std + 1e-4)
    )


@pytest.mark.parametrize("advantage", GROUP_BASED, ids=GROUP_NAMES)
def test_a_group_of_one_warns_and_is_zero(advantage):
    with pytest.warns(UserWarning, match="G = 1"):
        assert (advantage(double([[3], [4]])) == 0).all()


@pytest.mark.parametrize("advantage", [*GROUP_BASED, reinforce], ids=[*GROUP_NAMES, "reinforce"])
def test_no_gradient_and_no_mutation(advantage, rewards):
    rewards[0, 0] = NAN
    before = rewards.clone()
    assert not advantage(rewards.requires_grad_()).requires_grad
    assert torch.equal(rewards.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


def bandit_gradients(advantage) -> tuple[Tensor, Tensor]:
    """Expected policy-gradient estimate over all triples of arms, and the exact gradient of the expected reward."""
    logits = double([0.3, -0.5, 0.1]).requires_grad_()
    reward = double([1.0, 0.2, -0.7])
    probabilities = logits.softmax(0)
    (exact,) = torch.autograd.grad((probabilities * reward).sum(), logits, retain_graph=True)
    estimate = torch.zeros(3, dtype=torch.float64)
    scores = torch.eye(3, dtype=torch.float64) - probabilities.detach()  # gradient of log p(arm)
    for arms in itertools.product(range(3), repeat=3):
        drawn = list(arms)
        weight = probabilities.detach()[drawn].prod()
        estimate += weight * (advantage(reward[drawn].unsqueeze(0))[0].unsqueeze(-1) * scores[drawn]).mean(0)
    return estimate, exact


@pytest.mark.parametrize("advantage", [reinforce, rloo], ids=["reinforce", "rloo"])
def test_the_estimate_is_unbiased(advantage):
    estimate, exact = bandit_gradients(advantage)
    torch.testing.assert_close(estimate, exact, atol=1e-12, rtol=1e-10)


def test_grpo_is_not_unbiased_and_dr_grpo_only_up_to_a_factor():
    estimate, exact = bandit_gradients(dr_grpo)
    torch.testing.assert_close(estimate, exact * 2 / 3, atol=1e-12, rtol=1e-10)  # (G - 1) / G
    estimate, exact = bandit_gradients(grpo)
    assert (estimate / exact).std() > 1e-3  # not even proportional


class TestNormaliseThenSum:
    def test_each_component_counts_by_its_weight(self):
        scores = double([[[0, 0], [1, 0], [2, 3000]]])
        z1, z2 = double([-1, 0, 1]), double([-1, -1, 2]) / math.sqrt(3)
        total = z1 + 0.5 * z2
        found = normalise_then_sum(scores, double([1.0, 0.5]), eps=0.0)
        torch.testing.assert_close(found, (total / total.std()).unsqueeze(0))

    def test_with_one_component_it_is_the_z_score_of_the_z_score(self, rewards):
        z = grpo(rewards)
        found = normalise_then_sum(rewards.unsqueeze(-1), double([2.0]))
        torch.testing.assert_close(found, 2 * z / ((2 * z).std() + 1e-4))

    def test_a_dead_component_or_group_adds_exactly_nothing(self):
        scores = torch.rand(2, 7, 2, dtype=torch.float64)
        scores[0, :, 1] = 0.1
        scores[1] = 0.1
        found = normalise_then_sum(scores, double([1.0, 1.0]))
        assert (found[1] == 0).all()
        alone = normalise_then_sum(scores[..., :1], double([1.0]))
        torch.testing.assert_close(found, alone)

    def test_unscored_entries_are_left_out(self):
        scores = double([[[0, NAN], [1, 2], [3, 4]], [[NAN, NAN], [1, 1], [2, 2]]])
        found = normalise_then_sum(scores, double([1.0, 1.0]))
        assert found.isfinite().all()
        assert found[1, 0] == 0
        z1, z2 = grpo(scores[..., 0]), grpo(scores[..., 1])
        total = z1 + z2
        live = torch.tensor([[True, True, True], [False, True, True]])
        expected = (total - total[live].mean()) / (total[live].std() + 1e-4)
        torch.testing.assert_close(found, expected.where(live, 0.0))

    def test_weights_per_sample(self):
        scores = torch.rand(2, 3, 2, dtype=torch.float64)
        shared = double([1.0, 0.5])
        torch.testing.assert_close(
            normalise_then_sum(scores, shared.expand(2, 3, 2).clone()), normalise_then_sum(scores, shared)
        )

    def test_all_unscored(self):
        assert (normalise_then_sum(torch.full((2, 3, 2), NAN), torch.ones(2)) == 0).all()

    def test_errors(self, friendly_errors):
        with pytest.raises(
            ShapeError, match=r"advantages.normalise_then_sum: weights must be \[K\] with K = 2; got \[3\]"
        ):
            normalise_then_sum(torch.zeros(1, 2, 2), torch.ones(3))
        with pytest.raises(ShapeError, match=r"scores must be \[P, G, K\]; got \[2, 2\]"):
            normalise_then_sum(torch.zeros(2, 2), torch.ones(2))


class TestErrors:
    @pytest.mark.parametrize("advantage", [grpo, dr_grpo, rloo, reinforce, group_advantages])
    def test_flat_rewards(self, advantage, friendly_errors):
        expected = rf"advantages\.{advantage.__name__}: rewards must be \[P, G\]; got \[16\]"
        with pytest.raises(ShapeError, match=expected):
            advantage(torch.zeros(16))

    @pytest.mark.parametrize("advantage", [grpo, dr_grpo, rloo, reinforce, group_advantages])
    def test_an_infinite_reward_is_named(self, advantage):
        with pytest.raises(ScoreError, match=rf"advantages\.{advantage.__name__}: rewards\[1, 0\] is infinite"):
            advantage(double([[0, 1], [math.inf, 1]]))

    def test_unknown_options(self, friendly_errors):
        with pytest.raises(RecipeError, match="scale must be 'group', 'batch' or 'none'; got 'std'"):
            group_advantages(torch.zeros(1, 2), scale="std")
        with pytest.raises(RecipeError, match="baseline must be 'none', 'batch' or a number; got 'mean'"):
            reinforce(torch.zeros(1, 2), baseline="mean")


def test_without_bessels_correction():
    rewards = double([[0.0, 2.0], [4.0, 4.0]])
    assert group_advantages(rewards, eps=0.0, bessel=False).tolist() == [[-1.0, 1.0], [0.0, 0.0]]
    # all four: mean 2.5, squares 6.25, 0.25, 2.25, 2.25, population std sqrt(2.75)
    found = group_advantages(rewards, scale="batch", eps=0.0, bessel=False)
    torch.testing.assert_close(found, double([[-1.0, 1.0], [0.0, 0.0]]) / math.sqrt(2.75))


def test_sums_of_z_scores_may_stay_as_they_are():
    scores = double([[[0.0, 0.0], [2.0, 10.0]], [[1.0, 5.0], [1.0, 3.0]]])
    z = 1 / math.sqrt(2)
    found = normalise_then_sum(scores, torch.tensor([1.0, 0.5]).double(), eps=0.0, whiten=False)
    torch.testing.assert_close(found, double([[-1.5 * z, 1.5 * z], [0.5 * z, -0.5 * z]]))
