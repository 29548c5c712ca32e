"""PRDP's claim test: its plan, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest

from guerdon.evidence import prdp, runner
from guerdon.evidence.base import Evidence, Result, Results, Unit

FIGURES = {
    "prdp-many": {"quality_before": 0.37, "quality_after": 0.8, "quality_gain": 0.43, "kl_after": 2.0},
    "ddpo-many": {"quality_before": 0.37, "quality_after": 0.25, "quality_gain": -0.12, "kl_after": 5.0},
    "prdp-few": {"quality_before": 0.37, "quality_after": 0.81, "quality_gain": 0.44, "kl_after": 2.0},
    "ddpo-few": {"quality_before": 0.37, "quality_after": 0.93, "quality_gain": 0.56, "kl_after": 10.0},
}


def concluded(change: dict[str, dict[str, float]] | None = None, budget: Any = "full") -> Evidence:
    results = [
        Result(Unit(arm, seed, {"lr": 1e-3}), FIGURES[arm] | (change or {}).get(arm, {}), {"quality": [(1.0, 0.5)]})
        for arm in prdp.ARMS
        for seed in range(3)
    ]
    return prdp.conclude(Results(results, budget))


def verdicts(evidence: Evidence) -> dict[str, bool]:
    return {check.name: check.holds for check in evidence.checks}


@pytest.mark.parametrize(("budget", "trials"), [("smoke", 0), ("full", 6)])
def test_the_plan(budget, trials):
    units = runner.checked(prdp, prdp.plan(budget, 5))
    for arm in prdp.ARMS:
        mine = [unit for unit in units if unit.arm == arm]
        assert sum(unit.role == "tune" for unit in mine) == trials
        assert [unit.seed for unit in mine if unit.role == "measure"] == [0, 1, 2, 3, 4]


def test_what_was_tuned_is_measured():
    results = [
        Result(unit, {"quality_after": float(unit.settings["lr"]) * (-1 if unit.arm == "ddpo-few" else 1)})
        for unit in prdp.plan("full", 1)
        if unit.role == "tune"
    ]
    units = prdp.plan("full", 1, prdp.tune(Results(results, "full")))
    rates = {unit.arm: unit.settings["lr"] for unit in units if unit.role == "measure"}
    assert rates == {"prdp-many": 3e-3, "ddpo-many": 3e-3, "prdp-few": 3e-3, "ddpo-few": 3e-4}


def test_all_well():
    evidence = concluded()
    assert evidence.holds
    assert evidence.headline == "shown"
    assert Evidence.from_json(evidence.to_json()).checks == evidence.checks


@pytest.mark.parametrize(
    ("arm", "figure", "value", "name"),
    [
        ("prdp-many", "quality_gain", 0.05, "prdp-many learns"),
        ("prdp-few", "quality_gain", 0.05, "prdp-few learns"),
        ("prdp-few", "quality_after", 0.95, "what prompts add changes little"),
        ("ddpo-many", "quality_after", 0.46, "DDPO with many prompts"),
        ("ddpo-many", "quality_gain", 0.01, "DDPO with many prompts ends below its start"),
        ("ddpo-few", "kl_after", 1.0, "divergence with few prompts"),
    ],
)
def test_each_condition_can_fail(arm, figure, value, name):
    assert verdicts(concluded())[name]
    changed = concluded({arm: {figure: value}})
    assert [found for found, holds in verdicts(changed).items() if not holds] == [name]
    mechanism = next(check.kind for check in changed.checks if check.name == name) == "mechanism"
    assert changed.holds != mechanism


def test_bounds_on_quality_can_fail():
    low = concluded({"prdp-many": {"quality_after": 0.69}, "prdp-few": {"quality_after": 0.74}})
    assert [name for name, holds in verdicts(low).items() if not holds] == [
        "PRDP with many prompts",
        "PRDP with few prompts",
    ]
    near = concluded({"ddpo-many": {"quality_after": 0.6}})
    assert not verdicts(near)["quality with many prompts"]


def test_a_short_run_is_not_compared():
    evidence = concluded({"ddpo-many": {"quality_after": 0.9}}, "smoke")
    assert evidence.holds
    assert evidence.headline == ""


@pytest.mark.slow
def test_a_smoke_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    evidence = runner.run(prdp, "smoke", jobs=1, progress=False)
    assert evidence.holds
    assert evidence.headline == ""
