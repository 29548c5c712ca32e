"""The number of processes, and how the weights are spread over them, do not change how an image model is trained."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from guerdon.cli.main import main
from tests.invariants.launch import launch
from tests.invariants.sharded_images import make

REWARDS = """
def bright(samples):
    return [[image.mean().item() for image in group] for group in samples]
"""


RUNS: dict[str, dict[str, object]] = {
    "flow-grpo": {"passes": 2, "mini_batches": 2, "policy.random_share": 0.6, "optim.ema": 0.5},
    # a reward for every step, adapters, and prompts one at a time
    "vgpo": {
        "rewards.likeness": "{instant: {reward: 'myrewards:bright'}}",
        "policy.lora.rank": 2,
        "policy.guidance": 2.0,
        "micro_batch": 1,
        "optim.ema": "null",
    },
    "rwr": {"optim.ema": "null"},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Rewards, and all that two processes make with them."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "myrewards.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        launch(
            folder,
            *(["guerdon", "train", recipe, *words(f"{recipe}-two", **RUNS[recipe])] for recipe in RUNS),
            ["tests.invariants.sharded_images", str(folder)],
        )
    return folder


def words(name: str, **changes: object) -> list[str]:
    wanted = {
        "policy.model": "digits",
        "policy.steps": 3,
        "policy.dtype": "float64",
        "rewards.likeness": "myrewards:bright",
        "watch": "null",
        "prompts_per_step": 4,
        "group_size": 3,
        "steps": 3,
        "optim.lr": 1e-3,
        "evaluation.every": 0,
        "evaluation.size": 5,
        "evaluation.samples": 1,
        "run.directory": "runs",
        "run.name": name,
        "run.samples_every": 1,
        **changes,
    }
    return [word for key, value in wanted.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("recipe", RUNS)
def test_two_processes_make_the_trajectory_of_one(workplace, monkeypatch, recipe):
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    changes = RUNS[recipe]
    assert main(["train", recipe, *words(f"{recipe}-one", **changes)]) == 0
    one, two = workplace / "runs" / f"{recipe}-one", workplace / "runs" / f"{recipe}-two"
    parts = ["policy", "average"] if changes["optim.ema"] != "null" else ["policy"]
    file = "adapter_model.safetensors" if "policy.lora.rank" in changes else "unet/diffusion_pytorch_model.safetensors"
    for part in parts:
        ours, theirs = (load_file(run / "checkpoints/step-3" / part / file) for run in (one, two))
        assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-6
    for line, other in zip(*((run / "metrics.jsonl").read_text().splitlines() for run in (one, two)), strict=True):
        line, other = json.loads(line), json.loads(other)
        for key in ("reward", "loss", "grad_norm", "length", "kl", "advantage_stage/size_1", "eval/sampled/likeness"):
            assert line.get(key) == pytest.approx(other.get(key), abs=1e-5), key
    for path in (one / "images").iterdir():
        assert path.read_bytes() == (two / "images" / path.name).read_bytes()
    assert json.loads((two / "environment.json").read_text())["processes"] == 2


def test_a_sharded_policy_makes_the_trajectory_of_a_whole_one_and_resumes(workplace):
    sharded = torch.load(workplace / "sharded.pt", weights_only=True)
    loop = make(None)
    start = {name: value.clone() for name, value in loop.policy.state_dict().items()}
    for _ in range(3):
        loop.step()
    whole = loop.policy.state_dict()
    for found in sharded.values():
        assert found.keys() == whole.keys()
        assert max((found[name] - whole[name]).abs().max().item() for name in whole) < 1e-6
    assert max((start[name] - whole[name]).abs().max().item() for name in whole) > 1e-3
