"""A claim test that takes no time: the method is better than the baseline by what its settings say."""

from __future__ import annotations

import os
import time
from pathlib import Path

from guerdon.evidence.base import Evidence, Unit, at_least, compare, tuning_seeds

SLUG = "toy"
TITLE = "Toy"
PAPER = "Nobody 2025"
CLAIM = "The method is better than the baseline."


def plan(budget, seeds, tuned=None):
    trials = [
        Unit(arm, seed, {"lr": lr}, "tune")
        for arm in ("method", "baseline")
        for lr in (0.1, 0.2, 0.3)
        for seed in tuning_seeds(2)
    ]
    chosen = tuned or {}
    measured = [
        Unit(arm, seed, chosen.get(arm, {"lr": 0.1})) for arm in ("method", "baseline") for seed in range(seeds)
    ]
    return trials + measured


def tune(results):
    return results.best("accuracy")


def measure(unit):
    with Path(os.environ["TOY_LOG"]).open("a") as log:
        log.write(f"{unit}\n")
    fault, _, where = os.environ.get("TOY_FAULT", "").partition(":")
    if where == f"{unit.arm}{unit.seed}":
        if fault == "raise":
            raise ZeroDivisionError("division by zero")
        if fault == "die":
            os._exit(3)
        if fault == "hang":
            time.sleep(60)
    best = 0.2 if unit.arm == "method" else 0.3
    edge = float(os.environ.get("TOY_EDGE", "0.1")) if unit.arm == "method" else 0.0
    accuracy = 0.5 + edge - abs(unit.settings["lr"] - best) + 0.001 * (unit.seed % 3)
    return {"figures": {"accuracy": accuracy}, "curves": {"accuracy": [(0, 0.0), (1, accuracy)]}}


def conclude(results):
    method, baseline = results.arm("method", "method"), results.arm("baseline", "baseline")
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        (method, baseline),
        (
            at_least("the method learns", method.figures["accuracy"], 0.4),
            compare("accuracy", method.figures["accuracy"], baseline.figures["accuracy"], margin=0.05),
        ),
        ("A toy.",),
    )
