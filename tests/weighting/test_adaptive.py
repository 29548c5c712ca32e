"""Weights that adapt: hypervolume's factor, and gradients of single components in the online loop."""

from __future__ import annotations

import pytest
import torch

from guerdon.advantages import dr_grpo, grpo
from guerdon.errors import NumericsError, RecipeError
from guerdon.objectives import policy_gradient
from guerdon.rollout import Rollout
from guerdon.signal import Signal
from guerdon.training import Online, Optim
from guerdon.weighting import gradient_alignment, hypervolume
from guerdon.weighting.gradient_alignment import exponentiated_update, gradient_gram, influence
from guerdon.weighting.hypervolume import meta_reward
from tests.training.bandit import BanditPolicy


def test_the_factor():
    assert meta_reward(0.0) == 0.5
    assert meta_reward(50.0) == 2.0
    assert meta_reward(0.1) < meta_reward(0.2)
    stage = hypervolume(weights=[0.5, 0.5])
    assert stage.scale == 1.0
    stage.validate(torch.tensor([0.2, 0.4]))
    assert stage.scale == 1.0
    stage.validate(torch.tensor([0.4, 0.6]))  # gains of 1 and 0.5 in units of the reference
    assert stage.scale == pytest.approx(meta_reward(0.5))
    stage.validate(torch.tensor([0.1, 0.9]))
    assert stage.scale == 0.5
    assert stage.metrics() == {"scale": 0.5, "hypervolume": pytest.approx(0.5), "front": 1.0}


def made() -> Rollout:
    live = torch.ones(2, 3, 1).bool()
    return Rollout(["p", "q"], [["a", "bb", "cccc"]] * 2, live, torch.zeros(2, 3, 1))


def lengths(samples):
    return [[float(len(s)) for s in group] for group in samples]


def letters(samples):
    return [[float("b" in s) for s in group] for group in samples]


@pytest.mark.parametrize(("apply_to", "factor"), [("advantage", 0.5), ("reward", 1.0)])
def test_on_rewards_the_factor_cancels_and_on_advantages_it_does_not(apply_to, factor):
    def advantages(stage):
        return Signal(rewards=[lengths, letters], weighting=stage, advantage=grpo)(made()).advantages

    plain, stage = hypervolume(), hypervolume(apply_to=apply_to)
    stage.validate(torch.tensor([1.0, 1.0]))
    stage.validate(torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(advantages(stage), factor * advantages(plain), atol=2e-4, rtol=0)


def test_a_signal_hands_over_held_out_scores():
    stage = hypervolume(maximise={"lengths": False})
    signal = Signal(rewards=[lengths, letters], weighting=stage, advantage=grpo)
    signal.validate({"eval/sampled/lengths": 4.0, "eval/sampled/letters": 0.5, "eval/greedy/lengths": 9.0})
    signal.validate({"eval/sampled/lengths": 2.0, "eval/sampled/letters": 1.0})
    assert stage.hypervolume() == pytest.approx(0.5)
    with pytest.raises(RecipeError, match="mean score of every component"):
        signal.validate({})
    with pytest.raises(RecipeError, match="no advantage stage"):
        Signal(rewards=[lengths], weighting=hypervolume()).check({"prompts", "samples"})


def test_influences_add_up_to_the_square_of_the_sum():
    gradients = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(influence(gradients).sum(), gradients.sum(0).square().sum())
    torch.testing.assert_close(influence(torch.eye(3) * 2), torch.full((3,), 4.0))


def test_updates():
    weights, first, second = torch.tensor([0.2, 0.8]).double(), torch.tensor([1.0, -1.0]), torch.tensor([3.0, 0.5])
    step = {"lr": 0.1, "mu": 0.5}
    torch.testing.assert_close(exponentiated_update(weights, torch.zeros(2), **step), weights)
    torch.testing.assert_close(
        exponentiated_update(weights, first, **step), exponentiated_update(weights, first + 9.0, **step)
    )
    twice = exponentiated_update(exponentiated_update(weights, first, **step), second, **step)
    torch.testing.assert_close(twice, exponentiated_update(weights, first + second, **step))
    assert exponentiated_update(weights, torch.tensor([1e9, 0.0]), lr=1.0, mu=1e-5).tolist() == [1.0, 0.0]


def test_the_stage():
    stage = gradient_alignment(mu=1.0, clip_norm=1.0, floor=0.3)
    stage.adapt(torch.tensor([[100.0, 0.0], [0.0, 0.0]]), 5.0)
    assert stage.metrics()["influence/0"] == pytest.approx(1.0)  # shortened from a norm of 10
    assert stage.weights.min().item() == pytest.approx(0.3 / (0.3 + 1 / (1 + 2.718281828**-5)))
    with pytest.raises(NumericsError, match="not finite"):
        stage.adapt(torch.full((2, 2), float("nan")), 1.0)
    with pytest.warns(UserWarning, match="stays 0"):
        gradient_alignment(weights=[0.0, 1.0])
    with pytest.raises(RecipeError, match="add up to 1"):
        gradient_alignment(weights=[0.5, 0.6])(torch.zeros(1, 2, 2))
    again = gradient_alignment(mu=1.0)
    again.load_state_dict(stage.state_dict())
    assert torch.equal(again.weights, stage.weights)


def test_blocks_give_the_same_products():
    x = torch.randn(4, requires_grad=True)
    y = torch.randn(3, requires_grad=True)
    losses = [x.square().sum(), (x[:3] * y).sum(), y.sum()]
    whole, parts = gradient_gram(losses, [x, y]), gradient_gram(losses, [x, y], blocks=2)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(whole[2, 2], torch.tensor(3.0, dtype=torch.float64))


def online(micro_batch=None, advantage=dr_grpo, seen=None) -> Online:
    def arms(samples):
        return [[float(sum(map(float, s)) if not isinstance(s, str) else len(s)) for s in group] for group in samples]

    def many(samples):
        return [[float(len(s) > 1) for s in group] for group in samples]

    stage = gradient_alignment(mu=0.1, clip_norm=None)
    if seen is not None:
        inner = stage.adapt

        def adapt(gram, lr, score_names=()):
            seen.append(gram)
            inner(gram, lr, score_names)

        stage.adapt = adapt
    signal = Signal(rewards={"arms": arms, "many": many}, weighting=stage, advantage=advantage)
    options = {
        "prompts_per_step": 6,
        "group_size": 4,
        "micro_batch": micro_batch,
        "optim": Optim(lr=0.05, clip_norm=None),
    }
    return Online(BanditPolicy(), [{"prompt": i} for i in range(6)], signal, policy_gradient, **options)


def test_the_loop_gives_exact_gradients_under_micro_batches():
    seen = []
    results = [online(size, seen=seen).step() for size in (None, 4, 1)]
    for gram in seen[1:]:
        torch.testing.assert_close(gram, seen[0])
    assert seen[0].diagonal().min() > 0
    weights = [result.metrics["weight/arms"] for result in results]
    assert weights == pytest.approx([weights[0]] * 3)
    assert weights[0] != 0.5  # the step is made with the new weights


def test_the_whole_gradient_is_the_weighted_sum_only_where_advantages_are_linear():
    for advantage, linear in ((dr_grpo, True), (grpo, False)):
        seen = []
        loop = online(advantage=advantage, seen=seen)
        result = loop.step()
        weights = loop.signal.weighting.weights
        mixed = (weights @ seen[0] @ weights).sqrt().item()
        assert (result.metrics["grad_norm"] == pytest.approx(mixed, rel=1e-5)) == linear
