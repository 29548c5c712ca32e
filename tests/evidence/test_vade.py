"""VADE's claim test: its plan, its bandit, and verdicts that follow from the figures."""

from __future__ import annotations

import math
from typing import Any

import pytest

from guerdon.evidence import runner
from guerdon.evidence import vade as claim
from guerdon.evidence.base import Evidence, Result, Results, Unit

MIXED = {"bandit-vade": 0.8, "bandit-fast": 0.7, "bandit-undecayed": 0.85, "bandit-uniform": 0.35}
GOOD: dict[str, dict[str, float]] = {
    "vade": {"mixed_groups": 0.4, "sampled_after": 0.35, "rollouts_needed": 2e4, "rollouts": 6e4},
    "uniform": {"mixed_groups": 0.2, "sampled_after": 0.25, "rollouts_needed": 4e4, "rollouts": 6e4},
    "filtering": {"mixed_groups": 1.0, "sampled_after": 0.25, "rollouts_needed": 5e4, "rollouts": 9e4},
}


def concluded(changes: dict[str, dict[str, float]] | None = None, budget: Any = "full") -> Evidence:
    results = []
    for arm, share in MIXED.items():
        error = 0.09 if arm == "bandit-vade" else 0.15
        GOOD[arm] = {"mixed_last_still": share, "mixed_last_moving": share, "error_last_moving": error}
    for arm, figures in GOOD.items():
        if budget == "full" or arm in MIXED:
            results += [Result(Unit(arm, seed), figures | (changes or {}).get(arm, {})) for seed in range(3)]
    return claim.conclude(Results(results, budget))


def failing(evidence: Evidence) -> list[str]:
    return [check.name for check in evidence.checks if not check.holds]


@pytest.mark.parametrize(("budget", "trials"), [("smoke", 0), ("full", 3)])
def test_the_plan(budget, trials):
    units = runner.checked(claim, claim.plan(budget, 5))
    for arm in (*claim.BANDITS, *(claim.TRAINED if budget == "full" else ())):
        mine = [unit for unit in units if unit.arm == arm]
        assert sum(unit.role == "tune" for unit in mine) == (trials if arm in claim.TRAINED else 0)
        assert [unit.seed for unit in mine if unit.role == "measure"] == [0, 1, 2, 3, 4]
    assert {unit.arm for unit in units} == {*claim.BANDITS, *(claim.TRAINED if budget == "full" else ())}


def test_what_was_tuned_is_measured_at_full_length():
    trials = [unit for unit in claim.plan("full", 1) if unit.role == "tune"]
    found = claim.tune(Results([Result(u, {"sampled_after": float(u.settings["lr"])}) for u in trials], "full"))
    units = [u for u in claim.plan("full", 1, found) if u.role == "measure" and u.arm in claim.TRAINED]
    assert {(u.arm, u.settings["lr"], u.settings["steps"]) for u in units} == {
        ("vade", 6e-4, 250),
        ("uniform", 6e-4, 250),
        ("filtering", 6e-4, 60),
    }
    assert claim.tune(Results([], "smoke")) == {}


def test_all_well():
    evidence = concluded()
    assert (failing(evidence), evidence.holds, evidence.headline) == ([], True, "shown")
    assert not concluded(budget="smoke").headline


@pytest.mark.parametrize(
    ("arm", "figure", "value", "check"),
    [
        ("bandit-vade", "mixed_last_still", 0.62, "bandit: more mixed groups"),
        ("bandit-vade", "error_last_moving", 0.12, "bandit that moves: decay keeps the estimate near"),
        ("vade", "mixed_groups", 0.29, "training: more mixed groups"),
        ("vade", "sampled_after", 0.27, "sampled accuracy after as many rollouts"),
        ("vade", "rollouts_needed", 2.6e4, "samples to a sampled accuracy of 0.15"),
        ("vade", "rollouts_needed", math.inf, "samples to a sampled accuracy of 0.15"),
        ("vade", "mixed_groups", math.nan, "training: more mixed groups"),
    ],
)
def test_each_condition_can_fail(arm, figure, value, check):
    evidence = concluded({arm: {figure: value}})
    assert failing(evidence) == [check]
    assert Evidence.from_json(evidence.to_json()).verdict == evidence.verdict


def test_filtering_that_never_gets_there_counts_with_all_its_samples():
    never = {"rollouts_needed": math.inf}
    assert failing(concluded({"filtering": never})) == []
    assert failing(concluded({"filtering": {**never, "rollouts": 3e4}})) == ["samples to a sampled accuracy of 0.15"]


def test_the_bandit():
    units = {unit.arm: unit for unit in claim.plan("smoke", 1)}
    found = {arm: claim.measure(units[arm]) for arm in ("bandit-vade", "bandit-uniform")}
    assert found["bandit-vade"]["figures"]["mixed_last_still"] > 0.75
    assert 0.2 < found["bandit-uniform"]["figures"]["mixed_last_still"] < 0.45
    assert set(found["bandit-vade"]["curves"]) == {"mixed_still", "error_still", "mixed_moving", "error_moving"}
    assert found["bandit-vade"] == claim.measure(units["bandit-vade"])


@pytest.mark.slow
def test_training(monkeypatch, tmp_path):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    for arm in claim.TRAINED:
        found = claim.measure(Unit(arm, 0, {"steps": 2, "lr": 3e-4}))
        assert 0 <= found["figures"]["mixed_groups"] <= 1
        assert found["curves"]["sampled_by_rollouts"][-1][0] == found["figures"]["rollouts"]
