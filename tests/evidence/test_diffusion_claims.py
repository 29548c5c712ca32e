"""The claim tests of the diffusion baselines: plans, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest

from guerdon.evidence import diffusion_base, diffusion_rl_base, runner
from guerdon.evidence.base import Evidence, Result, Results, Unit

DRAWN = {
    f"{name}_{way}": value for way in diffusion_base.WAYS for name, value in (("accuracy", 0.95), ("distance", 20.0))
}
BASE = {arm: DRAWN | {"accuracy_guided": 0.99, "distance_guided": 90.0} for arm in diffusion_base.BASES}
BASE["shapes/short"] |= {"accuracy_plain": 0.55}
RL = {arm: {"before": 0.3, "after": 0.7, "gain": 0.4} for arm in (*diffusion_rl_base.RINGS, *diffusion_rl_base.RECIPES)}


def concluded(module: Any, figures: Any, change: Any = None, budget: Any = "full") -> Evidence:
    results = [
        # seeds differ a little, so that there is a standard error
        Result(Unit(arm, seed), {k: v + 1e-3 * seed for k, v in (figures[arm] | (change or {}).get(arm, {})).items()})
        for arm in figures
        for seed in range(3)
    ]
    return module.conclude(Results(results, budget))


@pytest.mark.parametrize(("module", "figures"), [(diffusion_base, BASE), (diffusion_rl_base, RL)])
def test_all_well(module, figures):
    for budget in ("full", "smoke"):
        evidence = concluded(module, figures, budget=budget)
        # baselines claim nothing over another method
        assert (evidence.holds, evidence.headline) == (True, "")


@pytest.mark.parametrize(
    ("module", "figures", "arm", "changed", "name"),
    [
        (diffusion_base, BASE, "digits/full", {"accuracy_plain": 0.8}, "digits/full draws what it is asked for"),
        (diffusion_base, BASE, "shapes/full", {"accuracy_sde": 0.8}, "shapes/full: the SDE is as right as the ODE"),
        (diffusion_base, BASE, "shapes/full", {"distance_plain": 40.0}, "shapes/full is near real pictures"),
        (diffusion_base, BASE, "shapes/full", {"accuracy_guided": 0.9}, "guidance draws more of what is asked"),
        (diffusion_base, BASE, "shapes/full", {"distance_guided": 25.0}, "and goes away from real pictures"),
        (diffusion_base, BASE, "shapes/short", {"accuracy_plain": 0.9}, "shapes/short leaves room"),
        (diffusion_rl_base, RL, "ring-ddpo", {"gain": 0.2}, "ring-ddpo learns"),
        (diffusion_rl_base, RL, "dpok", {"after": 0.3}, "dpok raises its reward"),
        (diffusion_rl_base, RL, "rwr", {"after": 0.32}, "rwr raises its reward"),
    ],
)
def test_each_condition_can_fail(module, figures, arm, changed, name):
    evidence = concluded(module, figures, {arm: changed})
    assert [check.name for check in evidence.checks if not check.holds] == [name]
    assert Evidence.from_json(evidence.to_json()).verdict == evidence.verdict


def test_the_plans_and_a_run_on_the_ring():
    for module, arms in ((diffusion_base, BASE), (diffusion_rl_base, RL)):
        units = runner.checked(module, module.plan("full", 5))
        assert {unit.arm for unit in units} == set(arms)
        assert len(units) == 5 * len(arms)
    found = diffusion_rl_base.measure(Unit("ring-flow-grpo", 0, {"steps": 10}))
    assert found["figures"]["gain"] == pytest.approx(found["figures"]["after"] - found["figures"]["before"])
    assert len(found["curves"]["reward"]) == 2
