"""Constrained RLHF's claim: multipliers hold each reward at the point beyond which it is no longer true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from guerdon.evidence.base import Budget, Evidence, Points, Results, Role, Settings, Unit, at_least, at_most, compare
from guerdon.evidence.writers import Writers
from guerdon.weighting.lagrangian import Mode, Multipliers, mix_advantages
from guerdon.weighting.proxy_points import ProxyPointSearch

SLUG = "constrained-rlhf"
TITLE = "Constrained RLHF"
PAPER = "Confronting Reward Model Overoptimization with Constrained RLHF, 2023, arXiv 2310.04373"
CLAIM = (
    "Holding every reward of a mixture at its proxy point, by learned multipliers, beats PPO with tuned weights and with squared "
    "distances; the equality form is best, and the points can be found within one run. (Curves on DailyDialog; no table.)"
)

NAMES = ("first", "second")
POINTS = (0.45, 0.30)  # of the two rewards; beyond them a text gets worse
WIDTH = 0.35  # of the true worth, around them
ARMS = ("none", "squares", "mu", "xi", "all", "search", "squares-coins", "xi-coins")
MODES: dict[str, Mode] = {"mu": "mu", "xi": "xi", "all": "all", "xi-coins": "xi"}
STEPS: dict[Budget, int] = {"smoke": 400, "full": 1500}
SMOKE = ("none", "mu", "xi")
SEEDS = {"smoke": 2, "full": 5}

PROMPTS, GROUP, LENGTH, TOKENS, EVERY = 4, 32, 20, 8, 50
LR, PRICE, MULTIPLIER_LR = 0.02, 0.02, 0.1
BOX = (0.15, 0.7)
STEPS_PER_POINT = 120


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Every arm on every seed with the same settings; nothing is tuned."""
    arms = ARMS if budget == "full" else SMOKE
    return [Unit(arm, seed, {"steps": STEPS[budget]}) for arm in arms for seed in range(seeds)]


def scores(texts: Tensor) -> Tensor:
    """Two rewards of texts [U, P, G, T] that have a token in common, [U, P, G, 2]."""
    shares = [(texts == token).float().mean(-1) for token in range(3)]
    return torch.stack([shares[0] + 0.7 * shares[2], shares[1] + 0.7 * shares[2]], -1)


def worth(rewards: Tensor) -> Tensor:
    """The true worth of a policy by its mean rewards [..., 2]; 1 at the proxy points."""
    return 1 - ((rewards - torch.tensor(POINTS)) / WIDTH).square().sum(-1)


class _Arm:
    """What an arm makes of a batch: advantages [P, G]."""

    def __init__(self, unit: Unit) -> None:
        self.arm = unit.arm
        self.coins = torch.Generator().manual_seed(1000 + unit.seed) if unit.arm.endswith("coins") else None
        self.multipliers: Multipliers | None = None
        self.search: ProxyPointSearch | None = None
        if unit.arm in MODES:
            self.multipliers = Multipliers(POINTS, mode=MODES[unit.arm], lr=MULTIPLIER_LR, seed=unit.seed)
        elif unit.arm == "search":
            self.search = ProxyPointSearch(
                box={name: list(BOX) for name in NAMES},
                steps_per_point=STEPS_PER_POINT,
                steps=int(unit.settings["steps"]),
                lr=MULTIPLIER_LR,
                seed=unit.seed,
            )
            self.multipliers = self.search.lagrangian.multipliers

    def advantages(self, own: Tensor, divergence: Tensor) -> Tensor:
        """Args: scores [P, G, 2] and log-ratios to the reference [P, G]."""
        if self.coins is not None:  # each score becomes the probability of a 1
            own = (torch.rand(own.shape, generator=self.coins) < own).float()
        flat, task = own.flatten(0, 1), -divergence.flatten()
        if self.multipliers is None:
            points = torch.tensor(POINTS)
            paid = -(own - points).square().sum(-1) if self.arm.startswith("squares") else own.sum(-1)
            rewards = paid.flatten() + PRICE * task
            return ((rewards - rewards.mean()) / (rewards.std() + 1e-8)).view_as(divergence)
        mode: Mode = MODES.get(self.arm, "xi")
        if mode == "all":
            task = flat.sum(-1) + PRICE * task
        mixed = mix_advantages(flat, task, self.multipliers.weights.float(), mode=mode)
        if self.search is None:
            self.multipliers.step(flat)
        else:
            watched = worth(flat.mean(0)).expand(*own.shape[:2], 1)
            self.search.observe(own, NAMES, torch.full(own.shape[:2], LENGTH), watched)
        return mixed.view_as(divergence)


