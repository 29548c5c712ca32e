"""Quark Medical Alignment's claim, by our reading of it: frozen reference statistics and three factors balance rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from guerdon.advantages.group import grpo, normalise_then_sum
from guerdon.evidence.base import Budget, Evidence, Points, Results, Role, Settings, Unit, at_least, at_most, compare
from guerdon.evidence.writers import Writers
from guerdon.shaping.reference_frozen import ReferenceFrozen
from guerdon.weighting.tri_factor import TriFactor

SLUG = "quark-medical"
TITLE = "Quark medical alignment"
PAPER = "Quark Medical Alignment, 2026, arXiv 2602.11661"
CLAIM = (
    "Scores normalised by the frozen statistics of the reference policy, and weighed by weakness, risk and redundancy, are "
    "balanced where a sum of scores lets the loud ones win. (No single figure; the formulas are our reading.)"
)

PLAIN = ("raw-sum", "group-z", "frozen")
FACTORS: dict[str, dict[str, Any]] = {
    "three-factors": {},
    "no-weakness": {"alpha": 0.0},
    "no-risk": {"kappa": 0.0, "severity": {}},
    "no-redundancy": {"lam": 0.0},
    # cases made for one factor: a reference that is unsafe half of the time, and helpfulness measured three times
    "unsafe-start": {},
    "unsafe-start-no-risk": {"kappa": 0.0, "severity": {}},
    "copies": {"alpha": 0.0},
    "copies-no-redundancy": {"alpha": 0.0, "lam": 0.0},
}
ARMS = (*PLAIN, *FACTORS)
SMOKE = (*PLAIN, "three-factors")
STEPS = 400
SEEDS = {"smoke": 2, "full": 5}

PROMPTS, GROUP, LENGTH, TOKENS, TESTED, EVERY = 8, 16, 12, 10, 64, 20
HELPFUL, FORMAT, UNSAFE = (4, 5, 6), 8, 9
OTHERS = (0, 1, 2, 3, 7)  # what targets are drawn from
LR = 0.03
NAMES = ("correct", "helpful", "helpful_again", "safe", "format")
TARGETS = {"correct": 4.0, "helpful": 2.0, "helpful_again": 2.0, "safe": 1.0, "format": 2.0}
SETTINGS: dict[str, Any] = {"severity": {"safe": 2.0}, "floors": {"safe": 0.05}, "target": TARGETS}


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Every arm on every seed with the same settings; nothing is tuned."""
    return [Unit(arm, seed, {}) for arm in (ARMS if budget == "full" else SMOKE) for seed in range(seeds)]


def names(arm: str) -> tuple[str, ...]:
    """The components that an arm is paid by."""
    return (*NAMES, "helpful_third") if arm.startswith("copies") else NAMES


def scores(texts: Tensor, targets: Tensor, arm: str, draw: torch.Generator) -> Tensor:
    """Raw scores [P, G, K] of very different scales, of texts [P, G, T]."""

    def share(*tokens: int) -> Tensor:
        return torch.isin(texts, torch.tensor(tokens)).float().mean(-1)

    unsafe = share(UNSAFE)
    helpful = share(*HELPFUL) + (1.0 if arm.startswith("unsafe") else 0.5) * unsafe
    again = [20 * (helpful + 0.1 * torch.randn(helpful.shape, generator=draw)) for _ in names(arm)[4:]]
    right = (texts == targets).float().mean(-1)
    first = (texts[..., 0] == FORMAT).float()
    return torch.stack([right, 20 * helpful, again[0], 0.1 * (1 - 3 * unsafe), first, *again[1:]], -1)


class _Arm:
    """What an arm makes of scores: advantages [P, G]."""

    def __init__(self, arm: str, calibration: Tensor) -> None:
        self.arm, self.names = arm, names(arm)
        self.frozen = [ReferenceFrozen() for _ in self.names]
        for stage, own in zip(self.frozen, calibration.flatten(0, 1).unbind(-1), strict=True):
            stage.calibrate(own)
        self.factors: TriFactor | None = None
        if arm in FACTORS:
            target = {name: TARGETS.get(name, 2.0) for name in self.names}
            self.factors = TriFactor(**{**SETTINGS, "target": target, **FACTORS[arm]})

    def advantages(self, raw: Tensor) -> Tensor:
        if self.arm == "raw-sum":
            return grpo(raw.sum(-1))
        if self.arm == "group-z":
            return normalise_then_sum(raw, raw.new_ones(raw.shape[-1]))
        z = torch.stack([stage(own) for stage, own in zip(self.frozen, raw.unbind(-1), strict=True)], -1)
        if self.factors is None:
            return grpo(z.sum(-1))
        rewards = self.factors(z, self.names, raw).rewards
        self.factors.observe(z, self.names, raw)
        return grpo(rewards)


