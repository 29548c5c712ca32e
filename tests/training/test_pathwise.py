"""The pathwise loop: its cuts, its gradient, its errors, and runs from the command line."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from guerdon.cli.main import main
from guerdon.diffusion.bases import untrained
from guerdon.diffusion.policy import DenoisingPolicy
from guerdon.errors import BindingError, NumericsError, RecipeError, ScoreError
from guerdon.recipes import load_recipe
from guerdon.signal import Signal
from guerdon.training import Optim, Pathwise, Truncation
from guerdon.weighting import linear
from tests.diffusion.pipelines import stable_diffusion, stable_diffusion_3
from tests.invariants.launch import launch
from tests.training.bandit import BanditPolicy

REWARDS = """
import torch

def bright(images, label):
    assert len(label) == len(images)
    return images.mean((1, 2, 3))

def plain(samples):
    return [[image.mean().item() for image in group] for group in samples]

def cut(images):
    return images.mean((1, 2, 3)).detach()
"""
ROWS = [{"prompt": str(k), "label": k} for k in range(4)]


def bright(images: Tensor, label: list[int]) -> Tensor:
    """Of a picture's brightness, more so for later labels."""
    return images.mean((1, 2, 3)) * (1 + torch.tensor(label, dtype=images.dtype))


def loop(reward: Any = bright, *, steps: int = 4, lora: dict | None = None, **options: Any) -> Pathwise:
    policy = untrained("digits", "flow", steps=steps, lora=lora)
    if options.get("beta"):
        policy.keep_reference()
    wanted = {"prompts_per_step": 4, "group_size": 2, "optim": Optim(lr=1e-3, clip_norm=None), **options}
    return Pathwise(policy, ROWS, Signal(rewards={"bright": reward}, weighting=linear), steps=3, **wanted)


def weights_after(made: Pathwise, steps: int = 2) -> Tensor:
    for _ in range(steps):
        made.step()
    return torch.cat([p.detach().flatten() for p in made.trained])


def test_random_cuts():
    for kind in ("uniform", "gaussian"):
        drawn = Counter(Truncation(kind).draw(8, seed).first for seed in range(3000))  # type: ignore[arg-type]
        assert set(drawn) <= set(range(1, 8))
        if kind == "uniform":
            assert all(abs(drawn[b] / 3000 - 1 / 7) < 0.03 for b in range(1, 8))
        else:
            assert drawn.most_common(1)[0][0] == 6
    fifty = [Truncation("gaussian").draw(50, seed).first for seed in range(1000)]
    assert sum(fifty) / 1000 == pytest.approx(41.5, abs=0.5)  # the integer part of N(42, 5)
    assert Truncation("uniform").draw(8, 5) == Truncation("uniform").draw(8, 5)


def test_fixed_cuts():
    assert Truncation("full").draw(8, 0) == (0, False, 0)
    assert Truncation("last", k=3).draw(8, 0) == (5, False, 0)
    assert Truncation("low_variance").draw(8, 0) == (7, False, 2)
    single = {Truncation("single").draw(40, seed).first for seed in range(400)}
    assert single == set(range(30, 40))
    assert Truncation("full").draw(1, 0).first == 0


@pytest.mark.parametrize(
    ("options", "steps", "text"),
    [
        ({"kind": "last", "k": 5}, 4, "more than policy.steps"),
        ({"kind": "uniform"}, 1, "Use truncation: full"),
        ({"kind": "last", "k": 0}, 4, "at least 1"),
        ({"mean": 1.5}, 4, "cut_mean"),
    ],
)
def test_cuts_that_cannot_be(options, steps, text):
    with pytest.raises(RecipeError, match=text):
        Truncation(**options).draw(steps, 0)


@pytest.mark.parametrize("kind", ["full", "last", "uniform", "gaussian", "low_variance", "single"])
def test_every_cut_raises_the_reward(kind):
    made = loop(truncation=Truncation(kind), lora={"rank": 4}, optim=Optim(lr=3e-3))
    rewards = [made.step().metrics["reward"] for _ in range(2)]
    result = made.step()
    assert result.metrics["reward"] > rewards[0]
    assert result.metrics["skipped"] == 0
    assert result.rollout.samples[0][0].shape == (1, 8, 8)
    assert len(result.rollout.samples[0]) == (4 if kind == "low_variance" else 2)
    live = result.rollout.mask[0, 0].nonzero().flatten().tolist()
    first = int(result.metrics["cut"])
    assert live == ([first] if kind == "single" else list(range(first, 4)))