def measure_all(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """All units at once, from policies that write every token alike."""
    writers = Writers([unit.seed for unit in units], prompts=PROMPTS, length=LENGTH, tokens=TOKENS)
    reference = writers.tables.clone()
    arms = [_Arm(unit) for unit in units]
    curves: list[dict[str, Points]] = [{"worth": [], "first": [], "second": []} for _ in units]
    rates = torch.full((len(units),), LR)
    steps = int(units[0].settings["steps"])
    recent = torch.zeros(len(units), 2)
    for step in range(1, steps + 1):
        texts = writers.write(GROUP)
        found = scores(texts)
        recent += found.mean((1, 2))
        if step % EVERY == 0:  # the mean of the steps since the last time
            for curve, (first, second), value in zip(
                curves, (recent / EVERY).tolist(), worth(recent / EVERY), strict=True
            ):
                for name, number in (("worth", float(value)), ("first", first), ("second", second)):
                    curve[name].append((float(step), number))
            recent.zero_()
        divergence = (writers.logp(texts) - writers.logp(texts, reference)).sum(-1)
        advantages = torch.stack([arm.advantages(s, d) for arm, s, d in zip(arms, found, divergence, strict=True)])
        writers.step(writers.gradients(texts, [advantages])[0], rates)
    return [{"figures": _figures(arm, curve), "curves": curve} for arm, curve in zip(arms, curves, strict=True)]


def _figures(arm: _Arm, curve: Mapping[str, Points]) -> dict[str, float]:
    values = [value for _, value in curve["worth"]]
    end = {name: curve[name][-1][1] for name in NAMES}
    off = max(abs(end[name] / point - 1) for name, point in zip(NAMES, POINTS, strict=True))
    found = {"worth": values[-1], "worth_peak": max(values), "worth_lost": max(values) - values[-1], "off": off, **end}
    if arm.search is not None:
        found["worth_best"] = arm.search.metrics()["best"]
        found["points"] = arm.search.metrics()["points"]
    return found


def conclude(results: Results) -> Evidence:
    """Over-optimisation without constraints; with them the rewards stay where they are true."""
    full = results.budget == "full"
    names = ARMS if full else SMOKE
    plain = results.values("none", "worth")
    checks = [
        at_least(
            "without constraints the worth falls",
            results.values("none", "worth_lost"),
            0.5,
            what="worth lost since the peak",
        ),
        *(at_least(f"{arm} ends at its worth", results.values(arm, "worth"), 0.9) for arm in ("xi", "mu")),
        *(at_most(f"{arm} holds the rewards at their points", results.values(arm, "off"), 0.1) for arm in ("xi", "mu")),
    ]
    if full:
        checks += [
            at_least("the search finds good points in one run", results.values("search", "worth_best"), 0.8),
            compare("and better ones than no constraint ends at", results.values("search", "worth_best"), plain),
            compare(
                "equality against squares, where scores are 0 or 1",
                results.values("xi-coins", "worth"),
                results.values("squares-coins", "worth"),
                margin=0.1,
            ),
        ]
    roles: dict[str, Role] = {"none": "baseline", "squares": "baseline", "squares-coins": "baseline"}
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(results.arm(name, roles.get(name, "method")) for name in names),
        checks=tuple(checks),
        notes=(
            f"{PROMPTS} prompts, texts of {LENGTH} of {TOKENS} tokens; two rewards, each the share of a token of its own plus "
            f"0.7 times that of a common one. Worth: 1 - sum of ((mean reward - point) / {WIDTH}) squared, points {POINTS}.",
            f"The policy is autoregressive, {GROUP} samples a prompt, advantages normalised over the batch, Adam at {LR}, "
            f"multipliers at {MULTIPLIER_LR}. none: the sum of the rewards less {PRICE} a nat of divergence. Nothing is tuned.",
            "all (All-PPO) is our reading; no condition is on it. coins: each score is drawn as 0 or 1 with the score as its "
            f"probability. search: thresholds from [{BOX[0]}, {BOX[1]}], {STEPS_PER_POINT} steps a point; worth_best is the best "
            "point's, of one batch.",
        ),
        shown=("worth", "worth_peak", "first", "second", "off", "worth_best"),
    )
