"""Prompts that hold a draft: the template, chat turns, and drafts that do not fit."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import DataError, RecipeError
from guerdon.language.policy import LanguagePolicy
from guerdon.language.revision import TEMPLATE, revision_prompt
from guerdon.language.tasks import drafts, topics
from guerdon.recipes.schema import load_recipe


def policy(**options) -> LanguagePolicy:
    options = {"max_new_tokens": 13, "revision": drafts.REVISION, **options}
    return LanguagePolicy.load(topics.model(0), tokenizer=topics.tokenizer(), **options)


def test_a_slot_in_a_prompt_or_a_draft_is_text():
    assert revision_prompt("{prompt}|{draft}|{prompt}", "a {draft} b", "{prompt}") == "a {draft} b|{prompt}|a {draft} b"


def test_messages_keep_their_turns():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q", "name": "n"}]
    found = revision_prompt("{prompt}+{draft}", chat, "d")
    assert found == [chat[0], {"role": "user", "content": "q+d", "name": "n"}]
    assert chat[1]["content"] == "q"
    for prompt in (
        [*chat, {"role": "assistant", "content": "x"}],
        [{"role": "user", "content": [{"text": "q"}]}],
        [],
        3,
    ):
        with pytest.raises(DataError, match=r"messages that end in a text of the user's, to hold a draft"):
            revision_prompt(TEMPLATE, prompt, "d")


def test_a_template_needs_both_slots():
    for template, slot in (("{prompt}", "{draft}"), ("{draft}", "{prompt}")):
        with pytest.raises(RecipeError, match=rf"policy\.revision: must contain \{slot}"):
            policy(revision=template)
        with pytest.raises(RecipeError, match=rf"policy\.revision: must contain \{slot}"):
            load_recipe("srpo", {"policy.revision": template})
    assert (
        load_recipe("sort").policy.revision
        == TEMPLATE
        == load_recipe("srpo", {"policy.model": "m", "data": "d"}).policy.revision
    )
    # two slots of each, and room for a draft: `policy.encode` says the same
    assert load_recipe("srpo").policy.revision == drafts.REVISION


def test_a_draft_is_cut_and_never_the_prompt():
    """64 positions, 13 to follow: with the opening token and two topics there is room for 48 letters of a draft."""
    who = policy()
    letters = topics.LETTERS * 5
    cases = [letters[:48], letters[:49], letters, "", None]
    prompts, cut = who.revision_prompts(["A"] * 5, cases)
    assert cut == [False, True, True, False, False]
    assert prompts == [f"A{letters[:48]}A"] * 3 + ["AA", "A"]
    ids, mask = who.encode(prompts)
    assert ids.shape[1] == 51
    assert mask.sum(1).tolist() == [51, 51, 51, 3, 2]
    # less room for what follows is more room for drafts
    assert who.revision_prompts(["A"], [letters], room=3)[0] == [f"A{letters[:58]}A"]
    # a prompt that is too long without a draft is an error as ever
    long = "A" * 30
    prompts, cut = who.revision_prompts([long], ["abc"])
    assert (prompts, cut) == ([long * 2], [True])
    with pytest.raises(DataError, match="prompt 0 is too long"):
        who.encode(prompts)


def test_a_draft_that_stands_twice_is_cut_twice():
    who = policy(revision="{draft}{prompt}{draft}")
    (found,), cut = who.revision_prompts(["A"], ["abcdefghij" * 4])
    assert cut == [True]
    kept = found.split("A")[0]
    assert found == f"{kept}A{kept}"
    assert len(found) == 49  # with the opening token 50 of 51


def test_packing_with_drafts():
    who = policy(dtype="float64")
    plain, drafted = who.pack(["A", "B"], [["ab"], ["c"]]), who.pack(["A", "B"], [["ab"], ["c"]], [None, "dd"])
    assert "draft_cut" not in plain.extras
    assert drafted.extras["draft_cut"].tolist() == [False, False]
    assert drafted.prompts == ["A", "BddB"]
    assert torch.equal(plain.mask, drafted.mask)
    by_hand = who.pack(["A", "BddB"], [["ab"], ["c"]])
    assert all(torch.equal(by_hand.steps[name], drafted.steps[name]) for name in by_hand.steps)
    first, second = who.log_prob(plain).logp, who.log_prob(drafted).logp
    assert torch.allclose(first[0], second[0])
    assert (first[1] - second[1]).abs().max() > 1e-4
    # a message of the assistant is a draft too, and room is kept for as much as the policy may say
    said = who.pack(["B"], [["c"]], [[{"role": "assistant", "content": "d" * 60}]])
    assert said.prompts == ["B" + "d" * 48 + "B"]
    assert said.extras["draft_cut"].tolist() == [True]
