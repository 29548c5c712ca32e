from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import NumericsError
from guerdon.language.generation import Uniforms, generate
from guerdon.language.probe import probe
from tests.language.conftest import WORDS, make_model

PAD, END = 0, 1


def prompts():
    """Four prompts of different lengths, padded on the left."""
    ids = torch.tensor([[0, 0, 0, 4, 7], [2, 3, 4, 5, 6], [0, 9, 9, 3, 2], [0, 0, 8, 8, 14]])
    return ids, ids != PAD


def run(model, group=3, *, ids=None, seeds=(5, 6, 7, 8), **options):
    ids, mask = prompts() if ids is None else (ids, ids != PAD)
    options = {"max_new_tokens": 9, "eos_ids": [END], "pad_id": PAD} | options
    if options.get("temperature", 1.0) > 0:
        options.setdefault("uniforms", Uniforms(seeds[: len(ids)], group))
    return generate(model, ids, mask, group, **options)


def exact_logp(model, result, temperature=1.0):
    """Log-probabilities from whole sequences, one at a time and without padding."""
    ids, mask = prompts()
    out = torch.zeros_like(result.logp)
    for p in range(len(ids)):
        prompt = ids[p][mask[p]]
        for g in range(result.mask.shape[1]):
            words = result.completion_ids[p, g][result.mask[p, g]]
            with torch.no_grad():
                logits = model(torch.cat([prompt, words])[None]).logits[0, len(prompt) - 1 : -1]
            out[p, g, : len(words)] = (logits / temperature).log_softmax(-1).gather(1, words[:, None])[:, 0]
    return out


