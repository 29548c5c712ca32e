"""Units, results, checks and the record."""

from __future__ import annotations

import doctest
import json
import math

import pytest

from guerdon.evidence import base
from guerdon.evidence.base import (
    Arm,
    Check,
    Evidence,
    EvidenceError,
    Result,
    Results,
    Unit,
    at_least,
    at_most,
    compare,
)


def evidence(*checks: Check, **changed) -> Evidence:
    arms = (Arm("a", "method", {"accuracy": [0.5, 0.7]}, {"loss": [[(0.0, 1.0), (1.0, 0.5)]]}, {"lr": 0.1}),)
    return Evidence("toy", "Toy", "It works.", "Nobody", arms, checks or (Check("m", "x > 0", True),), **changed)


def test_examples():
    assert doctest.testmod(base).failed == 0


def test_a_key_names_the_unit_and_the_code():
    unit = Unit("a", 0, {"lr": 0.1, "steps": 3})
    assert unit.key("code") == Unit("a", 0, {"steps": 3, "lr": 0.1}).key("code")
    others = [Unit("b", 0, unit.settings), Unit("a", 1, unit.settings), Unit("a", 0, {"lr": 0.2, "steps": 3})]
    others.append(Unit("a", 0, unit.settings, "tune"))
    keys = {unit.key("code"), unit.key("other code"), *(other.key("code") for other in others)}
    assert len(keys) == 6
    assert hash(unit) == hash(Unit("a", 0, {"steps": 3, "lr": 0.1}))


def test_a_unit_in_words():
    assert str(Unit("a", 2, {"lr": 3e-4, "loss": "dapo"})) == "a (measure, seed 2, lr 0.0003, loss dapo)"


def results() -> Results:
    rows = [Result(Unit("a", seed, {"lr": 0.1}), {"x": float(seed)}, {"c": [(0.0, float(seed))]}) for seed in (2, 0, 1)]
    tried = {0.1: (1.0, 2.0), 0.2: (5.0, 0.0), 0.3: (9.0, math.nan)}
    rows += [
        Result(Unit("a", 100 + i, {"lr": lr}, "tune"), {"x": value})
        for lr, values in tried.items()
        for i, value in enumerate(values)
    ]
    return Results(rows)


def test_results_of_an_arm_by_seed():
    assert results().values("a", "x") == [0.0, 1.0, 2.0]
    arm = results().arm("a", "method")
    assert (arm.figures, arm.settings, arm.n) == ({"x": [0.0, 1.0, 2.0]}, {"lr": 0.1}, 3)
    assert arm.curves["c"] == [[(0.0, 0.0)], [(0.0, 1.0)], [(0.0, 2.0)]]
    assert (arm.mean("x"), arm.sd("x")) == (1.0, 1.0)


def test_the_best_settings_have_the_best_mean_and_no_diverged_run():
    assert results().best("x") == {"a": {"lr": 0.2}}
    assert results().best("x", better="low") == {"a": {"lr": 0.1}}


def test_results_that_are_not_there():
    with pytest.raises(EvidenceError, match=r"no measure results of arm 'b'.*There are: \['a'\]"):
        results().of("b")
    with pytest.raises(EvidenceError, match=r"a \(measure, seed 0, lr 0.1\) gave no figure 'y'.*It gave: x"):
        results().values("a", "y")


def test_bounds():
    assert at_least("x", [0.5, 0.7], 0.6).holds
    assert not at_least("x", [0.5, 0.7], 0.61).holds
    assert not at_least("x", [1.0, math.nan], 0.0).holds
    assert at_most("x", [0.5, 0.7], 0.6).holds
    assert not at_most("x", [0.5, 0.7], 0.59).holds
    assert not at_most("x", [1.0, math.nan], 9.0).holds
    check = at_least("x", [0.5, 0.75], 0.61, what="gain")
    assert check.condition == "gain >= 0.61"
    assert check.figures["method"] == 0.625
    assert check.figures["spread"] == pytest.approx(0.25 / math.sqrt(2))


