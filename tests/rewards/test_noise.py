"""A verifier made worse on purpose."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import RecipeError, ScoreError
from guerdon.rewards import exact_answer, noisy
from guerdon.rewards.noise import flip


def many(rate_p: float, rate_n: float, count: int = 4000, **options):
    stage = noisy(reward="exact_answer", **{"false_positive_rate": rate_p, "false_negative_rate": rate_n, **options})
    samples = [[f"{i}", "wrong"] for i in range(count)]
    return stage, samples, [f"{i}" for i in range(count)]


def scores(stage, samples, answers, prompts=None) -> torch.Tensor:
    found = stage(prompts or answers, samples, answer=answers).scores
    return torch.tensor([[cell[0] for cell in row] for row in found])


def test_rates_are_met():
    found = scores(*many(0.1, 0.3))
    assert found[:, 0].mean().item() == pytest.approx(0.7, abs=0.025)
    assert found[:, 1].mean().item() == pytest.approx(0.1, abs=0.02)


def test_no_noise_is_the_verifier():
    stage, samples, answers = many(0.0, 0.0, 5)
    found = stage(answers, samples, answer=answers)
    assert found.scores == exact_answer(samples, answers)
    assert found.flipped.tolist() == [0] * 5
    assert (scores(*many(1.0, 1.0, 5)) == torch.tensor([0.0, 1.0])).all()


def test_flips_are_counted():
    stage, samples, answers = many(0.5, 0.5, 50)
    found = stage(answers, samples, answer=answers)
    clean = [[float(s == a) for s in group] for group, a in zip(samples, answers, strict=True)]
    expected = [
        sum(cell[0] != c for cell, c in zip(row, c_row, strict=True))
        for row, c_row in zip(found.scores, clean, strict=True)
    ]
    assert found.flipped.tolist() == expected
    assert found.flipped.dtype == torch.int64
    assert 30 < sum(expected) < 70


def test_drawn_errors_are_new_at_every_update_and_the_same_within():
    stage, samples, answers = many(0.5, 0.5, 100)
    first = scores(stage, samples, answers)
    assert torch.equal(first, scores(stage, samples, answers))
    stage.observe()
    second = scores(stage, samples, answers)
    assert not torch.equal(first, second)
    again, *_ = many(0.5, 0.5, 100)
    again.load_state_dict(stage.state_dict())
    assert torch.equal(second, scores(again, samples, answers))
    other, *_ = many(0.5, 0.5, 100, seed=1)
    assert not torch.equal(first, scores(other, samples, answers))


def test_an_error_does_not_depend_on_the_batch():
    stage, samples, answers = many(0.5, 0.5, 20)
    whole = scores(stage, samples, answers)
    assert torch.equal(whole[5:9], scores(stage, samples[5:9], answers[5:9]))


@pytest.mark.parametrize("key", ["sample", "answer"])
def test_keyed_errors_stay(key):
    stage, samples, answers = many(0.5, 0.5, 100, key=key)
    first = scores(stage, samples, answers)
    stage.observe()
    assert torch.equal(first, scores(stage, samples, answers))
    swapped = scores(stage, [group[::-1] for group in samples], answers)
    assert torch.equal(first, swapped.flip(-1))
    assert 0.3 < first.mean() < 0.7


def test_an_answer_is_judged_alike_however_it_is_written():
    stage = noisy(reward="exact_answer", false_negative_rate=0.5, key="answer")
    samples = [[f"{i}", f" {i}\n"] for i in range(40)]
    found = scores(stage, samples, [f"{i}" for i in range(40)])
    assert torch.equal(found[:, 0], found[:, 1])
    assert 0 < found.mean() < 1
    written = noisy(reward="exact_answer", false_negative_rate=0.5, key="sample")
    found = scores(written, samples, [f"{i}" for i in range(40)])
    assert not torch.equal(found[:, 0], found[:, 1])


def test_rates_of_prompts():
    stage = noisy(reward="exact_answer", false_negative_rate="trouble")
    found = stage(["a", "b"], [["a"] * 50, ["b"] * 50], answer=["a", "b"], trouble=[0.0, 1.0])
    assert found.flipped.tolist() == [0, 50]
    with pytest.raises(ScoreError, match=r"the data has no column 'trouble'. It has: answer"):
        stage(["a"], [["a"]], answer=["a"])
    with pytest.raises(ScoreError, match="column 'trouble' must hold numbers from 0 to 1"):
        stage(["a"], [["a"]], answer=["a"], trouble=[2.0])


def test_what_is_not_scored_stays_so_and_other_forms_of_rewards_work():
    assert noisy(reward="exact_answer")(["p"], [["a", "b"]], answer=[None]).scores == [[None, None]]

    def plain(completions, **_):
        return [float(c == "a") for c in completions]

    assert noisy(reward=plain)(["p"], [["a", "b"]]).scores == [[1.0, 0.0]]

    async def slow(samples):
        return [[1.0] * len(group) for group in samples]

    assert noisy(reward=slow, false_negative_rate=1.0)(["p"], [["a", "b"]]).scores == [[0.0, 0.0]]


def test_the_channel():
    right = torch.tensor([[1.0, 0.0, float("nan")]])
    found = flip(right, torch.tensor([[0.2, 0.1, 0.5]]), 0.2, 0.2)
    assert found[0, :2].tolist() == [1.0, 1.0]
    assert found[0, 2].isnan()


def test_a_verifier_with_state_observes():
    inner = noisy(reward="exact_answer")
    outer = noisy(reward=inner)
    outer.observe()
    assert inner.updates.item() == outer.updates.item() == 1
    assert set(outer.state_dict()) == {"updates", "reward.updates"}


def test_faults(friendly_errors):
    with pytest.raises(
        RecipeError, match=r"false_negative_rate: must be from 0 to 1, or the name of a column; got 1.5"
    ):
        noisy(reward="exact_answer", false_negative_rate=1.5)
    with pytest.raises(RecipeError, match="key: must be draw, sample or answer; got 'text'"):
        noisy(reward="exact_answer", key="text")
    with pytest.raises(ScoreError, match="the verifier must give 0 or 1; got 3"):
        noisy(reward=lambda samples: [[3.0]])(["p"], [["a"]])
    with pytest.raises(ScoreError, match="needs a verifier that returns pairs"):
        noisy(reward=lambda samples: [[1.0]], key="answer")(["p"], [["a"]])
    with pytest.raises(RecipeError, match=r"rewards.noisy.reward: .*Did you mean 'exact_answer'"):
        noisy(reward="exact_anser")
