"""The claim tests of AlignProp and ReNO: plans, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest

from guerdon.evidence import alignprop, reno, runner
from guerdon.evidence.base import Evidence, Result, Results, Unit

PATHS = {"reward_before": -4.0, "reward_after": -1.0, "gain": 3.0, "judge_before": 0.95, "judge_after": 0.9}
ALIGNPROP = {arm: {**PATHS, "area_after": 0.5, "cpu_s": 10.0} for arm in alignprop.ARMS}
ALIGNPROP["policy-gradient"] |= {"reward_after": -3.0, "gain": 1.0, "cpu_s": 30.0}
ALIGNPROP["full"] |= {"judge_after": 0.8}
NOISE = {"loss_before": 2.8, "judge_change": 0.0, "frechet_before": 90.0, "frechet_after": 85.0}
RENO = {arm: {**NOISE, "loss_after": 0.01, "norm_distance": 0.2} for arm in reno.ARMS}
RENO["reno-free-norm"] |= {"norm_distance": 2.0}
RENO["best-of-n"] |= {"loss_after": 0.4}
RENO["best-of-n-two-steps"] |= {"loss_after": 0.4}


def concluded(module: Any, figures: Any, change: Any = None, budget: Any = "full") -> Evidence:
    results = [
        # seeds differ a little, so that there is a standard error
        Result(Unit(arm, seed), {k: v + 1e-3 * seed for k, v in (figures[arm] | (change or {}).get(arm, {})).items()})
        for arm in module.ARMS
        for seed in range(3)
    ]
    return module.conclude(Results(results, budget))


@pytest.mark.parametrize(("module", "figures"), [(alignprop, ALIGNPROP), (reno, RENO)])
def test_all_well(module, figures):
    evidence = concluded(module, figures)
    assert evidence.holds
    assert evidence.headline == "shown"
    short = concluded(module, figures, budget="smoke")
    assert (short.holds, short.headline) == (True, "")


@pytest.mark.parametrize(
    ("module", "figures", "arm", "changed", "name"),
    [
        (alignprop, ALIGNPROP, "random", {"gain": 0.0}, "random cut: the reward rises"),
        (alignprop, ALIGNPROP, "policy-gradient", {"reward_after": 0.0}, "reward from half the samples"),
        (alignprop, ALIGNPROP, "random", {"cpu_s": 40.0}, "less computation"),
        (alignprop, ALIGNPROP, "full", {"judge_after": 0.95}, "judge, random cut against the full gradient"),
        (reno, RENO, "reno", {"norm_distance": 0.8}, "the penalty holds the norm"),
        (reno, RENO, "reno-free-norm", {"norm_distance": 0.2}, "without it the norm leaves"),
        (reno, RENO, "reno", {"judge_change": -0.1}, "held-out judge, one step"),
        (reno, RENO, "best-of-n", {"loss_after": 0.02}, "a quarter of the loss of the best of n, one step"),
    ],
)
def test_each_condition_can_fail(module, figures, arm, changed, name):
    evidence = concluded(module, figures, {arm: changed})
    assert [check.name for check in evidence.checks if not check.holds] == [name]


def test_the_plans():
    full = runner.checked(alignprop, alignprop.plan("full", 5))
    assert {unit.settings["updates"] for unit in full if unit.arm == "policy-gradient"} == {40}
    assert {unit.settings["updates"] for unit in full if unit.arm != "policy-gradient"} == {20}
    tuned = alignprop.plan("full", 1, {"random": {"lr": 5e-3}, "policy-gradient": {"lr": 1e-4}})
    rates = {unit.arm: unit.settings["lr"] for unit in tuned if unit.role == "measure"}
    assert rates == {"random": 5e-3, "last": 5e-3, "full": 5e-3, "policy-gradient": 1e-4}
    assert len(runner.checked(reno, reno.plan("full", 5))) == 5 * len(reno.ARMS)
