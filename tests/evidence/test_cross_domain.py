"""The claim of two domains: its plan, its commands, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest

from guerdon.evidence import cross_domain, runner
from guerdon.evidence.base import Evidence, Result, Results, Unit
from guerdon.recipes import load_recipe

SEEDS = (0, 1, 2)


def concluded(change: dict[str, tuple[float, ...]] | None = None, budget: Any = "full") -> Evidence:
    results = []
    for name in cross_domain.METHODS:
        for seed, after in zip(SEEDS, (change or {}).get(name, (0.8, 0.82, 0.81)), strict=True):
            figures = {"before": 0.7, "after": after, "gain": after - 0.7}
            results.append(Result(Unit(name, seed, {"steps": 1}), figures, {"reward": [(1.0, 0.5)]}))
    return cross_domain.conclude(Results(results, budget))


def test_every_method_runs_on_the_same_seeds_untuned():
    units = runner.checked(cross_domain, cross_domain.plan("full", 3))
    assert {unit.role for unit in units} == {"measure"}
    assert len(units) == 3 * len(cross_domain.METHODS)


@pytest.mark.parametrize("name", cross_domain.METHODS)
def test_its_settings_are_those_of_a_recipe(name):
    job = cross_domain.JOBS[cross_domain.METHODS[name].domain]
    recipe = load_recipe(job.recipe, cross_domain.words(name))
    assert recipe.policy.kind == ("flow" if name.startswith("images") else "language")


def test_each_must_end_above_its_beginning():
    assert concluded().holds
    evidence = concluded({"images-copo": (0.7, 0.71, 0.69), "images-real": (0.6, 1.0, 0.8)})
    failed = {check.name for check in evidence.checks if not check.holds}
    # the second gains 0.1 on average, and less than two standard errors
    assert failed == {"COPO trains an image model", "REAL trains an image model"}
    assert not evidence.holds


def test_a_run_of_two_steps(monkeypatch):
    short = {"warm_start.steps": "2", "warm_start.batch_size": "8", "evaluation.size": "8", "prompts_per_step": "4"}
    job = cross_domain.JOBS["language"]
    monkeypatch.setitem(cross_domain.JOBS, "language", job._replace(settings={**job.settings, **short}))
    found = cross_domain.measure(Unit("language-wins", 0, {"steps": 2}))
    assert found["figures"]["gain"] == pytest.approx(found["figures"]["after"] - found["figures"]["before"])
    assert [step for step, _ in found["curves"]["reward"]] == [1.0, 2.0]
    assert [reward for _, reward in found["curves"]["reward"]] == pytest.approx([0.5, 0.5])  # of win rates, always
