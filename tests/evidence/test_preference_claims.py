"""The claim tests of the DPO family, SimPO and TGDPO: plans, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest

from guerdon.evidence import dpo_family, runner, simpo, tgdpo
from guerdon.evidence.base import Evidence, Result, Results, Unit

TOPICS = {
    "quality_before": 0.5,
    "quality": 0.8,
    "quality_gain": 0.3,
    "win_rate": 0.8,
    "length_before": 7.0,
    "length": 7.5,
    "accuracy": 0.8,
    "likelihood_accuracy": 0.8,
    "length_correlation": -0.3,
    "seconds": 20.0,
}
FAMILY = {arm: dict(TOPICS) for arm in dpo_family.LOSSES["full"]}
SIMPO = {arm: dict(TOPICS) for arm in simpo.ARMS}
SIMPO["dpo"] |= {"quality": 0.7, "win_rate": 0.7, "length_correlation": 0.0}
SIMPO["not-normalised"] |= {"length_correlation": 0.4, "likelihood_accuracy": 0.6}
TGDPO = {arm: TOPICS | {"token_gap": 0.3} for arm in tgdpo.ARMS}
for baseline in ("dpo-early", "dpo"):
    TGDPO[baseline] |= {"quality": 0.7, "win_rate": 0.7}
CASES = [(dpo_family, FAMILY), (simpo, SIMPO), (tgdpo, TGDPO)]


def concluded(module: Any, figures: Any, change: Any = None, budget: Any = "full") -> Evidence:
    results = [
        # seeds differ a little, so that there is a standard error
        Result(Unit(arm, seed), {k: v + 1e-3 * seed for k, v in (figures[arm] | (change or {}).get(arm, {})).items()})
        for arm in figures
        for seed in range(3)
    ]
    return module.conclude(Results(results, budget))


@pytest.mark.parametrize(("module", "figures"), CASES)
def test_all_well(module, figures):
    evidence = concluded(module, figures)
    assert evidence.holds
    # a family of baselines claims nothing over another method
    assert evidence.headline == ("" if module is dpo_family else "shown")
    short = concluded(module, figures, budget="smoke")
    assert (short.holds, short.headline) == (True, "")


@pytest.mark.parametrize(
    ("module", "figures", "arm", "changed", "names"),
    [
        (dpo_family, FAMILY, "kto", {"quality_gain": 0.1}, ["kto lifts true quality"]),
        (dpo_family, FAMILY, "orpo", {"win_rate": 0.55}, ["orpo wins against its start"]),
        (simpo, SIMPO, "simpo", {"length_correlation": 0.0}, ["longer is less likely than under DPO"]),
        (
            simpo,
            SIMPO,
            "not-normalised",
            {"length_correlation": 0.0},
            ["without length normalisation it is more likely"],
        ),
        (simpo, SIMPO, "dpo", {"likelihood_accuracy": 0.9}, ["likelihood ranks pairs as well as DPO's"]),
        (simpo, SIMPO, "not-normalised", {"likelihood_accuracy": 0.9}, ["and better than without normalisation"]),
        (simpo, SIMPO, "simpo", {"quality": 0.71}, ["true quality against DPO"]),
        (simpo, SIMPO, "simpo", {"win_rate": 0.7}, ["win rate against the start, against DPO's"]),
        (tgdpo, TGDPO, "early", {"token_gap": 0.01}, ["the guide rewards good letters more than others"]),
        (tgdpo, TGDPO, "dpo-early", {"quality": 0.8}, ["higher true quality than DPO early on"]),
        (tgdpo, TGDPO, "early-half", {"quality": 0.85}, ["a larger alpha is no slower"]),
        (tgdpo, TGDPO, "tgdpo", {"quality": 0.7}, ["higher true quality than DPO at the end"]),
        (tgdpo, TGDPO, "tgdpo", {"win_rate": 0.7}, ["win rate against the start, against DPO's"]),
    ],
)
def test_each_condition_can_fail(module, figures, arm, changed, names):
    evidence = concluded(module, figures, {arm: changed})
    assert [check.name for check in evidence.checks if not check.holds] == names


def test_the_plans():
    for module in (dpo_family, simpo):
        full = runner.checked(module, module.plan("full", 5))
        assert {unit.seed for unit in full if unit.role == "measure"} == set(range(5))
        assert not {unit.seed for unit in full if unit.role != "measure"} & set(range(5)), "tuned on a measured seed"
        arm = full[0].arm
        chosen = module.plan("full", 1, {arm: {"lr": 7e-4}})
        assert {unit.settings["lr"] for unit in chosen if unit.arm == arm and unit.role == "measure"} == {7e-4}
    units = runner.checked(tgdpo, tgdpo.plan("full", 5))
    assert len(units) == 5 * len(tgdpo.ARMS)
    early = {unit.settings["steps"] for unit in units if unit.arm.startswith(("early", "dpo-early"))}
    assert max(early) < min(unit.settings["steps"] for unit in units if unit.arm in ("dpo", "tgdpo"))
