"""Revisions: none are plain samples, and each sees the last draft alone."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import RecipeError, ShapeError
from guerdon.inference import revise
from guerdon.language.policy import LanguagePolicy
from guerdon.language.tasks import drafts, topics

PROMPTS, SEEDS = ["A", "B", "C"], [7, 8, 9]


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    return LanguagePolicy.load(
        topics.model(0), tokenizer=topics.tokenizer(), max_new_tokens=13, revision=drafts.REVISION
    )


class Spy:
    """A policy that keeps what it was asked."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self.policy, self.asked = policy, []

    def sample(self, prompts, *args, **options):
        self.asked.append(list(prompts))
        return self.policy.sample(prompts, *args, **options)

    def revision_prompts(self, prompts, drafts):
        return self.policy.revision_prompts(prompts, drafts)


@pytest.mark.parametrize("greedy", [False, True])
def test_no_revision_is_a_sample(policy, greedy):
    (found,) = revise(policy, PROMPTS, SEEDS, revisions=0, group_size=2, greedy=greedy)
    plain = policy.sample(PROMPTS, 2, SEEDS, greedy=greedy)
    assert found.samples == plain.samples
    assert torch.equal(found.logp_old, plain.logp_old)


def test_each_revision_sees_the_last_draft_alone(policy):
    spy = Spy(policy)
    found = revise(spy, PROMPTS, SEEDS, revisions=3, group_size=2)
    assert len(found) == 4
    for k in range(3):
        expected = [f"{p}{draft}{p}" for p, group in zip(PROMPTS, found[k].samples, strict=True) for draft in group]
        assert spy.asked[k + 1] == expected
    # and is a sample after that prompt, scored as such (texts leave out special tokens, which this model also samples)
    again = policy.given(spy.asked[3], [[text] for group in found[3].samples for text in group])
    lengths = found[3].mask.sum(-1).flatten()
    same = (lengths == again.mask.sum(-1).flatten()) & ~found[3].extras["truncated"].flatten()
    assert same.any()
    sums = [(x.logp_old * x.mask).sum(-1).flatten()[same] for x in (found[3], again)]
    assert torch.allclose(*sums, atol=1e-4)
    for rollout in found[1:]:
        assert rollout.validate().mask.shape[:2] == (3, 2)
        assert rollout.extras["draft_cut"].shape == (3, 2)
        assert not rollout.steps


def test_what_is_sampled_depends_on_the_seed_alone(policy):
    whole = revise(policy, PROMPTS, SEEDS, revisions=2, group_size=2)
    alone = revise(policy, PROMPTS[1:2], SEEDS[1:2], revisions=2, group_size=2)
    assert [r.samples[1] for r in whole] == [r.samples[0] for r in alone]
    shorter = revise(policy, PROMPTS, SEEDS, revisions=1, group_size=2)
    assert shorter[1].samples == whole[1].samples
    other = revise(policy, PROMPTS, [1, 2, 3], revisions=1, group_size=2)
    assert other[1].samples != whole[1].samples
    # the answers of a group are revised with numbers of their own
    same = revise(policy, PROMPTS, SEEDS, group_size=4, drafts=[["ab"] * 4] * 3)
    assert any(len(set(group)) > 1 for group in same[0].samples)


def test_given_drafts_are_the_start(policy):
    spy = Spy(policy)
    found = revise(spy, PROMPTS, SEEDS, revisions=2, drafts=[["ab"], [""], ["c" * 60]])
    assert len(found) == 2
    assert spy.asked[0] == ["AabA", "BB", "C" + "c" * 48 + "C"]
    assert found[0].extras["draft_cut"].tolist() == [[False], [False], [True]]


def test_refusals(policy):
    with pytest.raises(RecipeError, match="revisions must be 0 or more"):
        revise(policy, PROMPTS, SEEDS, revisions=-1)
    with pytest.raises(ShapeError, match=r"one seed per prompt \(P = 3\); got 2"):
        revise(policy, PROMPTS, SEEDS[:2])
    for wrong in ([["a"]] * 2, [["a", "b"]] * 3):
        with pytest.raises(ShapeError, match="drafts must be 3 lists of 1"):
            revise(policy, PROMPTS, SEEDS, drafts=wrong)
