"""Rewards of every step: projection, scoring in one call, faults, and the way to the advantage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from guerdon.advantages import value_anchored
from guerdon.errors import BindingError, ScoreError, ShapeError, UnknownNameError
from guerdon.objectives import policy_gradient
from guerdon.rewards import instant
from guerdon.rewards.instant import instant_rewards
from guerdon.rollout import Rollout
from guerdon.signal import Signal
from guerdon.training.online import Online
from tests.training.bandit import BanditPolicy, rows

PROJECTIONS = [[["1", "2", "3"], ["4", "5", "6"]], [["7", "8", "9"], ["0", "0", "1"]]]
SAMPLES = [["3", "6"], ["9", "1"]]


def number(samples: Sequence[Sequence[str]]) -> list[list[float]]:
    return [[float(s) for s in group] for group in samples]


def rollout(projections: Any = PROJECTIONS) -> Rollout:
    return Rollout(
        ["p", "q"],
        SAMPLES,
        torch.ones(2, 2, 3).bool(),
        torch.zeros(2, 2, 3),
        columns={"answer": ["3", "9"]},
        extras={"projections": projections},
    )


class TestStage:
    def test_scores_are_those_of_the_last_projection(self):
        found = instant(reward=number)(["p", "q"], SAMPLES, PROJECTIONS)
        assert found.scores == [[3.0, 6.0], [9.0, 1.0]]
        assert found.step_rewards.tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [0, 0, 1]]]

    def test_the_reward_is_called_once(self):
        asked = []

        def counted(samples):
            asked.append(samples)
            return number(samples)

        instant(reward=counted)(["p", "q"], SAMPLES, PROJECTIONS)
        assert asked == [[["1", "2", "3", "4", "5", "6"], ["7", "8", "9", "0", "0", "1"]]]

    def test_a_named_reward_gets_the_columns(self):
        found = instant(reward="exact_answer")(["p", "q"], SAMPLES, PROJECTIONS, answer=["3", "9"], other=torch.ones(2))
        assert found.step_rewards.tolist() == [[[0, 0, 1], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]]]

    def test_samples_may_be_tensors(self):
        images = torch.arange(12.0).reshape(1, 2, 2, 3)

        def mean(samples):
            return [[image.mean() for image in group] for group in samples]

        found = instant(reward=mean)(["p"], [[images[0, 0, 1], images[0, 1, 1]]], images)
        assert found.step_rewards.tolist() == [[[1.0, 4.0], [7.0, 10.0]]]

    def test_what_is_not_scored_and_what_fails(self):
        def picky(samples):
            return [[None if s == "2" else math.nan if s == "8" else float(s) for s in group] for group in samples]

        found = instant(reward=picky)(["p", "q"], SAMPLES, PROJECTIONS)
        assert found.scores[0] == [None, 6.0]
        assert math.isnan(found.scores[1][0])  # type: ignore[arg-type]
        with pytest.raises(ScoreError, match="reward 'dense' returned nan for prompt 1, sample 0"):
            Signal(rewards={"dense": instant(reward=picky)}, advantage=value_anchored())(rollout())
        signal = Signal(rewards={"dense": instant(reward=picky)}, advantage=value_anchored(), on_bad_score="drop")
        done = signal(rollout())
        assert done.advantages is not None
        assert (done.advantages[:, 0] == 0).all()
        assert done.advantages.isfinite().all()

    @pytest.mark.parametrize("bad", [[[["1"], ["2", "3"]]], [[["1", "2"]]], [[[], []]]])
    def test_uneven_projections(self, bad):
        with pytest.raises(ShapeError, match=r"projections must be \[P\]\[G\]\[T\]"):
            instant(reward=number)(["p"], [["1", "2"]], bad)

    def test_a_reward_that_is_not_there(self):
        with pytest.raises(UnknownNameError, match="exact_answer"):
            instant(reward="exact_anser")


class TestOnTheRoad:
    def test_to_the_advantage(self):
        signal = Signal(rewards={"dense": instant(reward=number)}, advantage=value_anchored())
        done = signal(rollout())
        assert done.rewards is not None
        assert done.rewards.tolist() == [[3.0, 6.0], [9.0, 1.0]]
        expected = value_anchored()(torch.tensor(number_of(PROJECTIONS)), done.mask).advantages
        assert done.advantages is not None
        assert torch.equal(done.advantages, expected)

    def test_a_policy_without_projections_is_an_error_before_training(self):
        signal = Signal(rewards={"dense": instant(reward=number)}, advantage=value_anchored())
        with pytest.raises(BindingError, match="needs the field 'projections'"):
            Online(BanditPolicy(), rows(4), signal, policy_gradient, prompts_per_step=2, group_size=2)

    def test_a_policy_is_told_that_they_are_wanted(self):
        class Projecting(BanditPolicy):
            keep_projections = False

            @property
            def fields(self):  # type: ignore[override]
                return ("projections",) if self.keep_projections else ()

            def sample(self, *args, **options):
                found = super().sample(*args, **options)
                steps = found.mask.shape[2]
                return found.update({"projections": [[[s] * steps for s in group] for group in found.samples]})

        def first(samples):
            return [[float(str(s)[:1] == "1") for s in group] for group in samples]

        signal = Signal(rewards={"dense": instant(reward=first)}, advantage=value_anchored())
        loop = Online(Projecting(), rows(4), signal, policy_gradient, prompts_per_step=2, group_size=4)
        result = loop.step()
        assert loop.policy.keep_projections
        assert "advantage_stage/size_0" in result.metrics


def number_of(nested):
    return [[[float(s) for s in steps] for steps in group] for group in nested]


class TestProjection:
    def test_along_a_straight_flow_every_projection_is_the_end(self):
        generator = torch.Generator().manual_seed(0)
        noise, data = torch.randn(2, 2, 3, 4, 2, generator=generator, dtype=torch.float64).unbind(2)[:2]
        sigmas = torch.linspace(1, 0, 6, dtype=torch.float64)
        path = torch.stack([(1 - s) * data + s * noise for s in sigmas[1:]], dim=2)
        velocity = (noise - data).unsqueeze(2).expand_as(path)
        found = instant_rewards(path, velocity, sigmas, lambda x: x.square().sum((-1, -2)))
        torch.testing.assert_close(found, data.square().sum((-1, -2)).unsqueeze(-1).expand(2, 2, 5))

    def test_the_last_step_is_the_sample_whatever_the_velocity(self):
        x = torch.randn(1, 2, 3, 2)
        velocity = torch.full_like(x, math.nan)
        velocity[:, :, :-1] = 1.0
        found = instant_rewards(x, velocity, torch.tensor([1.0, 0.6, 0.3, 0.0]), lambda clean: clean.sum(-1))
        assert torch.equal(found[..., -1], x[..., -1, :].sum(-1))
        torch.testing.assert_close(found[..., 0], (x[..., 0, :] - 0.6).sum(-1))

    def test_no_graph(self):
        x = torch.randn(1, 1, 2, 2, requires_grad=True)
        found = instant_rewards(x, torch.zeros_like(x), torch.tensor([1.0, 0.5, 0.0]), lambda clean: clean.sum(-1))
        assert not found.requires_grad

    def test_shapes(self, friendly_errors):
        x = torch.zeros(1, 1, 2, 2)
        with pytest.raises(ShapeError, match=r"sigmas \[T \+ 1\]"):
            instant_rewards(x, x, torch.zeros(2), lambda clean: clean.sum(-1))
        with pytest.raises(ShapeError, match=r"reward must be \[P, G, T\]"):
            instant_rewards(x, x, torch.zeros(3), lambda clean: clean)
