"""REAL's claim test: its plan, its probe, and verdicts that follow from the figures."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import pytest
import torch

from guerdon.evidence import real as claim
from guerdon.evidence import runner
from guerdon.evidence.base import Evidence, Result, Results, Unit
from guerdon.objectives import policy_gradient, real

UNCLIPPED = partial(policy_gradient, clip_low=None, clip_high=None)
TAU = 0.5
GOOD = {"real": 0.6, "dapo": 0.5, "real-stress": 0.34, "dapo-stress": 0.35, "unclipped-stress": 0.1}


@cache
def curves_of(arm: str) -> dict[str, list[tuple[float, float]]]:
    return claim.weight_curves(partial(real, tau=TAU) if arm.startswith("real") else UNCLIPPED)


def concluded(
    accuracy: dict[str, float] | None = None,
    figures: dict[str, dict[str, float]] | None = None,
    curves: dict[str, dict[str, Any]] | None = None,
    budget: Any = "full",
) -> Evidence:
    results = []
    for arm, value in (GOOD | (accuracy or {})).items():
        for seed in range(3):
            found = {"sampled_after": value, "greedy_after": value, "sampled_gain": 0.1, "pull_most": 0.9 / TAU}
            found |= (figures or {}).get(arm, {})
            found["sampled_after"] += 0.001 * seed
            drawn = {
                "sampled": [(0.0, 0.1)],
                "score_most": [(1.0, 0.1)],
                **curves_of(arm),
                **(curves or {}).get(arm, {}),
            }
            results.append(Result(Unit(arm, seed, {"tau": TAU} if arm.startswith("real") else {}), found, drawn))
    return claim.conclude(Results(results, budget))


def verdicts(evidence: Evidence) -> dict[str, bool]:
    return {check.name: check.holds for check in evidence.checks}


@pytest.mark.parametrize(("budget", "trials"), [("smoke", 0), ("full", 4)])
def test_the_plan(budget, trials):
    units = runner.checked(claim, claim.plan(budget, 5))
    for arm in claim.ARMS:
        mine = [unit for unit in units if unit.arm == arm]
        # the ratio without a clip has nothing to tune at a learning rate that is given
        assert sum(unit.role == "tune" for unit in mine) == (0 if arm == "unclipped-stress" else trials)
        assert [unit.seed for unit in mine if unit.role == "measure"] == [0, 1, 2, 3, 4]


def test_what_was_tuned_is_measured_at_full_length():
    results = [
        Result(unit, {"sampled_after": float(unit.settings.get("tau", unit.settings.get("clip_high", 0)))})
        for unit in claim.plan("full", 1)
        if unit.role == "tune"
    ]
    assert {result.unit.settings["steps"] for result in results} == {20, 40}
    units = [u for u in claim.plan("full", 1, claim.tune(Results(results, "full"))) if u.role == "measure"]
    settings = {unit.arm: unit.settings for unit in units}
    assert settings["real"] == {"steps": 80, "passes": 1, "mini_batches": 4, "eval_size": 400, "lr": 1e-4, "tau": 0.5}
    assert settings["real-stress"]["tau"] == 0.5
    assert settings["real-stress"]["lr"] == settings["unclipped-stress"]["lr"] == 3e-4
    assert settings["dapo-stress"]["clip_high"] == 0.4
    assert {settings[arm]["steps"] for arm in claim.STRESSED} == {40}


def test_all_well():
    evidence = concluded()
    assert evidence.holds
    assert evidence.headline == "shown"


def test_below_the_baseline_is_not_shown():
    evidence = concluded({"real": 0.45})
    assert evidence.holds
    assert evidence.headline == "not shown at this scale"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"accuracy": {"unclipped-stress": 0.25}}, "stress: above the same without weights"),
        ({"accuracy": {"dapo-stress": 0.5}}, "stress: not far below DAPO"),
        ({"figures": {"real-stress": {"pull_most": 1.01 / TAU}}}, "the pull of a side of a group is bounded"),
        ({"figures": {"real": {"pull_most": math.nan}}}, "the pull of a side of a group is bounded"),
        (
            {"curves": {"real-stress": curves_of("unclipped")}},
            "weights are bounded and largest where most is left to learn",
        ),
        (
            {"curves": {"unclipped-stress": curves_of("real")}},
            "weights are bounded and largest where most is left to learn",
        ),
    ],
)
def test_each_mechanism_can_fail(change, name):
    evidence = concluded(**change)
    assert not evidence.holds
    assert [check for check, holds in verdicts(evidence).items() if not holds] == [name]


def test_one_seed_below_is_enough_to_fail():
    evidence = concluded()
    results = [
        Result(
            Unit(arm.name, seed, arm.settings),
            {n: v[seed] for n, v in arm.figures.items()},
            {n: v[seed] for n, v in arm.curves.items()},
        )
        for arm in evidence.arms
        for seed in range(3)
    ]
    for i, result in enumerate(results):
        if result.unit.arm == "real-stress":
            high = {**result.figures, "sampled_after": 0.05 if result.unit.seed == 1 else 0.9}
            results[i] = Result(result.unit, high, result.curves)
    found = verdicts(claim.conclude(Results(results, "full")))
    assert not found["stress: above the same without weights"]


def test_a_short_run_is_not_compared():
    evidence = concluded({"real-stress": 0.0}, budget="smoke")
    assert evidence.holds
    assert evidence.headline == ""
    assert "stress: not far below DAPO" not in verdicts(evidence)


def test_the_curves():
    found = claim.weight_curves(partial(real, tau=0.5))
    at = {name: dict(points) for name, points in found.items()}
    assert at["weight_right"][0.0] == pytest.approx(2 / 5)
    assert at["weight_wrong"][3.0] == pytest.approx(2 * math.exp(6) / (4 + math.exp(6)))
    free = dict(claim.weight_curves(UNCLIPPED)["weight_wrong"])
    assert free[3.0] / free[0.0] == pytest.approx(math.exp(3))


def test_the_probe():
    generator = torch.Generator().manual_seed(0)
    logp_old = -torch.rand(2, 4, 3, dtype=torch.float64, generator=generator)
    logp = (logp_old + torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)).requires_grad_()
    rewards = torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 0, 0]], dtype=torch.float64)
    mask = torch.ones(2, 4, 3).bool()
    probe = claim.Probe(partial(real, tau=0.5), every=2)
    assert torch.equal(probe(logp, logp_old, rewards, rewards, mask).total, real(logp, logp_old, rewards, mask).total)
    assert probe.pull_most == 0
    with torch.no_grad():
        probe(logp, logp_old, rewards, rewards, mask)
    assert probe.pull_most == 0
    probe(logp, logp_old, rewards, rewards, mask)
    s = (logp - logp_old).detach().mean(-1)[0]
    right, wrong = math.exp(-2 * s[0]), sum(math.exp(2 * x) for x in s[1:].tolist())
    assert probe.pull_most == pytest.approx(2 * max(right / (1 + right), wrong / (1 + wrong)))
    found = probe.read()
    assert found["score_most"] == pytest.approx((logp - logp_old).detach().mean(-1).abs().max().item())
    assert found["wrong_pull_growth"] == pytest.approx(wrong / (1 + wrong) / (3 / 4))
    assert probe.step == {}


@pytest.mark.slow
def test_a_smoke_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    assert runner.run(claim, "smoke", jobs=1, progress=False).holds
