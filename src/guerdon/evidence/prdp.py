"""PRDP's claim: with so many prompts that each is seen once, it goes on learning where DDPO does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from guerdon.advantages.prompt_tracker import PromptTracker
from guerdon.evidence.base import (
    Budget,
    Check,
    Evidence,
    Results,
    Settings,
    Unit,
    at_least,
    at_most,
    compare,
    mean,
    rate_plan,
    sd,
)
from guerdon.evidence.ring_flow import Paths, centre, side_by_side, thin, together, train
from guerdon.objectives.loss import Loss
from guerdon.objectives.policy_gradient import policy_gradient
from guerdon.objectives.reward_difference import prdp

SLUG = "prdp"
TITLE = "Proximal reward difference prediction"
PAPER = (
    "F. Deng et al. 2024, PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion "
    "Models, arXiv 2402.08714"
)
CLAIM = (
    "Trained on more than 100 000 prompts it stays stable where DDPO collapses: HPSv2 of 0.3175 against 0.2464 (0.2685 "
    "before training)."
)

ARMS = ("prdp-many", "ddpo-many", "prdp-few", "ddpo-few")
RATES = (3e-4, 1e-3, 3e-3)
PROMPTS, GROUP, UPDATES = 32, 2, 4
BETA, CLIP = 0.1, 0.2
OFFSET = 10.0  # spread of what a prompt adds to its rewards, where there are many
ROUNDS: dict[Budget, int] = {"smoke": 15, "full": 60}
LAST = 5  # rounds that the figures at the end are means of


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """In full the learning rate of each arm on two seeds of its own; then each arm on every seed."""
    rounds: Settings = {"rounds": ROUNDS[budget]}
    trials = 2 if budget == "full" else 0
    return rate_plan(ARMS, rounds, RATES, seeds, trials=trials, tuned=tuned, default=1e-3)


def tune(results: Results) -> dict[str, Settings]:
    """The learning rate with the best quality at the end."""
    return results.best("quality_after")


def measure_all(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """Train the runs of each arm side by side."""
    return side_by_side(units, _trained)


def quality(paths: Paths) -> Tensor:
    """How near a sample is to the middle mode of its class, in (0, 1]: [R, P, G]."""
    distance = (paths.samples - centre(paths.classes).unsqueeze(2)).square().sum(-1)
    return (-distance / (2 * 0.4**2)).exp()


def _trained(arm: str, units: Sequence[Unit]) -> list[dict[str, Any]]:
    method, _, prompts = arm.partition("-")
    rounds = int(units[0].settings["rounds"])
    offsets = [Generator().manual_seed(17 + unit.seed) for unit in units]
    # DDPO's own statistics: of a prompt that was seen 16 times, and of the batch before that
    trackers = [PromptTracker() for _ in units]

    def signal(number: int, paths: Paths) -> dict[str, Tensor]:
        good = quality(paths)
        rewards = good
        seen = paths.classes
        if prompts == "many":
            # every prompt is new: nobody has seen it before, nor what it adds to its rewards
            rewards = good + OFFSET * torch.stack([torch.randn(PROMPTS, 1, generator=g) for g in offsets])
            seen = (number * PROMPTS + torch.arange(PROMPTS)).expand_as(seen)
        given = {"log/quality": good.mean((1, 2)), "rewards": together(rewards)}
        if method == "ddpo":
            advantages = []
            for tracker, r, indices in zip(trackers, rewards, seen.tolist(), strict=True):
                advantages.append(tracker(r, indices))
                tracker.observe(r, indices)
            given["advantages"] = torch.cat(advantages)
        return given

    def loss(logp: Tensor, paths: Paths, given: Mapping[str, Tensor]) -> Loss:
        old = together(paths.logp)
        live = torch.ones_like(old, dtype=torch.bool)
        if method == "prdp":
            return prdp(logp, old, given["logp_ref"], given["rewards"], live, beta=BETA, clip=CLIP)
        return policy_gradient(logp, old, given["advantages"], live, advantage_clip=5.0)

    _, curves = train(
        [unit.seed for unit in units],
        lr=[float(unit.settings["lr"]) for unit in units],
        rounds=rounds,
        updates=UPDATES,
        prompts=PROMPTS,
        group=GROUP,
        signal=signal,
        loss=loss,
        reference=True,
    )
    return [
        {
            "figures": {
                "quality_before": good[0],
                "quality_after": mean(good[-LAST:]),
                "quality_gain": mean(good[-LAST:]) - good[0],
                "kl_after": mean(kl[-LAST:]),
            },
            "curves": {"quality": thin(good), "kl": thin(kl)},
        }
        for good, kl in zip(curves["quality"].tolist(), curves["kl"].tolist(), strict=True)
    ]


def conclude(results: Results) -> Evidence:
    """PRDP with many prompts and with few, against DDPO with each."""
    arms = {arm: results.arm(arm, "method" if arm.startswith("prdp") else "baseline") for arm in ARMS}
    after = {arm: results.values(arm, "quality_after") for arm in ARMS}
    rises = [
        at_least(f"{arm} learns", results.values(arm, "quality_gain"), bound, what="mean gain in quality")
        for arm, bound in (("prdp-many", 0.1), ("prdp-few", 0.1))
    ]
    gaps = [abs(many - few) for many, few in zip(after["prdp-many"], after["prdp-few"], strict=True)]
    checks: list[Check] = [*rises, at_most("what prompts add changes little", gaps, 0.1, what="mean gap, many to few")]
    if results.budget == "full":
        kl = {arm: results.values(arm, "kl_after") for arm in ARMS}
        checks += [
            at_least(
                "PRDP with many prompts", after["prdp-many"], 0.7, kind="headline", what="mean quality at the end"
            ),
            at_most(
                "DDPO with many prompts", after["ddpo-many"], 0.45, kind="headline", what="mean quality at the end"
            ),
            at_least("PRDP with few prompts", after["prdp-few"], 0.75, kind="headline", what="mean quality at the end"),
            compare("divergence with few prompts", kl["prdp-few"], kl["ddpo-few"], better="low"),
            compare("quality with many prompts", after["prdp-many"], after["ddpo-many"], margin=0.25, errors=2.0),
            Check(
                "DDPO with many prompts ends below its start",
                "mean gain in quality < 0",
                mean(results.values("ddpo-many", "quality_gain")) < 0,
                "headline",
                {
                    "method": mean(results.values("ddpo-many", "quality_gain")),
                    "spread": sd(results.values("ddpo-many", "quality_gain")),
                },
            ),
        ]
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        tuple(arms.values()),
        tuple(checks),
        notes=NOTES,
        shown=("quality", "kl", "quality_before", "quality_after", "kl_after"),
        x="round",
    )


NOTES = (
    "Points on a ring, 8-step flow SDE, 32 prompts of 2 samples a round, 4 updates each. The reward is the nearness to "
    "the middle mode of the class; with many prompts each adds a number from N(0, 100) of its own, and is seen once.",
    "DDPO normalises by the last 16 rewards of a prompt, and by the batch for a prompt that was seen less often, as its "
    "code does; with many prompts that is always the batch. A baseline from the group of two would be another method.",
    "Learning rates tuned per arm on two other seeds, by the quality at the end, which no arm sees with many prompts.",
)
