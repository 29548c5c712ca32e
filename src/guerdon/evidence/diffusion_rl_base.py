"""The baselines of diffusion and flow: each of them raises its reward, on points of a ring and on pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guerdon.advantages.group import group_advantages
from guerdon.evidence.base import Budget, Evidence, Results, Settings, Unit, at_least, compare, mean
from guerdon.evidence.prdp import quality
from guerdon.evidence.recipe_run import recipe_run
from guerdon.evidence.ring_flow import Paths, thin, together, train
from guerdon.objectives.loss import Loss
from guerdon.objectives.policy_gradient import policy_gradient

SLUG = "diffusion-rl-base"
TITLE = "DDPO, DPOK, RWR, Flow-GRPO, DanceGRPO"
PAPER = "arXiv 2305.13301 (DDPO), 2305.16381 (DPOK), 2302.12192 (RWR), 2505.05470 (Flow-GRPO), 2505.07818 (DanceGRPO)"
CLAIM = (
    "Policy gradients and weighted losses raise the rewards of diffusion and flow models (Flow-GRPO: SD3.5-M on GenEval from "
    "0.63 to 0.95). These are the baselines of other methods here: what is tested is that each of them learns."
)

RECIPES = ("ddpo", "dpok", "rwr", "flow-grpo", "dance-grpo")
RINGS = {"ring-ddpo": (32, 2), "ring-flow-grpo": (8, 8)}  # prompts and samples a round
SMOKE = (*RINGS, "flow-grpo")
ROUNDS, UPDATES, RING_LR, LAST = 60, 1, 1e-3, 5
STEPS: dict[Budget, int] = {"smoke": 2, "full": 30}
LIKENESS, JUDGE = "eval/sampled/likeness", "eval/sampled/judge"


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Every arm on every seed; nothing is tuned."""
    arms = SMOKE if budget == "smoke" else (*RINGS, *RECIPES)
    return [
        Unit(arm, seed, {"steps": ROUNDS if arm in RINGS else STEPS[budget]}) for arm in arms for seed in range(seeds)
    ]


def measure(unit: Unit) -> dict[str, Any]:
    """A run on the ring, or one from the bundled recipe."""
    if unit.arm in RINGS:
        return _ring(unit)
    steps = int(unit.settings["steps"])
    short = {"watch.diversity": "null", "evaluation.size": "50"}
    return recipe_run(unit.arm, short, [LIKENESS, JUDGE], seed=unit.seed, steps=steps, samples=4)


def _ring(unit: Unit) -> dict[str, Any]:
    prompts, group = RINGS[unit.arm]

    def signal(_: int, paths: Paths) -> dict[str, Tensor]:
        good = quality(paths)
        rewards = together(good)
        # DDPO normalises over the batch, GRPO in the group
        ddpo = unit.arm == "ring-ddpo"
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8) if ddpo else group_advantages(rewards)
        return {"log/quality": good.mean((1, 2)), "advantages": advantages}

    def loss(logp: Tensor, paths: Paths, given: Mapping[str, Tensor]) -> Loss:
        live = torch.ones_like(logp, dtype=torch.bool)
        return policy_gradient(logp, together(paths.logp), given["advantages"], live, advantage_clip=5.0)

    _, curves = train(
        [unit.seed],
        lr=[RING_LR],
        rounds=int(unit.settings["steps"]),
        updates=UPDATES,
        prompts=prompts,
        group=group,
        signal=signal,
        loss=loss,
    )
    found = curves["quality"][0].tolist()
    before, after = mean(found[:LAST]), mean(found[-LAST:])
    return {"figures": {"before": before, "after": after, "gain": after - before}, "curves": {"reward": thin(found)}}


def conclude(results: Results) -> Evidence:
    """Each arm ends above where it began."""
    full = results.budget == "full"
    arms = (*RINGS, *RECIPES) if full else SMOKE
    checks = [at_least(f"{arm} learns", results.values(arm, "gain"), 0.3, what="mean gain in quality") for arm in RINGS]
    for arm in arms:
        if arm in RINGS:
            continue
        name = f"{arm} raises its reward"
        # two steps of a smoke run show that it runs
        settings: dict[str, Any] = {"errors": 2.0, "margin": 0.05} if full else {"margin": -10.0}
        checks.append(
            compare(name, results.values(arm, "after"), results.values(arm, "before"), kind="mechanism", **settings)
        )
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(results.arm(arm, "method") for arm in arms),
        checks=tuple(checks),
        notes=(
            f"ring: 8-step flow SDE on points of a ring, {ROUNDS} rounds of 64 samples; quality is the nearness to the middle "
            "mode of the class, from 0 to 1.",
            f"The others are the bundled recipes as they stand, {STEPS['full']} steps of 60 pictures: 8 x 8 digits from a base "
            "that is right nine times in ten. The reward is a classifier's log-probability of the digit that was asked for, in "
            "nats; judge is the share that another classifier calls right. 4 samples of each of 50 held-out prompts. Nothing is "
            "tuned, and figures of different recipes do not rank them.",
        ),
        shown=("before", "after", "gain", "judge_before", "judge_after"),
    )
