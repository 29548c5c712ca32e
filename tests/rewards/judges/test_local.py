"""A language model on this machine as a judge: a tiny one, saved to disk as a user's would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from guerdon.errors import DataError, RecipeError
from guerdon.language.characters import character_tokenizer
from guerdon.rewards import tournament
from guerdon.rewards.judges import local
from guerdon.rewards.judges.base import Match
from tests.language.conftest import make_model

ALPHABET = "".join(chr(code) for code in range(32, 127)) + "\n"
QUESTION = "{first}|{second}?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with random weights, one token per character."""
    found = tmp_path_factory.mktemp("judge")
    tokenizer = character_tokenizer(ALPHABET)
    make_model("llama", torch.float32, len(tokenizer)).save_pretrained(found)
    tokenizer.save_pretrained(found)
    return found


def judge_of(folder: Path, **options: Any) -> Any:
    return local(model=str(folder), **{"template": QUESTION, "system": "", "max_new_tokens": 24, **options})


MATCHES = [Match("p", a, b) for a, b in (("four", "five"), ("x", "yy"), ("", "abc def"), ("12", "12"), ("2", "10"))]


def replying(judge: Any, replies: dict[str, list[str]], asked: list[str]) -> None:
    """Put words into the model's mouth, question by question; everything else stays as it is."""
    sample = judge.policy.sample

    def instead(questions: list[str], *arguments: Any, **options: Any) -> Any:
        asked.extend(questions)
        rollout = sample(questions, *arguments, **options)
        rollout.samples = [[replies[question].pop(0)] for question in questions]
        return rollout

    judge.policy.sample = instead


def test_written_verdicts_are_read_as_those_of_a_server(folder: Path) -> None:
    judge = judge_of(folder, batch_size=2)
    replies = {
        "four|five?": ['{"first": 8, "second": 3}'],
        "x|yy?": ['I say {"first": 1, "second": "2"}'],
        "|abc def?": ["neither"],
        "12|12?": ['{"first": 5, "second": 5}'],
        "2|10?": ['{"first": 11, "second": 5}'],
    }
    asked: list[str] = []
    replying(judge, replies, asked)
    found = judge(MATCHES)
    assert asked == ["four|five?", "x|yy?", "|abc def?", "12|12?", "2|10?"]
    assert [(v.first, v.second) for v in found if not v.failed] == [(8.0, 3.0), (1.0, 2.0), (5.0, 5.0)]
    assert [v.failed for v in found] == [False, False, True, False, True]
    assert [v.malformed for v in found] == [0, 0, 1, 0, 1]
    assert [v.calls for v in found] == [1] * 5
    assert found[2].why == "no verdict in the reply 'neither'"


def test_malformed_verdicts_are_written_anew_at_a_temperature(folder: Path) -> None:
    good = '{"first": 8, "second": 3}'
    judge = judge_of(folder, temperature=1.0, tries=3)
    asked: list[str] = []
    replying(judge, {"four|five?": ["hm", good], "x|yy?": [good], "|abc def?": ["hm", "hm", "hm"]}, asked)
    found = judge(MATCHES[:3])
    assert asked == ["four|five?", "x|yy?", "|abc def?", "four|five?", "|abc def?", "|abc def?"]
    assert [(v.calls, v.malformed, v.failed) for v in found] == [(2, 1, False), (1, 0, False), (3, 3, True)]
    # greedily the same reply would come again
    assert judge_of(folder, temperature=0.0, tries=3).tries == 1


def test_what_an_untrained_model_writes_is_no_verdict(folder: Path) -> None:
    found = judge_of(folder)(MATCHES)
    assert all(v.failed and v.malformed == 1 and v.why.startswith("no verdict in the reply") for v in found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_match_is_judged_alike_in_any_batch(folder: Path, temperature: float) -> None:
    together = judge_of(folder, temperature=temperature)(MATCHES)
    one_by_one = judge_of(folder, temperature=temperature, batch_size=1)(MATCHES[::-1])[::-1]
    assert [v.why for v in together] == [v.why for v in one_by_one]
    tokens = {"verdict": "tokens", "dtype": "float64"}
    together = judge_of(folder, **tokens)(MATCHES)
    one_by_one = judge_of(folder, **tokens, batch_size=1)(MATCHES[::-1])[::-1]
    assert [v.first for v in together] == pytest.approx([v.first for v in one_by_one], rel=1e-5)


def test_token_probabilities_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(label, add_special_tokens=False).input_ids[0] for label in "AB="]
    with torch.no_grad():
        logits = network(**tokenizer("four|five?", return_tensors="pt")).logits[0, -1]
    two, three = logits[ids[:2]].softmax(-1), logits[ids].softmax(-1)
    (found,) = judge_of(folder, verdict="tokens", dtype="float64")(MATCHES[:1])
    assert found.first == pytest.approx(10 * two[0].item(), rel=1e-6)
    assert found.first + found.second == pytest.approx(10.0)
    assert found.calls == 1
    (found,) = judge_of(folder, verdict="tokens", tie_label="=", dtype="float64")(MATCHES[:1])
    assert found.first == pytest.approx(10 * (three[0] + three[2] / 2).item(), rel=1e-6)
    assert found.first + found.second == pytest.approx(10.0)


