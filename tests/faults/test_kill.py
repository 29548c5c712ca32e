"""A run that is killed goes on as if it had never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guerdon.cli.main import main
from guerdon.training import checkpoint
from tests.models import settings

TIMES = ("elapsed", "seconds/", "tokens_per_s")


def figures(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "policy" / "model.safetensors")


def assert_same(run: Path, other: Path) -> None:
    assert figures(run) == figures(other)
    for name in ("ledger.jsonl", "samples.jsonl"):
        assert (run / name).read_text() == (other / name).read_text()
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def straight(workplace: Path, **changes: object) -> Path:
    assert main(["train", "rlvr", *settings(workplace, **{"run.name": "straight", **changes})]) == 0
    return workplace / "runs" / "straight"


def in_a_process(words: list[str], workplace: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "guerdon", *words]
    return subprocess.run(command, cwd=workplace, env=variables, capture_output=True, text=True, check=False)


def test_killed_in_the_middle_of_a_step(workplace, capsys):
    options = {"rewards.correct": "myrewards:deadly", "optim.schedule": "cosine", "passes": 2}
    run = workplace / "runs" / "killed"
    # 2 evaluations (greedy, sampled) come before the first step, 2 more after step 3: the 9th call is in step 5
    done = in_a_process(
        ["train", "rlvr", *settings(workplace, **options, **{"run.name": "killed"})], workplace, DEADLY="9"
    )
    assert done.returncode == -signal.SIGKILL
    assert json.loads((run / "status.json").read_text())["state"] == "running"
    assert [line["step"] for line in figures(run)] == [0, 1, 2, 3, 4]
    with (run / "metrics.jsonl").open("a") as handle:
        handle.write('{"step":5,"reward":0.')  # the kill may cut a line
    assert main(["resume", str(run)]) == 0
    assert_same(run, straight(workplace, **options))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert "finished" in capsys.readouterr().out


def test_killed_before_the_first_checkpoint(workplace):
    options = {"rewards.correct": "myrewards:deadly"}
    run = workplace / "runs" / "early"
    done = in_a_process(
        ["train", "rlvr", *settings(workplace, **options, **{"run.name": "early"})], workplace, DEADLY="4"
    )
    assert done.returncode == -signal.SIGKILL
    assert main(["resume", str(run)]) == 0
    assert_same(run, straight(workplace, **options))


def test_killed_while_a_checkpoint_is_written(workplace):
    run = workplace / "runs" / "torn"
    script = (
        "import os, signal, sys\n"
        "from guerdon.training import checkpoint\n"
        "whole, calls = checkpoint._save_tensors, []\n"
        "def torn(tensors, path):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        "        path.write_bytes(b'half a file')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    whole(tensors, path)\n"
        "checkpoint._save_tensors = torn\n"
        "from guerdon.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["train", "rlvr", *settings(workplace, **{"run.name": "torn"})]
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=workplace, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.list_steps(run) == [2]
    assert main(["resume", str(run)]) == 0
    assert_same(run, straight(workplace))


def test_ctrl_c_finishes_the_step_and_keeps_it(workplace, monkeypatch, capsys):
    monkeypatch.setenv("DEADLY", "7")  # in step 4, after four evaluations' calls
    run = workplace / "runs" / "stopped"
    options = {"rewards.correct": "myrewards:interrupted"}
    assert main(["train", "rlvr", *settings(workplace, **options, **{"run.name": "stopped"})]) == 130
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert checkpoint.list_steps(run)[-1] == status["step"] < 6
    assert f"guerdon resume {run}" in capsys.readouterr().err
    monkeypatch.delenv("DEADLY")
    assert main(["resume", str(run)]) == 0
    assert_same(run, straight(workplace, **options))


def test_a_longer_run_begins_with_the_shorter_one(workplace):
    words = settings(workplace, **{"run.name": "short", "steps": 3, "evaluation.every": 0})
    assert main(["train", "rlvr", *words]) == 0
    assert main(["resume", str(workplace / "runs" / "short"), "--steps", "6"]) == 0
    ours, theirs = weights(workplace / "runs" / "short"), weights(straight(workplace, **{"evaluation.every": 0}))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("extra", [{"policy.lora.rank": 4}, {"sampling": "dynamic", "advantage": "running_scale"}])
def test_adapters_and_stages_with_state_go_on_too(workplace, extra):
    words = settings(workplace, **{"run.name": "half", "steps": 4, "evaluation.every": 0, **extra})
    assert main(["train", "rlvr", *words]) == 0
    assert main(["resume", str(workplace / "runs" / "half"), "--steps", "6"]) == 0
    other = straight(workplace, **{"evaluation.every": 0, **extra})
    name = "adapter_model.safetensors" if "policy.lora.rank" in extra else "model.safetensors"
    ours, theirs = (load_file(r / "checkpoints/step-6/policy" / name) for r in (workplace / "runs" / "half", other))
    assert ours
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
