"""A cheap verifier whose rejections can be appealed."""

from __future__ import annotations

import statistics

import pytest
import torch

from guerdon.advantages import reinforce
from guerdon.errors import RecipeError, ScoreError
from guerdon.rewards import appeal
from guerdon.rewards.appeal import false_negative_rate
from guerdon.rollout import Rollout
from guerdon.shaping import forward_correction
from guerdon.signal import Signal

STRONG = {"exact_answer": {"ignore_case": True}}
# the cheap verifier rejects "A", which is right
SAMPLES, ANSWERS = [["a", "A", "b", "A"], ["a", "b", "b", "b"]], ["a", "a"]


def make(**options):
    return appeal(reward="exact_answer", strong=STRONG, **{"appeal_probability": 1.0, **options})


def run(stage):
    return stage(["p", "q"], SAMPLES, answer=ANSWERS)


def counts(found) -> tuple[list[int], ...]:
    return found.accepted.tolist(), found.appeals.tolist(), found.overturned.tolist()


def test_all_rejections_appealed():
    found = run(make())
    assert [[cell[0] for cell in row] for row in found.scores] == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert counts(found) == ([1, 1], [3, 3], [2, 0])
    # two of four right samples are rejected
    assert found.false_negative_rate.tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


def test_recovered_samples_count_as_right():
    found = run(make(recover=True))
    assert [[cell[0] for cell in row] for row in found.scores] == [[1, 1, 0, 1], [1, 0, 0, 0]]
    assert counts(found) == ([1, 1], [3, 3], [2, 0])


def test_the_estimate():
    assert false_negative_rate(90, 1, appeal_probability=0.1) == pytest.approx((10 + 1e-5) / (100 + 2e-5))
    assert false_negative_rate(0, 0, appeal_probability=0.1) is None
    assert false_negative_rate(50, 0, appeal_probability=0.1) == pytest.approx(1e-5 / 50)
    # one lucky appeal among few accepted samples
    assert false_negative_rate(0, 1, appeal_probability=0.1) == 0.95
    assert false_negative_rate(1, 3, appeal_probability=0.1, rho_max=0.8) == 0.8


def test_the_number_of_false_negatives_is_right_on_average():
    group = ["A"] * 300 + ["b"] * 100  # 300 right ones are rejected
    found = [
        int(make(appeal_probability=0.25, seed=seed)(["p"], [group], answer=["a"]).overturned) / 0.25
        for seed in range(20)
    ]
    assert statistics.fmean(found) == pytest.approx(300, abs=25)  # standard error 6.7
    assert statistics.stdev(found) == pytest.approx(30, abs=15)


def test_the_running_rate_forgets_its_start_geometrically():
    stage = make(ema_decay=0.8)
    first = [torch.tensor([n]) for n in (10, 10, 10)]  # half of the right ones rejected
    later = [torch.tensor([n]) for n in (10, 10, 0)]
    stage.observe(*first)
    start = stage.rate.item()
    assert start == pytest.approx(0.5, abs=1e-5)
    for n in range(1, 6):
        stage.observe(*later)
        settled = false_negative_rate(10, 0, appeal_probability=1.0)
        assert abs(stage.rate.item() - settled) == pytest.approx(0.8**n * abs(start - settled), rel=1e-6)
    for _ in range(3):  # nothing accepted, nothing overturned: left out
        before = stage.rate.item()
        stage.observe(*[torch.tensor([n]) for n in (0, 5, 0)])
        assert stage.rate.item() == before
    assert stage.metrics()["appeals_total"] == 75
    assert stage.metrics()["overturned_total"] == 10


def test_the_estimate_of_a_step_has_the_step_in_it():
    stage = make(ema_decay=0.9)
    stage.observe(*[torch.tensor([n]) for n in (10, 0, 0)])
    found = run(stage)
    assert found.false_negative_rate[0].item() == pytest.approx(0.9 * 1e-6 + 0.1 * 0.5, abs=1e-5)
    stage.observe(found.accepted, found.appeals, found.overturned)
    assert stage.rate.item() == pytest.approx(found.false_negative_rate[0].item())


def test_which_samples_are_appealed_changes_with_the_update_only():
    stage = make(appeal_probability=0.5)
    group, answers = [[f"{i}" for i in range(64)]], ["x"]

    def appealed() -> list[int]:
        asked = []

        def strong(prompts, samples):
            asked.extend(int(s[0]) for s in samples)
            return [[0.0]] * len(samples)

        stage.strong = strong
        stage(["p"], group, answer=answers)
        return asked

    first = appealed()
    assert first == appealed()
    assert 16 < len(first) < 48
    stage.observe(*torch.zeros(3, 1, dtype=torch.int64))
    assert first != appealed()


def test_appeals_are_one_call_with_the_columns_of_their_rows():
    calls = []

    def strong(prompts, samples, answer):
        calls.append((prompts, samples, answer))
        return [[None] for _ in samples]

    stage = appeal(reward="exact_answer", strong=strong, appeal_probability=1.0)
    found = stage(["p", "q"], [["a", "b"], ["b", "c"]], answer=["a", "c"])
    assert calls == [(["p", "q"], [["b"], ["b"]], ["a", "c"])]
    assert found.overturned.tolist() == [0, 0]  # no verdict overturns nothing
    calls.clear()
    stage(["p"], [["a", "a"]], answer=["a"])
    assert calls == []


def test_what_is_not_scored_is_not_appealed():
    found = make()(["p", "q"], [["A"], ["A"]], answer=[None, "a"])
    assert found.scores == [[None], [(0.0, "A")]]
    assert counts(found) == ([0, 0], [0, 1], [0, 1])


def test_on_the_road_with_the_forward_correction():
    stage = make(ema_decay=0.5)
    signal = Signal(
        rewards={"right": stage}, shaping={"right": [forward_correction(baseline="ema")]}, advantage=reinforce
    )
    mask = torch.ones(2, 4, 1).bool()
    rollout = Rollout(["p", "q"], SAMPLES, mask, torch.zeros(2, 4, 1), columns={"answer": ANSWERS})
    found = signal(rollout)
    assert found.advantages[0].tolist() == pytest.approx([0.5, -0.5, -0.5, -0.5], abs=1e-4)
    signal.observe(found.available())
    told = signal.metrics()
    assert told["rewards_right/false_negative_rate"] == pytest.approx(0.5, abs=1e-4)
    assert told["shaping_right_0/running_baseline"] == pytest.approx(-0.25, abs=1e-4)
    restored = make(ema_decay=0.5)
    restored.load_state_dict(stage.state_dict())
    assert restored.rate.item() == stage.rate.item()
    assert restored.estimated.item() == 1
    assert not list(stage.parameters())


def test_faults(friendly_errors):
    with pytest.raises(RecipeError, match="appeal_probability: must be above 0 and at most 1; got 0"):
        make(appeal_probability=0.0)
    with pytest.raises(RecipeError, match=r"ema_decay must be in \[0, 1\)"):
        make(ema_decay=1.0)
    with pytest.raises(RecipeError, match=r"rewards.appeal.strong: .*nothing called 'judge'"):
        appeal(reward="exact_answer", strong="judge")
    with pytest.raises(ScoreError, match=r"the cheap verifier must give 0 or 1; got 0.5"):
        appeal(reward=lambda samples: [[0.5]], strong=STRONG)(["p"], [["a"]])

    def broken(samples):
        raise OSError("no answer")

    with pytest.raises(ScoreError, match="'strong verifier of appeal' raised OSError: no answer"):
        appeal(reward="exact_answer", strong=broken, appeal_probability=1.0)(["p"], [["b"]], answer=["a"])
