"""Bad input gives one clear error, a non-zero exit code, and leaves everything readable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from guerdon.cli.main import main
from guerdon.errors import GuerdonError
from guerdon.report import read_run
from guerdon.training import checkpoint
from guerdon.training.run import resume
from tests.models import settings


def train(workplace: Path, **changes: object) -> int:
    return main(["train", "rlvr", *settings(workplace, **{"run.name": "run", **changes})])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.count("guerdon: ") == 1
    return text


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("sometimes_nan", "reward 'correct' returned nan for prompt"),
        ("sometimes_raises", "reward 'correct' raised ZeroDivisionError"),
        ("short_list", "reward 'correct' returned 3 entries; expected 4"),
    ],
)
def test_a_bad_reward_stops_the_run_with_a_reason(workplace, capsys, reward, message):
    assert train(workplace, **{"rewards.correct": f"myrewards:{reward}"}) == 1
    assert message in error(capsys)
    status = json.loads((workplace / "runs/run/status.json").read_text())
    assert status["state"] == "failed"
    assert message in status["reason"]
    assert read_run(workplace / "runs/run").status["state"] == "failed"


@pytest.mark.parametrize("reward", ["sometimes_nan", "sometimes_raises"])
def test_bad_samples_can_be_dropped_and_are_counted(workplace, reward):
    assert train(workplace, **{"rewards.correct": f"myrewards:{reward}", "on_bad_score": "drop"}) == 0
    lines = [json.loads(line) for line in (workplace / "runs/run/ledger.jsonl").read_text().splitlines()]
    dropped = [fault for line in lines for fault in line["dropped"]]
    assert dropped
    for _, _, name, why in dropped[:3]:
        assert name == "correct"
        assert "nan" in why or "ZeroDivisionError" in why or "could not be scored" in why
    for line in lines:
        for p, g, *_ in line["dropped"]:
            assert line["advantages"][p][g] == 0.0


def test_none_means_not_scored(workplace):
    assert train(workplace, **{"rewards.correct": "myrewards:sometimes_none"}) == 0
    lines = [json.loads(line) for line in (workplace / "runs/run/ledger.jsonl").read_text().splitlines()]
    assert any(None in cell for line in lines for row in line["raw"] for cell in row)
    assert not any(line["dropped"] for line in lines)


def test_a_malformed_data_file_is_named_by_row(workplace, capsys):
    path = workplace / "problems.jsonl"
    path.write_text(path.read_text() + '{"prompt": "1=", "ans')
    assert train(workplace) == 1
    message = error(capsys)
    assert "problems.jsonl" in message
    assert "41" in message
    assert "truncated" in message
    assert not (workplace / "runs/run").exists()


def test_a_missing_column_is_found_before_the_model_is_loaded(workplace, capsys):
    path = workplace / "problems.jsonl"
    path.write_text(path.read_text().replace('"answer"', '"solution"'))
    assert train(workplace) == 1
    assert "needs the field 'answer'" in error(capsys)
    assert not (workplace / "runs/run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"rewards.correct": "myrewards:frist"}, "Did you mean 'first'"),
        ({"rewards.correct": "myrewardz:first"}, "module 'myrewardz'"),
        ({"advantage": "grppo"}, "Did you mean 'grpo'"),
        ({"advantage.grpo.epz": 1}, "Did you mean 'eps'"),
        ({"optim.lrr": 1}, "Did you mean 'lr'"),
        ({"steps": "many"}, "steps"),
        ({"mini_batches": 3}, "mini_batches"),
    ],
)
def test_mistakes_in_a_recipe_leave_nothing_behind(workplace, capsys, changes, message):
    code = train(workplace, **changes)
    assert code == (1 if "data" in changes else 2)
    assert message in error(capsys)
    assert not (workplace / "runs").exists()


def test_a_damaged_checkpoint_is_refused_and_an_earlier_one_offered(workplace, capsys):
    assert train(workplace) == 0
    run = workplace / "runs/run"
    assert checkpoint.list_steps(run) == [4, 6]
    path = run / "checkpoints/step-6/policy/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))
    capsys.readouterr()
    assert main(["resume", str(run), "--steps", "8"]) == 1
    message = error(capsys)
    assert "policy/model.safetensors is damaged" in message
    assert f"guerdon resume {run} --from-step 4" in message
    assert main(["resume", str(run), "--steps", "8", "--from-step", "4"]) == 0
    assert [line["step"] for line in read_run(run).metrics] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_missing_file_of_a_checkpoint_is_refused(workplace, capsys):
    assert train(workplace, steps=2) == 0
    (workplace / "runs/run/checkpoints/step-2/training.safetensors").unlink()
    capsys.readouterr()
    assert main(["resume", str(workplace / "runs/run"), "--steps", "4"]) == 1
    assert "step-2 cannot be read" in error(capsys)


def test_a_full_disk_leaves_the_last_checkpoint_and_all_records(workplace):
    words = ["train", "rlvr", *settings(workplace, **{"run.name": "full"})]
    # files may grow to 200 KB: records fit, the model's weights do not; the first checkpoint is made before the limit
    script = (
        "import resource, sys\n"
        "from guerdon.training import checkpoint\n"
        "whole = checkpoint.write\n"
        "def write(run, step, *rest):\n"
        "    if step == 4:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))\n"
        "    return whole(run, step, *rest)\n"
        "checkpoint.write = write\n"
        "from guerdon.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=workplace, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "step-4 could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    run = workplace / "runs/full"
    assert checkpoint.list_steps(run) == [2]
    assert not list((run / "checkpoints").glob(".*"))
    assert [line["step"] for line in read_run(run).metrics] == [0, 1, 2, 3, 4]
    assert main(["resume", str(run)]) == 0


def test_a_name_that_is_taken_is_not_overwritten(workplace, capsys):
    assert train(workplace, steps=1) == 0
    before = (workplace / "runs/run/metrics.jsonl").read_text()
    capsys.readouterr()
    assert train(workplace, steps=1) == 2
    assert "holds a run already" in error(capsys)
    assert (workplace / "runs/run/metrics.jsonl").read_text() == before


def test_a_folder_of_somebody_elses_is_left_alone(workplace, capsys):
    folder = workplace / "runs/run"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("all of it")
    for extra in (None, "recipe.yaml"):
        if extra:
            (folder / extra).write_text("steps: 3")
        assert train(workplace, steps=1) == 2
        assert "is no run of guerdon's" in error(capsys)
        assert (folder / "thesis.txt").read_text() == "all of it"


def test_a_run_that_failed_before_its_first_figure_gives_its_name_back(workplace, capsys):
    folder = workplace / "runs/run"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("steps: 3")
    (folder / "status.json").write_text("{}")
    assert train(workplace, steps=1) == 0


def test_a_wrong_override_leaves_a_runs_recipe_as_it_was(workplace):
    assert train(workplace, steps=1) == 0
    recipe = workplace / "runs/run/recipe.yaml"
    before = recipe.read_text()
    with pytest.raises(GuerdonError, match=r"nowhere.jsonl"):
        resume(recipe.parent, ["--data", "nowhere.jsonl"])
    assert recipe.read_text() == before


def test_what_is_no_run_cannot_be_resumed(workplace, capsys):
    assert main(["resume", str(workplace / "model")]) == 2
    assert "recipe.yaml" in error(capsys)
