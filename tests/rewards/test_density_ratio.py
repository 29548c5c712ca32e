"""Density ratios: the properties of the reward, on tables and on models saved to disk."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import DataError, RecipeError, ScoreError
from guerdon.language.characters import character_tokenizer
from guerdon.language.policy import LanguagePolicy
from guerdon.language.tasks import find
from guerdon.rewards import density_ratio
from guerdon.rewards.density_ratio import log_density_ratio
from guerdon.rewards.likelihood import Likelihood, SequenceLogp, summed_logp
from tests.language.conftest import make_model
from tests.rewards.judges.server import Reply, serve

PROMPTS, SAMPLES = ["A", "B"], [["ae", "fbm", "n"], ["b", "aehk", "cg"]]


def tables(seed: int, count: int = 3, size: tuple[int, int] = (4, 6)) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, size[1] + 1, size[:1], generator=generator)
    mask = torch.arange(size[1]) < lengths[:, None]
    return mask, [-torch.rand(size, generator=generator, dtype=torch.float64) * 5 for _ in range(count)]


def ratio(mask: torch.Tensor, strong: torch.Tensor, weak: torch.Tensor, **options: Any) -> torch.Tensor:
    return log_density_ratio(summed_logp(strong, mask), summed_logp(weak, mask), **options)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_swapping_the_models_turns_the_sign_and_ratios_add_up(seed: int) -> None:
    mask, (a, b, c) = tables(seed)
    for normalise in ("sum", "mean"):
        assert torch.equal(ratio(mask, a, b, normalise=normalise), -ratio(mask, b, a, normalise=normalise))
        chain = ratio(mask, a, b, normalise=normalise) + ratio(mask, b, c, normalise=normalise)
        assert torch.allclose(ratio(mask, a, c, normalise=normalise), chain, rtol=0, atol=1e-12)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_tokens_add_up_and_masked_ones_are_nothing(seed: int) -> None:
    mask, (a, b) = tables(seed, 2)
    by_hand = [sum(float(a[i, t] - b[i, t]) for t in range(6) if mask[i, t]) for i in range(4)]
    assert ratio(mask, a, b).tolist() == pytest.approx(by_hand)
    shared = b.clone()
    shared[:, 1:] = a[:, 1:]  # the models agree from the second token on
    assert ratio(mask, a, shared).tolist() == pytest.approx((a[:, 0] - b[:, 0]).tolist())
    for poison in (math.nan, math.inf, 7.0):
        found = ratio(mask, a.masked_fill(~mask, poison), b.masked_fill(~mask, -poison))
        assert torch.equal(found, ratio(mask, a, b))


def test_the_mean_can_rank_otherwise_than_the_sum() -> None:
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    strong, weak = torch.full((2, 4), -1.0), torch.tensor([[-2.0] * 4, [-3.0] * 4])
    assert ratio(mask, strong, weak).tolist() == [4.0, 2.0]
    assert ratio(mask, strong, weak, normalise="mean").tolist() == [1.0, 2.0]


def test_on_a_finite_set_it_is_the_reward_that_the_strong_model_was_tilted_by() -> None:
    generator = torch.Generator().manual_seed(5)
    weak = torch.randn(3, 8, generator=generator, dtype=torch.float64).log_softmax(-1)  # 3 prompts, 8 responses
    reward = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    beta = 0.3
    strong = (weak + reward / beta).log_softmax(-1)
    ones = torch.ones(3, 8, dtype=torch.int64)
    found = log_density_ratio(SequenceLogp(strong, ones), SequenceLogp(weak, ones))
    offset = beta * found - reward
    assert torch.allclose(offset, offset[:, :1].expand_as(offset), atol=1e-12)
    assert torch.equal(found.argsort(-1), reward.argsort(-1))
    assert torch.allclose((weak.exp() * found.exp()).sum(-1), torch.ones(3, dtype=torch.float64))
    divergence = (strong.exp() * found).sum(-1)
    assert torch.allclose(divergence, (strong.exp() * (strong - weak)).sum(-1))
    assert (divergence > 0).all()


def test_probabilities_of_zero() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    never, likely = torch.tensor([[-1.0, -math.inf]]), torch.tensor([[-1.0, -2.0]])
    assert ratio(mask, never, likely).item() == -math.inf
    assert ratio(mask, likely, never).item() == math.inf
    with pytest.raises(ScoreError, match=r"both models give the completion at \[0\] the probability 0"):
        ratio(mask, never, never)
    floored = log_density_ratio(summed_logp(never, mask, floor=-5.0), summed_logp(likely, mask, floor=-5.0))
    assert floored.item() == -3.0
    with pytest.raises(ScoreError, match=r"at \[0, 1\] is NaN"):
        summed_logp(torch.tensor([[-1.0, math.nan]]), mask)


def test_a_completion_without_tokens_is_worth_nothing_and_says_so() -> None:
    mask = torch.zeros(1, 2, dtype=torch.bool)
    for normalise in ("sum", "mean"):
        with pytest.warns(UserWarning, match="1 completions have no tokens"):
            assert ratio(mask, torch.ones(1, 2), torch.zeros(1, 2), normalise=normalise).item() == 0.0


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two small models of the same tokenizer."""
    found = []
    for seed in (0, 1):
        task, folder = find("topics"), tmp_path_factory.mktemp(f"model{seed}")
        task.model(seed).save_pretrained(folder)
        task.tokenizer().save_pretrained(folder)
        found.append(str(folder))
    return found[0], found[1]


