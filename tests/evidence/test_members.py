"""What every claim test must be; one that is listed is tested here."""

from __future__ import annotations

from collections import Counter

import pytest

from guerdon import catalogue, evidence
from guerdon.cli.reproduce import constants
from guerdon.errors import UnknownNameError
from guerdon.evidence import runner
from guerdon.evidence.base import BUDGETS


@pytest.mark.parametrize("slug", evidence.MEMBERS)
def test_is_named_and_described(slug):
    module = evidence.find(slug)
    assert slug == module.SLUG
    assert slug in {*(method.slug for method in catalogue.METHODS), *evidence.OWN}
    assert constants(slug) == {name: getattr(module, name) for name in ("SLUG", "TITLE", "PAPER", "CLAIM")}
    assert all(constants(slug).values())


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("slug", evidence.MEMBERS)
def test_the_plan_keeps_the_rules(slug, budget):
    module = evidence.find(slug)
    for seeds in (1, 3):
        units = runner.checked(module, module.plan(budget, seeds))
        if hasattr(module, "tune"):
            # whatever is picked, the second plan keeps the rules too and measures with it
            trials = [unit for unit in units if unit.role == "tune"]
            tuned = {unit.arm: dict(unit.settings) for unit in trials}
            units = runner.checked(module, module.plan(budget, seeds, tuned))
        measured = Counter(unit.arm for unit in units if unit.role == "measure")
        assert set(measured.values()) == {seeds}
        assert {unit.seed for unit in units if unit.role == "measure"} == set(range(seeds))


def test_one_that_is_not_there():
    with pytest.raises(UnknownNameError, match="Did you mean 'grpo-family'"):
        evidence.find("grpo-famly")
