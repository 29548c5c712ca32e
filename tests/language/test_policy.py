from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guerdon.errors import CheckpointError, DataError, RecipeError, ShapeError
from guerdon.language.characters import character_tokenizer
from guerdon.language.policy import LanguagePolicy
from tests.language.conftest import ALPHABET, WORDS, make_model

PROMPTS = ["ab", "cdefg", "hhh", "a"]
SEEDS = [3, 1, 4, 15]


def make_policy(tokenizer, kind="llama", dtype="float64", *, scale=0.5, **options):
    options = {"max_new_tokens": 8} | options
    model = make_model(kind, getattr(torch, dtype), scale=scale)
    policy = LanguagePolicy.load(model, tokenizer=tokenizer, dtype=dtype, **options)
    if policy.critic is not None:
        torch.nn.init.normal_(policy.critic.weight, generator=torch.Generator().manual_seed(5))
    return policy


def with_adapters(tokenizer, dtype="float64", **options):
    policy = make_policy(tokenizer, dtype=dtype, lora={"rank": 3, "alpha": 6}, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return policy


def value_and_gradient(policy, rollout, module=None):
    found = policy.log_prob(rollout, module=module)
    weight = torch.linspace(-1, 1, rollout.mask.numel()).view(rollout.mask.shape).to(found.logp.dtype)
    loss = (found.logp * weight).sum() + 0.1 * found.entropy.sum()
    if found.values is not None:
        loss = loss + (found.values * weight).sum()
    trained = [p for p in policy.parameters() if p.requires_grad]
    return found, torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)


CASES = [
    *[("plain", kind, "float64", 3) for kind in ("llama", "gpt2", "window", "tied")],
    *[("plain", kind, "float32", 3) for kind in ("llama", "eager", "softcap")],
    ("adapters", "llama", "float64", 3),
    ("adapters", "llama", "float32", 3),
    ("critic", "gpt2", "float64", 3),
    ("critic", "softcap", "float32", 3),
    ("plain", "llama", "float64", 1),
]