def test_comparison_on_the_same_seeds():
    better = compare("x", [0.6, 0.8], [0.5, 0.5], margin=0.2)
    assert better.holds
    assert better.figures == pytest.approx(
        {"method": 0.7, "baseline": 0.5, "difference": 0.2, "spread": 0.2 / math.sqrt(2)}
    )
    assert not compare("x", [0.6, 0.8], [0.5, 0.5], margin=0.21).holds
    assert compare("x", [0.5, 0.5], [0.6, 0.8], better="low").holds
    assert not compare("x", [0.6, 0.8], [0.5, 0.5], better="low").holds
    assert compare("x", [0.5], [0.55], margin=-0.1).holds
    assert not compare("x", [math.nan], [0.5]).holds


def test_comparison_with_standard_errors():
    # mean 0.2, standard error 0.1
    assert compare("x", [0.1, 0.3], [0.0, 0.0], errors=1.9).holds
    assert not compare("x", [0.1, 0.3], [0.0, 0.0], errors=2.1).holds
    assert "standard errors" in compare("x", [0.1, 0.3], [0.0, 0.0], errors=2.1).condition
    assert compare("x", [0.1], [0.0], errors=9.0).holds  # a single seed has no standard error


def test_comparison_needs_the_same_seeds():
    with pytest.raises(EvidenceError, match="2 seeds of the method against 1"):
        compare("x", [1.0, 2.0], [1.0])
    with pytest.raises(EvidenceError, match="0 seeds"):
        compare("x", [], [])


def test_verdicts():
    yes, no = Check("m", "c", True), Check("m", "c", False)
    shown, unseen = Check("h", "c", True, "headline"), Check("h", "c", False, "headline")
    assert (yes.verdict, no.verdict) == ("holds", "does not hold")
    assert (shown.verdict, unseen.verdict) == ("shown", "not shown at this scale")
    assert evidence(yes, unseen).holds
    assert evidence(yes, shown, unseen).headline == "not shown at this scale"
    assert evidence(yes, shown).headline == "shown"
    assert evidence(yes).headline == ""
    assert not evidence(yes, no, shown).holds
    assert evidence(yes, unseen).verdict == "mechanism holds, headline not shown at this scale"
    assert evidence(no).verdict == "mechanism does not hold"


def test_evidence_without_a_mechanism_is_refused():
    with pytest.raises(EvidenceError, match="at least one mechanism check"):
        evidence(Check("h", "c", True, "headline"))


def test_the_record_can_be_read_back():
    check = Check("m", "x > 0", False, figures={"method": math.nan, "baseline": 1.0})
    first = evidence(check, notes=("n",), shown=("loss",), budget="full", seeds=(0, 1), seconds=1.5)
    text = first.to_json()
    record = json.loads(text)
    assert (record["holds"], record["headline"]) == (False, "")
    assert record["checks"][0]["figures"]["method"] is None
    again = Evidence.from_json(text)
    assert again.arms == first.arms
    assert (again.seeds, again.notes, again.shown, again.seconds) == ((0, 1), ("n",), ("loss",), 1.5)
    assert math.isnan(again.checks[0].figures["method"])
    assert again.to_json() == text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"slug": 1}'])
def test_something_else_is_no_record(text):
    with pytest.raises(EvidenceError, match="not the record of a claim test"):
        Evidence.from_json(text)


def test_what_is_shown():
    assert evidence().table == ["accuracy"]
    assert evidence().drawn == ["loss"]
    assert evidence(shown=("accuracy",)).drawn == []
    assert evidence(shown=("loss",)).drawn == ["loss"]


def test_first_reach():
    points = [(0.0, 0.1), (100.0, 0.1), (200.0, 0.3)]
    assert base.first_reach(0.1, points) == 0.0
    assert base.first_reach(0.2, points) == pytest.approx(150.0)
    assert base.first_reach(0.4, points) == math.inf


def test_rate_plan_tunes_on_seeds_of_its_own():
    units = base.rate_plan(
        "ab", {"steps": 3}, (0.1, 0.2), 2, trials=1, tuned={"a": {"steps": 3, "lr": 0.2}}, default=0.1
    )
    tried = [(u.arm, u.seed, u.settings["lr"]) for u in units if u.role == "tune"]
    measured = [(u.arm, u.seed, u.settings["lr"]) for u in units if u.role == "measure"]
    assert tried == [("a", 100, 0.1), ("a", 100, 0.2), ("b", 100, 0.1), ("b", 100, 0.2)]
    assert measured == [("a", 0, 0.2), ("a", 1, 0.2), ("b", 0, 0.1), ("b", 1, 0.1)]
