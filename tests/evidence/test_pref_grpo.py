"""Pref-GRPO's claim test: its plan, its figures on known cases, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guerdon.evidence import pref_grpo, runner
from guerdon.evidence.base import Evidence, Result, Results, Unit

FIGURES = {
    "pref": {"quality_after": 0.5, "reward_model_after": 1.0, "right_after": 1.0, "size_after": 0.0, "suite_gap": 2.0},
    "grpo": {"quality_after": 0.0, "reward_model_after": 1.4, "right_after": 40.0, "size_after": 0.8},
    "pref-kl": {"quality_after": 0.9, "reward_model_after": 1.0, "right_after": 0.3, "size_after": 0.0},
}


def concluded(change: dict[str, dict[str, float]] | None = None, budget: Any = "full") -> Evidence:
    results = [
        Result(Unit(arm, seed, {"lr": 1e-3}), FIGURES[arm] | (change or {}).get(arm, {}), {"quality": [(1.0, 0.5)]})
        for arm in pref_grpo.ARMS
        for seed in range(3)
    ]
    return pref_grpo.conclude(Results(results, budget))


def verdicts(evidence: Evidence) -> dict[str, bool]:
    return {check.name: check.holds for check in evidence.checks}


@pytest.mark.parametrize(("budget", "trials"), [("smoke", 0), ("full", 4)])
def test_the_plan(budget, trials):
    units = runner.checked(pref_grpo, pref_grpo.plan(budget, 5))
    for arm in pref_grpo.ARMS:
        mine = [unit for unit in units if unit.arm == arm]
        assert sum(unit.role == "tune" for unit in mine) == trials
        assert [unit.seed for unit in mine if unit.role == "measure"] == [0, 1, 2, 3, 4]


def test_what_was_tuned_is_measured():
    results = [
        Result(unit, {"quality_after": float(unit.settings["lr"]) * (-1 if unit.arm == "grpo" else 1)})
        for unit in pref_grpo.plan("full", 1)
        if unit.role == "tune"
    ]
    units = pref_grpo.plan("full", 1, pref_grpo.tune(Results(results, "full")))
    rates = {unit.arm: unit.settings["lr"] for unit in units if unit.role == "measure"}
    assert rates == {"pref": 1e-3, "grpo": 3e-4, "pref-kl": 1e-3}


def test_all_well():
    evidence = concluded()
    assert evidence.holds
    assert evidence.headline == "shown"
    assert Evidence.from_json(evidence.to_json()).checks == evidence.checks


@pytest.mark.parametrize(
    ("arm", "figure", "value", "name"),
    [
        ("pref", "size_after", 0.75, "size of advantages at the end, below that with scores"),
        ("grpo", "right_after", 2.0, "scores drive samples to the right"),
        ("pref", "right_after", 1.6, "win rates do not"),
        ("pref", "suite_gap", 4.5, "the suite finds a generator's abilities"),
        ("pref", "quality_after", 0.29, "true quality at the end"),
        ("grpo", "quality_after", 0.3, "true quality against scores"),
        ("grpo", "reward_model_after", 0.99, "the reward model is hacked with scores"),
    ],
)
def test_each_condition_can_fail(arm, figure, value, name):
    assert verdicts(concluded())[name]
    changed = concluded({arm: {figure: value}})
    assert [found for found, holds in verdicts(changed).items() if not holds] == [name]
    mechanism = next(check.kind for check in changed.checks if check.name == name) == "mechanism"
    assert changed.holds != mechanism


def test_a_short_run_is_not_compared():
    evidence = concluded({"pref": {"quality_after": 0.0}}, "smoke")
    assert evidence.holds
    assert evidence.headline == ""


def test_a_margin_makes_ties():
    outcomes = pref_grpo.judged(torch.tensor([[1.0, 1.04, 2.0]]), 0.05)
    assert outcomes.tolist() == [[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 1.0, 0.5]]]


def test_what_is_liked_and_what_is_wanted():
    near, far = torch.tensor([0.0, 2.0]), torch.tensor([30.0, 2.0])
    assert pref_grpo.reward_model(far) > pref_grpo.reward_model(near)
    assert pref_grpo.quality(near) > 0.99
    assert pref_grpo.quality(far) < 1e-6


def test_the_suite_is_as_far_off_as_chance_makes_it():
    gaps = [pref_grpo.suite_gap(seed) for seed in range(5)]
    assert len(set(gaps)) == 5
    assert 0.5 < sum(gaps) / 5 < 3.0


@pytest.mark.slow
def test_a_smoke_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    evidence = runner.run(pref_grpo, "smoke", jobs=1, progress=False)
    assert evidence.holds
    assert evidence.headline == ""
