"""Q-values of a policy: against whole logits, on models from disk, without ever holding the vocabulary for all tokens."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from guerdon.errors import CheckpointError, DataError, RecipeError
from guerdon.language.characters import character_tokenizer
from guerdon.language.logprob import token_logit, token_logprob
from guerdon.language.policy import LanguagePolicy
from guerdon.language.values import implicit_values
from tests.language.conftest import ALPHABET, make_model

PROMPTS = ["ab", "cdefg", "a"]
TEXTS = [["hij", "k"], ["a", "abcd"], ["m", "mmm"]]
BETA = 0.5


def saved(folder, kind, tokenizer, *, shift=0.0):
    model = make_model(kind, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shift * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "softcap"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_they_are_what_whole_logits_say(tokenizer, tmp_path, kind, temperature):
    start, end = saved(tmp_path / "start", kind, tokenizer), saved(tmp_path / "end", kind, tokenizer, shift=0.05)
    policy, reference = (LanguagePolicy.load(path, temperature=temperature) for path in (end, start))
    rollout = policy.pack(PROMPTS, TEXTS)
    found = implicit_values(policy, rollout, reference=reference, beta=BETA)
    models = [AutoModelForCausalLM.from_pretrained(path).double() for path in (end, start)]
    for p, prompt in enumerate(PROMPTS):
        ids = torch.tensor(tokenizer(prompt).input_ids)
        for g in range(2):
            words = rollout.steps["completion_ids"][p, g][rollout.mask[p, g]]
            n = len(words)
            with torch.no_grad():
                now, then = (
                    m(torch.cat([ids, words])[None]).logits[0, len(ids) - 1 : -1] / temperature for m in models
                )
            taken = now.gather(1, words[:, None])[:, 0]
            value = now.logsumexp(-1)
            logp = [table.log_softmax(-1).gather(1, words[:, None])[:, 0] for table in (now, then)]
            expected = {
                "q": taken,
                "value": value,
                "advantage": logp[0],
                "reward": taken - torch.cat([value[1:], torch.zeros(1)]),
                "reward_kl": logp[0] - logp[1],
            }
            for name, by_hand in expected.items():
                ours = getattr(found, name)[p, g]
                torch.testing.assert_close(ours[:n].double(), BETA * by_hand.double(), rtol=0, atol=2e-5)
                assert (ours[n:] == 0).all()
    assert found.reward_kl.abs().max() > 0.01
    assert not found.q.requires_grad


def test_without_adapters_is_the_reference(tokenizer, tmp_path):
    plain = LanguagePolicy.load(saved(tmp_path / "start", "llama", tokenizer))
    tuned = LanguagePolicy.load(str(tmp_path / "start"), lora={"rank": 2})
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    rollout = tuned.pack(PROMPTS, TEXTS)
    own, given = implicit_values(tuned, rollout), implicit_values(tuned, rollout, reference=plain)
    for name, value in own._asdict().items():
        torch.testing.assert_close(value, getattr(given, name))
    assert own.reward_kl.abs().max() > 0.1


def test_what_is_refused(tokenizer):
    policy = LanguagePolicy.load(make_model(dtype=torch.float32), tokenizer=tokenizer)
    rollout = policy.pack(PROMPTS, TEXTS)
    with pytest.raises(CheckpointError, match="keep_reference"):
        implicit_values(policy, rollout)
    other = LanguagePolicy.load(make_model(dtype=torch.float32), tokenizer=character_tokenizer(ALPHABET[::-1]))
    with pytest.raises(DataError, match="another vocabulary"):
        implicit_values(policy, rollout, reference=other)
    with pytest.raises(RecipeError, match="beta must be above 0"):
        implicit_values(policy, rollout, reference=policy, beta=-1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_normaliser_and_its_gradient(temperature, bias, chunk):
    """A token's logit less its log-probability is logsumexp of all logits, in value and in gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 6), (11, 6), *([(11,)] if bias else [])]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    hidden, matrix, offset = inputs[0], inputs[1], inputs[2] if bias else None
    ids = torch.randint(11, (9,), generator=generator)
    logp, _ = token_logprob(hidden, matrix, ids, bias=offset, temperature=temperature, chunk=chunk)
    found = token_logit(hidden, matrix, ids, bias=offset, temperature=temperature) - logp
    logits = (hidden @ matrix.T + (offset if offset is not None else 0.0)) / temperature
    torch.testing.assert_close(found, logits.logsumexp(-1))
    weight = torch.linspace(-1, 1, 9, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), inputs) for x in (found, logits.logsumexp(-1)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision_gives_a_normaliser_in_float32(mixed):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 6, generator=generator).bfloat16()
    matrix = torch.randn(11, 6, generator=generator).to(torch.float32 if mixed else torch.bfloat16)
    ids = torch.randint(11, (9,), generator=generator)
    logp, _ = token_logprob(hidden, matrix, ids)
    found = token_logit(hidden, matrix, ids) - logp
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (hidden.float() @ matrix.float().T).logsumexp(-1), rtol=1e-6, atol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the most elements of a tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for made in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return found


def test_the_vocabulary_is_never_held_for_all_tokens(tokenizer):
    words = 3000
    model = make_model("tied", torch.float32, words=words)
    policy = LanguagePolicy.load(model, tokenizer=tokenizer, logprob_chunk=4)
    policy.keep_reference()
    rollout = policy.pack(PROMPTS * 8, [["abcdefghijklm"[i % 3 :]] for i in range(24)])
    tokens = int(rollout.mask.sum())
    with Largest() as largest:
        implicit_values(policy, rollout)
    # nothing larger than the model's own matrix of the vocabulary, or a chunk of logits
    assert largest.elements <= max(words * 16, 4 * words)
    assert largest.elements < tokens * words / 10
    with Largest() as whole:
        model(rollout.steps["completion_ids"].flatten(0, 1))
    assert whole.elements >= tokens * words / 2, "the test must see what it counts"