def test_the_usual_question_of_each_kind(folder: Path) -> None:
    # the model has 64 positions, and the usual questions more characters: they fail, and say why
    (found,) = local(model=str(folder))(MATCHES[:1])
    assert found.failed
    assert found.calls == 0
    assert "is too long" in found.why
    assert "Reply with A or B" in local(model=str(folder), verdict="tokens").question.text(MATCHES[0])
    assert '{"first": <score>' in local(model=str(folder)).question.text(MATCHES[0])


def test_a_match_that_is_too_long_does_not_stop_the_others(folder: Path) -> None:
    found = judge_of(folder, verdict="tokens")([MATCHES[0], Match("p", "a" * 80, "b"), MATCHES[1]])
    assert [v.failed for v in found] == [False, True, False]
    assert (found[1].calls, found[1].malformed) == (0, 0)
    assert "is too long" in found[1].why


def test_a_chat_template_is_used_where_there_is_one(folder: Path) -> None:
    judge = judge_of(folder, verdict="tokens", system="S")
    plain = judge(MATCHES[:1])[0].first
    seen: list[Any] = []
    encode = judge.policy.encode
    judge.policy.encode = lambda prompts: seen.extend(prompts) or encode(prompts)
    judge(MATCHES[:1])
    assert seen[-1] == "S\n\nfour|five?"
    judge.policy.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert judge(MATCHES[:1])[0].first != plain
    assert seen[-1] == [{"role": "system", "content": "S"}, {"role": "user", "content": "four|five?"}]


def test_a_tournament_by_a_local_judge(folder: Path) -> None:
    judge = judge_of(folder, verdict="tokens")
    samples = ["one", "two", "three", "four", "5"]
    found = tournament(judge=judge)(["p"], [samples])
    assert found.comparisons.tolist() == [8]
    assert found.judge_calls.tolist() == [16]
    assert sorted(found.ranks[0].tolist()) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert not any(parameter.requires_grad for parameter in judge.policy.parameters())
    assert tournament(judge={"local": {"model": str(folder), "template": QUESTION, "system": "", "verdict": "tokens"}})(
        ["p"], [samples]
    ).ranks.equal(found.ranks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verdict": "tokens", "labels": ("AB", "B")}, r"labels: 'AB' must be one token of the model; it is 2"),
        ({"verdict": "tokens", "labels": ("A", "A")}, r"labels: they must be different tokens; got \('A', 'A'\)"),
        ({"verdict": "tokens", "tie_label": "B"}, r"labels: they must be different tokens"),
        ({"verdict": "spoken"}, r"verdict: must be text or tokens; got 'spoken'"),
        ({"batch_size": 0}, r"batch_size: must be 1 or more; got 0"),
        ({"tries": 0}, r"tries: must be 1 or more; got 0"),
        ({"temperature": -1.0}, r"temperature: must be 0 or more; got -1.0"),
        ({"template": "{second}"}, r"template: it must show both answers; there is no {first}"),
    ],
)
@pytest.mark.usefixtures("friendly_errors")
def test_options_out_of_range(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^judges.local.{message}"):
        judge_of(folder, **options)


def test_a_column_that_is_not_there(folder: Path) -> None:
    judge = judge_of(folder, template="{first}|{second}|{answer}", verdict="tokens")
    assert not judge([Match("p", "a", "b", {"answer": "c"})])[0].failed
    with pytest.raises(DataError, match=r"judges.local.template: {answer} names nothing"):
        judge(MATCHES[:1])
