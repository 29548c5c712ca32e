"""TGDPO's claim: a guide's token rewards make DPO learn faster and better from the same pairs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from guerdon.evidence.base import Budget, Evidence, Results, Settings, Unit, at_least, compare
from guerdon.evidence.topics_task import base_policy, guide_policy, topics_run
from guerdon.language.tasks import topics
from guerdon.objectives.dpo import dpo
from guerdon.objectives.tgdpo import tgdpo

SLUG = "tgdpo"
TITLE = "TGDPO"
PAPER = (
    "TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization, 2025, arXiv 2506.14574"
)
CLAIM = (
    "Weighing the tokens of DPO by the rewards that an already trained model gives them beats DPO by up to 7.5 points on "
    "MT-Bench, 6.2 on AlpacaEval 2 and 4.3 on Arena-Hard, and converges sooner."
)
BETA, LR = 0.1, 5e-4


LENGTH = 10


class Arm(NamedTuple):
    """A loss, for how long it is trained by what part of the full length, and whether the length of answers is fixed."""

    alpha: float
    part: str
    plain_end: bool = True
    fixed: bool = True
    role: Any = "method"


ARMS = {
    "dpo-early": Arm(0.0, "early", role="baseline"),
    "early": Arm(2.0, "early"),
    "early-half": Arm(0.5, "early", role="ablation"),
    "dpo": Arm(0.0, "whole", role="baseline"),
    "tgdpo": Arm(2.0, "whole"),
    "dpo-free": Arm(0.0, "whole", fixed=False, role="ablation"),
    "free": Arm(2.0, "whole", fixed=False, role="ablation"),
    "free-end-weighted": Arm(2.0, "whole", plain_end=False, fixed=False, role="ablation"),
}
STEPS: dict[Budget, dict[str, int]] = {"smoke": {"early": 20, "whole": 20}, "full": {"early": 40, "whole": 150}}
SMOKE = ("dpo-early", "early")
SIZES: dict[Budget, Settings] = {
    "smoke": {"batch_size": 32, "prompts": 200, "base_steps": 150, "guide_steps": 40},
    "full": {"batch_size": 64, "prompts": 400, "base_steps": 300, "guide_steps": 150},
}


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Every arm on every seed, at the guide's learning rate; nothing is tuned."""
    names = SMOKE if budget == "smoke" else tuple(ARMS)
    settings: dict[str, Settings] = {}
    for name in names:
        settings[name] = {**SIZES[budget], "steps": STEPS[budget][ARMS[name].part], "lr": LR}
        settings[name] |= {"length": LENGTH} if ARMS[name].fixed else {}
    return [Unit(name, seed, settings[name]) for name in names for seed in range(seeds)]


def measure(unit: Unit) -> dict[str, Any]:
    """Train one arm from the supervised start, beside a guide that DPO made on the same pairs."""
    arm = ARMS[unit.arm]
    settings: dict[str, Any] = dict(unit.settings)
    if not arm.alpha:
        settings.pop("guide_steps")
        return topics_run(unit.seed, partial(dpo, beta=BETA), **settings)
    objective = partial(tgdpo, beta=BETA, alpha=arm.alpha, plain_end=arm.plain_end)
    found = topics_run(unit.seed, objective, guide_lr=LR, **settings)
    named: dict[str, Any] = {name: settings.get(name) for name in ("base_steps", "guide_steps", "length")}
    found["figures"]["token_gap"] = token_gap(unit.seed, **named)
    return found


@torch.no_grad()
def token_gap(seed: int, base_steps: int, guide_steps: int, length: int | None, prompts: int = 100) -> float:
    """Mean reward of a good letter less that of another under the guide, in nats, over samples of the start."""
    base = base_policy(seed, steps=base_steps, length=length)
    guide = guide_policy(seed, base_steps=base_steps, steps=guide_steps, lr=LR, length=length)
    rows = topics.held_out_rows(prompts)
    rollout = base.sample([row["prompt"] for row in rows], 4, list(range(prompts)))
    rewards = BETA * (guide.log_prob(rollout, entropy=False).logp - rollout.logp_old)
    good, poor = [], []
    for row, texts, of_prompt in zip(rows, rollout.samples, rewards.tolist(), strict=True):
        for text, of_sample in zip(texts, of_prompt, strict=True):
            for letter, reward in zip(text, of_sample, strict=False):  # one letter a token; the end is left out
                (good if letter in topics.GOOD[row["topic"]] else poor).append(reward)
    return sum(good) / len(good) - sum(poor) / len(poor)


def conclude(results: Results) -> Evidence:
    """The guide tells tokens apart and learning is faster: mechanism. Better at the end: the headline."""
    full = results.budget == "full"
    names = tuple(ARMS) if full else SMOKE
    arms = {name: results.arm(name, ARMS[name].role) for name in names}

    def figures(name: str, figure: str = "quality") -> list[float]:
        return arms[name].figures[figure]

    gap = at_least(
        "the guide rewards good letters more than others",
        figures("early", "token_gap"),
        BETA * (0.5 if full else 0.05),
        what="mean difference, nats",
    )
    faster = compare(
        "higher true quality than DPO early on",
        figures("early"),
        figures("dpo-early"),
        margin=0.02 if full else 0.0,
        kind="mechanism",
    )
    checks = [gap, faster]
    if full:
        checks += [
            compare(
                "a larger alpha is no slower", figures("early"), figures("early-half"), margin=-0.005, kind="mechanism"
            ),
            compare("higher true quality than DPO at the end", figures("tgdpo"), figures("dpo"), margin=0.02),
            compare(
                "win rate against the start, against DPO's",
                figures("tgdpo", "win_rate"),
                figures("dpo", "win_rate"),
                errors=2.0,
            ),
        ]
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(arms.values()),
        checks=tuple(checks),
        notes=(
            f"Topics task: 0.1 M weights, 3000 pairs of answers of {LENGTH} letters labelled by sigmoid(6 x difference in "
            f"quality). The guide is the start after {SIZES[results.budget]['guide_steps']} steps of DPO at beta {BETA} and "
            f"learning rate {LR}, which all arms have.",
            "early: fewer steps, alpha 2; early-half: alpha 0.5. free: answers of 2 to 12 letters that end by themselves; "
            "free-end-weighted: with the last token weighted like the others. No condition is on these three.",
        ),
        shown=("quality", "win_rate", "length", "accuracy", "token_gap", "seconds"),
    )
