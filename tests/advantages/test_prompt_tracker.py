"""Rewards against what the same prompt earned before, on hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.advantages import prompt_tracker
from guerdon.errors import RecipeError, ScoreError, ShapeError


def test_a_short_queue_is_compared_with_the_batch():
    stage = prompt_tracker(size=4, min_count=3, eps=0.0)
    # mean 3, population std sqrt(5)
    found = stage(torch.tensor([[0.0, 2.0], [4.0, 6.0]]), [0, 1])
    torch.testing.assert_close(found, torch.tensor([[-3.0, -1.0], [1.0, 3.0]]) / math.sqrt(5))


def test_a_full_queue_takes_over_and_the_batch_is_in_it():
    stage = prompt_tracker(size=4, min_count=3, eps=0.0)
    stage.observe(torch.tensor([[0.0, 2.0]]), [7])
    # prompt 7 has 0, 2, 4, 2: mean 2, std sqrt 2; prompt 8 has two: the batch 4, 2, 1, 1 with mean 2, std sqrt 1.5
    found = stage(torch.tensor([[4.0, 2.0], [1.0, 1.0]]), [7, 8])
    torch.testing.assert_close(found[0], torch.tensor([2 / math.sqrt(2), 0.0]))
    torch.testing.assert_close(found[1], torch.tensor([-1.0, -1.0]) / math.sqrt(1.5))


def test_old_rewards_are_forgotten():
    stage = prompt_tracker(size=2, min_count=2, eps=0.0)
    stage.observe(torch.tensor([[100.0, -100.0]]), [0])
    assert stage(torch.tensor([[1.0, 3.0]]), [0]).tolist() == [[-1.0, 1.0]]


def test_a_prompt_twice_in_a_batch_has_one_queue():
    stage = prompt_tracker(size=4, min_count=4, eps=0.0)
    found = stage(torch.tensor([[0.0, 0.0], [2.0, 2.0], [50.0, 90.0]]), [3, 3, 4])
    assert found[:2].tolist() == [[-1.0, -1.0], [1.0, 1.0]]


def test_calling_changes_nothing_observing_does():
    stage = prompt_tracker(size=4, min_count=1)
    first = stage(torch.tensor([[0.0, 2.0]]), [0])
    assert torch.equal(first, stage(torch.tensor([[0.0, 2.0]]), [0]))
    assert len(stage.keys) == 0
    stage.observe(torch.tensor([[0.0, 2.0], [5.0, 7.0]]), [4, 2])
    assert stage.keys.tolist() == [4, 2]
    assert stage.counts.tolist() == [2, 2]
    assert stage.rewards.tolist() == [[0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 5.0, 7.0]]


def test_a_new_stage_takes_the_state_of_one_that_saw_prompts():
    stage, other = prompt_tracker(size=3, min_count=3), prompt_tracker(size=3, min_count=3)
    stage.observe(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), [5, 9])
    other.load_state_dict(stage.state_dict())
    rewards = torch.tensor([[4.0, 1.0], [0.0, 2.0]])
    assert torch.equal(stage(rewards, [9, 1]), other(rewards, [9, 1]))


def test_unscored_samples_are_not_remembered():
    stage = prompt_tracker(size=4, min_count=2, eps=0.0)
    stage.observe(torch.tensor([[0.0, math.nan]]), [0])
    assert stage.counts.tolist() == [1]
    assert stage(torch.tensor([[math.nan, 2.0]]), [0]).tolist() == [[0.0, 1.0]]


def test_a_constant_past_gives_nothing():
    stage = prompt_tracker(size=4, min_count=2, eps=1e-6)
    stage.observe(torch.tensor([[0.1, 0.1]]), [0])
    assert stage(torch.tensor([[0.1, 0.1]]), [0]).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 0}, "size must be at least 1"), ({"size": 4, "min_count": 5}, "between 1 and size = 4; got 5")],
)
def test_options(options, message):
    with pytest.raises(RecipeError, match=message):
        prompt_tracker(**options)


def test_errors_name_the_stage(friendly_errors):
    with pytest.raises(ShapeError, match=r"advantages.prompt_tracker: rewards must be \[P, G\]"):
        prompt_tracker()(torch.zeros(3), [0])
    with pytest.raises(ScoreError, match="is infinite"):
        prompt_tracker()(torch.tensor([[math.inf, 0.0]]), [0])
