"""The claim test for noisy verifiers: its plan, its sums, and verdicts that follow from the figures."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from guerdon.evidence import noisy_verifier, runner
from guerdon.evidence.base import Evidence, Result, Results, Unit
from guerdon.language.tasks import sort

EXACT = {
    "error_backward": 1e-16,
    "error_forward": 1e-16,
    "error_loo": 1e-16,
    "direction_off": 1e-15,
    "z_score_backward_max": 4e-4,
    "z_score_forward_max": 0.0,
    "z_score_backward_cosine": 1.0,
    "z_score_forward_cosine": 1.0,
    "loo_backward_mean": 0.4,
}
AFTER = {
    "backward": 0.3,
    "forward-ema": 0.28,
    "forward": 0.1,
    "uncorrected": 0.2,
    "uncorrected-loo": 0.3,
    "uncorrected-direct": 0.28,
    "oracle": 0.35,
    "appealed": 0.4,
    "recovered": 0.38,
    "brittle": 0.3,
}


def concluded(change: dict[str, dict[str, float]] | None = None, budget: Any = "full", curve: float = 3.0) -> Evidence:
    change = change or {}
    curves = {
        "variance_backward": [(0.2, 1.0), (0.5, curve)],
        "variance_forward": [(0.2, 1.0), (0.5, 0.5)],
    }
    results = [Result(Unit("exact", seed), EXACT | change.get("exact", {}), curves) for seed in range(3)]
    for arm in AFTER if budget == "full" else ("appealed",):
        for seed in range(3):
            figures = {"sampled_after": AFTER[arm], "greedy_after": 0.5}
            if arm in noisy_verifier.KEYED:
                figures |= {"rate_true": 0.5, "appealed_share": 0.25, "rate_gap": 0.02}
            found = figures | change.get(arm, {})
            found["sampled_after"] += 0.001 * seed
            results.append(Result(Unit(arm, seed, {"lr": 1e-4}), found))
    return noisy_verifier.conclude(Results(results, budget))


def verdicts(evidence: Evidence) -> dict[str, bool]:
    return {check.name: check.holds for check in evidence.checks}


def test_the_plan():
    units = runner.checked(noisy_verifier, noisy_verifier.plan("full", 5))
    counts = Counter((unit.arm, unit.role) for unit in units)
    for arm in (*noisy_verifier.TRAINED, *noisy_verifier.KEYED):
        assert counts[arm, "tune"] == 2
        assert counts[arm, "measure"] == 5
    assert {unit.arm for unit in noisy_verifier.plan("smoke", 1)} == {"exact", "appealed"}


def test_what_was_tuned_is_measured():
    trials = [
        Result(unit, {"sampled_after": float(unit.settings["lr"]) * (-1 if unit.arm == "forward" else 1)})
        for unit in noisy_verifier.plan("full", 1)
        if unit.role == "tune"
    ]
    units = noisy_verifier.plan("full", 1, noisy_verifier.tune(Results(trials, "full")))
    rates = {unit.arm: unit.settings["lr"] for unit in units if unit.role == "measure" and unit.settings}
    assert rates["forward"] == 1e-4
    assert rates["backward"] == rates["appealed"] == 3e-4
    assert noisy_verifier.tune(Results([], "smoke")) == {}


@pytest.mark.parametrize("seed", [0, 7])
def test_exact_sums(seed):
    figures = noisy_verifier.exact(seed)["figures"]
    assert max(figures[f"error_{name}"] for name in ("backward", "forward", "loo")) < 1e-14
    assert figures["direction_off"] < 1e-12
    assert figures["z_score_backward_max"] < 1e-3
    assert figures["loo_backward_mean"] > 0.1


def test_a_good_result_holds():
    evidence = concluded()
    assert evidence.holds
    assert verdicts(evidence)["the better correction (backward) above uncorrected GRPO, sampled"]
    # the control does as well, and that is said
    assert not verdicts(evidence)["backward against the same baseline without a correction, sampled"]


@pytest.mark.parametrize(
    ("arm", "figure", "value", "name"),
    [
        ("exact", "error_backward", 1e-3, "exact sums: the backward update is the clean one"),
        ("exact", "error_loo", 0.2, "exact sums: backward with the leave-one-out baseline is the clean one"),
        ("exact", "direction_off", 0.1, "exact sums: direction"),
        ("exact", "z_score_forward_max", 0.5, "a z-score in the group cancels forward"),
        ("exact", "loo_backward_mean", 0.0, "leave one out keeps backward"),
        ("appealed", "rate_gap", 0.06, "appeals: the running rate is near the true one"),
        ("appealed", "appealed_share", 1.0, "appeals cost what they should"),
        ("uncorrected", "sampled_after", 0.29, "the better correction (backward) above uncorrected GRPO, sampled"),
        ("oracle", "sampled_after", 0.25, "and not above the verifier without errors (backward), sampled"),
        ("brittle", "sampled_after", 0.37, "appeals and correction above the key alone, sampled"),
        ("recovered", "sampled_after", 0.3, "recovered appeals above the key alone, sampled"),
    ],
)
def test_each_condition_can_fail(arm, figure, value, name):
    assert verdicts(concluded())[name]
    assert not verdicts(concluded({arm: {figure: value}}))[name]


def test_a_variance_that_does_not_grow_fails():
    assert not concluded(curve=1.2).holds


def test_a_short_run_is_not_compared():
    evidence = concluded({"appealed": {"rate_gap": 0.1}}, "smoke")
    assert evidence.holds
    assert evidence.headline == ""


def test_digits_may_be_sorted_either_way():
    rows = noisy_verifier.EitherWay(sort.train_rows(0), "key")
    found = rows[:200]
    assert rows[3] == found[3]
    turned = sum(row["answer"] != row["ascending"] for row in found)
    assert 70 < turned < 130
    assert all(row["answer"] in (row["ascending"], row["ascending"][::-1]) for row in found)
    shown = noisy_verifier.EitherWay(sort.demonstrations(0), "x")[0]
    assert shown["completion"] == shown["answer"] + "$"
    assert noisy_verifier.either([["12", "21", "1"]], ["12"]) == [[1.0, 1.0, 0.0]]


@pytest.mark.slow
def test_a_smoke_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    evidence = runner.run(noisy_verifier, "smoke", jobs=1, progress=False)
    assert evidence.holds
    assert 0.4 < evidence.arms[1].figures["rate_true"][0] < 0.6
