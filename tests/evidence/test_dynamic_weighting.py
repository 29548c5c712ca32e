"""The claim test of dynamic weighting: its plan, its small policies, and verdicts that follow from the figures."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.evidence import dynamic_weighting as claim
from guerdon.evidence import runner
from guerdon.evidence.base import Evidence, Result, Results, Unit

EXACT = {"doubled_left": 0.0, "gap_centred": 1e-7, "gap_normalised": 0.6}
REST = {
    "weight_accuracy": 0.4,
    "weight_concise": 0.25,
    "weight_format": 0.35,
    "accuracy_after": 0.9,
    "concise_after": 0.3,
}
VOLUMES = {
    "gradient": 0.45,
    "fixed-balanced": 0.2,
    "fixed-accuracy": 0.4,
    "fixed-efficiency": 0.02,
    "sgd-fixed": 0.3,
    "sgd-hypervolume": 0.299,
}


def concluded(changes: dict[str, dict[str, float]] | None = None) -> Evidence:
    results = [
        Result(Unit(arm, seed), {"hypervolume": volume, **EXACT, **REST, **(changes or {}).get(arm, {})})
        for arm, volume in VOLUMES.items()
        for seed in range(3)
    ]
    return claim.conclude(Results(results))


def failing(evidence: Evidence) -> list[str]:
    return [check.name for check in evidence.checks if not check.holds]


def test_the_plan():
    units = runner.checked(claim, claim.plan("full", 5))
    for arm in VOLUMES:
        mine = [unit for unit in units if unit.arm == arm]
        assert [sum(unit.role == role for unit in mine) for role in ("tune", "measure")] == [6, 5]
        assert {unit.seed for unit in mine if unit.role == "tune"} == {100, 101}
    trials = [unit for unit in units if unit.role == "tune"]
    found = claim.tune(Results([Result(u, {"hypervolume": float(u.settings.get("ratio", 0))}) for u in trials], "full"))
    assert found["gradient"] == {"steps": 400, "lr": 0.05, "ratio": 20.0}
    assert not [unit for unit in claim.plan("smoke", 3) if unit.role == "tune"]


def test_all_well():
    evidence = concluded()
    assert (failing(evidence), evidence.holds, evidence.headline) == ([], True, "shown")


@pytest.mark.parametrize(
    ("arm", "figure", "value", "check"),
    [
        ("gradient", "doubled_left", 2e-5, "GRPO: a doubled reward changes nothing (epsilon 1e-9)"),
        ("gradient", "gap_centred", 2e-4, "parts add up to the whole without a std"),
        ("gradient", "gap_normalised", 0.0, "and not with one"),
        ("gradient", "weight_concise", 0.34, "gradient: conciseness loses weight"),
        ("gradient", "weight_concise", math.nan, "gradient: conciseness loses weight"),
        ("fixed-accuracy", "hypervolume", 0.46, "gradient: larger volume than fixed-accuracy"),
        ("sgd-hypervolume", "hypervolume", 0.29, "hypervolume: at least 0.98 of fixed weights (plain descent)"),
    ],
)
def test_each_condition_can_fail(arm, figure, value, check):
    evidence = concluded({arm: {figure: value}})
    assert failing(evidence) == [check]
    assert Evidence.from_json(evidence.to_json()).verdict == evidence.verdict


def test_the_three_rewards():
    _, drawn = claim._writers([Unit("gradient", 0)])
    answers = drawn[0, :, 0]
    tokens = torch.full((1, claim.PROMPTS, 3, claim.LENGTH), 9)
    tokens[0, :, :, :2] = claim.MARKER
    tokens[0, :, 0, 4:8] = answers
    tokens[0, :, 0, 8] = claim.END
    tokens[0, :, 1, 1] = claim.END  # what comes after the end does not count
    tokens[0, :, 1, 4:8] = answers
    tokens[0, :, 2, 4:8] = torch.where(answers == 9, 8, 9)
    found = claim._scores(tokens, drawn)[0]
    torch.testing.assert_close(found[:, 0], torch.tensor([1.0, 1 / 3, 1.0]).expand(claim.PROMPTS, 3))
    torch.testing.assert_close(found[:, 1], torch.tensor([0.0, 11 / 12, 0.0]).expand(claim.PROMPTS, 3))
    torch.testing.assert_close(found[:, 2], torch.tensor([0.0, 0.0, 1.0]).expand(claim.PROMPTS, 3))


def test_a_unit_does_not_depend_on_its_company(monkeypatch):
    monkeypatch.setattr(claim, "STEPS", 20)
    units = [Unit(unit.arm, unit.seed, {**unit.settings, "steps": 20}) for unit in claim.plan("smoke", 1)]
    together = claim.measure_all(units)
    for unit, found in zip(units, together, strict=True):
        (alone,) = claim.measure_all([unit])
        assert found["figures"] == pytest.approx(alone["figures"], abs=1e-4)
        assert [x for x, _ in found["curves"]["hypervolume"]] == [0.0, 20.0]
    weights = [together[-1]["figures"][f"weight_{name}"] for name in claim.OBJECTIVES]
    assert sum(weights) == pytest.approx(1.0)
    assert weights != pytest.approx(list(claim.BALANCED), abs=1e-4)
