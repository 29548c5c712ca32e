"""Samples kept to a whitelist of tokens, and to a grammar: in sampling, in training, and by numbers."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from guerdon.errors import DataError, RecipeError
from guerdon.language.policy import LanguagePolicy
from guerdon.rewards.expression import RewardExpression
from guerdon.rewards.grammar import Grammar
from guerdon.rollout import Rollout
from tests.language.conftest import make_model

CHARACTERS = "g1234+-*/(). 05e"
MERGES = [("g", "1"), ("g", "2"), ("+", "g"), ("0", "."), ("0.", "5"), (")", ")"), ("a", "g"), ("(", "g1"), ("e", "e")]


@pytest.fixture(scope="module")
def merged() -> PreTrainedTokenizerFast:
    """A tokenizer with tokens of several characters, some of them in and out of the whitelist at once."""
    letters = ["<pad>", "<eos>", *"abcxyz", *CHARACTERS, *("".join(pair) for pair in MERGES)]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(letters)}, MERGES))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def policy(tokenizer, kind: str = "llama", **options) -> LanguagePolicy:
    dtype = torch.float64 if kind == "llama" else torch.float32
    made = make_model(kind, dtype, words=len(tokenizer))
    return LanguagePolicy(made, tokenizer, **{"max_new_tokens": 12, "temperature": 0.7, **options})


def samples(p: LanguagePolicy, prompts: int, group: int) -> Rollout:
    return p.sample(["x"] * prompts, group, list(range(prompts)))


@pytest.mark.parametrize("kind", ["llama", "softcap"])
def test_a_whitelist_is_kept_to(merged, kind):
    p = policy(merged, kind)
    assert any(set(text) - set(CHARACTERS) for group in samples(p, 1, 8).samples for text in group)
    p.restrict(CHARACTERS)
    found = samples(p, 125, 8)
    texts = [text for group in found.samples for text in group]
    assert len(texts) == 1000
    assert not any(set(text) - set(CHARACTERS) for text in texts)
    assert any("0.5" in text for text in texts)
    assert any(map(bool, texts))


def refusal(text: str) -> str:
    """Why the parser refuses it; nothing if it does not."""
    try:
        RewardExpression.parse(text, 4)
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["llama", "softcap"])
def test_with_a_grammar_every_sample_is_an_expression(merged, kind):
    p = policy(merged, kind)
    p.restrict(CHARACTERS, Grammar(["g1", "g2", "g3", "g4"]))
    found = samples(p, 40, 8)
    texts = [text for group in found.samples for text in group]
    assert not found.extras["truncated"].any()
    assert len(set(texts)) > 200
    faults = [fault for text in texts if (fault := refusal(text))]
    assert not [fault for fault in faults if "test point" not in fault]
    assert len(faults) < len(texts) / 2


@pytest.mark.parametrize("kind", ["llama", "softcap"])
@pytest.mark.parametrize("grammar", [None, Grammar(["g1", "g2"])])
def test_training_sees_the_distribution_that_was_sampled_from(merged, kind, grammar):
    p = policy(merged, kind)
    p.restrict(CHARACTERS, grammar)
    found = samples(p, 6, 4)
    scored = p.log_prob(found)
    assert torch.allclose(scored.logp, found.logp_old.to(scored.logp.dtype), atol=1e-5)
    # against the plain definition: softmax over what was allowed at each place
    ids = found.steps["completion_ids"]
    p.allowed, close = None, 1e-9 if kind == "llama" else 1e-5
    places = torch.tensor(_allowed(p, merged, grammar, ids))
    full = _logits(p, found) / p.temperature
    table = full.masked_fill(~places, -torch.inf).log_softmax(-1)
    plain = table.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(scored.logp, plain.where(found.mask, 0.0), atol=close)
    assert scored.entropy is not None
    entropy = -(table.exp() * table.masked_fill(~places, 0.0)).sum(-1)
    assert torch.allclose(scored.entropy, entropy.where(found.mask, 0.0), atol=close)


def _logits(p: LanguagePolicy, found: Rollout) -> torch.Tensor:
    prompt, ids = found.steps["prompt_ids"], found.steps["completion_ids"]
    rows = torch.cat([prompt.repeat_interleave(ids.shape[1], 0), ids.flatten(0, 1)], 1)
    with torch.no_grad():
        return p.model(input_ids=rows).logits[:, prompt.shape[1] - 1 : -1].view(*ids.shape, -1)


def _allowed(p: LanguagePolicy, tokenizer, grammar: Grammar | None, ids: torch.Tensor) -> list:
    """By trying every token after every beginning, from texts alone."""
    words = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    end = tokenizer.eos_token_id

    def row(tokens: list[int]) -> list[list[bool]]:
        table, text, over = [], "", False
        for t, token in enumerate(tokens):
            left = p.max_new_tokens - t - 1
            here = []
            for other, word in enumerate(words):
                good = bool(word) and set(word) <= set(CHARACTERS)
                if grammar is None or over:
                    here.append(good or other == end)
                    continue
                before = grammar.advance(grammar.start, text)
                after = grammar.advance(grammar.start, text + word) if good else None
                fits = after is not None and grammar.shortest(after) + 1 <= left
                here.append(grammar.complete(before) if other == end else fits)
            table.append([True] * len(words) if over else here)
            over |= token == end
            text += words[token]
        return table

    return [[row(tokens) for tokens in group] for group in ids.tolist()]


def test_gradients_flow_and_the_rest_of_the_vocabulary_gets_none(merged):
    p = policy(merged)
    p.restrict(CHARACTERS, Grammar(["g1", "g2"]))
    out = p.log_prob(samples(p, 2, 4))
    assert out.entropy is not None
    (out.logp.sum() + out.entropy.sum()).backward()
    head = p.backbone.head.weight.grad
    assert head is not None
    assert head.isfinite().all()
    assert p.allowed is not None
    outside = [token for token in range(len(merged)) if token not in p.allowed.tokens]
    assert (head[outside] == 0).all()
    assert (head[merged.convert_tokens_to_ids("g1")] != 0).any()


def test_the_greedy_sample_keeps_to_it_too(merged):
    p = policy(merged)
    p.restrict(CHARACTERS, Grammar(["g1"]))
    text = p.sample(["x"], 1, [0], greedy=True).samples[0][0]
    RewardExpression.parse(text, 1)


def test_given_completions_must_be_of_allowed_tokens(merged):
    p = policy(merged)
    p.restrict(CHARACTERS)
    assert p.given(["x"], [["g1+g2"]]).logp_old.isfinite().all()
    with pytest.raises(DataError, match="none that a sample may be made of"):
        p.given(["x"], [["g1+ab"]])


def test_what_cannot_be_kept_to_is_an_error(merged):
    p = policy(merged)
    with pytest.raises(RecipeError, match="no token"):
        p.restrict("QW")
    with pytest.raises(RecipeError, match="of a single character"):
        p.restrict("g12+", Grammar(["g1"]))
    short = policy(merged, max_new_tokens=2)
    with pytest.raises(RecipeError, match="too few"):
        short.restrict(CHARACTERS, Grammar(["g1"]))
