"""A claim test whose units are measured together."""

from __future__ import annotations

from guerdon.evidence.base import Evidence, Unit, at_least

SLUG, TITLE, PAPER, CLAIM = "batched", "Batched", "Nobody 2025", "All at once."


def plan(budget, seeds, tuned=None):
    return [Unit("method", seed) for seed in range(seeds)]


def measure_all(units):
    return [{"figures": {"together": len(units), "seed": unit.seed}} for unit in units]


def conclude(results):
    arm = results.arm("method", "method")
    return Evidence(SLUG, TITLE, CLAIM, PAPER, (arm,), (at_least("together", arm.figures["together"], 2.0),))
