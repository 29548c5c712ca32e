"""VGPO's claim test: its plan, its figures on known cases, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guerdon.evidence import runner, vgpo
from guerdon.evidence.base import Evidence, Result, Results, Unit
from guerdon.evidence.ring_flow import Paths, centre

METHOD = {"rounds_to_level": 30.0, "reward_after": 0.95, "size_last": 0.5, "zero_variance": 0.1, "ode_after": 0.9}
GRPO = {"rounds_to_level": 44.0, "reward_after": 0.92, "size_last": 0.15, "zero_variance": 0.0, "ode_after": 0.9}


def concluded(change: dict[str, dict[str, float]] | None = None, budget: Any = "full") -> Evidence:
    results = [
        Result(
            Unit(arm, seed, {"lr": 1e-3}),
            (GRPO if arm.startswith("grpo") else METHOD) | (change or {}).get(arm, {}),
            {"reward": [(1.0, 0.5)]},
        )
        for arm in vgpo.ARMS
        for seed in range(3)
    ]
    return vgpo.conclude(Results(results, budget))


def verdicts(evidence: Evidence) -> dict[str, bool]:
    return {check.name: check.holds for check in evidence.checks}


@pytest.mark.parametrize(("budget", "trials"), [("smoke", 0), ("full", 6)])
def test_the_plan(budget, trials):
    units = runner.checked(vgpo, vgpo.plan(budget, 5))
    assert len(vgpo.ARMS) == 8
    for arm in vgpo.ARMS:
        mine = [unit for unit in units if unit.arm == arm]
        assert sum(unit.role == "tune" for unit in mine) == trials
        assert [unit.seed for unit in mine if unit.role == "measure"] == [0, 1, 2, 3, 4]


def test_what_was_tuned_is_measured():
    results = [
        Result(unit, {"reward_mean": float(unit.settings["lr"]) * (-1 if unit.arm == "grpo-smooth" else 1)})
        for unit in vgpo.plan("full", 1)
        if unit.role == "tune"
    ]
    units = vgpo.plan("full", 1, vgpo.tune(Results(results, "full")))
    rates = {unit.arm: unit.settings["lr"] for unit in units if unit.role == "measure"}
    assert rates == dict.fromkeys(vgpo.ARMS, 2e-3) | {"grpo-smooth": 5e-4}


def test_all_well():
    evidence = concluded()
    assert evidence.holds
    assert evidence.headline == "shown"
    assert [arm.role for arm in evidence.arms[:3]] == ["method", "baseline", "ablation"]
    assert Evidence.from_json(evidence.to_json()).checks == evidence.checks


@pytest.mark.parametrize(
    ("arm", "figure", "value", "name"),
    [
        ("anchored-binary", "zero_variance", 0.0, "a group of equal samples has an advantage"),
        ("grpo-binary", "zero_variance", 0.1, "a group of equal samples has an advantage"),
        ("anchored-binary", "size_last", 0.29, "the advantage lives on with a binary reward"),
        ("anchored-binary", "rounds_to_level", 38.0, "rounds to a binary reward of 0.8"),
        ("anchored-smooth", "reward_after", 0.925, "smooth reward at the end"),
    ],
)
def test_each_condition_can_fail(arm, figure, value, name):
    assert verdicts(concluded())[name]
    changed = concluded({arm: {figure: value}})
    assert [found for found, holds in verdicts(changed).items() if not holds] == [name]
    mechanism = next(check.kind for check in changed.checks if check.name == name) == "mechanism"
    assert changed.holds != mechanism


def test_a_short_run_is_not_compared():
    evidence = concluded({"anchored-smooth": {"reward_after": 0.0}}, "smoke")
    assert evidence.holds
    assert evidence.headline == ""


def test_rounds():
    assert vgpo.rounds_to([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == 6
    assert vgpo.rounds_to([0.0] * 12) == 12


def test_worth():
    classes = torch.tensor([2])
    at = centre(classes)
    assert vgpo.worth(at, classes, "smooth").item() == 1.0
    assert vgpo.worth(at + 0.3, classes, "binary").item() == 1.0
    assert vgpo.worth(at + 0.4, classes, "binary").item() == 0.0


def test_projections_of_a_straight_path_are_its_end():
    sigmas = torch.linspace(1, 0, 9)
    classes = torch.tensor([[0, 1]])
    end, noise = torch.randn(2, 1, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    states = torch.stack([(1 - s) * end + s * noise for s in sigmas], 3)
    velocities = (noise - end).unsqueeze(3).expand(1, 2, 3, 8, 2)
    found = vgpo.dense(Paths(classes, states, velocities, torch.zeros(1, 2, 3, 8)), sigmas, "smooth")
    expected = vgpo.worth(end, classes.unsqueeze(-1), "smooth")[0]
    torch.testing.assert_close(found, expected.unsqueeze(-1).expand(2, 3, 8), rtol=1e-4, atol=1e-5)


def test_a_group_of_equal_samples():
    assert vgpo.alike(None) == 0.0
    assert vgpo.alike({"k": 0.0, "use_step_weights": False}) == 0.0
    # steps 0 to 4 of 8: k times the discounted sums of 8, 7, 6, 5 and 4 rewards
    sums = [(1 - 0.9**n) / 0.1 for n in (8, 7, 6, 5, 4)]
    assert vgpo.alike({"k": 0.05, "use_step_weights": False}) == pytest.approx(0.05 * sum(sums) / 8)


@pytest.mark.slow
def test_a_smoke_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    evidence = runner.run(vgpo, "smoke", jobs=1, progress=False)
    assert evidence.holds
    assert evidence.headline == ""
