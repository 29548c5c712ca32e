"""Runs that end because they get no better."""

from __future__ import annotations

import json
import math

import pytest

from guerdon.cli.main import main
from guerdon.training.patience import Patience
from guerdon.training.run import resume
from tests.training.test_run import metrics, train


def counted(values, goal="highest", patience=2):
    stage = Patience("gold", patience, goal)
    return [stage.spent(step, {} if value is None else {"gold": value}) != "" for step, value in enumerate(values)]


def test_measurements_since_the_best_are_counted():
    assert counted([0.1, 0.2, None, 0.2, None, None, 0.1, 0.3]) == [False] * 6 + [True, False]
    assert counted([3.0, 2.0, 4.0, 2.5], goal="lowest") == [False, False, False, True]
    assert counted([math.nan, math.nan, 0.0, -1.0]) == [False, True, False, False]
    stage = Patience("gold", 1)
    assert [stage.spent(step, {"gold": 1.0}) for step in (0, 0)] == ["", ""]  # asked twice about one step
    assert stage.spent(1, {"gold": 1.0}) == "gold has been no higher than 1 for 1 measurements"


def test_what_stands_in_the_record_is_known_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"step": 1, "gold": 2.0}, {"step": 2, "gold": None})))
    stage = Patience("gold", 2)
    stage.restore(path, 2)
    assert stage.spent(3, {"gold": 1.0})
    earlier = Patience("gold", 2)
    earlier.restore(path, 1)
    assert not earlier.spent(3, {"gold": 1.0})


OPTIONS = {
    "watch.gold": "falling:gold",
    "evaluation.every": 1,
    "evaluation.greedy": "false",
    "run.checkpoint_every": 1,
    "stop": "{metric: eval/sampled/gold, patience: 3}",
}


@pytest.fixture
def falling(workplace):
    """A watched reward that is best after the second step: what it says follows the number of steps done."""
    (workplace / "falling.py").write_text(
        "import json, pathlib\n"
        "def gold(samples):\n"
        "    run = pathlib.Path('runs/run/metrics.jsonl')\n"
        "    done = len(run.read_text().splitlines()) if run.exists() else 0\n"
        "    return [[-abs(done - 2.0) for _ in group] for group in samples]\n"
    )
    return workplace


def test_a_run_ends_when_what_is_watched_gets_no_better(falling):
    run = train(falling, steps=9, **OPTIONS)
    gold = [line["eval/sampled/gold"] for line in metrics(run)]
    assert gold == [-2.0, -1.0, 0.0, -1.0, -2.0, -3.0]  # before training, and after each step
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 5)
    assert status["reason"] == "eval/sampled/gold has been no higher than 0 for 3 measurements"


def test_a_resumed_run_has_not_forgotten(falling):
    run = train(falling, **{**OPTIONS, "steps": 4})
    assert json.loads((run / "status.json").read_text())["reason"] == ""
    assert main(["resume", str(run), "--steps", "9"]) == 0
    assert json.loads((run / "status.json").read_text())["step"] == 5
    # with more patience it goes on
    resume(run, ["--stop.patience", "4"])
    assert json.loads((run / "status.json").read_text())["step"] == 6
