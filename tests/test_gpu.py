"""On an accelerator: the same numbers as on the CPU, in half precision, from a stop to the end.

Left out of the default suite: `python -m pytest -m gpu tests/test_gpu.py` where there is a GPU.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from guerdon.advantages import grpo
from guerdon.cli.main import main
from guerdon.language.logprob import token_logprob
from guerdon.language.policy import LanguagePolicy
from guerdon.objectives import policy_gradient
from guerdon.signal import Signal
from guerdon.training import Online, Optim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def gradient(policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double().cpu() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("prompts", [["31=", "27="], ["3=", "2718="]], ids=["even", "padded"])
def test_samples_scores_and_gradients_are_those_of_the_cpu(saved, prompts):
    found = {}
    for device in ("cpu", "cuda"):
        policy = LanguagePolicy.load(str(saved), max_new_tokens=6).to(device)
        rollout = policy.sample(prompts, 4, seeds=[1, 2])
        scores = policy.log_prob(rollout)
        torch.testing.assert_close(scores.logp.detach(), rollout.logp_old, atol=1e-5, rtol=0)
        weight = torch.arange(scores.logp.numel(), device=device).view_as(scores.logp) / 10
        (scores.logp * weight).sum().backward()
        found[device] = rollout.to("cpu"), scores.logp.detach().cpu(), gradient(policy)
    (ours, logp, slope), (theirs, other, tilt) = found["cpu"], found["cuda"]
    assert torch.equal(ours.steps["completion_ids"], theirs.steps["completion_ids"])
    torch.testing.assert_close(logp, other, atol=1e-5, rtol=0)
    assert ((slope - tilt).norm() / slope.norm()).item() < 1e-5


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("budget", [None, 7])
def test_log_probabilities_in_bfloat16_are_summed_up_in_float32(entropy, budget):
    torch.manual_seed(0)
    hidden, matrix = torch.randn(64, 32), torch.randn(5000, 32) / 4
    ids = torch.randint(5000, (64,))
    found = []
    for device in ("cpu", "cuda"):
        # the same rounded numbers on both, but exact arithmetic on the CPU
        dtype = torch.bfloat16 if device == "cuda" else torch.float64
        h, m = (t.bfloat16().to(device, dtype).requires_grad_() for t in (hidden, matrix))
        logp, spread = token_logprob(h, m, ids.to(device), chunk=budget, entropy=entropy)
        (logp.sum() + (spread.sum() if entropy else 0)).backward()
        found.append([t.detach().double().cpu() for t in (logp, h.grad, m.grad)])
    for exact, ours, limit in zip(*found, (1e-6, 8e-3, 8e-3), strict=True):
        assert ((exact - ours).norm() / exact.norm()).item() < limit


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_policy_learns(saved, precision):
    AcceleratorState._reset_state(True)  # its precision is the process's; another test may have set it
    policy = LanguagePolicy.load(str(saved), max_new_tokens=6)
    accelerator = Accelerator(mixed_precision=precision)
    policy.to(accelerator.device)

    def threes(samples):
        return [[float(sample.count("3")) for sample in group] for group in samples]

    loop = Online(
        policy,
        [{"prompt": f"{i}{i % 7}="} for i in range(64)],
        Signal(rewards={"threes": threes}, advantage=grpo),
        partial(policy_gradient, clip_low=0.2, clip_high=0.2),
        optim=Optim(lr=1e-2),
        steps=25,
        accelerator=accelerator,
    )
    rewards = [loop.step().metrics["reward"] for _ in range(25)]
    AcceleratorState._reset_state(True)
    assert next(policy.parameters()).is_cuda
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1


@pytest.mark.parametrize("recipe", ["rlvr", "flow"])
def test_a_run_goes_on_as_if_it_had_not_stopped(workplace: Path, recipe: str):
    words = {
        "rlvr": ["rlvr", "--policy.model", "model", "--data", "problems.jsonl", "--policy.max_new_tokens", "6"],
        "flow": ["flow-grpo", "--policy.model", "digits", "--policy.steps", "4", "--warm_start.steps", "5"],
    }[recipe]
    words = ["train", *words, "--prompts_per_step", "4", "--group_size", "4", "--evaluation.size", "4"]
    words += ["--watch.diversity", "null", "--evaluation.samples", "2"] if recipe == "flow" else []
    words += ["--run.checkpoint_every", "2", "--evaluation.every", "0"]
    assert main([*words, "--steps", "4", "--run.name", "whole"]) == 0
    assert main([*words, "--steps", "2", "--run.name", "halves"]) == 0
    assert main(["resume", "runs/halves", "--steps", "4"]) == 0
    whole, halves = (
        [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "halves")
    )
    assert json.loads(Path("runs/whole/environment.json").read_text())["device"].startswith("cuda")
    told = [line for line in halves if line["step"] and "reward" in line]
    for line, other in zip((x for x in whole if x["step"] and "reward" in x), told, strict=True):
        # sums on a GPU may be taken in another order, so near rather than equal
        assert line["reward"] == pytest.approx(other["reward"], rel=1e-3)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


def test_images_and_their_scores_are_those_of_the_cpu():
    from guerdon.diffusion.bases import untrained
    from guerdon.diffusion.tasks import find as find_images

    prompts = [row["prompt"] for row in find_images("shapes").prompt_rows()[:2]]
    found = {}
    for device in ("cpu", "cuda"):
        policy = untrained("shapes", "flow", seed=0, steps=4, noise_level=0.7).to(device)
        rollout = policy.sample(prompts, 2, seeds=[1, 2])
        logp = policy.log_prob(rollout).logp
        logp.sum().backward()
        found[device] = rollout.to("cpu").steps["latents"], logp.detach().cpu(), gradient(policy)
    for ours, theirs in zip(found["cpu"], found["cuda"], strict=True):
        assert ((ours - theirs).norm() / ours.norm()).item() < 1e-3