def by_transformers(folder: str, prompt: str, completion: str) -> float:
    """The same number without this library's policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = tokenizer(prompt).input_ids
    ids = [*start, *tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logp[t - 1, ids[t]].item() for t in range(len(start), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_models_on_disk(folders: tuple[str, str], batch_size: int) -> None:
    strong, weak = folders
    found = density_ratio(strong=strong, weak=weak, batch_size=batch_size)(PROMPTS, SAMPLES)
    expected = [
        [by_transformers(strong, p, y) - by_transformers(weak, p, y) for y in group]
        for p, group in zip(PROMPTS, SAMPLES, strict=True)
    ]
    assert torch.allclose(found.scores, torch.tensor(expected, dtype=torch.float64), atol=1e-4)
    assert found.completion_tokens.tolist() == [[3, 4, 2], [2, 5, 3]]
    assert found.domain == ["", ""]
    mean = density_ratio(strong=strong, weak=weak, batch_size=batch_size, normalise="mean")(PROMPTS, SAMPLES)
    assert torch.equal(mean.scores, found.scores / found.completion_tokens)


def test_lengths_and_ends(folders: tuple[str, str]) -> None:
    score = Likelihood(model=folders[0], end_token=False, max_completion=2)
    assert score(["A"], [["aehk", "ae", "", "a"]]).tokens.tolist() == [[2, 2, 0, 1]]
    whole, short = Likelihood(model=folders[0]), Likelihood(model=folders[0], max_prompt=2)
    long = "ABCDA"
    assert torch.equal(short([long], [["ae"]]).total, short(["CBCDA"], [["ae"]]).total)  # the last two tokens are read
    assert not torch.equal(short([long], [["ae"]]).total, whole([long], [["ae"]]).total)


def test_tokenizers_may_differ(folders: tuple[str, str], tmp_path: Path) -> None:
    alphabet = "zyxwvutsrqponmlkjihgfedcbaABCD"
    tokenizer = character_tokenizer(alphabet, bos="<bos>")
    make_model("llama", torch.float32, len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = density_ratio(strong=str(tmp_path), weak=folders[1])(PROMPTS, SAMPLES)
    expected = by_transformers(str(tmp_path), "B", "aehk") - by_transformers(folders[1], "B", "aehk")
    assert found.scores[1, 1].item() == pytest.approx(expected, abs=1e-4)


def test_adapters_on_over_adapters_off(folders: tuple[str, str], tmp_path: Path) -> None:
    policy = LanguagePolicy.load(folders[0], lora={"rank": 2, "alpha": 64})
    torch.manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    policy.save(tmp_path / "adapters")
    reward = density_ratio(strong=str(tmp_path / "adapters"), cache=tmp_path / "scores.db")
    alone = density_ratio(strong=str(tmp_path / "adapters"), weak=folders[0])
    found = reward(PROMPTS, SAMPLES).scores
    assert torch.allclose(found, alone(PROMPTS, SAMPLES).scores, atol=1e-4)
    assert found.abs().min() > 1e-3
    assert torch.equal(reward(PROMPTS, SAMPLES).scores, found)  # both sides of the pair are kept apart
    with pytest.raises(RecipeError, match="weak: must be given"):
        density_ratio(strong=folders[0])


def test_scores_are_kept(folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "scores.db"
    first = density_ratio(strong=folders[0], weak=folders[1], cache=store)(PROMPTS, SAMPLES)
    calls = []
    pack = LanguagePolicy.pack
    monkeypatch.setattr(LanguagePolicy, "pack", lambda *a, **k: calls.append(1) or pack(*a, **k))
    again = density_ratio(strong=folders[0], weak=folders[1], cache=store, normalise="mean")(PROMPTS, SAMPLES)
    assert calls == []
    assert torch.equal(again.scores, first.scores / first.completion_tokens)
    density_ratio(strong=folders[0], weak=folders[1], cache=store, max_completion=2)(PROMPTS, SAMPLES)
    assert calls  # another form of the same texts is another score
    calls.clear()
    other = tmp_path / "moved"
    shutil.copytree(folders[0], other)
    density_ratio(strong=str(other), weak=folders[1], cache=store)(PROMPTS[:1], SAMPLES[:1])
    assert calls
    wrong = tmp_path / "notes.txt"
    wrong.write_text("this is no database, only words that go on for a while" * 20)
    with pytest.raises(RecipeError, match="cannot be used to keep scores"):
        density_ratio(strong=folders[0], weak=folders[1], cache=wrong)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strong": "a/b", "weak": "a/b"}, "are the same model"),
        ({"strong": "./a/../m", "weak": "m"}, "are the same model"),
        ({"normalise": "max"}, "must be sum or mean"),
        ({"domain": "safety"}, "domain and router choose among domains"),
        ({"domains": "default", "domain": "safty"}, "Did you mean 'safety'"),
        ({"domains": "nowhere.toml", "domain": "safety"}, "nowhere.toml cannot be read"),
        ({"strong": "no/such/folder"}, "cannot be loaded"),
        ({"strong": {"dtype": "float32"}}, "a model is named by its folder"),
        ({"strong": {"model": "m", "divice": "cpu"}}, "strong.divice: there is no such option. Did you mean 'device'"),
        (
            {"strong": {"model": "no/such/name", "base_url": "http://127.0.0.1:1/v1"}},
            "tokenizer: 'no/such/name' cannot be",
        ),
        ({"strong": "no_such_module:score"}, "cannot be found"),
        ({"batch_size": 0, "strong": "y"}, "batch_size: must be 1 or more"),
        ({"floor": 1.0, "strong": "y"}, "floor: must be below 0"),
    ],
)
def test_mistakes(options: dict[str, Any], text: str, friendly_errors: None) -> None:
    def given_scores(prompts: Any, samples: Any) -> SequenceLogp:
        raise AssertionError("not called")

    with pytest.raises(RecipeError, match=text):
        density_ratio(**{"strong": given_scores, "weak": "x", **options})


def test_the_same_object_is_refused(folders: tuple[str, str]) -> None:
    policy = LanguagePolicy.load(folders[0])
    with pytest.raises(ValueError, match="are the same model"):
        density_ratio(strong=policy, weak=policy)
    other = LanguagePolicy.load(folders[1])
    assert density_ratio(strong=policy, weak=other)(PROMPTS, SAMPLES).scores.shape == (2, 3)


def served(folder: str) -> Any:
    """A server's answer to a request for an echo, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)

    def answer(request: dict[str, Any], number: int) -> Reply:
        if number == 1:
            return Reply("", status=503)
        assert (request["max_tokens"], request["echo"], request["model"]) == (0, True, "mine")
        ids = request["prompt"]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [None, *(logp[t - 1, ids[t]].item() for t in range(1, len(ids)))]
        return Reply(body=json.dumps({"choices": [{"text": "", "logprobs": {"token_logprobs": found}}]}).encode())

    return answer


