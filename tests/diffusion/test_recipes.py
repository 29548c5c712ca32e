"""Runs of image models from the command line: what they leave behind, and that a killed one goes on as if it had not been."""

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
from guerdon.errors import RecipeError
from guerdon.recipes import load_recipe

REWARDS = '''
import os, signal
calls = 0

def bright(samples):
    """The mean intensity of a picture."""
    return [[image.mean().item() for image in group] for group in samples]

def deadly(samples):
    """The same, and kills the process the DEADLY-th time it is called."""
    global calls
    calls += 1
    if calls == int(os.environ.get("DEADLY", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return bright(samples)

def labelled(samples, label, caption):
    assert [str(one) for one in label] == list(caption)
    return [[image[0, one % 8].mean().item() for image in group] for group, one in zip(samples, label)]
'''
IMAGE_RECIPES = ["dance-grpo", "ddpo", "dpok", "flow-grpo", "rwr", "shapes", "vgpo"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    (tmp_path / "myrewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("myrewards", None)
    yield tmp_path
    sys.modules.pop("myrewards", None)


def words(**changes: object) -> list[str]:
    """A very short run on the digits, from an untrained network."""
    wanted = {
        "policy.model": "digits",
        "policy.steps": 3,
        "data": "digits",
        "rewards.likeness": "myrewards:bright",
        "watch": "null",
        "prompts_per_step": 2,
        "group_size": 3,
        "steps": 2,
        "optim.lr": 1e-3,
        "evaluation.every": 0,
        "evaluation.size": 3,
        "evaluation.samples": 1,
        "run.directory": "runs",
        "run.name": "run",
        "run.samples_every": 1,
        **changes,
    }
    return [word for name, value in wanted.items() for word in (f"--{name}", str(value))]


def train(recipe: str = "flow-grpo", **changes: object) -> Path:
    assert main(["train", recipe, *words(**changes)]) == 0
    return Path("runs") / str(changes.get("run.name", "run"))


def lines(run: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def weights(run: Path, step: int, part: str = "policy") -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step}" / part / "unet" / "diffusion_pytorch_model.safetensors")


def test_what_a_run_leaves_behind(capsys):
    run = train(**{"watch.other": "myrewards:labelled", "evaluation.samples": 2})
    expected = {"recipe.yaml", "metrics.jsonl", "ledger.jsonl", "samples.jsonl", "images", "checkpoints", "report.html"}
    assert expected <= {path.name for path in run.iterdir()}
    last = lines(run)[-1]
    assert {"reward", "kl", "ratio_max", "watch/other", "eval/greedy/likeness", "eval/sampled/other"} <= set(last)
    assert last["length"] == 2.0  # of three steps the last has no noise
    samples = lines(run, "samples")
    assert {record["phase"] for record in samples} == {"before", "train", "after"}
    for record in samples:
        assert (run / record["sample"]["image"]).read_bytes()[1:4] == b"PNG"
    assert len({record["sample"]["image"] for record in samples}) == len(samples)
    page = (run / "report.html").read_text()
    assert page.count('<img class="sample" src="data:image/png;base64,') >= 2 * 3
    assert 'class="pictures"' in page
    assert "Held-out likeness, greedy" in capsys.readouterr().out


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_every_recipe_runs(name):
    changes: dict[str, object] = {"policy.model": "shapes", "data": "shapes"} if name == "shapes" else {}
    if name == "shapes":
        changes |= {"warm_start.steps": 2, "warm_start.batch_size": 4}
    run = train(name, **changes)
    record = lines(run)[-1]
    assert record["step"] == 2
    assert record["grad_norm"] > 0
    assert record["loss"] is not None
    if name == "dpok":
        assert record["kl"] > 0  # the first update has moved the policy
    if name == "rwr":
        assert {"imitation", "effective_samples"} <= set(record)
    if name == "shapes":
        assert len(lines(run, "supervised")) == 2
        assert (run / "base" / "unet").is_dir()


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_the_published_settings(name):
    recipe = load_recipe(name)
    objective = recipe.objective.get("policy_gradient") if isinstance(recipe.objective, dict) else None
    if objective is not None:
        assert (objective["clip_low"], objective["clip_high"], objective["advantage_clip"]) == (1e-4, 1e-4, 5.0)
        assert recipe.policy.logp_reduction == "mean"
    if name == "dance-grpo":
        assert (recipe.policy.std, recipe.policy.noise_level, recipe.policy.random_share) == ("dance", 0.3, 0.6)
        assert recipe.policy.shared_noise
        assert recipe.advantage == {"grpo": {"eps": 1e-8}}
    if name == "ddpo":
        assert recipe.policy.eta == 1.0
        assert recipe.advantage == {"prompt_tracker": {"size": 16, "min_count": 16}}
    if name == "flow-grpo":
        assert (recipe.policy.std, recipe.policy.noise_level) == ("flow_grpo", 0.7)
        assert recipe.policy.eval_steps > recipe.policy.steps
    judges = recipe.watch["judge"]["guerdon.diffusion.oracle:oracle_score"]
    rewarded = recipe.rewards["likeness"]
    rewarded = rewarded["instant"]["reward"] if "instant" in rewarded else rewarded
    assert judges["seed"] != rewarded["guerdon.diffusion.oracle:oracle_score"]["seed"]


def test_a_window_of_noise_from_a_recipe(capsys):
    options = {"policy.steps": 5, "policy.window": 2, "policy.window_range": "[1, 4]", "policy.kl_scaling": "time"}
    assert lines(train(**options))[-1]["length"] == 2.0
    wrong = {**options, "policy.window_range": "[0, 1]", "run.name": "other"}
    assert main(["train", "flow-grpo", *words(**wrong)]) == 2
    assert "policy.window = 2 steps must lie within [0, 1)" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"policy.window: must be at least 1"):
        load_recipe("flow-grpo", {"policy.window": 0})


def test_killed_in_the_middle_of_a_step(capsys):
    options = {
        "rewards.likeness": "myrewards:deadly", "steps": 3, "passes": 2, "run.checkpoint_every": 1,
        "advantage": "prompt_tracker", "optim.ema": 0.9, "objective": "reward_weighted", "objective.reward_weighted.beta": 0.1,
    }  # fmt: skip
    command = [sys.executable, "-m", "guerdon", "train", "flow-grpo", *words(**options, **{"run.name": "killed"})]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DEADLY": "4"}  # two evaluations come first: step 2
    done = subprocess.run(command, env=variables, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    run = Path("runs/killed")
    assert [line["step"] for line in lines(run)] == [0, 1]
    assert main(["resume", str(run)]) == 0
    other = train(**options, **{"run.name": "straight"})
    times = ("elapsed", "seconds/", "tokens_per_s")
    figures = [[{k: v for k, v in line.items() if not k.startswith(times)} for line in lines(r)] for r in (run, other)]
    assert figures[0] == figures[1]
    for name in ("ledger", "samples"):
        assert lines(run, name) == lines(other, name)
    for path in (other / "images").iterdir():
        assert path.read_bytes() == (run / "images" / path.name).read_bytes()
    for part in ("policy", "average"):
        ours, theirs = weights(run, 3, part), weights(other, 3, part)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(weights(run, 3)["conv_in.weight"], weights(run, 3, "average")["conv_in.weight"])


def test_a_warm_start_is_gone_on_from_bit_by_bit():
    options = {"warm_start": "{steps: 2, batch_size: 4, optim: {lr: 1.0e-3, ema: 0.9}}", "run.checkpoint_every": 0}
    run = train(**options, steps=0)
    assert main(["resume", str(run), "--steps", "2"]) == 0
    other = train(**options, **{"run.name": "straight"})
    ours, theirs = weights(run, 2), weights(other, 2)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_supervised_training_of_a_base():
    changes = {"loop": "supervised", "steps": 6, "prompts_per_step": 8, "optim.ema": 0.9, "evaluation.size": 16}
    run = train("shapes", **changes, warm_start="null", objective="null")
    record = lines(run)[-1]
    assert 0 < record["eval/loss"] < 5
    assert record["tokens"] == 8.0  # one step a picture
    assert (run / "checkpoints/step-6/average/unet").is_dir()
    again = train(**{"policy.model": run / "checkpoints/step-6/average", "run.name": "again"})
    assert lines(again)[-1]["step"] == 2


def test_adapters_are_trained_alone():
    run = train(**{"policy.lora.rank": 2, "objective.policy_gradient.beta": 0.1})
    folder = run / "checkpoints/step-2/policy"
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "unet").exists()
    assert lines(run)[-1]["kl"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"policy.max_new_tokens": 8},
            r"policy.max_new_tokens: this is a setting of kind 'language'; .* of kind 'flow'",
        ),
        ({"policy.eta": 1.0}, r"policy.eta: this is a setting of kind 'diffusion'"),
        ({"policy.kind": "flwo"}, r"policy.kind: must be one of 'language', 'spans', 'diffusion', 'flow'; got 'flwo'"),
        ({"policy.nose_level": 1.0}, r"policy.nose_level: there is no such setting .* Did you mean 'noise_level'"),
        ({"policy.kind": "diffusion"}, r"policy.std: this is a setting of kind 'flow'"),
    ],
)
def test_settings_of_another_kind(change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("flow-grpo", change)


def test_a_language_model_has_no_exact_divergence(capsys):
    wrong = ["--objective.policy_gradient.beta", "0.1", "--objective.policy_gradient.kl_estimator", "exact"]
    assert main(["train", "sort", "--objective", "dpok", "--run.directory", "runs"]) == 1
    assert "needs the field 'kl', which nothing before it provides" in capsys.readouterr().err
    assert main(["train", "sort", *wrong, "--warm_start", "null", "--steps", "1", "--run.directory", "runs"]) == 1
    assert "needs the field kl, which is not there; take kl_estimator: k3" in capsys.readouterr().err
