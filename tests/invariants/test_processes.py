"""The number of processes, and how the weights are spread over them, do not change the trajectory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guerdon.cli.main import main
from guerdon.language.tasks import topics
from tests.invariants import zero
from tests.invariants.launch import launch
from tests.invariants.sharded import make
from tests.models import REWARDS, problems, saved_model, settings

RUNS = {
    "plain": {"passes": 2, "mini_batches": 2, "evaluation.size": 5},
    # prompts that are drawn again move between processes; the reference and the adapters are scored on both
    "dynamic": {
        "sampling": "dynamic",
        "policy.lora.rank": 4,
        "objective.policy_gradient.beta": 0.05,
        "micro_batch": 1,
    },
}
# samples that are given: the recipe, and what is changed
GIVEN = {
    "adapters": ("dpo", {"policy.lora.rank": 4}),
    "kto": ("dpo", {"objective": "kto"}),
    "precompute": ("dpo", {"preference.precompute": "true"}),
    # five held-out rows: in the last round one process has none of its own
    "supervised": ("implicit-reward", {"data": "answers.jsonl", "watch.kl": "kl_penalty", "optim.lr_scale": 0.5}),
    "drafts": (
        "dpo",
        {
            "objective": "srpo",
            "policy.revision": "{prompt}{draft}{prompt}",
            "preference.precompute": "true",
            "evaluation.revisions": 1,
        },
    ),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Models and data, and all that two processes make of them."""
    folder = tmp_path_factory.mktemp("processes")
    saved_model(folder / "model")
    problems(folder / "problems.jsonl")
    (folder / "myrewards.py").write_text(REWARDS)
    topics.model(0).save_pretrained(folder / "topics")
    topics.tokenizer().save_pretrained(folder / "topics")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in topics.pairs(0, count=30)[:]))
    rows = topics.held_out_rows(29)  # a fifth of them, five, is held out
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUERDON_CACHE", str(folder / "cache of two"))
        launch(
            folder,
            *(["guerdon", *online_words(folder, name, "two")] for name in RUNS),
            *(["guerdon", *given_words(name, "two")] for name in GIVEN),
            ["tests.invariants.sharded", str(folder / "model")],
        )
    return folder


def online_words(folder: Path, name: str, processes: str) -> list[str]:
    changes = {"steps": 4, "evaluation.every": 2, "policy.dtype": "float64", **RUNS[name]}
    return ["train", "rlvr", *settings(folder, **changes, **{"run.name": f"{name}-{processes}"})]


def given_words(name: str, processes: str) -> list[str]:
    recipe, changes = GIVEN[name]
    wanted = {
        "policy.model": "topics",
        "data": "pairs.jsonl",
        "policy.max_new_tokens": 13,
        "prompts_per_step": 8,
        "micro_batch": 3,
        "policy.dtype": "float64",
        "steps": 3,
        "optim.lr": 1e-3,
        "evaluation.every": 2,
        "watch.quality": "guerdon.language.tasks.topics:quality",
        "run.name": f"{name}-{processes}",
        **changes,
    }
    return ["train", recipe, *(word for key, value in wanted.items() for word in (f"--{key}", str(value)))]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_trajectory_of_one(workplace, monkeypatch, name):
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    assert main(online_words(workplace, name, "one")) == 0
    one, two = workplace / "runs" / f"{name}-one", workplace / "runs" / f"{name}-two"
    file = "adapter_model.safetensors" if "policy.lora.rank" in RUNS[name] else "model.safetensors"
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


@pytest.mark.parametrize("stage", [1, 2])
def test_a_deepspeed_engine_makes_the_same_trajectory_and_resumes(workplace, stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    launch(workplace, ["tests.invariants.zero", str(workplace / "model"), str(stage)])
    found = torch.load(workplace / f"zero-{stage}.pt", weights_only=True)
    loop = zero.make(workplace / "model", None)
    norms, state = [], {}
    for step in range(4):
        if step == 2:
            state = loop.state().tensors
        norms.append(loop.step().metrics["grad_norm"])
    whole = loop.policy.state_dict()
    for name in ("straight", "resumed"):
        assert max((found[name][key] - whole[key]).abs().max().item() for key in whole) < 1e-6
    assert found["norms"] == pytest.approx(norms, abs=1e-5)
    # the state has the form of an optimiser in one piece
    assert found["state"].keys() == state.keys()
    assert max((found["state"][key] - state[key]).abs().max().item() for key in state) < 1e-6


@pytest.mark.parametrize("name", GIVEN)
def test_two_processes_make_the_trajectory_of_one_on_given_samples(workplace, monkeypatch, name):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("GUERDON_CACHE", str(workplace / "cache of one"))
    assert main(given_words(name, "one")) == 0
    file = "adapter_model.safetensors" if "policy.lora.rank" in GIVEN[name][1] else "model.safetensors"
    runs = [workplace / "runs" / f"{name}-{processes}" for processes in ("one", "two")]
    ours, theirs = (load_file(run / "checkpoints/step-3/policy" / file) for run in runs)
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-6
    lines = zip(*((run / "metrics.jsonl").read_text().splitlines() for run in runs), strict=True)
    for line, other in (map(json.loads, pair) for pair in lines):
        for key in (
            "loss",
            "grad_norm",
            "accuracy",
            "margin_std",
            "reference_point",
            "nll",
            "implicit",
            "value_start",
            "eval/loss",
            "eval/nll",
            "eval/implicit",
            "eval/sampled/quality",
            "eval/revised_1/quality",
            "eval/sampled/kl",
        ):
            assert line.get(key) == pytest.approx(other.get(key), abs=1e-5), key
