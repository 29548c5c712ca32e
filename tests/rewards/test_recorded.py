"""Scores from the data, and samples from the data in the online loop."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import DataError, RecipeError
from guerdon.language.tasks import sort
from guerdon.objectives import copg
from guerdon.rewards import recorded
from guerdon.rollout import beside
from guerdon.signal import Signal
from guerdon.training import Online, Optim
from tests.training.bandit import BanditPolicy

ROWS = [
    {"prompt": "312=", "completions": ["123", "321"], "completion_scores": [1.0, 0.0]},
    {"prompt": "40=", "completions": ["04", "4"], "completion_scores": [1.0, 0.5]},
]


def test_scores_of_the_row_and_none_for_the_policys_own():
    given = torch.tensor([[True, True, False]])
    assert recorded([["a", "b", "c"]], given, completion_scores=[[0.5, None]]) == [[0.5, None, None]]
    assert recorded([["a", "b"]], None) == [[None, None]]


@pytest.mark.parametrize("row", [[0.5], None, "0.5", [1.0, 2.0, 3.0]])
def test_a_row_must_have_a_score_for_each(row):
    with pytest.raises(DataError, match="completion_scores of prompt 0 must be a list of 2 numbers"):
        recorded([["a", "b"]], torch.ones(1, 2).bool(), completion_scores=[row])
    with pytest.raises(DataError, match="no column 'points'"):
        recorded([["a", "b"]], torch.ones(1, 2).bool(), column="points", completion_scores=[row])


def policy():
    from guerdon.language.policy import LanguagePolicy

    return LanguagePolicy.load(sort.model(0), tokenizer=sort.tokenizer(), max_new_tokens=6)


def loop(group_size: int, **more) -> Online:
    chosen = policy()
    chosen.keep_reference()
    options = {"prompts_per_step": 2, "group_size": group_size, "samples": "data", "optim": Optim(lr=3e-3), **more}
    return Online(chosen, ROWS, Signal(rewards={"score": recorded}), copg, **options)


def test_given_completions_are_learnt_from():
    run = loop(2)
    first = run.step()
    assert first.rollout.samples[first.rollout.indices.index(0)] == ["123", "321"]
    assert first.metrics["log_ratio"] == 0.0
    assert first.metrics["left_out"] == 0.0
    before = first.rollout.logp_old.sum(-1)
    for _ in range(20):
        last = run.step()
    order = [first.rollout.indices.index(i) for i in last.rollout.indices]
    gap = (last.rollout.logp_old.sum(-1) - before[order]).diff(dim=-1)
    assert (gap < -0.5).all()  # the second of each pair has the lower score


def test_the_policy_adds_its_own():
    found = loop(4).step().rollout
    assert [group[:2] for group in found.samples] == [ROWS[i]["completions"] for i in found.indices]
    assert found.scores[..., 0].isnan().tolist() == [[False, False, True, True]] * 2
    assert found.extras["given"].tolist() == [[True, True, False, False]] * 2


def test_micro_batches_change_nothing():
    whole, parts = loop(3), loop(3, micro_batch=1)
    first, second = whole.step(), parts.step()
    assert first.metrics["grad_norm"] == pytest.approx(second.metrics["grad_norm"], rel=1e-4)


def test_what_cannot_be_given():
    with pytest.raises(RecipeError, match="takes no samples from the data"):
        Online(BanditPolicy(), ROWS, Signal(rewards={"score": recorded}), copg, samples="data")
    run = loop(1)
    with pytest.raises(DataError, match=r"list of 1 to 1 \(group_size\) texts"):
        run.step()


def test_beside_keeps_prompts_apart():
    one = policy()
    first = one.given(["312="], [["123", "1"]])
    both = beside(first, one.sample(["312="], 3, [0]))
    assert both.mask.shape[:2] == (1, 5)
    assert both.steps["prompt_ids"].shape == first.steps["prompt_ids"].shape
    assert both.validate() is both
