"""The number of processes, and how the weights are spread over them, do not change the trajectory."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guerdon.cli.main import main
from guerdon.language.tasks import topics
from tests.invariants.sharded import make
from tests.models import REWARDS, problems, saved_model, settings


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    saved_model(folder / "model")
    problems(folder / "problems.jsonl")
    (folder / "myrewards.py").write_text(REWARDS)
    return folder


def launch(workplace: Path, *words: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torchrun is what `accelerate launch` starts; for several processes on a CPU it has to be called by itself
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("plain", {"passes": 2, "mini_batches": 2, "evaluation.size": 5}),
        # prompts that are drawn again move between processes; the reference and the adapters are scored on both
        (
            "dynamic",
            {"sampling": "dynamic", "policy.lora.rank": 4, "objective.policy_gradient.beta": 0.05, "micro_batch": 1},
        ),
    ],
)
def test_two_processes_make_the_trajectory_of_one(workplace, monkeypatch, name, extra):
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    changes = {"steps": 4, "evaluation.every": 2, "policy.dtype": "float64", **extra}
    assert main(["train", "rlvr", *settings(workplace, **changes, **{"run.name": f"{name}-one"})]) == 0
    launch(workplace, "-m", "guerdon", "train", "rlvr", *settings(workplace, **changes, **{"run.name": f"{name}-two"}))
    one, two = workplace / "runs" / f"{name}-one", workplace / "runs" / f"{name}-two"
    file = "adapter_model.safetensors" if "policy.lora.rank" in extra else "model.safetensors"
    ours, theirs = (load_file(run / "checkpoints/step-4/policy" / file) for run in (one, two))
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-6
    for line, other in zip(*((run / "metrics.jsonl").read_text().splitlines() for run in (one, two)), strict=True):
        line, other = json.loads(line), json.loads(other)
        for key in ("reward", "loss", "grad_norm", "constant_groups", "tokens", "kl", "eval/sampled/correct"):
            assert line.get(key) == pytest.approx(other.get(key), abs=1e-5), key
    assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
    assert len((two / "ledger.jsonl").read_text().splitlines()) == 4
    assert json.loads((two / "environment.json").read_text())["processes"] == 2


def test_a_sharded_policy_makes_the_trajectory_of_a_whole_one_and_resumes(workplace):
    launch(workplace, "-m", "tests.invariants.sharded", str(workplace / "model"))
    sharded = torch.load(workplace / "sharded.pt", weights_only=True)
    loop = make(workplace / "model", None)
    start = {name: value.clone() for name, value in loop.policy.state_dict().items()}
    for _ in range(4):
        loop.step()
    whole = loop.policy.state_dict()
    for found in sharded.values():
        assert found.keys() == whole.keys()
        assert max((found[name] - whole[name]).abs().max().item() for name in whole) < 1e-6
    assert max((start[name] - whole[name]).abs().max().item() for name in whole) > 1e-3


@pytest.mark.parametrize(
    "extra", [["--policy.lora.rank", "4"], ["--objective", "kto"], ["--preference.precompute", "true"]]
)
def test_two_processes_make_the_preference_trajectory_of_one(tmp_path, monkeypatch, extra):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path / "cache"))
    topics.model(0).save_pretrained(tmp_path / "model")
    topics.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in topics.pairs(0, count=30)[:]))
    words = [
        "train",
        "dpo",
        "--policy.model",
        "model",
        "--data",
        "pairs.jsonl",
        "--policy.max_new_tokens",
        "13",
        *extra,
    ]
    words += ["--prompts_per_step", "8", "--micro_batch", "3", "--policy.dtype", "float64", "--steps", "3"]
    words += [
        "--optim.lr",
        "1e-3",
        "--evaluation.every",
        "2",
        "--watch.quality",
        "guerdon.language.tasks.topics:quality",
    ]
    assert main([*words, "--run.name", "one"]) == 0
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    launch(tmp_path, "-m", "guerdon", *words, "--run.name", "two")
    file = "adapter_model.safetensors" if "--policy.lora.rank" in extra else "model.safetensors"
    ours, theirs = (load_file(f"runs/{name}/checkpoints/step-3/policy/{file}") for name in ("one", "two"))
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-6
    lines = zip(*(Path(f"runs/{name}/metrics.jsonl").read_text().splitlines() for name in ("one", "two")), strict=True)
    for line, other in (map(json.loads, pair) for pair in lines):
        for key in (
            "loss",
            "grad_norm",
            "accuracy",
            "margin_std",
            "reference_point",
            "eval/loss",
            "eval/sampled/quality",
        ):
            assert line.get(key) == pytest.approx(other.get(key), abs=1e-5), key
