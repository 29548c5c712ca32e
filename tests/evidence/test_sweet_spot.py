"""The claim test for sweet spots: its plan, its task, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guerdon.evidence import runner, sweet_spot
from guerdon.evidence.base import Evidence, Result, Results, Unit

RULES = {"outranked": 0.0, "groups_lost": 0.0, "one_zone_difference": 1e-6, "live_groups_binary": 0.05}
AFTER = {
    "tiers-4": 0.05,
    "binary": 0.012,
    "continuous": 0.04,
    "tiers-2": 0.03,
    "tiers-8": 0.04,
    "tiers-16": 0.04,
    "noisy-tiers-4": 0.03,
    "noisy-tiers-16": 0.02,
    "noisy-continuous": 0.02,
    "easy-tiers-4": 0.6,
    "easy-binary": 0.62,
}


def concluded(change: dict[str, dict[str, float]] | None = None, budget: Any = "full", slow: bool = False) -> Evidence:
    results = []
    for arm in AFTER if budget == "full" else sweet_spot.SMOKE:
        tiers = "binary" not in arm
        figures = {**RULES, "live_groups": 0.8 if tiers else 0.05, "snr_at_start": 0.05 if tiers else 0.001}
        figures |= {"success_after": AFTER[arm]} | (change or {}).get(arm, {})
        curve = [(0.0, 0.0), (700.0 if slow else 200.0, 0.012), (800.0, figures["success_after"])]
        for seed in range(3):
            results.append(Result(Unit(arm, seed, {"lr": 3e-3}), figures, {"success": curve}))
    return sweet_spot.conclude(Results(results, budget))


def verdicts(evidence: Evidence) -> dict[str, bool]:
    return {check.name: check.holds for check in evidence.checks}


def test_what_was_tuned_is_measured():
    trials = [
        Result(unit, {"success_after": -float(unit.settings["lr"]) if unit.arm == "binary" else 0.0})
        for unit in sweet_spot.plan("full", 1)
        if unit.role == "tune"
    ]
    units = sweet_spot.plan("full", 1, sweet_spot.tune(Results(trials, "full")))
    measured = {unit.arm: unit.settings for unit in units if unit.role == "measure"}
    assert measured["binary"]["lr"] == 1e-3
    assert measured["tiers-4"]["steps"] == 800
    assert measured["easy-binary"]["steps"] == 1200
    assert sweet_spot.tune(Results([], "smoke")) == {}


def test_a_good_result_holds():
    evidence = concluded()
    assert evidence.holds
    assert evidence.headline == "shown"


STEPS = "steps to the success that the binary reward has at the end"


@pytest.mark.parametrize(
    ("arm", "figure", "value", "name"),
    [
        ("tiers-16", "outranked", 1.0, "no failure outranks a success"),
        ("continuous", "groups_lost", 2.0, "no group that the binary reward tells apart becomes constant"),
        ("binary", "one_zone_difference", 0.1, "one zone gives the advantages of the binary reward"),
        ("tiers-4", "live_groups", 0.1, "more live groups than the binary reward would have on the same samples"),
        ("tiers-4", "snr_at_start", 0.0005, "the first gradient has more signal to its noise"),
        ("binary", "success_after", 0.06, STEPS),
        ("continuous", "success_after", 0.051, "four tiers are the best choice"),
        ("noisy-continuous", "success_after", 0.04, "four tiers are the best choice, closeness with noise"),
        ("easy-tiers-4", "success_after", 0.5, "where success is not rare, not behind binary at the end"),
    ],
)
def test_each_condition_can_fail(arm, figure, value, name):
    assert verdicts(concluded())[name]
    assert not verdicts(concluded({arm: {figure: value}}))[name]


def test_slow_tiers_are_not_a_success():
    assert not verdicts(concluded(slow=True))[STEPS]


def test_a_short_run_asks_for_twice():
    assert concluded({}, "smoke").headline == "shown"
    assert concluded({"tiers-4": {"success_after": 0.02}}, "smoke").headline == "not shown at this scale"


def test_success_is_the_exact_probability():
    policy = sweet_spot.Clicker(8)
    for parameter in policy.parameters():
        torch.nn.init.zeros_(parameter)  # uniform over 8 x 8 cells, of which 9 are hits
    centre = sweet_spot.targets(50, 8, torch.Generator().manual_seed(0))
    assert sweet_spot.success(policy, centre) == pytest.approx(9 / 64, rel=1e-5)
    assert centre.min() >= 1
    assert centre.max() <= 6


def test_noise_and_zones_of_a_reward():
    near, hit = torch.tensor([[0.3, 0.6, 1.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    found = {zones: sweet_spot.reward_of({"zones": zones}, generator)(near, hit) for zones in (0, 4, -1)}
    assert found[0].tolist() == [[0.0, 0.0, 1.0]]
    assert found[4].tolist() == [[0.125, 0.25, 1.5]]
    assert found[-1].flatten().tolist() == pytest.approx([0.15, 0.3, 1.5])
    noisy = sweet_spot.reward_of({"zones": -1, "noise": 0.2}, generator)(near, hit)
    assert not torch.allclose(noisy, found[-1])


@pytest.mark.slow
def test_a_smoke_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    evidence = runner.run(sweet_spot, "smoke", jobs=1, progress=False)
    assert evidence.holds
    assert evidence.headline == "shown"
