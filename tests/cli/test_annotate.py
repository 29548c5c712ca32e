"""`guerdon annotate`: from raw completions to pairs that a recipe trains on, with any reward, killed and gone on with."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from guerdon.cli.main import main
from guerdon.language.tasks import find, topics

REWARDS = """
import os, signal
calls = 0

def good(samples, topic, *, scale=1.0):
    from guerdon.language.tasks.topics import share_good
    return [[scale * share_good(text, t) for text in group] for group, t in zip(samples, topic)]

def deadly(samples, topic):
    global calls
    calls += 1
    if calls == int(os.environ.get("DEADLY", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return good(samples, topic)

def flaky(samples):
    return [[None if "a" in text else float("nan") if "b" in text else float(len(text)) for text in g] for g in samples]

def needs_logp(samples, logp_old):
    return [[0.0 for _ in g] for g in samples]

def by_vowels(matches):
    return [(float(m.first.count("a")), float(m.second.count("a"))) for m in matches]
"""


def sampled(count: int = 24, size: int = 4) -> list[dict[str, Any]]:
    """Prompts of the task with answers of any quality, their true qualities as labels."""
    draw = random.Random(3)
    rows = []
    for i in range(count):
        topic = "ABCD"[i % 4]
        texts = ["".join(draw.choice(topics.LETTERS) for _ in range(draw.randint(1, 6))) for _ in range(size)]
        labels = [topics.share_good(text, topic) for text in texts]
        rows.append({"prompt": topic, "topic": topic, "completions": texts, "labels": labels, "number": i})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("strong", "weak", "model")):
        task = find("topics")
        task.model(seed).save_pretrained(folder / name)
        task.tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("strong", "weak", "model"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "scoring.py").write_text(REWARDS)
    write(tmp_path / "samples.jsonl", sampled())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("scoring", None)
    yield tmp_path
    sys.modules.pop("scoring", None)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["annotate", *words]) in (1, 2)
    return capsys.readouterr().err


def test_two_commands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from guerdon.rewards import density_ratio

    words = ["annotate", "samples.jsonl", "--reward", "density_ratio", "--strong", "./strong", "--weak", "./weak"]
    assert main([*words, "--out", "pairs.jsonl", "--batch", "5"]) == 0
    shown = capsys.readouterr().out
    assert "24 prompts, 96 completions, 24 pairs" in shown
    assert "agreement with labels" in shown
    pairs = read(place / "pairs.jsonl")
    assert list(pairs[0])[:4] == ["prompt", "chosen", "rejected", "scores"]
    reward = density_ratio(strong="strong", weak="weak")
    for row, pair in zip(sampled(), pairs, strict=True):
        scores = reward([row["prompt"]], [row["completions"]]).scores[0].tolist()
        assert pair["scores"] == pytest.approx(scores, abs=1e-4)
        assert pair["chosen"] == row["completions"][scores.index(max(scores))]
        assert pair["rejected"] in row["completions"]
        assert pair["score_chosen"] > pair["score_rejected"]
        assert (pair["topic"], pair["number"]) == (row["topic"], row["number"])
    recipe = {
        "policy.model": "./model",
        "policy.max_new_tokens": 8,
        "data": "pairs.jsonl",
        "prompts_per_step": 4,
        "steps": 2,
        "optim.lr": 1e-3,
        "evaluation.every": 0,
        "run.name": "aligned",
        "watch.quality": "guerdon.language.tasks.topics:quality",
    }
    assert (
        main(["train", "simpo", *(word for name, value in recipe.items() for word in (f"--{name}", str(value)))]) == 0
    )
    last = read(place / "runs" / "aligned" / "metrics.jsonl")[-1]
    assert math.isfinite(last["loss"])
    assert (place / "runs" / "aligned" / "checkpoints" / "step-2" / "policy" / "model.safetensors").exists()


def in_a_process(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "guerdon", "annotate", *words],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_and_given_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["samples.jsonl", "--reward", "scoring:deadly", "--batch", "4", "--out"]
    done = in_a_process([*words, "killed.jsonl"], DEADLY="4")
    assert done.returncode == -signal.SIGKILL
    assert not (place / "killed.jsonl").exists()
    half = read(place / "killed.jsonl.part")
    assert 0 < len(half) <= 12
    with (place / "killed.jsonl.part").open("a") as part:
        part.write('{"prompt": "of a batch that was cut')
    assert main(["annotate", *words, "straight.jsonl"]) == 0
    whole = capsys.readouterr().out
    assert (
        main(["annotate", *words[:-3], "--batch", "3", "--out", "killed.jsonl"]) == 0
    )  # another batch changes nothing
    resumed = capsys.readouterr().out
    assert (place / "killed.jsonl").read_bytes() == (place / "straight.jsonl").read_bytes()
    assert not (place / "killed.jsonl.part").exists()
    assert resumed.replace("killed", "straight") == whole
    before = (place / "killed.jsonl").stat().st_mtime_ns
    assert main(["annotate", *words, "killed.jsonl"]) == 0  # there is nothing left to do
    assert capsys.readouterr().out == resumed
    assert (place / "killed.jsonl").stat().st_mtime_ns == before


def test_memory_does_not_grow_with_the_data(place: Path) -> None:
    """Of 4 MB of texts only a batch is held."""
    from guerdon.language.completions import Groups
    from guerdon.language.data import read_rows
    from guerdon.training.annotation import annotate

    rows = [{"prompt": f"p{i}", "topic": "A", "completions": ["a" * (1000 + i % 7), "n" * 1000]} for i in range(2000)]
    write(place / "large.jsonl", rows)
    del rows

    def length(samples: Any) -> list[list[float]]:
        return [[float(len(text)) for text in group] for group in samples]

    tracemalloc.start()
    found = annotate(Groups(read_rows(place / "large.jsonl")), length, place / "pairs.jsonl", batch=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.counts["pairs"] == 1714  # those whose lengths differ
    assert peak < 2e6


def test_stopped_between_the_last_batch_and_the_end(place: Path) -> None:
    words = ["annotate", "samples.jsonl", "--reward", "scoring:good"]
    assert main([*words, "--out", "a.jsonl"]) == 0
    text = (place / "a.jsonl").read_bytes()
    (place / "a.jsonl").rename(place / "a.jsonl.part")
    assert main([*words, "--out", "a.jsonl"]) == 0
    assert (place / "a.jsonl").read_bytes() == text


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (["--seed", "1"], "seed was 0 and is 1 now"),
        (["--rejected", "worst"], "rejected was 'random' and is 'worst' now"),
        (["--reward.scale", "2"], "reward.scale was not given and is 2 now"),
        (["--label", "number"], "label was 'labels' and is 'number' now"),
        (["--reward", "exact_answer"], "reward was 'scoring:good' and is 'exact_answer' now"),
    ],
)
def test_a_changed_setting_is_refused(place: Path, capsys, changed: list[str], text: str) -> None:
    words = ["samples.jsonl", "--reward", "scoring:good", "--out", "pairs.jsonl"]
    write(place / "samples.jsonl", [{**row, "number": row["labels"], "answer": "a"} for row in sampled()])
    assert main(["annotate", *words]) == 0
    said = refused(capsys, *words, *changed)
    assert "was begun with other settings" in said
    assert text in said
    assert "choose another --out" in said


def test_changed_data_and_models_are_refused(place: Path, capsys) -> None:
    words = ["samples.jsonl", "--strong", "./strong", "--weak", "./weak", "--out", "pairs.jsonl"]
    assert main(["annotate", *words]) == 0
    assert main(["annotate", *words, "--reward.batch_size", "3", "--reward.cache", "scores.db"]) == 0
    for path in ("strong", "weak"):
        (place / path).unlink()
    (place / "strong").symlink_to((place / "model").resolve())
    (place / "weak").symlink_to(place / "model")
    assert "are the same model" in refused(capsys, *words)
    (place / "weak").unlink()
    shutil.copytree(place / "model", place / "weak")
    assert "reward.strong was" in refused(capsys, *words)
    write(place / "samples.jsonl", sampled(8))
    assert "data was" in refused(capsys, "samples.jsonl", *words[1:])


def test_files_that_are_not_its_own(place: Path, capsys) -> None:
    words = ["samples.jsonl", "--reward", "scoring:good", "--out", "pairs.jsonl"]
    (place / "pairs.jsonl").write_text("mine\n")
    assert "is there already, without a record" in refused(capsys, *words)
    assert (place / "pairs.jsonl").read_text() == "mine\n"
    (place / "pairs.jsonl").unlink()
    (place / "pairs.jsonl.json").write_text("[1]")
    assert "is no record of an annotation" in refused(capsys, *words)
    (place / "pairs.jsonl.json").unlink()
    assert main(["annotate", *words]) == 0
    (place / "pairs.jsonl").write_text("")
    assert "is not what was written before" in refused(capsys, *words)


def test_two_at_a_time(place: Path, capsys) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (place / "pairs.jsonl.part").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        record = {"format": 1, "done": 0, "bytes": 0, "counts": {}, "agreement": {}}
        words = ["samples.jsonl", "--reward", "scoring:good", "--out"]
        assert main(["annotate", *words, "other.jsonl"]) == 0
        made = json.loads((place / "other.jsonl.json").read_text())
        (place / "pairs.jsonl.json").write_text(json.dumps({**made, **record, "counts": made["counts"]}))
        assert "another process is writing" in refused(capsys, *words, "pairs.jsonl")


# ---------------------------------------------------------------- data


def test_every_form_of_the_data(place: Path) -> None:
    """The same prompts as lists, as rows in any order, as CSV, as parquet and as a saved folder give the same pairs."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    columns = ("topic", "completions", "labels")
    lists = [{"prompt": "ABCDABCD"[: i + 1], **{c: row[c] for c in columns}} for i, row in enumerate(sampled(8))]
    write(place / "lists.jsonl", lists)
    (place / "lists.json").write_text(json.dumps(lists))
    singles = [
        {"prompt": row["prompt"], "topic": row["topic"], "completion": text, "label": label}
        for row in lists
        for text, label in zip(row["completions"], row["labels"], strict=True)
    ]
    apart = [singles[g + p * 4] for g in range(4) for p in range(8)]  # the rows of a prompt stand apart
    write(place / "singles.jsonl", apart)
    with (place / "singles.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(apart[0]))
        table.writeheader()
        table.writerows(apart)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lists), place / "lists.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(apart)}).save_to_disk(place / "saved")
    found = []
    sources = ["lists.jsonl", "lists.json", "singles.jsonl", "singles.csv", "lists.parquet", "saved:train"]
    for n, source in enumerate(sources):
        words = ["annotate", source, "--reward", "scoring:good", "--batch", "3", "--out", f"{n}.jsonl"]
        assert main(words) == 0
        agreement = json.loads((place / f"{n}.jsonl.json").read_text())["agreement"]
        found.append((read(place / f"{n}.jsonl"), agreement))
    assert len(found[0][0]) == 7
    for source, other in zip(sources, found, strict=True):
        assert other == found[0], source
    assert found[0][1][""]["wrong"] == 0  # the labels are the reward
    assert found[0][1][""]["right"] > 20


def test_groups_of_different_sizes_and_conversations(place: Path) -> None:
    talk = [{"role": "user", "content": "A"}]
    rows = [
        {"prompt": "A", "completions": ["ae", "n"], "topic": "A"},
        {"prompt": talk, "completions": [[{"role": "assistant", "content": "nn"}], "hk", ""], "topic": "A"},
        {"prompt": "B", "completions": ["b\U0001f600", "n", "é"], "topic": "B"},
        {"prompt": "B", "completions": ["n", "n"], "topic": "B"},
    ]
    write(place / "mixed.jsonl", rows)
    assert main(["annotate", "mixed.jsonl", "--reward", "scoring:good", "--rejected", "worst"]) == 0
    pairs = read(place / "mixed.pairs.jsonl")
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [
        ("A", "ae", "n"),
        (talk, "hk", "nn"),
        ("B", "b\U0001f600", "n"),
    ]
    assert [len(p["scores"]) for p in pairs] == [2, 3, 3]
    record = json.loads((place / "mixed.pairs.jsonl.json").read_text())
    assert record["counts"]["constant"] == 1
    assert record["agreement"] == {}


def test_given_pairs_test_a_reward(place: Path, capsys) -> None:
    rows = [dict(row) for row in topics.held_out_pairs(60)]
    write(place / "known.jsonl", rows)
    assert main(["annotate", "known.jsonl", "--reward", "scoring:good", "--out", "again.jsonl"]) == 0
    right = sum(topics.share_good(r["chosen"], r["topic"]) > topics.share_good(r["rejected"], r["topic"]) for r in rows)
    tied = sum(topics.share_good(r["chosen"], r["topic"]) == topics.share_good(r["rejected"], r["topic"]) for r in rows)
    shown = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in shown if line.strip().startswith("all"))
    assert row[:4] == ["all", "60", f"{right / 60:.1%}", f"{tied / 60:.1%}"]
    assert all(line["rejected"] for line in read(place / "again.jsonl"))


def test_columns_that_differ_within_a_prompt_are_left_out(place: Path, capsys) -> None:
    rows = [
        {"prompt": "A", "completion": c, "topic": "A", "from": source}
        for c, source in (("a", "x"), ("n", "y"), ("ae", "x"))
    ]
    write(place / "rows.jsonl", rows)
    assert main(["annotate", "rows.jsonl", "--reward", "scoring:good"]) == 0
    assert "from: rows of one prompt differ" in capsys.readouterr().err
    (pair,) = read(place / "rows.pairs.jsonl")
    assert "from" not in pair
    assert pair["topic"] == "A"


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        (
            [
                {"prompt": "A", "completions": ["a", "b"]},
                {"prompt": "A", "completions": ["a"]},
                {"prompt": "A", "completions": "a"},
                {"completions": ["a", "b"]},
                {"prompt": "A", "completions": ["a", 3]},
                {"prompt": "A", "completions": ["a", "b"], "labels": [1]},
                {"prompt": "A", "completions": ["a", "b"], "labels": [1, "good"]},
            ],
            [
                "6 rows are malformed; the first 5:",
                "row 1 (line 2): completions has 1: two or more are needed",
                "row 2 (line 3): completions must be a list; got text",
                "row 3 (line 4): prompt is missing",
                "row 4 (line 5): completion 1 must be text",
                "row 5 (line 6): labels must be a list with one entry for each of 2 completions; got 1",
            ],
        ),
        (
            [
                {"prompt": "A", "completion": "a"},
                {"prompt": "B", "completion": "a"},
                {"prompt": "A", "completion": "b"},
            ],
            ["1 row is malformed:", "row 1 (line 2): its prompt has no other completion to compare with"],
        ),
        (
            [{"prompt": "A", "completion": "a", "label": "good"}, {"prompt": "A", "completion": None, "label": True}],
            ["row 0 (line 1): label must be a finite number; got 'good'", "row 1 (line 2): completion is missing"],
        ),
        (
            [{"prompt": "A", "completons": ["a", "b"]}],
            ["there is no column 'completions'", "Did you mean 'completons'"],
        ),
        ([{"prompt": "A", "completions": ["a", "b"]}], ["needs the field 'topic'", "There are: completions, prompts"]),
    ],
)
def test_malformed_rows_are_named(place: Path, capsys, rows: list[dict[str, Any]], lines: list[str]) -> None:
    write(place / "bad.jsonl", rows)
    said = refused(capsys, "bad.jsonl", "--reward", "scoring:good")
    for line in lines:
        assert line in said
    assert not list(place.glob("bad.pairs*"))


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["--reward", "exact_answer", "--reward.ignore_case", "true"], "AE"),
        (["--reward", "{regex: {pattern: '^[n]+$'}}"], "nn"),
        (["--reward", "scoring:good", "--reward.scale=-1"], "nn"),
        (["--reward", "tournament", "--reward.judge", "scoring:by_vowels", "--reward.topology", "round_robin"], "aae"),
        (["--reward", "win_rate", "--reward.judge.pointwise.reward", "scoring:good"], "aae"),
        (["--reward", "pointwise", "--reward.reward", "scoring:good"], "aae"),
        (["--reward", "pairwise", "--reward.function", "operator:gt"], None),
    ],
)
def test_any_reward_judge_or_tournament(place: Path, capsys, words: list[str], chosen: str | None) -> None:
    write(
        place / "some.jsonl", [{"prompt": "A", "completions": ["nn", "aae", "AE", "n"], "topic": "A", "answer": "ae"}]
    )
    if chosen is None:  # a function that is no judge of pairs
        assert "TypeError" in refused(capsys, "some.jsonl", *words)
        return
    assert main(["annotate", "some.jsonl", *words]) == 0
    assert read(place / "some.pairs.jsonl")[0]["chosen"] == chosen