def test_a_served_model(folders: tuple[str, str]) -> None:
    with serve(served(folders[0])) as server:
        strong = {"base_url": server.url, "model": "mine", "tokenizer": folders[0], "concurrency": 3}
        found = density_ratio(strong=strong, weak=folders[1], max_completion=4)(PROMPTS, SAMPLES)
        assert server.paths[0] == "/v1/completions"
        assert len(server.requests) == 7  # one was tried again
    here = density_ratio(strong=folders[0], weak=folders[1], max_completion=4)(PROMPTS, SAMPLES)
    assert torch.allclose(found.scores, here.scores, atol=1e-4)
    assert torch.equal(found.completion_tokens, here.completion_tokens)
    chat = Reply('{"first": 1}')
    with serve(lambda request, number: chat) as server:
        strong |= {"base_url": server.url, "tries": 2}
        with pytest.raises(ScoreError, match="no echo of log-probabilities"):
            density_ratio(strong=strong, weak=folders[1])(PROMPTS, SAMPLES)


# ---------------------------------------------------------------- domains


class Recorder:
    """A model that takes down what it is asked, and finds everything alike."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Any]] = []

    def __call__(self, prompts: Any, samples: Any) -> SequenceLogp:
        self.asked.append((list(prompts), [list(group) for group in samples]))
        ones = torch.ones(len(prompts), len(samples[0]))
        return SequenceLogp(ones, ones.long())


MINE = {
    "sums": {"about": "numbers", "criteria": "Be exact.", "exemplars": [f"Example {n}. User:" for n in range(4)]},
    "chat": {"about": "the rest"},
}


def test_both_models_read_the_same_prompt_and_the_completions_stay() -> None:
    strong, weak = Recorder(), Recorder()
    replies = {"2 + 2": "[START]SUMS[END]", "hello": "hm", "3 * 3": "It is [START] sums\n[END]"}
    seen: list[str] = []

    def router(questions: Any) -> list[str]:
        seen.extend(questions)
        return [next(reply for text, reply in replies.items() if text in q) for q in questions]

    reward = density_ratio(strong=strong, weak=weak, domains=MINE, router=router)
    prompts = [
        "2 + 2",
        "hello",
        [{"role": "system", "content": "Short."}, {"role": "user", "content": "3 * 3"}],
        "2 + 2",
    ]
    samples = [["4", "five"]] * 4
    found = reward(prompts, samples)
    assert found.domain == ["sums", "chat", "sums", "sums"]
    assert len(seen) == 3  # the same prompt is asked about once
    assert strong.asked == weak.asked
    (asked, said), *_ = strong.asked
    assert said == samples
    assert asked[1] == "hello"  # chat is not customised
    assert asked[0] == asked[3]
    assert asked[0].startswith("Be exact.\n\nExample ")
    assert asked[0].endswith(". User:\n2 + 2\nGood Assistant:")
    assert asked[2][0] == {"role": "system", "content": "Be exact.\n\nShort."}
    assert asked[2][1]["content"].endswith(". User:\n3 * 3\nGood Assistant:")
    assert prompts[2][1]["content"] == "3 * 3"  # the data are left as they were
    reward(["hello"], [["hi", "ho"]])
    assert len(seen) == 3


def test_exemplars_are_drawn_alike_for_the_same_seed_and_over_the_pool() -> None:
    prompts = [f"{n} + 1" for n in range(60)]

    def drawn(seed: int) -> list[str]:
        strong = Recorder()
        density_ratio(strong=strong, weak=Recorder(), domains=MINE, domain="sums", seed=seed)(
            prompts, [["a", "b"]] * 60
        )
        return [text.split("\n\n")[1].split(".")[0] for text in strong.asked[0][0]]

    first = drawn(0)
    assert first == drawn(0)
    assert first != drawn(1)
    counts = [first.count(f"Example {n}") for n in range(4)]
    assert sum(counts) == 60
    assert min(counts) > 5


def test_a_column_says_the_domain() -> None:
    reward = density_ratio(strong=Recorder(), weak=Recorder(), domains="default")
    assert reward(["p", "q"], [["a", "b"]] * 2, domain=["SAFETY", "chat"]).domain == ["safety", "chat"]
    with pytest.raises(DataError, match=r"prompt 1 has the domain 'reasonng'. Did you mean 'reasoning'"):
        reward(["p", "q"], [["a", "b"]] * 2, domain=["safety", "reasonng"])
    with pytest.raises(DataError, match="nothing says which domain"):
        reward(["p", "q"], [["a", "b"]] * 2)
