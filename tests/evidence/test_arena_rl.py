"""ArenaRL's claim test: its plan, its figures on known cases, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guerdon.evidence import arena_rl, runner
from guerdon.evidence.base import Evidence, Result, Results, Unit

COST = {
    "single_elimination": 30.0,
    "round_robin": 120.0,
    "pointwise": 0.0,
    "anchor": 15.0,
    "swiss": 32.0,
    "double_elimination": 30.0,
}
SPEARMAN = {"single_elimination": 0.93, "round_robin": 0.98, "pointwise": 0.4, "anchor": 0.92}
ACCURACY = {"single_elimination": 0.4, "round_robin": 0.42, "pointwise": 0.25}


def concluded(change: dict[str, dict[str, float]] | None = None, budget: Any = "full") -> Evidence:
    results = []
    for arm in arena_rl.ARMS:
        figures = {f"spearman_{noise:g}": SPEARMAN.get(arm, 0.8) for noise in arena_rl.NOISE}
        figures |= {"comparisons": COST[arm]} | (change or {}).get(arm, {})
        if arm in ACCURACY:
            figures = {"sampled_after": ACCURACY[arm]} | figures
        results += [Result(Unit(arm, seed, {"lr": 1e-4}), figures, {"spearman": [(0.1, 0.9)]}) for seed in range(3)]
    return arena_rl.conclude(Results(results, budget))


def verdicts(evidence: Evidence) -> dict[str, bool]:
    return {check.name: check.holds for check in evidence.checks}


@pytest.mark.parametrize(("budget", "trials"), [("smoke", 0), ("full", 4)])
def test_the_plan(budget, trials):
    units = runner.checked(arena_rl, arena_rl.plan(budget, 5))
    for arm in arena_rl.ARMS:
        mine = [unit for unit in units if unit.arm == arm]
        assert sum(unit.role == "tune" for unit in mine) == (trials if arm in arena_rl.TRAINED else 0)
        assert [unit.seed for unit in mine if unit.role == "measure"] == [0, 1, 2, 3, 4]


def test_what_was_tuned_is_measured():
    results = [
        Result(unit, {"sampled_after": unit.settings["lr"] * (-1 if unit.arm == "pointwise" else 1)})  # type: ignore
        for unit in arena_rl.plan("full", 1)
        if unit.role == "tune"
    ]
    units = arena_rl.plan("full", 1, arena_rl.tune(Results(results, "full")))
    rates = {unit.arm: unit.settings["lr"] for unit in units if unit.role == "measure" and unit.settings}
    assert rates == {"single_elimination": 3e-4, "round_robin": 3e-4, "pointwise": 1e-4}


def test_all_well():
    evidence = concluded()
    assert evidence.holds
    assert evidence.headline == "shown"
    assert Evidence.from_json(evidence.to_json()).checks == evidence.checks


@pytest.mark.parametrize(
    ("arm", "figure", "value", "name"),
    [
        ("round_robin", "comparisons", 240.0, "cost, in comparisons of 16 samples"),
        ("single_elimination", "comparisons", 45.0, "cost, in comparisons of 16 samples"),
        ("single_elimination", "spearman_0.1", 0.88, "ranks nearly as well as all pairs, noise 0.1"),
        ("round_robin", "spearman_0.25", 1.1, "ranks nearly as well as all pairs, noise 0.25"),
        ("pointwise", "spearman_0.1", 0.65, "ranks better than scores, noise 0.1"),
        ("pointwise", "spearman_0.25", 0.65, "ranks better than scores, noise 0.25"),
        ("pointwise", "sampled_after", 0.36, "accuracy against pointwise, sampled"),
        ("round_robin", "sampled_after", 0.46, "accuracy against all pairs, sampled"),
        ("anchor", "spearman_0.25", 0.94, "ranks better than anchor, noise 0.25"),
        ("swiss", "spearman_0.25", 0.93, "ranks better than swiss, noise 0.25"),
        ("double_elimination", "spearman_0.25", 0.94, "ranks better than double_elimination, noise 0.25"),
    ],
)
def test_each_condition_can_fail(arm, figure, value, name):
    assert verdicts(concluded())[name]
    changed = concluded({arm: {figure: value}})
    assert [found for found, holds in verdicts(changed).items() if not holds] == [name]
    mechanism = next(check.kind for check in changed.checks if check.name == name) == "mechanism"
    assert changed.holds != mechanism


def test_figures_that_are_no_numbers_hold_nothing():
    changed = verdicts(concluded({"single_elimination": {"spearman_0.25": float("nan")}}))
    assert {found for found, holds in changed.items() if not holds} == {
        "ranks nearly as well as all pairs, noise 0.25",
        "ranks better than scores, noise 0.25",
        "ranks better than anchor, noise 0.25",
        "ranks better than swiss, noise 0.25",
        "ranks better than double_elimination, noise 0.25",
    }


def test_a_short_run_is_not_compared():
    evidence = concluded({"single_elimination": {"sampled_after": 0.0}}, "smoke")
    assert evidence.holds
    assert evidence.headline == ""


def test_correlation_of_ranks():
    first = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 2.0]])
    second = torch.tensor([[2.0, 1.0, 9.0, 7.0], [1.0, 2.0, 3.0, 4.0]])
    # 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15); with ties 4 / sqrt(4 * 5)
    torch.testing.assert_close(arena_rl.spearman(first, second), torch.tensor([0.6, 0.894427191], dtype=torch.float64))


def test_ranking_figures_are_those_of_the_arm(monkeypatch):
    monkeypatch.setattr(arena_rl, "GROUPS", 40)
    found = {arm: arena_rl.ranking(arm, 0) for arm in ("pointwise", "anchor", "round_robin")}
    assert {arm: part["figures"]["comparisons"] for arm, part in found.items()} == {
        "pointwise": 0.0,
        "anchor": 15.0,
        "round_robin": 120.0,
    }
    assert found["anchor"] == arena_rl.ranking("anchor", 0)
    order = [found[arm]["figures"]["spearman_0.25"] for arm in found]
    assert order == sorted(order)
    assert found["round_robin"]["figures"]["champion_0.1"] < 1.5 < found["pointwise"]["figures"]["champion_0.1"]


@pytest.mark.parametrize(
    ("sample", "answer", "value"),
    [("123", "123", 2.0), ("132", "123", 1 / 3), ("12", "123", 2 / 3), ("1234", "123", 0.75), ("", "123", 0.0)],
)
def test_the_hidden_worth(sample, answer, value):
    assert arena_rl.worth(sample, answer) == pytest.approx(value)


def test_the_judges_see_that_worth():
    samples, answer = [["123", "321", "999"]] * 400, ["123"] * 400
    scores = torch.tensor(arena_rl.reward("pointwise", 0)(samples, answer)).mean(0)
    assert scores.tolist() == pytest.approx([5.2, 5.0333, 5.0], abs=0.02)
    ranks = arena_rl.reward("round_robin", 0)(["p"] * 400, samples, answer=answer).ranks.mean(0)
    assert ranks[0] < 1.01
    assert ranks[0] < ranks[1] < ranks[2]


@pytest.mark.slow
def test_a_smoke_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    evidence = runner.run(arena_rl, "smoke", jobs=1, progress=False)
    assert evidence.holds
    assert evidence.headline == ""