def test_micro_batches_and_checkpoints_do_not_change_the_trajectory():
    # without Adam, which makes much of the last bits of a gradient near zero
    options = {"optim": Optim("sgd", lr=0.1, betas=(0.0, 0.0)), "steps": 3}
    whole = weights_after(loop(**options))
    torch.testing.assert_close(weights_after(loop(micro_batch=1, **options)), whole, rtol=1e-4, atol=1e-6)
    assert torch.equal(weights_after(loop(checkpointing=False, **options)), whole)


def test_adapters_alone_are_trained():
    made = loop(lora={"rank": 2})
    before = {name: p.detach().clone() for name, p in made.policy.named_parameters()}
    made.step()
    moved = {name for name, p in made.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_the_drift_holds_the_policy_back():
    ends = {}
    for beta in (1e-6, 100.0):
        made = loop(beta=beta, lora={"rank": 2}, truncation=Truncation("last"), steps=2, group_size=1)
        ends[beta] = [made.step().metrics["drift"] for _ in range(4)][-1]
    assert ends[100.0] < ends[1e-6]


def test_a_gradient_that_is_not_finite_is_left_out_and_counted():
    calls = [0]

    def breaks(images: Tensor) -> Tensor:
        calls[0] += 1
        broken = images.mean((1, 2, 3))
        return broken + (0 * broken - 0.0).sqrt() if calls[0] >= 2 else broken  # 0, with a gradient of 0 * inf

    made = loop(breaks, skips=1)
    assert made.step().metrics["skipped"] == 0
    before = weights_after(made, 0)
    assert made.step().metrics["skipped"] == 1
    assert torch.equal(weights_after(made, 0), before)
    with pytest.raises(NumericsError, match="as in the 1 steps before"):
        made.step()


def test_a_reward_that_is_no_number():
    def hollow(images: Tensor) -> Tensor:
        scores = images.mean((1, 2, 3))
        return scores + torch.tensor([math.nan] + [0.0] * (len(scores) - 1))

    with pytest.raises(ScoreError, match="reward 'bright' returned nan for prompt 0, sample 0"):
        loop(hollow).step()
    policy = untrained("digits", "flow", steps=3)
    signal = Signal(rewards={"hollow": hollow}, weighting=linear, on_bad_score="drop")
    result = Pathwise(policy, ROWS, signal, prompts_per_step=4, group_size=2, steps=1).step()
    assert result.metrics["dropped"] == 1
    assert result.metrics["skipped"] == 0
    assert result.metrics["grad_norm"] > 0


def test_a_shaping_that_keeps_the_gradient_and_one_that_does_not():
    def gap(scores: Tensor) -> Tensor:
        return -(scores - 10).abs()

    def numbers(scores: Tensor) -> Tensor:
        return scores.detach().round()

    def made(stage: Any) -> Pathwise:
        signal = Signal(rewards={"bright": bright}, shaping={"bright": [stage]}, weighting=linear)
        return Pathwise(untrained("digits", "flow", steps=2), ROWS, signal, prompts_per_step=4, steps=1)

    assert made(gap).step().metrics["reward"] < -5
    with pytest.raises(RecipeError, match="shaping or weighting ended the gradient"):
        made(numbers).step()


def test_rewards_without_a_gradient_and_policies_without_one():
    with pytest.raises(ScoreError, match="gave scores without a gradient"):
        loop(lambda images: images.mean((1, 2, 3)).detach()).step()
    with pytest.raises(ScoreError, match="must give a tensor with one score for each of the 8 images; got list"):
        loop(lambda images: [1.0] * len(images)).step()
    with pytest.raises(BindingError, match="must name `images`"):
        loop(lambda samples: [[0.0] * 2] * 4)
    with pytest.raises(RecipeError, match="BanditPolicy has no gradient"):
        Pathwise(BanditPolicy(), ROWS, Signal(rewards={"bright": bright}))
    with pytest.raises(RecipeError, match="loop: pathwise needs a policy of images"):
        load_recipe("sort", {"loop": "pathwise"})


@pytest.mark.parametrize("maker", [stable_diffusion, stable_diffusion_3])
def test_a_pipeline_on_disk_learns_with_adapters(maker, tmp_path):
    maker().save_pretrained(tmp_path / "pipeline")
    policy = DenoisingPolicy.load(tmp_path / "pipeline", steps=3, guidance=3.0, lora={"rank": 4, "alpha": 8})
    signal = Signal(rewards={"red": lambda images: images[:, 0].mean((1, 2))}, weighting=linear)
    rows = [{"prompt": "a red cat"}, {"prompt": "a dog"}]
    made = Pathwise(policy, rows, signal, prompts_per_step=2, group_size=2, micro_batch=1, optim=Optim(lr=0.01))

    def redness() -> float:
        samples = policy.sample(["a red cat", "a dog"], 4, [1, 2]).samples
        return sum(image[0].mean().item() for group in samples for image in group)

    before = redness()
    for _ in range(5):
        made.step()
    assert redness() > before
    policy.save(tmp_path / "trained")
    back = DenoisingPolicy.load(tmp_path / "trained", steps=3, guidance=3.0)
    one, two = (p.sample(["a dog"], 1, [5]).steps["latents"] for p in (policy, back))
    assert torch.equal(one, two)


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "myrewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("myrewards", None)
    yield tmp_path
    sys.modules.pop("myrewards", None)


def words(**changes: object) -> list[str]:
    wanted = {
        "policy.model": "digits",
        "policy.steps": 3,
        "data": "digits",
        "rewards.likeness": "myrewards:bright",
        "watch": "{other: 'myrewards:plain'}",
        "prompts_per_step": 2,
        "group_size": 2,
        "steps": 4,
        "evaluation.every": 0,
        "evaluation.size": 3,
        "evaluation.samples": 1,
        "run.name": "run",
        "run.samples_every": 1,
        "run.checkpoint_every": 2,
        "optim.ema": 0.9,
        **changes,
    }
    return [word for name, value in wanted.items() for word in (f"--{name}", str(value))]


def lines(run: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def adapters(run: Path, step: int = 4) -> dict[str, Tensor]:
    return load_file(run / f"checkpoints/step-{step}/policy/adapter_model.safetensors")


def test_a_run_is_resumed_bit_for_bit(place, capsys):
    assert main(["train", "alignprop", *words(steps=2)]) == 0
    assert main(["resume", "runs/run", "--steps", "4"]) == 0
    assert main(["train", "alignprop", *words(**{"run.name": "straight"})]) == 0
    ours, theirs = adapters(Path("runs/run")), adapters(Path("runs/straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    last = lines(Path("runs/run"))[-1]
    wanted = {"reward", "score/likeness", "watch/other", "cut", "skipped", "grad_norm", "eval/greedy/likeness"}
    assert wanted <= set(last)
    assert last["loss"] == pytest.approx(-last["reward"], abs=1e-6)
    straight = lines(Path("runs/straight"))[-1]
    assert {k: last[k] for k in wanted} == {k: straight[k] for k in wanted}
    assert len(lines(Path("runs/run"), "ledger")) == 4
    assert "report.html" in capsys.readouterr().out


def test_a_run_ends_where_a_judge_falls(place):
    assert main(["train", "alignprop", *words(stop_below="{watch/other: 2.0}")]) == 0
    status = json.loads(Path("runs/run/status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 1)
    assert "fell below 2" in status["reason"]


def test_the_recipe():
    recipe = load_recipe("alignprop")
    assert recipe.loop == "pathwise"
    assert recipe.pathwise.truncation == "uniform"
    assert recipe.pathwise.checkpointing
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.clip_norm) == (1e-3, 1e-4, 1.0)


@pytest.mark.slow
def test_two_processes_make_the_trajectory_of_one(place):
    assert main(["train", "alignprop", *words(micro_batch=1)]) == 0
    launch(place, ["guerdon", "train", "alignprop", *words(**{"run.name": "two"})])
    ours, theirs = adapters(Path("runs/run")), adapters(Path("runs/two"))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5
    for line, other in zip(lines(Path("runs/run")), lines(Path("runs/two")), strict=True):
        for key in ("reward", "loss", "grad_norm", "cut", "eval/sampled/likeness"):
            assert line.get(key) == pytest.approx(other.get(key), abs=1e-5), key