def measure_all(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """All units at once."""
    writers = Writers([unit.seed for unit in units], prompts=PROMPTS, length=LENGTH, tokens=TOKENS)
    targets = torch.stack(
        [torch.tensor(OTHERS)[torch.randint(len(OTHERS), (PROMPTS, 1, LENGTH), generator=d)] for d in writers.draws]
    )
    for table, unit in zip(writers.tables, units, strict=True):
        if unit.arm.startswith("unsafe"):
            table[:, :LENGTH, UNSAFE] = torch.tensor(float(TOKENS - 1)).log()  # every second token
    draws = [torch.Generator().manual_seed(1000 + unit.seed) for unit in units]

    def score(texts: Tensor) -> list[Tensor]:
        return [scores(*own[:2], own[2].arm, own[3]) for own in zip(texts, targets, units, draws, strict=True)]

    arms = [_Arm(unit.arm, own) for unit, own in zip(units, score(writers.write(GROUP)), strict=True)]
    rates = torch.full((len(units),), LR)
    curves: list[dict[str, Points]] = [{"correct": [], "helpful": [], "unsafe": [], "format": []} for _ in units]

    def test(step: int) -> None:
        texts = writers.write(TESTED)
        found = {
            "correct": (texts == targets).float(),
            "helpful": torch.isin(texts, torch.tensor(HELPFUL)).float(),
            "unsafe": (texts == UNSAFE).float(),
            "format": (texts[..., :1] == FORMAT).float(),
        }
        for name, values in found.items():
            for curve, value in zip(curves, values.mean((1, 2, 3)).tolist(), strict=True):
                curve[name].append((float(step), value))

    for step in range(STEPS):
        if step % EVERY == 0:
            test(step)
        texts = writers.write(GROUP)
        advantages = [arm.advantages(raw) for arm, raw in zip(arms, score(texts), strict=True)]
        writers.step(writers.gradients(texts, [torch.stack(advantages)])[0], rates)
    test(STEPS)
    return [{"figures": {n: points[-1][1] for n, points in curve.items()}, "curves": curve} for curve in curves]


def conclude(results: Results) -> Evidence:
    """The whole against sums; then each factor where it has something to do."""
    full = results.budget == "full"
    arms = ARMS if full else SMOKE
    own = {name: results.values("three-factors", name) for name in ("correct", "format", "unsafe")}
    checks = [
        compare(f"more correct than {arm}", own["correct"], results.values(arm, "correct"), margin=0.2)
        for arm in ("raw-sum", "group-z")
    ]
    checks += [
        at_least("the format is kept", own["format"], 0.9, what="mean"),
        at_most("and nothing unsafe is written", own["unsafe"], 0.01, what="mean"),
    ]
    if full:
        checks += [
            compare(
                "the risk factor, after an unsafe start",
                results.values("unsafe-start", "unsafe"),
                results.values("unsafe-start-no-risk", "unsafe"),
                better="low",
                errors=2.0,
                kind="mechanism",
            ),
            compare(
                "the redundancy factor, with three copies of a score",
                results.values("copies", "correct"),
                results.values("copies-no-redundancy", "correct"),
                errors=2.0,
                kind="mechanism",
            ),
        ]
    roles: dict[str, Role] = {**dict.fromkeys(PLAIN, "baseline"), "three-factors": "method"}
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(results.arm(arm, roles.get(arm, "ablation")) for arm in arms),
        checks=tuple(checks),
        notes=(
            f"{PROMPTS} prompts, texts of {LENGTH} of {TOKENS} tokens. Scores: the share of hidden targets (x 1); of three "
            "helpful tokens, plus half of the unsafe one (x 20); the same again with noise of 0.1; safety, 1 - 3 times the "
            "share of the unsafe token (x 0.1); one token in the first place (x 1).",
            f"The policy is autoregressive, GRPO with {GROUP} samples a prompt, Adam at {LR}, {STEPS} steps; nothing is tuned. "
            "Targets 4, 2, 2, 1 and 2 reference deviations; safety has severity 2 and a floor of 0.05.",
            "unsafe-start: the reference writes the unsafe token half of the time, and it counts as fully helpful. copies: "
            "helpfulness is measured three times; without the weakness factor, which would do the same work.",
        ),
        shown=("correct", "helpful", "unsafe", "format"),
    )
