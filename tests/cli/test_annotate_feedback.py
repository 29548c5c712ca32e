"""`guerdon annotate --critic`: records of feedback that a model learns from, what is skipped, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from guerdon.cli.main import main
from guerdon.language.tasks import sort
from tests.models import saved_model
from tests.rewards.judges.server import Reply, serve

CRITICS = """
import os, signal
calls = 0

def words(prompt, response, level=0):
    assert level == len(prompt)
    return {"textual_feedback": f"level {level}", "good_spans": [w for w in response.split() if len(w) > 2]}

def picky(prompt, response):
    if "none" in response:
        return None
    if "invented" in response:
        return {"good_spans": ["not there"], "poor_spans": []}
    if "odd" in response:
        return {"marks": [0.5] * len(response)}
    return {"good_spans": ["fine", "gone"], "poor_spans": []}

def deadly(prompt, response):
    global calls
    calls += 1
    if calls == int(os.environ.get("DEADLY", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return words(prompt, response, len(prompt))
"""


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "mycritics.py").write_text(CRITICS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sys.modules.pop("mycritics", None)
    yield tmp_path
    sys.modules.pop("mycritics", None)


def annotate(*words: str) -> int:
    return main(["annotate", *words])


PROGRAM = ("--critic", "program", "--critic.function")


def test_responses_of_every_form(folder, capsys):
    rows = [
        {"prompt": "ab", "level": 2, "completions": ["a fox", "it"]},
        {"prompt": "c", "level": 1, "completions": ["x"]},
    ]
    data = write(folder / "data.jsonl", rows)
    assert annotate(str(data), *PROGRAM, "mycritics:words") == 0
    found = read(folder / "data.feedback.jsonl")
    assert [(row["prompt"], row["response"], row["good_spans"]) for row in found] == [
        ("ab", "a fox", ["fox"]),
        ("ab", "it", []),
        ("c", "x", []),
    ]
    assert found[0]["spans"] == [[2, 5, 1]]
    assert found[0]["textual_feedback"] == "level 2"
    assert found[0]["level"] == 2
    said = capsys.readouterr().out
    assert "3 completions, 3 records: 1 good and 0 poor phrases" in said
    assert "without spans: 2" in said
    for name in ("response", "completion", "sample"):
        data = write(folder / f"{name}.jsonl", [{"prompt": "ab", "level": 2, name: "a fox"}])
        assert annotate(str(data), *PROGRAM, "mycritics:words") == 0
        assert read(folder / f"{name}.feedback.jsonl") == found[:1]


def test_what_cannot_be_used_is_skipped_and_counted(folder, capsys):
    texts = ["fine"] * 4 + ["none", "invented", "odd"]
    data = write(folder / "data.jsonl", [{"prompt": "p", "response": text} for text in texts])
    assert annotate(str(data), *PROGRAM, "mycritics:picky", "--batch", "2") == 0
    assert len(read(folder / "data.feedback.jsonl")) == 4
    said = capsys.readouterr().out
    assert "7 completions, 4 records: 4 good and 0 poor phrases" in said
    assert "skipped 1: no feedback" in said
    assert "skipped 1: no phrase stands in the response" in said
    assert "skipped 1: a label is none of -1, 0 and 1" in said
    assert "the first of them: the critic returned None" in said
    assert "unmatched phrases: 4" in said
    # given again, the counts are told from the record
    assert annotate(str(data), *PROGRAM, "mycritics:picky") == 0
    assert "skipped 1: no feedback" in capsys.readouterr().out


def test_a_critic_of_no_use_stops(folder, capsys):
    data = write(folder / "data.jsonl", [{"prompt": "p", "response": "none"}] * 40)
    assert annotate(str(data), *PROGRAM, "mycritics:picky", "--batch", "10") != 0
    said = capsys.readouterr().err
    assert "20 of 20 responses: no feedback" in said
    assert "The first: the critic returned None" in said
    assert annotate(str(data), *PROGRAM, "mycritics:picky", "--failures-max", "1") == 0
    assert read(folder / "data.feedback.jsonl") == []


def test_killed_and_gone_on_with_it_ends_in_the_same_file(folder):
    rows = [{"prompt": "p", "response": f"word{i} is it"} for i in range(20)]
    data = write(folder / "data.jsonl", rows)
    words = [str(data), *PROGRAM, "mycritics:deadly", "--batch", "3"]
    command = [sys.executable, "-m", "guerdon", "annotate", *words, "--out", "killed.jsonl"]
    died = subprocess.run(command, cwd=folder, env={**os.environ, "DEADLY": "11"}, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL
    assert 0 < len(read(folder / "killed.jsonl.part")) < 20
    assert not (folder / "killed.jsonl").exists()
    with (folder / "killed.jsonl.part").open("a") as file:
        file.write('{"half a li')  # what the record does not vouch for is cut off
    assert annotate(*words, "--out", "killed.jsonl") == 0
    assert annotate(*words, "--out", "whole.jsonl") == 0
    assert (folder / "killed.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert len(read(folder / "whole.jsonl")) == 20


def test_a_served_critic(folder, capsys):
    def critic(request: dict[str, Any], number: int) -> Reply:
        bad = number == 0
        return Reply("Hm." if bad else '{"textual_feedback": "ok", "good_spans": ["a fox"], "poor_spans": []}')

    data = write(folder / "data.jsonl", [{"prompt": "p", "response": "a fox"}] * 3)
    with serve(critic) as server:
        words = [
            "--critic",
            "chat",
            "--critic.base_url",
            server.url,
            "--critic.model",
            "m",
            "--critic.concurrency",
            "1",
        ]
        assert annotate(str(data), *words) == 0
    assert [row["good_spans"] for row in read(folder / "data.feedback.jsonl")] == [["a fox"]] * 3
    said = capsys.readouterr().out
    assert "critic calls: 4" in said
    assert "malformed replies: 1" in said


def test_errors(folder, capsys):
    data = write(folder / "data.jsonl", [{"prompt": "p", "response": "a"}])
    for words, message in (
        ([*PROGRAM, "mycritics:picky", "--reward", "x"], "give one of them"),
        (["--critic", "chet"], "Did you mean 'chat'"),
        ([*PROGRAM, "mycritics:picky", "--reward.scale", "2"], "--reward.scale"),
        ([*PROGRAM, "mycritics:nothing"], "has no 'nothing'"),
        ([*PROGRAM, "mycritics:picky", "--out", "x.csv"], "--out must end in .jsonl"),
        ([*PROGRAM, "mycritics:picky", "--failures-max", "2"], "failures_max from 0 to 1"),
    ):
        assert annotate(str(data), *words) != 0
        assert message in capsys.readouterr().err
    bad = write(folder / "bad.jsonl", [{"prompt": "p", "text": "a"}])
    assert annotate(str(bad), *PROGRAM, "mycritics:picky") != 0
    assert "there is no column 'response'" in capsys.readouterr().err
    bad = write(folder / "bad2.jsonl", [{"prompt": "p", "response": ""}, {"prompt": "p", "response": "a"}])
    assert annotate(str(bad), *PROGRAM, "mycritics:picky") != 0
    assert "response is empty" in capsys.readouterr().err


def train(recipe: str, folder: Path, name: str, *words: str) -> Path:
    written = ["--run.directory", str(folder / "runs"), "--run.name", name]
    assert main(["train", recipe, *written, *words]) == 0
    (run,) = [path for path in (folder / "runs" / name / "checkpoints").iterdir() if path.name.startswith("step-2")]
    return run / "policy"


def records(path: Path, count: int = 30) -> Path:
    return write(path, [dict(row) for row in sort.feedback(0)[:count]])


SHORT = ("--steps", "2", "--prompts_per_step", "4", "--evaluation.size", "4", "--run.keep", "1")


def test_from_responses_to_a_policy_by_a_learned_critic(folder):
    """Every step with a user's files: feedback on samples, a model of it, and token rewards by that model."""
    model = str(saved_model(folder / "model"))
    samples = [
        {"prompt": row["prompt"], "answer": row["answer"], "response": row["response"]} for row in sort.feedback(1)[:30]
    ]
    data = write(folder / "samples.jsonl", samples)
    assert annotate(str(data), *PROGRAM, "guerdon.language.tasks.sort:critique") == 0
    judge = train("span-reward", folder, "judge", *SHORT, "--policy.model", model, "--data", "samples.feedback.jsonl")
    assert json.loads((judge / "config.json").read_text())["architectures"] == ["LlamaForTokenClassification"]
    critic = f"{{classifier: {{model: {judge}}}}}"
    run = train(
        "text2grad",
        folder,
        "policy",
        *(*SHORT, "--policy.model", model, "--data", str(data), "--policy.max_new_tokens", "6"),
        *("--rewards.feedback.spans.critic", critic),
    )
    assert (run / "critic.safetensors").exists()


def test_a_generative_model_of_feedback_is_asked_as_it_was_taught(folder):
    letters = "".join(map(chr, range(32, 127)))
    from guerdon.language.characters import character_tokenizer
    from guerdon.language.tasks.small import small_llama

    tokenizer = character_tokenizer(letters)
    model = small_llama(0, tokens=len(tokenizer), pad=0, eos=1)
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder / "words")
    tokenizer.save_pretrained(folder / "words")
    data = write(folder / "records.jsonl", [{"prompt": "p", "response": "a fox", "good_spans": ["fox"]}] * 10)
    words = ("--policy.form", "generative", "--policy.template", "{response}?", "--policy.model", str(folder / "words"))
    judge = train("span-reward", folder, "judge", *SHORT, *words, "--data", str(data))
    assert json.loads((judge / "critic.json").read_text()) == {"template": "{response}?", "system": ""}
    from guerdon.rewards.critics.base import Response
    from guerdon.rewards.critics.local import LocalCritic

    critic = LocalCritic(model=str(judge), max_new_tokens=3)
    assert critic.question.plain(Response("p", "a fox")) == "a fox?"


def test_settings_of_a_model_of_feedback_that_do_not_fit(folder, capsys):
    data = str(records(folder / "records.jsonl"))
    model = str(saved_model(folder / "model"))
    bad = write(folder / "bad.jsonl", [{"prompt": "p", "response": "a", "good_spans": "a"}] * 3)
    none = write(folder / "none.jsonl", [{"prompt": "p", "response": "a"}])
    for words, message in (
        (
            ["--policy.template", "{response}?", "--data", data],
            "policy.template: this is a setting of form: generative",
        ),
        (["--loop", "online", "--data", data, "--rewards.r", "exact_answer"], "kind: spans"),
        (["--data", str(bad)], "good_spans must be a list of texts; got 'a'"),
        (["--data", str(none)], "Make them with: guerdon annotate DATA --critic NAME"),
        (["--data", "hacking"], "the task 'hacking' has no feedback. Tasks that have: sort"),
        (["--data", data, "--warm_start.steps", "2"], "leave warm_start out"),
    ):
        words = [*words, "--policy.model", model, "--run.directory", str(folder / "runs"), "--steps", "1"]
        assert main(["train", "span-reward", *words]) != 0, words
        assert message in capsys.readouterr().err
