"""SRPO's claim test: the tables' minimisers, the plan, verdicts that follow from the figures, a small run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guerdon.evidence import runner, srpo
from guerdon.evidence.base import Evidence, Result, Results, Unit
from guerdon.evidence.srpo import apart, closed_form, preferences, solve, solved

WINS = {f"win_{k}": 0.8 + 0.02 * k for k in range(6)} | {f"quality_{k}": 0.8 for k in range(6)}
TRAINED = {**WINS, "start_revised_win": 0.9, "best_quality": 0.8, "seconds": 1.0}
STILL = {f"win_{k}": 0.8 for k in range(6)}
FIGURES: dict[str, dict[str, float]] = {
    "srpo-exact": {"moved": 1e-5, "off": 1e-5},
    "dpo-exact": {"moved": 0.1},
    "ipo-exact": {"moved": 0.1},
    "srpo": TRAINED,
    "revise-only": TRAINED,
    "dpo": {**TRAINED, **STILL},
    "ipo": {**TRAINED, **STILL},
}


def test_the_minimum_is_the_closed_form_whoever_wrote_the_pairs():
    p, (uniform, other) = preferences(1)
    assert torch.allclose(p + p.T, torch.ones_like(p), atol=1e-15)
    answers, revisions = closed_form(p)
    assert torch.allclose(revisions.sum(1), torch.ones(8).double())
    for authors in (uniform, other):
        found = solve("srpo-exact", p, authors)
        assert apart(found[0], answers) < 1e-5
        assert apart(found[1], revisions) < 1e-5
    figures = {arm: solved(arm, 1)["moved"] for arm in srpo.EXACT}
    assert figures["srpo-exact"] < 1e-5
    assert figures["dpo-exact"] > 0.05
    assert figures["ipo-exact"] > 0.05


def test_the_baselines_are_solved():
    """With preferences of a reward DPO's log-ratios are that reward's; with uniform authors IPO's are mean preferences."""
    worth = torch.linspace(-0.1, 0.1, 8).double()
    p = torch.sigmoid(worth[None, :] - worth[:, None])
    mu = torch.arange(1, 9).double() / 36
    answers, _ = solve("dpo-exact", p, mu)
    assert apart(answers, (worth / srpo.BETA).softmax(0)) < 1e-6
    answers, _ = solve("ipo-exact", p, torch.full((8,), 1 / 8).double())
    # the gap nearest to (2 p - 1) / (2 beta) in the mean is that of p against a random answer
    assert apart(answers, (p.mean(0) / srpo.BETA).softmax(0)) < 1e-6


def concluded(change: Any = None, budget: Any = "full") -> Evidence:
    figures = {arm: {**values, **(change or {}).get(arm, {})} for arm, values in FIGURES.items()}
    results = [
        Result(Unit(arm, seed), {name: value * (1 + 1e-3 * seed) for name, value in values.items()})
        for arm, values in figures.items()
        for seed in range(3)
    ]
    return srpo.conclude(Results(results, budget))


def test_all_well():
    evidence = concluded()
    assert (evidence.holds, evidence.headline) == (True, "shown")
    assert (concluded(budget="smoke").holds, concluded(budget="smoke").headline) == (True, "")


@pytest.mark.parametrize(
    ("arm", "changed", "names"),
    [
        ("srpo-exact", {"off": 2e-3}, ["the solution is the closed form"]),
        ("srpo-exact", {"moved": 2e-3}, ["it does not move with the pairs' authors"]),
        ("ipo-exact", {"moved": 2e-5}, ["IPO's moves more than three times as far"]),
        ("dpo-exact", {"moved": 2e-5}, ["and so does DPO's"]),
        ("srpo", {"start_revised_win": 0.8}, ["one revision of the start's answers wins against the start"]),
        ("srpo", {"win_1": 0.8}, ["its own answers are better after a revision"]),
        ("dpo", {"win_0": 0.65}, ["five revisions bring more than they bring DPO"]),
        ("dpo", {"win_0": 0.9, "win_5": 0.9}, ["win rate after five revisions, against DPO's"]),
    ],
)
def test_each_condition_can_fail(arm, changed, names):
    assert [check.name for check in concluded({arm: changed}).checks if not check.holds] == names


def test_the_plan():
    full = runner.checked(srpo, srpo.plan("full", 5))
    assert {unit.seed for unit in full if unit.role == "measure"} == set(range(5))
    assert not {unit.seed for unit in full if unit.role == "tune"} & set(range(5))
    chosen = srpo.plan("full", 1, {"srpo": {**srpo.SIZES["full"], "lr": 7e-4, "beta": 0.05}})
    rates = {unit.arm: unit.settings.get("lr") for unit in chosen if unit.role == "measure"}
    assert rates["srpo"] == rates["revise-only"] == 7e-4
    assert rates["dpo"] == 1e-3
    assert rates["srpo-exact"] is None


def test_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    settings = {"steps": 2, "batch_size": 4, "prompts": 8, "base_steps": 2, "lr": 1e-3, "beta": 0.1}
    for arm in ("srpo", "dpo"):
        found = srpo.measure(Unit(arm, 0, settings))
        assert set(FIGURES[arm]) <= set(found["figures"])
        assert [x for x, _ in found["curves"]["win_rate"]] == [0, 1, 2, 3, 4, 5]
        assert found["curves"]["win_rate"][1][1] == found["figures"]["win_1"]
    # trained or not, the start is the same
    assert found["figures"]["start_quality"] == srpo.measure(Unit("srpo", 0, settings))["figures"]["start_quality"]