@pytest.mark.parametrize("kind", ["llama", "gpt2", "window", "softcap", "eager", "tied"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_whole_sequences(kind, temperature):
    # eager attention of transformers takes its softmax in float32 and cannot mask float64
    eager = kind in ("softcap", "eager")
    model = make_model(kind, torch.float32 if eager else torch.float64)
    result = run(model, temperature=temperature)
    torch.testing.assert_close(
        result.logp, exact_logp(model, result, temperature), rtol=0, atol=1e-5 if eager else 1e-9
    )


def test_all_short_cuts_are_taken_where_they_hold():
    found = {kind: probe(make_model(kind, torch.float32)) for kind in ("llama", "gpt2", "window", "softcap", "eager")}
    for kind, backbone in found.items():
        assert backbone.caches, (kind, backbone.refused)
        assert backbone.shares_prompt, (kind, backbone.refused)
        assert backbone.ignores_padding, (kind, backbone.refused)
        assert backbone.plain_head == (kind != "softcap"), (kind, backbone.refused)
        assert backbone.wide_mask == (kind in ("llama", "gpt2")), (kind, backbone.refused)
        assert backbone.packs == backbone.wide_mask, (kind, backbone.refused)


# each with the ones that build on it
@pytest.mark.parametrize("short_cuts", [["packs"], ["packs", "wide_mask"], ["packs", "wide_mask", "caches"]])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_without_a_short_cut_the_samples_are_the_same(short_cuts, model):
    backbone = probe(make_model(model, scale=0.3))
    fast = run(backbone, group=8)
    for short_cut in short_cuts:
        setattr(backbone, short_cut, False)
    slow = run(backbone, group=8)
    assert torch.equal(fast.completion_ids, slow.completion_ids)
    torch.testing.assert_close(fast.logp, slow.logp, rtol=0, atol=1e-9)


def test_a_sample_is_live_through_its_first_end_word():
    result = run(make_model(scale=0.3), group=16)
    ends = result.completion_ids == END
    lengths = result.mask.sum(-1)
    assert len(lengths.unique()) > 3
    assert int(lengths.max()) == result.mask.shape[2]
    for ids, mask, logp, truncated, length in zip(
        result.completion_ids.flatten(0, 1),
        result.mask.flatten(0, 1),
        result.logp.flatten(0, 1),
        result.truncated.flatten(),
        lengths.flatten().tolist(),
        strict=True,
    ):
        assert mask[:length].all()
        assert not mask[length:].any()
        assert (ids[length:] == PAD).all()
        assert (logp[length:] == 0).all()
        assert not (ids[: length - 1] == END).any()
        assert bool(truncated) == (int(ids[length - 1]) != END)
    assert bool(ends.any())
    assert bool(result.truncated.any())


def test_samples_that_end_leave_the_batch():
    backbone = probe(make_model(scale=0.3))
    sizes = []
    read = backbone.read
    backbone.read = lambda ids, *args, **options: (sizes.append(ids.numel()), read(ids, *args, **options))[1]
    result = run(backbone, group=16, eos_ids=[1, 2, 3, 4])
    assert sizes[0] == 4 * 5
    assert sizes[1] == 64
    assert 1 <= sizes[-1] <= 32
    assert len(sizes) == result.mask.shape[2]
    torch.testing.assert_close(result.logp, exact_logp(backbone.causal, result), rtol=0, atol=1e-9)


def test_every_word_ends():
    result = run(make_model(), eos_ids=list(range(WORDS)))
    assert result.mask.shape == (4, 3, 1)
    assert result.mask.all()
    assert not result.truncated.any()


def test_no_end_before_the_least_length():
    model = make_model(scale=0.1)
    result = run(model, group=16, min_new_tokens=5)
    lengths = result.mask.sum(-1)
    # five words that are no end, then possibly one
    assert int(lengths.min()) == 6
    torch.testing.assert_close(result.logp, exact_logp(model, result), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "softcap"])
def test_greedy_equals_transformers_generate(kind):
    model = make_model(kind, torch.float32)
    ids, mask = prompts()
    ours = run(model, 1, temperature=0.0)
    theirs = model.generate(
        ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=9, pad_token_id=PAD, eos_token_id=END
    )[:, ids.shape[1] :]
    assert torch.equal(ours.completion_ids[:, 0], theirs)
    torch.testing.assert_close(ours.logp, exact_logp(model, ours), rtol=0, atol=1e-5)


def test_samples_do_not_depend_on_the_batch():
    model = probe(make_model(dtype=torch.float32))
    ids, _ = prompts()
    together = run(model, 5, seeds=(5, 6, 7, 8))
    for p, seed in enumerate((5, 6, 7, 8)):
        alone = run(model, 5, ids=ids[p : p + 1][:, ids[p] != PAD], seeds=(seed,))
        length = alone.mask.shape[2]
        assert torch.equal(together.completion_ids[p, :, :length], alone.completion_ids[0])
        assert not together.mask[p, :, length:].any()


def test_seeds_decide():
    model = probe(make_model())
    first, again, other = run(model), run(model), run(model, seeds=(1, 2, 3, 4))
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert first.completion_ids.shape != other.completion_ids.shape or not torch.equal(
        first.completion_ids, other.completion_ids
    )


def chi_square(counts, expected):
    seen = expected > 0
    assert not counts[~seen].any()
    return float(((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum())


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (6, 0.8), (1, 1.0), (0, 1e-9)])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_first_words_have_the_distribution_asked_for(top_k, top_p, temperature):
    model = make_model(scale=0.3)
    ids = torch.tensor([[3, 8, 4]])
    draws = 4000
    result = run(
        model, draws, ids=ids, max_new_tokens=1, top_k=top_k, top_p=top_p, temperature=temperature, seeds=(11,)
    )
    with torch.no_grad():
        probability = (model(ids).logits[0, -1] / temperature).softmax(-1)
    # by hand: walk down the words from the most probable one
    order = sorted(range(WORDS), key=lambda word: -float(probability[word]))
    order = order[: top_k or WORDS]
    total, kept, mass = sum(float(probability[w]) for w in order), [], 0.0
    for word in order:
        if kept and mass >= top_p * total:
            break
        kept.append(word)
        mass += float(probability[word])
    expected = torch.zeros(WORDS)
    for word in kept:
        expected[word] = draws * float(probability[word]) / mass
    counts = torch.bincount(result.completion_ids.flatten(), minlength=WORDS).float()
    # 99.9 % points of chi-square with one degree of freedom less than there are words
    limit = {1: 1e-6, 2: 10.83, 3: 13.82, 4: 16.27, 5: 18.47, 6: 20.52}.get(len(kept), 36.12)
    assert chi_square(counts, expected) < limit
    # the log-probability is that of the whole distribution
    torch.testing.assert_close(result.logp.flatten(), probability.log()[result.completion_ids.flatten()])


def test_the_largest_uniform_number_is_no_word_without_mass():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    high = Uniforms([0], 1)
    high(0)
    high.numbers.fill_(1.0).clamp_(max=1 - 2.0**-24)
    result = run(
        model, 1, ids=torch.tensor([[3]]), max_new_tokens=1, uniforms=high, min_new_tokens=1, eos_ids=[WORDS - 1]
    )
    assert int(result.completion_ids) == WORDS - 2
    assert float(result.logp) == pytest.approx(-math.log(WORDS))


def test_uniform_numbers_belong_to_their_prompt():
    both, second = Uniforms([1, 2], 3), Uniforms([2], 3)
    for step in range(40):
        assert torch.equal(both(step)[3:], second(step))
    with pytest.raises(ValueError, match="in order"):
        both(0)


def test_long_samples_outgrow_the_room_set_aside():
    model = probe(make_model())
    model.causal.config.max_position_embeddings = 512
    short = torch.tensor([[3, 4]])
    result = run(model, 2, ids=short, max_new_tokens=150, min_new_tokens=150, seeds=(3,))
    assert result.mask.sum() == 300
    model.caches = False
    again = run(model, 2, ids=short, max_new_tokens=150, min_new_tokens=150, seeds=(3,))
    assert torch.equal(result.completion_ids, again.completion_ids)


def test_processes_that_share_a_model_go_on_until_all_are_done():
    votes = []

    def all_done(mine):
        votes.append(mine)
        return len(votes) == 4

    result = run(make_model(), eos_ids=list(range(WORDS)), all_done=all_done)
    assert votes == [True] * 4
    assert result.mask.shape[2] == 1


def test_sampling_without_numbers_is_refused():
    with pytest.raises(ValueError, match="needs uniforms"):
        generate(make_model(), *prompts(), 1, max_new_tokens=1, eos_ids=[1], pad_id=0)


def test_logits_that_are_no_numbers_are_reported():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NumericsError, match="prompt 0, sample 0"):
        run(probe(model))
