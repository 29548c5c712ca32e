"""Pref-GRPO's claim: win rates in place of scores keep a flow from hacking a reward model with a spurious slope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from guerdon.advantages.group import grpo
from guerdon.evidence.base import (
    Budget,
    Evidence,
    Results,
    Settings,
    Unit,
    at_least,
    at_most,
    compare,
    mean,
    rate_plan,
)
from guerdon.evidence.ring_flow import RADIUS, Paths, side_by_side, thin, together, train
from guerdon.metrics.prompt_suite import CRITERIA, PromptSuite, SuiteReport, judge_suite
from guerdon.objectives.loss import Loss
from guerdon.objectives.policy_gradient import policy_gradient
from guerdon.rewards.win_rate import win_rates

SLUG = "pref-grpo"
TITLE = "Pref-GRPO: pairwise preference rewards"
PAPER = (
    "Y. Wang et al. 2025, Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement "
    "Learning, arXiv 2508.20751"
)
CLAIM = (
    "Scores of a reward model differ little within a group, and normalising them makes advantages of noise, which drives "
    "reward hacking; win rates keep the ranking and stop it."
)

ARMS = ("pref", "grpo", "pref-kl")
RATES = (3e-4, 1e-3)
PROMPTS, GROUP, UPDATES = 8, 8, 2
SLOPE, MARGIN = 0.01, 0.05  # of what the reward model likes for no reason; gap below which a judge sees none
EDGE = RADIUS + 0.3  # beyond it a sample is off the data
ROUNDS: dict[Budget, int] = {"smoke": 40, "full": 150}
LAST = 10
IMAGES = 4  # of each prompt of the suite


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """In full the learning rate of each arm on two seeds of its own; then each arm on every seed."""
    rounds: Settings = {"rounds": ROUNDS[budget]}
    trials = 2 if budget == "full" else 0
    return rate_plan(ARMS, rounds, RATES, seeds, trials=trials, tuned=tuned, default=1e-3)


def tune(results: Results) -> dict[str, Settings]:
    """The learning rate with the best true quality at the end, which is the kindest choice for each arm."""
    return results.best("quality_after")


def measure_all(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """Train the runs of each arm side by side; and score a toy generator on the prompt suite."""
    found = side_by_side(units, _trained)
    for unit, result in zip(units, found, strict=True):
        if unit.arm == "pref" and unit.role == "measure":
            result["figures"]["suite_gap"] = suite_gap(unit.seed)
    return found


def reward_model(points: Tensor) -> Tensor:
    """What is trained on: upwards is good, and a little more of it far to the right."""
    return torch.sigmoid(3 * points[..., 1]) + SLOPE * points[..., 0]


def quality(points: Tensor) -> Tensor:
    """What is wanted: upwards, on the data."""
    beyond = (points.norm(dim=-1) - EDGE).clamp(min=0.0)
    return torch.sigmoid(3 * points[..., 1]) * (-(beyond.square()) / (2 * 0.5**2)).exp()


def judged(scores: Tensor, margin: float) -> Tensor:
    """Outcomes [N, G, G] of a judge that compares scores [N, G] and sees no gap up to the margin."""
    gap = scores.unsqueeze(2) - scores.unsqueeze(1)
    return (gap > margin).to(scores.dtype) + 0.5 * (gap.abs() <= margin).to(scores.dtype)


def _trained(arm: str, units: Sequence[Unit]) -> list[dict[str, Any]]:
    rounds = int(units[0].settings["rounds"])
    beta = 0.01 if arm == "pref-kl" else 0.0

    def signal(number: int, paths: Paths) -> dict[str, Tensor]:
        scores = reward_model(paths.samples)
        rewards = together(scores)
        if arm != "grpo":
            rewards = win_rates(judged(rewards, MARGIN))
        advantages = grpo(rewards, eps=1e-8)
        size = advantages.abs().view(scores.shape).mean((1, 2))
        return {
            "log/reward_model": scores.mean((1, 2)),
            "log/quality": quality(paths.samples).mean((1, 2)),
            "log/right": paths.samples[..., 0].mean((1, 2)),
            "log/size": size,
            "advantages": advantages,
        }

    def loss(logp: Tensor, paths: Paths, given: Mapping[str, Tensor]) -> Loss:
        old = together(paths.logp)
        live = torch.ones_like(old, dtype=torch.bool)
        return policy_gradient(
            logp, old, given["advantages"], live, given.get("logp_ref"), beta=beta, advantage_clip=5.0
        )

    _, curves = train(
        [unit.seed for unit in units],
        lr=[float(unit.settings["lr"]) for unit in units],
        rounds=rounds,
        updates=UPDATES,
        prompts=PROMPTS,
        group=GROUP,
        signal=signal,
        loss=loss,
        classes=2,
        reference=beta > 0,
    )
    names = ("reward_model", "quality", "right", "size")
    found = []
    for run in range(len(units)):
        history = {name: curves[name][run].tolist() for name in names}
        figures = {f"{name}_after": mean(values[-LAST:]) for name, values in history.items()}
        figures |= {f"{name}_before": mean(history[name][:1]) for name in ("reward_model", "quality")}
        found.append({"figures": figures, "curves": {name: thin(values) for name, values in history.items()}})
    return found


def suite_gap(seed: int) -> float:
    """Largest gap between a toy generator's ability in a criterion and its accuracy there, in standard errors.

    The generator gets every point of a criterion right with a probability of its own; a judge by rule looks it up.
    """
    generator = Generator().manual_seed(31 + seed)
    ability = dict(zip(CRITERIA, (0.05 + 0.9 * torch.rand(len(CRITERIA), generator=generator)).tolist(), strict=True))
    suite = PromptSuite.bundled()

    def paint(prompt: Any) -> list[int]:
        draws = torch.rand(len(prompt.points), generator=generator).tolist()
        return [
            int(draw < ability[name.partition("-")[0].strip()]) for name, draw in zip(prompt.points, draws, strict=True)
        ]

    images = [[paint(prompt) for _ in range(IMAGES)] for prompt in suite]
    report: SuiteReport = judge_suite(suite, images, lambda asked: [image for _, image in asked])
    judged_points = {
        name: sum(n for point, n in report.judged.items() if point.partition("-")[0].strip() == name)
        for name in CRITERIA
    }
    errors = {name: (p * (1 - p) / judged_points[name]) ** 0.5 for name, p in ability.items()}
    return max(abs(report.primary[name] - p) / errors[name] for name, p in ability.items())


def conclude(results: Results) -> Evidence:
    """Win rates against scores, under the same reward model."""
    arms = (results.arm("pref", "method"), results.arm("grpo", "baseline"), results.arm("pref-kl", "ablation"))
    right = {arm: results.values(arm, "right_after") for arm in ("pref", "grpo")}
    model = {arm: results.values(arm, "reward_model_after") for arm in ("pref", "grpo")}
    after = {arm: results.values(arm, "quality_after") for arm in ("pref", "grpo")}
    sizes = {arm: results.values(arm, "size_after") for arm in ("pref", "grpo")}
    checks = [
        compare(
            "size of advantages at the end, below that with scores",
            sizes["pref"],
            sizes["grpo"],
            margin=0.1,
            better="low",
            kind="mechanism",
        ),
        at_least("scores drive samples to the right", right["grpo"], 3.0, what="mean x with scores"),
        at_most("win rates do not", right["pref"], 1.5, what="mean x with win rates"),
        at_most(
            "the suite finds a generator's abilities",
            results.values("pref", "suite_gap"),
            4.0,
            what="mean over seeds of the largest gap of ten, in standard errors,",
        ),
    ]
    if results.budget == "full":
        checks += [
            at_least("true quality at the end", after["pref"], 0.3, kind="headline"),
            compare("true quality against scores", after["pref"], after["grpo"], margin=0.25),
            compare("the reward model is hacked with scores", model["grpo"], model["pref"]),
        ]
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms,
        tuple(checks),
        notes=NOTES,
        shown=("quality", "reward_model", "right", "size", "quality_after", "reward_model_after", "right_after"),
        x="round",
    )


NOTES = (
    "Points on a ring, 8-step flow SDE, 8 prompts of 8 samples a round from two of the classes, 2 updates each. The reward "
    "model is sigmoid(3 y) + 0.01 x, the true quality sigmoid(3 y) times a penalty beyond a radius of 2.3.",
    "Pref-GRPO has the same reward model as its judge, which sees no gap below 0.05. Without such a margin win rates "
    "would follow the slope as scores do: that judges see small gaps as ties is put in. pref-kl adds a divergence of "
    "weight 0.01.",
    "Learning rates tuned per arm on two other seeds by the true quality at the end, which favours arms that move little.",
    "The suite: a generator that gets each of ten criteria right with a probability of its own, 4 images of 40 prompts, "
    "judged by rule.",
)