@pytest.mark.parametrize(("what", "kind", "dtype", "group"), CASES)
def test_prompt_once_per_group_equals_whole_sequences(tokenizer, what, kind, dtype, group):
    if what == "adapters":
        policy = with_adapters(tokenizer, dtype)
    else:
        policy = make_policy(tokenizer, kind, dtype, critic=what == "critic", scale=0.3)
    rollout = policy.sample(PROMPTS, group, SEEDS)
    assert len(rollout.mask.sum(-1).unique()) > 1
    assert policy.backbone.shares_prompt
    shared, shared_gradient = value_and_gradient(policy, rollout)
    policy.backbone.shares_prompt = False
    whole, whole_gradient = value_and_gradient(policy, rollout)
    # logits of these weights are tens, where float32 has steps of 4e-6; how they add up differs between processors
    tolerance = 1e-9 if dtype == "float64" else 5e-5
    for ours, theirs in zip(shared, whole, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
            assert (ours[~rollout.mask] == 0).all()
    scale = max(float(g.abs().max()) for g in whole_gradient)
    assert scale > 1e-2
    for ours, theirs in zip(shared_gradient, whole_gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(scale, 1.0))
    # what was sampled is what is computed again
    torch.testing.assert_close(rollout.logp_old, shared.logp.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["llama", "softcap"])
def test_log_prob_and_entropy_against_one_sequence_at_a_time(tokenizer, kind):
    policy = make_policy(tokenizer, kind, "float32", temperature=0.8, top_k=5)
    rollout = policy.sample(PROMPTS, 2, SEEDS)
    found = policy.log_prob(rollout)
    for p, prompt in enumerate(PROMPTS):
        ids = torch.tensor(tokenizer(prompt).input_ids)
        for g in range(2):
            words = rollout.steps["completion_ids"][p, g][rollout.mask[p, g]]
            logits = policy.model(torch.cat([ids, words])[None]).logits[0, len(ids) - 1 : -1]
            table = (logits / 0.8).log_softmax(-1)
            n = len(words)
            torch.testing.assert_close(found.logp[p, g, :n], table.gather(1, words[:, None])[:, 0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found.entropy[p, g, :n], -(table.exp() * table).sum(-1), rtol=0, atol=1e-5)


def test_the_sampled_record(tokenizer):
    policy = make_policy(tokenizer, scale=0.3)
    rollout = policy.sample(PROMPTS, 5, SEEDS).validate()
    assert rollout.prompts == PROMPTS
    assert set(rollout.steps) == {"prompt_ids", "prompt_mask", "completion_ids"}
    assert rollout.extras["truncated"].any()
    for p in range(4):
        for g in range(5):
            words = rollout.steps["completion_ids"][p, g][rollout.mask[p, g]].tolist()
            assert (words[-1] == tokenizer.eos_token_id) != bool(rollout.extras["truncated"][p, g])
            # end and padding are steps if they were sampled, but not part of the text
            assert rollout.samples[p][g] == "".join(ALPHABET[word - 2] for word in words if word > 1)
    assert policy.log_prob(rollout, entropy=False).entropy is None


def test_masked_steps_and_parts_of_a_batch_change_nothing(tokenizer):
    policy = make_policy(tokenizer, scale=0.3)
    rollout = policy.sample(PROMPTS, 3, SEEDS)
    whole = policy.log_prob(rollout).logp
    parts = torch.cat([policy.log_prob(rollout.select(slice(p, p + 1))).logp for p in range(4)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-9)
    rollout.steps["completion_ids"] = rollout.steps["completion_ids"].masked_fill(~rollout.mask, 5)
    assert torch.equal(policy.log_prob(rollout).logp, whole)


def test_prompts_one_by_one_give_the_same_samples(tokenizer):
    policy = make_policy(tokenizer, dtype="float32", scale=0.3)
    together = policy.sample(PROMPTS, 4, SEEDS)
    for p, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        assert policy.sample([prompt], 4, [seed]).samples[0] == together.samples[p]
    assert policy.sample(PROMPTS, 4, [s + 1 for s in SEEDS]).samples != together.samples


def test_greedy_samples_are_transformers_greedy_texts(tokenizer):
    policy = make_policy(tokenizer, dtype="float32")
    rollout = policy.sample(PROMPTS, 2, SEEDS, greedy=True)
    for p, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        output = policy.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert rollout.samples[p] == [expected, expected]


def test_reference_is_the_model_without_adapters(tokenizer):
    policy = with_adapters(tokenizer)
    rollout = policy.sample(PROMPTS, 2, SEEDS)
    plain = make_policy(tokenizer)
    policy.keep_reference()
    reference = policy.reference_log_prob(rollout)
    torch.testing.assert_close(reference, plain.log_prob(rollout).logp.detach(), rtol=0, atol=1e-9)
    assert not reference.requires_grad
    assert float((reference - rollout.logp_old).abs().max()) > 0.1
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == {
        name for name, _ in policy.named_parameters() if "lora_" in name
    }


def test_reference_stays_while_the_policy_moves(tokenizer):
    policy = make_policy(tokenizer)
    rollout = policy.sample(PROMPTS, 2, SEEDS)
    with pytest.raises(CheckpointError, match="keep_reference"):
        policy.reference_log_prob(rollout)
    policy.keep_reference()
    names = set(policy.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(policy.reference_log_prob(rollout), rollout.logp_old, rtol=0, atol=1e-9)
    assert float((policy.log_prob(rollout).logp - rollout.logp_old).detach().abs().max()) > 1e-2
    assert not any("reference" in name for name in names)
    # the reference follows the policy to another device or dtype
    policy.to(torch.float32)
    assert policy.reference_log_prob(rollout).dtype == torch.float32


@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_checkpointing_gives_the_same(tokenizer, adapters):
    make = with_adapters if adapters else make_policy
    policy, saving = make(tokenizer), make(tokenizer, gradient_checkpointing=True)
    rollout = policy.sample(PROMPTS, 3, SEEDS)
    assert saving.sample(PROMPTS, 3, SEEDS).samples == rollout.samples
    plain, plain_gradient = value_and_gradient(policy, rollout)
    saving.train()
    saved, saved_gradient = value_and_gradient(saving, rollout)
    assert saving.model.training
    if adapters:
        torch.testing.assert_close(saving.reference_log_prob(rollout), policy.reference_log_prob(rollout))
    torch.testing.assert_close(saved.logp, plain.logp, rtol=0, atol=1e-9)
    torch.testing.assert_close(saved_gradient, plain_gradient, rtol=1e-8, atol=1e-8)


def test_dropout_is_off(tokenizer):
    model = make_model("gpt2")
    assert model.config.resid_pdrop > 0
    policy = LanguagePolicy.load(
        model, tokenizer=tokenizer, dtype="float64", max_new_tokens=8, gradient_checkpointing=True
    )
    policy.train()
    rollout = policy.sample(PROMPTS, 2, SEEDS)
    torch.testing.assert_close(policy.log_prob(rollout).logp.detach(), rollout.logp_old, rtol=0, atol=1e-9)


def test_autocast_keeps_log_probabilities_in_float32(tokenizer):
    policy = make_policy(tokenizer, dtype="float32", scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = policy.sample(PROMPTS, 3, SEEDS)
        found = policy.log_prob(rollout)
    assert found.logp.dtype == rollout.logp_old.dtype == found.entropy.dtype == torch.float32
    # bfloat16 inside the model, nothing worse outside
    torch.testing.assert_close(found.logp, rollout.logp_old, rtol=0, atol=0.1)
    assert float((found.logp - policy.log_prob(rollout).logp).detach().abs().max()) < 0.2


def test_a_wrapper_around_the_policy_is_used(tokenizer):
    policy = make_policy(tokenizer)
    kinds = []

    def wrapped(*args, **kwargs):
        kinds.append(kwargs["kind"])
        return policy(*args, **kwargs)

    rollout = policy.sample(PROMPTS, 2, SEEDS, module=wrapped)
    found = policy.log_prob(rollout, module=wrapped)
    assert kinds == ["sample", "log_prob"]
    torch.testing.assert_close(found.logp.detach(), rollout.logp_old, rtol=0, atol=1e-9)
    with pytest.raises(ShapeError, match="needs the mask"):
        policy(rollout.steps)


def test_a_critic_values_the_state_before_each_word(tokenizer):
    policy = make_policy(tokenizer, critic=True, scale=0.3)
    rollout = policy.sample(PROMPTS, 2, SEEDS)
    assert float(rollout.values.abs().max()) > 0.1
    with torch.no_grad():
        for p, prompt in enumerate(PROMPTS):
            ids = torch.tensor(tokenizer(prompt).input_ids)
            words = rollout.steps["completion_ids"][p, 0][rollout.mask[p, 0]]
            hidden = policy.model.model(torch.cat([ids, words])[None]).last_hidden_state[0, len(ids) - 1 : -1]
            torch.testing.assert_close(
                rollout.values[p, 0, : len(words)], policy.critic(hidden)[:, 0], rtol=0, atol=1e-9
            )
    assert (rollout.values[~rollout.mask] == 0).all()


def test_saved_and_loaded_back(tokenizer, tmp_path):
    policy = make_policy(tokenizer, dtype="float32", critic=True)
    rollout = policy.sample(PROMPTS, 2, SEEDS)
    policy.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in policy.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert AutoTokenizer.from_pretrained(tmp_path)("abc").input_ids == tokenizer("abc").input_ids
    again = LanguagePolicy.load(str(tmp_path), max_new_tokens=8, critic=True)
    repeated = again.sample(PROMPTS, 2, SEEDS)
    assert repeated.samples == rollout.samples
    torch.testing.assert_close(repeated.values, rollout.values)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # raised by peft itself
def test_adapters_saved_and_loaded_back(tokenizer, tmp_path):
    from peft import PeftModel

    make_policy(tokenizer, dtype="float32").save(tmp_path / "base")
    lora = {"rank": 2, "target_modules": ["q_proj", "v_proj"]}
    base = LanguagePolicy.load(str(tmp_path / "base"), max_new_tokens=8, lora=lora)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    rollout = base.sample(PROMPTS, 2, SEEDS)
    base.save(tmp_path / "adapters")
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["r"] == 2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapters")
    again = LanguagePolicy.load(peft, tokenizer=tokenizer, max_new_tokens=8)
    loaded = LanguagePolicy.load(str(tmp_path / "adapters"), max_new_tokens=8)
    for policy in (again, loaded):
        torch.testing.assert_close(policy.log_prob(rollout).logp.detach(), rollout.logp_old, rtol=0, atol=1e-5)
    assert any(p.requires_grad for p in loaded.parameters())


def test_chat_messages_go_through_the_template():
    tokenizer = character_tokenizer(ALPHABET)
    policy = make_policy(tokenizer)
    chat = [{"role": "user", "content": "bcd"}]
    with pytest.raises(DataError, match="prompt 0 cannot be encoded"):
        policy.sample([chat], 2, [0])
    tokenizer.chat_template = (
        "{% for m in messages %}e{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    ids, mask = policy.encode([chat, "a"])
    assert ids[0].tolist() == tokenizer("ebcda").input_ids
    assert mask.tolist() == [[True] * 5, [False] * 4 + [True]]
    rollout = policy.sample([chat], 2, [0])
    assert rollout.prompts == [chat]
    assert rollout.samples == policy.sample(["ebcda"], 2, [0]).samples


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["ab", ""], "prompt 1 is empty"),
        (["ab", "a" * 60], "prompt 1 is too long: its 60 tokens and 8 to follow"),
        (["a?"], "prompt 0 cannot be encoded"),
        ([], "no prompts"),
    ],
)
def test_prompts_that_cannot_be_used(tokenizer, prompts, message):
    with pytest.raises(DataError, match=message):
        make_policy(tokenizer).sample(prompts, 2, list(range(len(prompts))))


def test_a_seed_for_every_prompt(tokenizer):
    with pytest.raises(ShapeError, match="one seed per prompt"):
        make_policy(tokenizer).sample(PROMPTS, 2, [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be"),
        ({"min_new_tokens": 9}, "min_new_tokens must be between"),
        ({"lora": {"rnak": 4}}, "Did you mean 'rank'"),
        ({"lora": {"dropout": 0.1}}, "dropout must be 0"),
    ],
)
def test_settings_out_of_range(tokenizer, options, message):
    with pytest.raises(RecipeError, match=message):
        make_policy(tokenizer, **options)


def test_a_model_object_needs_its_tokenizer():
    with pytest.raises(RecipeError, match="needs its tokenizer"):
        LanguagePolicy.load(make_model())


def test_a_model_that_minds_padding_takes_prompts_of_one_length(tokenizer):
    policy = make_policy(tokenizer)
    policy.backbone.ignores_padding = False
    with pytest.raises(DataError, match="same number of tokens"):
        policy.sample(PROMPTS, 2, SEEDS)
    assert len(policy.sample(["ab", "cd"], 2, [0, 1])) == 2


def test_the_character_tokenizer():
    tokenizer = character_tokenizer("01=.$", pad=".", eos="$")
    assert tokenizer("1=0").input_ids == [1, 2, 0]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (3, 4, 5)
    assert tokenizer.decode([1, 1, 2, 4, 3], skip_special_tokens=True) == "11="
    assert character_tokenizer("ab", bos="<s>")("ba").input_ids == [2, 4, 3]
    with pytest.raises(DataError, match="occur once"):
        character_tokenizer("aba")


def test_offsets_of_samples_where_they_are_asked_for(tokenizer):
    policy = make_policy(tokenizer, max_new_tokens=6)
    assert "offsets" not in policy.sample(["ab", "c"], 2, [1, 2]).extras
    policy.keep_offsets = True
    for rollout in (policy.sample(["ab", "c"], 2, [1, 2]), policy.given(["ab"], [["abc", "a"]])):
        offsets = rollout.extras["offsets"]
        assert offsets.shape == (*rollout.mask.shape, 2)
        assert (offsets[~rollout.mask] == 0).all()
        for p, group in enumerate(rollout.samples):
            for g, text in enumerate(group):
                live = offsets[p, g][rollout.mask[p, g]].tolist()
                assert "".join(text[start:end] for start, end in live) == text


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float64"), ("gpt2", "float64"), ("softcap", "float32")])
@pytest.mark.parametrize("chunk", [None, 3])
def test_the_exact_divergence_is_the_mean_of_the_sampled_one(tokenizer, kind, dtype, chunk):
    policy = make_policy(tokenizer, kind, dtype, max_new_tokens=4, temperature=0.8, logprob_chunk=chunk)
    policy.keep_reference()
    rollout = policy.sample(["ab", "abc"], 3, [1, 2])
    assert policy.divergence(rollout).abs().max() < 1e-6
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    found = policy.divergence(rollout)
    assert (found[rollout.mask] > 0).all()
    assert (found[~rollout.mask] == 0).all()
    # every token at one place of every sample in turn: the gaps of the log-probabilities, weighted by the probabilities
    expected = torch.zeros_like(found[..., 1])
    for word in range(WORDS):
        steps = {**rollout.steps, "completion_ids": rollout.steps["completion_ids"].clone()}
        steps["completion_ids"][..., 1] = word
        other = replace(rollout, steps=steps, mask=torch.ones_like(rollout.mask))
        own, reference = policy.log_prob(other).logp[..., 1], policy.reference_log_prob(other)[..., 1]
        expected += own.exp() * (own - reference)
    live = rollout.mask[..., 1]
    torch.testing.assert_close(found[..., 1][live], expected[live].detach(), rtol=1e-4, atol=1e-6)


def test_the_divergence_from_the_model_without_adapters(tokenizer):
    policy = with_adapters(tokenizer, max_new_tokens=4)
    rollout = policy.sample(["ab"], 2, [1])
    found = policy.divergence(rollout)
    assert (found[rollout.mask] > 0).all()
    with policy.model.disable_adapter():
        assert policy.divergence(rollout).abs().max() == 0
