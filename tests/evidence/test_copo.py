"""COPO's claim test: its plan, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest

from guerdon.evidence import copo, runner
from guerdon.evidence.base import Evidence, Result, Results, Unit

GOOD = {
    "grpo": {
        "learning_least": 0.4,
        "learning_off_mixed": 0.0,
        "learning": 0.5,
        "greedy_after": 0.6,
        "sampled_after": 0.3,
    },
    "copo": {
        "learning_least": 1.0,
        "learning_off_mixed": 0.5,
        "learning": 1.0,
        "greedy_after": 0.7,
        "sampled_after": 0.4,
    },
    "copo-soft": {
        "learning_least": 0.8,
        "learning_off_mixed": 0.3,
        "learning": 0.8,
        "greedy_after": 0.6,
        "sampled_after": 0.35,
    },
}


def concluded(change: dict[str, dict[str, float]] | None = None, budget: Any = "full") -> Evidence:
    results = []
    for arm, figures in GOOD.items():
        changed = {"sampled_gain": 0.1} | figures | (change or {}).get(arm, {})
        for seed in range(3):
            shifted = {name: value + (0.001 * seed if "after" in name else 0.0) for name, value in changed.items()}
            curves = {
                "sampled": [(0.0, 0.1), (50.0, shifted["sampled_after"])],
                "learning": [(5.5, changed["learning"])],
            }
            results.append(Result(Unit(arm, seed, {"lr": 1e-4}), shifted, curves))
    return copo.conclude(Results(results, budget))


def verdicts(evidence: Evidence) -> dict[str, bool]:
    return {check.name: check.holds for check in evidence.checks}


@pytest.mark.parametrize(("budget", "trials"), [("smoke", 0), ("full", 3)])
def test_the_plan(budget, trials):
    units = runner.checked(copo, copo.plan(budget, 5))
    for arm in copo.ARMS:
        mine = [unit for unit in units if unit.arm == arm]
        assert sum(unit.role == "tune" for unit in mine) == trials
        assert [unit.seed for unit in mine if unit.role == "measure"] == [0, 1, 2, 3, 4]


def test_what_was_tuned_is_measured():
    results = [
        Result(unit, {"sampled_after": unit.settings["lr"] if unit.arm == "grpo" else -unit.settings["lr"]})  # type: ignore
        for unit in copo.plan("full", 1)
        if unit.role == "tune"
    ]
    units = copo.plan("full", 1, copo.tune(Results(results, "full")))
    rates = {unit.arm: unit.settings["lr"] for unit in units if unit.role == "measure"}
    assert rates == {"grpo": 3e-4, "copo": 3e-5, "copo-soft": 3e-5}
    assert {unit.settings["steps"] for unit in units} == {50}


def test_all_well():
    evidence = concluded()
    assert evidence.holds
    assert evidence.headline == "shown"
    assert Evidence.from_json(evidence.to_json()).checks == evidence.checks


def test_a_sample_without_a_gradient_breaks_the_mechanism():
    assert not concluded({"copo": {"learning_least": 0.999}}).holds
    assert not concluded({"copo": {"learning_least": float("nan")}}).holds
    assert not concluded({"grpo": {"learning_off_mixed": 0.01}}).holds


def test_a_method_that_is_no_better_is_not_shown():
    evidence = concluded({"copo": {"sampled_after": 0.29, "greedy_after": 0.59}})
    assert evidence.holds
    assert evidence.headline == "not shown at this scale"
    found = verdicts(evidence)
    assert not found["accuracy, sampled"]
    assert not found["accuracy, greedy"]
    assert found["COPO is not far below GRPO, greedy"]
    assert found["COPO learns, sampled"]


@pytest.mark.parametrize(
    ("arm", "figure", "value", "name"),
    [
        ("copo", "greedy_after", 0.5, "COPO is not far below GRPO, greedy"),
        ("copo", "sampled_gain", 0.04, "COPO learns, sampled"),
        ("copo-soft", "sampled_after", 0.2, "mode soft is not below GRPO, sampled"),
    ],
)
def test_each_condition_can_fail(arm, figure, value, name):
    assert verdicts(concluded())[name]
    assert not verdicts(concluded({arm: {figure: value}}))[name]


def test_a_short_run_is_not_compared():
    evidence = concluded({"copo": {"sampled_after": 0.0}}, "smoke")
    assert evidence.holds
    assert evidence.headline == ""


@pytest.mark.slow
def test_a_smoke_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    evidence = runner.run(copo, "smoke", jobs=1, progress=False)
    assert evidence.holds
    assert evidence.arms[1].figures["learning"][0] < 0.9
