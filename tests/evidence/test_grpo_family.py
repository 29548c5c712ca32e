"""The baselines' claim test: verdicts that follow from the figures."""

from __future__ import annotations

import pytest

from guerdon.evidence import grpo_family as module
from guerdon.evidence import runner
from guerdon.evidence.base import Evidence, Result, Results


def concluded(changed: dict[tuple[str, str], float] | None = None, budget="full") -> Evidence:
    results = []
    for unit in module.plan(budget, 3):
        figures = dict.fromkeys((*module.FIGURES, *module.CURVES), 0.5)
        figures |= {"sampled_gain": 0.3, f"sampled_at_{module.EARLY[budget]}": 0.4}
        figures["mixed_groups"] = 1.0 if unit.arm == "dynamic" else 0.7
        figures["ratio_max"] = {"clipped": 3.0, "unclipped": 9.0}.get(unit.arm, 1.0)
        figures |= {name: value for (arm, name), value in (changed or {}).items() if arm == unit.arm}
        results.append(Result(unit, figures))
    return module.conclude(Results(results, budget))


def failing(evidence: Evidence) -> list[str]:
    return [check.name for check in evidence.checks if not check.holds]


@pytest.mark.parametrize("budget", ["smoke", "full"])
def test_all_well(budget):
    evidence = concluded(budget=budget)
    assert evidence.holds
    assert failing(evidence) == []
    assert Evidence.from_json(evidence.to_json()) == evidence


@pytest.mark.parametrize("arm", module.LOSSES["full"])
def test_every_loss_must_learn(arm):
    assert failing(concluded({(arm, "sampled_gain"): 0.249})) == [f"{arm} learns"]
    assert failing(concluded({(arm, "sampled_gain"): float("nan")})) == [f"{arm} learns"]


@pytest.mark.parametrize(
    ("arm", "figure", "enough", "too_little", "words"),
    [
        ("clipped", "sampled_at_40", 0.31, 0.29, "no worse than one"),
        ("unclipped", "ratio_max", 3.1, 2.9, "largest ratio"),
        ("dynamic", "mixed_groups", 1.0, 0.999, "mixed groups only"),
    ],
)
def test_each_condition_can_fail(arm, figure, enough, too_little, words):
    assert concluded({(arm, figure): enough}).holds
    (name,) = failing(concluded({(arm, figure): too_little}))
    assert words in name


def test_a_short_run_asks_for_less():
    assert concluded({("dapo", "sampled_gain"): 0.09}, "smoke").holds
    assert failing(concluded({("dapo", "sampled_gain"): 0.07}, "smoke")) == ["dapo learns"]


def test_arms_run_what_they_are_called(monkeypatch):
    calls = {}

    def run(seed, *, signal, objective, sampler, **settings):
        calls[arm] = (signal.advantage.__name__, getattr(objective, "func", objective).__name__, objective, sampler)
        assert set(settings) <= {"steps", "eval_every", "eval_at", "passes", "mini_batches", "lr"}
        return {"figures": {}, "curves": {"sampled": [(0.0, 0.1), (40.0, 0.2)]}}

    monkeypatch.setattr(module, "sort_run", run)
    for unit in module.plan("full", 1):
        arm = unit.arm
        assert module.measure(unit)["figures"] == {"sampled_at_0": 0.1, "sampled_at_40": 0.2}
    assert {arm: call[:2] for arm, call in calls.items()} == {
        "grpo": ("grpo", "policy_gradient"),
        "rloo": ("rloo", "policy_gradient"),
        "dr_grpo": ("dr_grpo", "dr_grpo"),
        "dapo": ("grpo", "dapo"),
        "gspo": ("grpo", "gspo"),
        "clipped": ("grpo", "dapo"),
        "unclipped": ("grpo", "policy_gradient"),
        "dynamic": ("grpo", "dapo"),
    }
    assert calls["unclipped"][2].keywords == {"clip_low": None, "clip_high": None, "denominator": "per_token"}
    assert [arm for arm, call in calls.items() if call[3] is not None] == ["dynamic"]


@pytest.mark.slow
def test_a_smoke_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    evidence = runner.run(module, "smoke", jobs=1, progress=False)
    assert evidence.holds
