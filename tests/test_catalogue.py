"""The catalogue: complete, and honest about what is built."""

from __future__ import annotations

import pytest

from guerdon.catalogue import METHODS, PACKAGES, Method, exported, select
from guerdon.errors import UnknownNameError
from guerdon.members import STAGES, facts, members


def test_every_method_is_there_once() -> None:
    slugs = [method.slug for method in METHODS]
    assert len(slugs) == len(set(slugs))
    assert sum(method.kind == "method" for method in METHODS) == 49


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_entries_are_well_formed(method: Method) -> None:
    assert method.homes
    assert all(home.split(".")[0] in PACKAGES and home.count(".") == 1 for home in method.homes)
    assert method.source.startswith("arXiv ") or method.source == "common practice"
    assert 20 < len(method.line) < 110


def test_what_a_stage_exports_belongs_to_a_method() -> None:
    homes = {home for method in METHODS for home in method.homes}
    orphans = [
        f"{stage}.{name}"
        for stage in STAGES
        for name, module in members(stage).items()
        if f"{stage}.{name}" not in homes and f"{stage}.{module}" not in homes
    ]
    assert orphans == [], "add these to the homes of their method in guerdon/catalogue.py"


def test_state_is_read_from_the_tables() -> None:
    assert exported("advantages.grpo")
    assert exported("advantages.group")
    assert not exported("advantages.no_such_thing")
    assert not exported("no_such_package.thing")
    states = {method.slug: method.state for method in METHODS}
    assert states["basics"] == "built"
    for method in METHODS:
        assert method.built == (not method.missing) == (states[method.slug] == "built")


def test_selection_by_stage() -> None:
    assert [m.slug for m in select("weighting")] == [
        "quark-medical",
        "constrained-rlhf",
        "dynamic-weighting",
        "derl",
        "basics",
    ]
    with pytest.raises(UnknownNameError, match=r"no stage 'reward'. Did you mean 'rewards'"):
        select("reward")


@pytest.mark.parametrize(("stage", "name"), [(s, n) for s in STAGES for n in members(s)])
def test_every_member_can_be_described_from_its_source(stage: str, name: str) -> None:
    known = facts(stage, name)
    assert known.summary
    assert known.options is not None
