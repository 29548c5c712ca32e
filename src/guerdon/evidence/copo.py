"""COPO's claim: groups whose samples all agree are not wasted, and accuracy is higher than GRPO's for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from guerdon.advantages.copo import copo
from guerdon.advantages.group import grpo
from guerdon.evidence.base import (
    Budget,
    Check,
    Evidence,
    Results,
    Settings,
    Unit,
    at_least,
    compare,
    rate_plan,
)
from guerdon.evidence.sort_task import sort_run
from guerdon.objectives.copo import copo_loss
from guerdon.objectives.loss import Loss
from guerdon.objectives.policy_gradient import policy_gradient
from guerdon.rewards import exact_answer
from guerdon.signal import Signal
from guerdon.stages import call
from guerdon.training.online import StepResult

SLUG = "copo"
TITLE = "COPO: consistency-aware policy optimisation"
PAPER = "Han et al. 2025, COPO: Consistency-Aware Policy Optimization, arXiv 2508.04138"
CLAIM = (
    "Samples of groups that are all right or all wrong teach something too, which takes Qwen2.5-7B-Instruct to 65.8 on "
    "MATH-500 (mean of 8 samples) against 63.6 with GRPO."
)

ARMS = ("grpo", "copo", "copo-soft")
RATES = (3e-5, 1e-4, 3e-4)
SIZES: dict[str, Settings] = {
    "smoke": {"steps": 8, "prompts": 96, "group_size": 6, "eval_size": 100},
    "full": {"steps": 50, "prompts": 128, "group_size": 6, "eval_size": 400},
}


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """The learning rate of each arm on a seed of its own, then each arm on every seed."""
    trials = 1 if budget == "full" else 0
    return rate_plan(ARMS, SIZES[budget], RATES, seeds, trials=trials, tuned=tuned, default=1e-4)


def tune(results: Results) -> dict[str, Settings]:
    """The learning rate with the best sampled accuracy."""
    return results.best("sampled_after")


def measure(unit: Unit) -> dict[str, Any]:
    """One training run; after every step, the share of its samples that had a gradient."""
    advantage, objective = {
        "grpo": (partial(grpo, eps=1e-6), policy_gradient),
        "copo": (copo, copo_loss),
        "copo-soft": (partial(copo, mode="soft"), copo_loss),
    }[unit.arm]
    shares: list[float] = []
    gaps: list[float] = []

    def on_step(result: StepResult) -> dict[str, float]:
        share, mixed, tied = gradient_shares(result, objective)
        gaps.append(abs(share - mixed))
        if not tied:
            shares.append(share)
        more = {name: result.metrics[name] for name in ("wrong_raised", "local_weight") if name in result.metrics}
        return {"learning": share, **more}

    found = sort_run(
        unit.seed,
        signal=Signal(rewards={"correct": exact_answer}, advantage=advantage),
        objective=objective,
        on_step=on_step,
        eval_every=int(unit.settings["steps"]) // 2,
        **unit.settings,  # pyright: ignore[reportArgumentType]
    )
    found["figures"] |= {"learning_least": min(shares, default=float("nan")), "learning_off_mixed": max(gaps)}
    return found


def gradient_shares(result: StepResult, objective: Callable[..., Loss]) -> tuple[float, float, bool]:
    """Shares of samples with a gradient and of samples in mixed groups; and whether a prompt's accuracy is the mean."""
    rollout = result.rollout
    assert rollout.rewards is not None
    logp = rollout.logp_old.clone().requires_grad_()
    loss = call(objective, rollout.available() | {"logp": logp})
    (grad,) = torch.autograd.grad(loss.total, logp)
    learning = (grad != 0).any(-1).float().mean().item()
    mixed = (rollout.rewards.amax(-1) > rollout.rewards.amin(-1)).float().mean().item()
    right = rollout.rewards.sum(-1)
    return learning, mixed, bool((right * len(right) == right.sum()).any())


def conclude(results: Results) -> Evidence:
    """Compare the arms."""
    method, baseline, soft = (
        results.arm("copo", "method"),
        results.arm("grpo", "baseline"),
        results.arm("copo-soft", "ablation"),
    )
    least, gap = method.figures["learning_least"], baseline.figures["learning_off_mixed"]
    wasted = [1 - share for share in baseline.figures["learning"]]
    checks = [
        Check(
            "every sample has a gradient",
            "share of samples with a gradient = 1 in every batch where no prompt's accuracy is exactly the mean",
            all(share == 1 for share in least),
            figures={"method": min(least), "baseline": 1 - sum(wasted) / len(wasted)},
        ),
        Check(
            "under GRPO only mixed groups have one",
            "largest difference of the share of samples with a gradient from the share in mixed groups = 0",
            all(value < 1e-6 for value in gap),
            figures={"baseline": max(gap)},
        ),
    ]
    if results.budget == "full":
        checks += [
            compare(
                "accuracy, sampled", method.figures["sampled_after"], baseline.figures["sampled_after"], errors=2.0
            ),
            compare("accuracy, greedy", method.figures["greedy_after"], baseline.figures["greedy_after"], errors=2.0),
            at_least("COPO learns, sampled", method.figures["sampled_gain"], 0.05, kind="headline", what="mean gain"),
            compare(
                "COPO is not far below GRPO, greedy",
                method.figures["greedy_after"],
                baseline.figures["greedy_after"],
                margin=-0.03,
            ),
            compare(
                "mode soft is not below GRPO, sampled",
                soft.figures["sampled_after"],
                baseline.figures["sampled_after"],
                margin=-0.02,
            ),
        ]
    return Evidence(SLUG, TITLE, CLAIM, PAPER, (method, baseline, soft), tuple(checks), NOTES, ("sampled", "learning"))


NOTES = (
    "Sort task, 0.1 M weights, 50 steps of 128 prompts with 6 samples, one update each (the paper: 512 prompts with 6 "
    "samples, 3 B and 7 B weights). gamma 20 and rho 1.5. The learning rate of each arm was tuned on one other seed.",
    "The global advantage is one number for all samples of a prompt: in expectation its gradient is 1/G of the usual "
    "policy gradient, with the noise of pushing whole prompts, so that few prompts a step work against it.",
    "The paper's figures are from single runs.",
)
