"""Every listed member of every stage under its stage's battery: a new method is tested by being listed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contracts.checks import BATTERIES, Check
from tests.contracts.fields import OPTIONS, VARIANTS
from tests.contracts.members import resolve, settings, table

CASES = [
    pytest.param(stage, *parameter.values, check, id=f"{stage}-{parameter.id}-{check.__name__}")
    for stage, checks in BATTERIES.items()
    for parameter in settings(stage)
    for check in checks
]


@pytest.mark.parametrize(("stage", "name", "options", "plain", "check"), CASES)
def test_member(stage: str, name: str, options: dict[str, Any], plain: bool, check: Check) -> None:
    check(resolve(stage, name, options, plain))


def test_options_are_of_members_that_exist() -> None:
    known = {f"{stage}.{name}" for stage in BATTERIES for name in table(stage)}
    assert set(OPTIONS) <= known
    assert set(VARIANTS) <= known
