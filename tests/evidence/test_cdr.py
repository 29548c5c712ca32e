"""The claim test of density ratios: its measures, and a verdict that follows from the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guerdon.evidence import cdr
from guerdon.evidence.base import Evidence, Result, Results, Unit

FIGURES: dict[str, dict[str, float]] = {
    "gaps": {"correlation": 0.9, "correlation_upward": 0.8, "gap": 0.6, "accuracy": 0.9, "strong_alone": 0.6},
    "domains": {"accuracy": 0.8, "no_criterion": 0.6, "other_criterion": 0.3},
    **{
        name: {
            "quality_before": 0.6,
            "quality": 0.6 + gain,
            "gain": gain,
            "length": 8.0,
            "right_labels": 0.9,
            "pairs": 9.0,
        }
        for name, gain in (("ratio", 0.3), ("true-labels", 0.35), ("likelihood", 0.1))
    },
}


def concluded(changed: dict[str, dict[str, float]] | None = None, budget: Any = "full") -> Evidence:
    results = [
        Result(
            Unit(arm, seed),
            {name: value + 1e-3 * seed for name, value in (figures | (changed or {}).get(arm, {})).items()},
        )
        for arm, figures in FIGURES.items()
        if budget == "full" or arm == "gaps"
        for seed in range(3)
    ]
    return cdr.conclude(Results(results, budget))


def test_all_well() -> None:
    assert (concluded().holds, concluded().headline) == (True, "shown")
    short = concluded(budget="smoke")
    assert (short.holds, short.headline) == (True, "")
    assert not concluded({"gaps": {"correlation": 0.6}}, "smoke").holds


@pytest.mark.parametrize(
    ("arm", "changed", "failed"),
    [
        ("gaps", {"correlation": 0.69}, "the wider the gap"),
        ("gaps", {"correlation_upward": 0.2}, "also among those"),
        ("gaps", {"accuracy": 0.84}, "the widest gap ranks well"),
        ("gaps", {"strong_alone": 0.8}, "better than the strong model alone"),
        ("domains", {"no_criterion": 0.78}, "a criterion in the prompt"),
        ("true-labels", {"gain": 0.5}, "at least 70%"),
        ("likelihood", {"gain": 0.29}, "more than from the strong model's"),
    ],
)
def test_what_does_not_show_is_said(arm: str, changed: dict[str, float], failed: str) -> None:
    (check,) = [check for check in concluded({arm: changed}).checks if not check.holds]
    assert failed in check.name
    assert check.verdict == ("not shown at this scale" if check.kind == "headline" else "does not hold")


def test_accuracy_leaves_equals_out_and_counts_ties_as_wrong() -> None:
    worth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    rewards = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 1.0], [9.0, 1.0]])
    assert cdr.accuracy(rewards, worth) == pytest.approx(1 / 3)


def test_measures_run(diary: Any) -> None:
    """Each arm on models that have learnt next to nothing; the figures have the ranges of what they are."""
    found = cdr.measure(Unit("gaps", 0, {"steps": 2, "pairs": 20}))
    assert set(found["figures"]) == set(FIGURES["gaps"])
    assert len(found["curves"]["accuracy"]) == 10
    asked = cdr.measure(Unit("domains", 0, {"steps": 2, "pairs": 20}))["figures"]
    assert set(asked) == set(FIGURES["domains"])
    assert all(0 <= value <= 1 for value in asked.values())
    settings = {"steps": 2, "prompts": 12, "updates": 2, "batch_size": 4, "lr": 1e-3}
    for arm in cdr.LABELS:
        figures = cdr.measure(Unit(arm, 0, settings))["figures"]
        assert set(figures) == set(FIGURES[arm])
        assert figures["right_labels"] == 1.0 or arm != "true-labels"
        assert figures["gain"] == pytest.approx(figures["quality"] - figures["quality_before"])
