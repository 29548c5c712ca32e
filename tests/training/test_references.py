from __future__ import annotations

import pytest
import torch

from guerdon.advantages import dr_grpo
from guerdon.errors import DataError, RecipeError
from guerdon.objectives import policy_gradient
from guerdon.shaping import ceil, mean_std, par
from guerdon.signal import Signal
from guerdon.training import Online, Optim
from guerdon.training.references import References, given_scores, row_key
from tests.training.bandit import BanditPolicy, best_arm, rows


def hits(samples, best):
    return [[float(sum(a == b for a in draw)) for draw in group] for group, b in zip(samples, best, strict=True)]


def loop(*, data=None, **options):
    policy = BanditPolicy()
    policy.keep_reference()
    signal = Signal(rewards={"best": best_arm, "hits": hits}, shaping={"best": [par]}, advantage=dr_grpo)
    settings = {"prompts_per_step": 3, "group_size": 4, "optim": Optim(lr=0.2), "steps": 9, **options}
    return Online(policy, data or rows(), signal, policy_gradient, **settings)


def test_a_prompt_is_answered_once_by_the_policy_training_started_from(monkeypatch):
    running = loop(reference_samples=5)
    asked = []
    plain = running.policy.reference_sample

    def noting(prompts, *rest, **more):
        asked.extend(prompts)
        return plain(prompts, *rest, **more)

    monkeypatch.setattr(running.policy, "reference_sample", noting)
    for _ in range(5):
        result = running.step()
    assert sorted(asked) == [0, 1, 2, 3, 4, 5]
    assert result.rollout.extras["ref_scores"].shape == (3, 5, 2)
    expected = par(result.rollout.scores[..., 0], result.rollout.extras["ref_scores"][..., 0])
    torch.testing.assert_close(result.rollout.extras["shaped"][..., 0], expected)
    assert not torch.equal(running.policy.table, running.policy.reference)


def test_answers_depend_on_nothing_but_the_row():
    first, second = loop(reference_samples=3), loop(reference_samples=3)
    for _ in range(3):
        first.step()  # training in between changes neither the reference nor its seeds
    torch.testing.assert_close(first.reference.scores(rows()), second.reference.scores(rows()[::-1]).flip(0))


def test_a_checkpoint_carries_the_scores_along(monkeypatch):
    first, second = loop(), loop()
    first.step()
    second.policy.load_state_dict(first.policy.state_dict())
    second.load_state(first.state())
    kept = len(first.reference.kept.keys)
    assert kept == 3
    assert second.reference.kept.missing(first.reference.kept.keys.tolist()) == []
    for _ in range(2):
        first.step()
        second.step()
    torch.testing.assert_close(second.policy.table, first.policy.table, rtol=0, atol=0)


def test_scores_that_come_with_the_data_are_taken():
    data = [{**row, "ref_scores": {"best": [0.5], "hits": [1.0, 2.0]}} for row in rows()]
    running = loop(data=data)
    result = running.step()
    assert result.rollout.extras["ref_scores"][0, :, 0].tolist()[0] == 0.5
    assert len(running.reference.kept.keys) == 0
    with pytest.raises(DataError, match="row 0 has none for 'hits'"):
        given_scores([{"best": [1.0]}], ("best", "hits"))
    with pytest.raises(DataError, match="must hold lists of numbers"):
        given_scores([["a"]], ("best",))


def test_the_store():
    kept = References(2, 1)
    kept.add([5, -3], torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
    assert kept.missing([9, 5, 9, 8]) == [9, 8]
    assert kept.of([-3, 5, -3])[..., 0].tolist() == [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    other = References(2, 1)
    other.load_state_dict(kept.state_dict())
    assert other.of([5]).flatten().tolist() == [1.0, 2.0]
    assert row_key({"a": 1, "b": 2}) == row_key({"b": 2, "a": 1}) != row_key({"a": 1, "b": 3})
    with pytest.raises(RecipeError, match="samples and prompts must be at least 1; got 0"):
        loop(reference_samples=0)


def test_a_stage_learns_what_it_shaped_and_each_component_for_itself():
    shaping = {"*": [mean_std()], "hits": [lambda scores: ceil(scores, c=-10.0), last := mean_std()]}
    signal = Signal(rewards={"best": best_arm, "hits": hits}, shaping=shaping, advantage=dr_grpo)
    first, second = signal.shaping["best"][0], signal.shaping["hits"][0]
    assert first is not second
    running = Online(BanditPolicy(), rows(), signal, policy_gradient, prompts_per_step=3, group_size=4)
    result = running.step()
    scores = result.rollout.scores
    assert first.moments[1].item() == pytest.approx(scores[..., 0].mean().item())
    assert second.moments[1].item() == pytest.approx(scores[..., 1].mean().item())
    assert last.moments[1].item() == -10.0