def test_counts_of_a_tournament_are_shown(place: Path, capsys) -> None:
    assert main(["annotate", "samples.jsonl", "--reward", "tournament", "--reward.judge", "scoring:by_vowels"]) == 0
    assert "judge calls: 288" in capsys.readouterr().out  # 2 (4 - 1) matches in both orders, 24 times


def test_domains_are_told_apart(place: Path, capsys) -> None:
    rows = [{**row, "domain": "mine" if row["number"] % 2 else "chat"} for row in sampled()]
    write(place / "samples.jsonl", rows)
    words = ["--strong", "./strong", "--weak", "./weak", "--reward.domains", "{mine: {exemplars: [AB]}, chat: {}}"]
    # the models know letters only: a line break cannot be encoded, and the error says which prompt it is
    said = refused(capsys, "samples.jsonl", *words)
    assert "reward 'density_ratio' raised DataError" in said
    assert "cannot be encoded" in said
    assert "for prompt 1, sample 0, data row 1" in said
    words[-1] = "{mine: {}, chat: {}}"
    assert main(["annotate", "samples.jsonl", *words, "--out", "pairs.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.strip().startswith(("all", "chat", "mine"))] == [
        "all",
        "chat",
        "mine",
    ]
    assert {pair["domain"] for pair in read(place / "pairs.jsonl")} == {"mine", "chat"}


def test_scores_that_are_none(place: Path, capsys) -> None:
    rows = [
        {"prompt": "A", "completions": ["a", "n", "nn"]},  # one is not scored
        {"prompt": "A", "completions": ["a", "n"]},  # only one is
    ]
    write(place / "few.jsonl", rows)
    assert main(["annotate", "few.jsonl", "--reward", "scoring:flaky"]) == 0
    shown = capsys.readouterr().out
    assert "no pair for 1: fewer than two scored completions" in shown
    (pair,) = read(place / "few.pairs.jsonl")
    assert (pair["chosen"], pair["rejected"], pair["scores"]) == ("nn", "n", [None, 1.0, 2.0])
    write(place / "nan.jsonl", [rows[0], {"prompt": "A", "completions": ["b", "n", "nn"]}])
    said = refused(capsys, "nan.jsonl", "--reward", "scoring:flaky", "--batch", "1")
    assert "returned nan for prompt 0, sample 0, data row 1 (sample: 'b')" in said
    assert (
        main(["annotate", "nan.jsonl", "--reward", "scoring:flaky", "--on-bad-score", "drop", "--out", "d.jsonl"]) == 0
    )
    assert "dropped: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--reward is needed"),
        (["--reward", "density"], "Did you mean 'density_ratio'"),
        (["--strong", "./strong", "--reward.normalize", "mean"], "there is no such option"),
        (["--strong", "./strong", "--reward.normalise", "max"], "must be one of 'sum', 'mean'; got 'max'"),
        (["--strong", "./strong", "--reward.strong", "./weak"], "--strong is given twice"),
        (["--strong", "./strong"], "weak: must be given"),
        (["--strong", "./strong", "--weak", "./nowhere"], "cannot be loaded"),
        (["--reward", "density_ratio"], "the option strong must be given"),
        (["--reward", "scoring:goood"], "scoring has no 'goood'. Did you mean 'good'"),
        (["--reward", "scoring:needs_logp"], "needs the field 'logp_old'"),
        (["--reward", "overlong", "--reward.max_length", "3", "--reward.cache", "1"], "needs the field 'lengths'"),
        (["--reward", "scoring:good", "--out", "pairs.csv"], "--out must end in .jsonl"),
        (["--reward", "scoring:good", "--batch", "0"], "must be at least 1"),
        (["--reward", "scoring:good", "--rejectd", "worst"], "Did you mean 'rejected'"),
        (["--reward", "scoring:good", "--label", "labes"], "there is no column 'labes'. Did you mean 'labels'"),
    ],
)
def test_mistakes(place: Path, capsys, words: list[str], text: str, friendly_errors: None) -> None:
    assert text in refused(capsys, "samples.jsonl", *words)
    assert not list(place.glob("samples.pairs*"))


def test_data_that_is_not_there(place: Path, capsys) -> None:
    assert "there is no such file" in refused(capsys, "sampels.jsonl", "--reward", "scoring:good")
