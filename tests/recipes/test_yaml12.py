"""YAML with the scalars of version 1.2."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.recipes.yaml12 import dumps, loads, scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-6", 1e-6),
        ("3E5", 3e5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("7", 7),
        ("-7", -7),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("1_000", "1_000"),
        ("'1'", "1"),
        ("mypkg.mod:fn", "mypkg.mod:fn"),
        ("[0.9, 0.99]", [0.9, 0.99]),
        ("{a: 1e-3}", {"a": 1e-3}),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = loads(text)
    assert found == value
    assert type(found) is type(value)


def test_a_key_given_twice_is_an_error() -> None:
    with pytest.raises(yaml.YAMLError, match="'lr' stands twice"):
        loads("optim:\n  lr: 1\n  lr: 2\n")


def test_merge_keys_work() -> None:
    assert loads("a: &a {x: 1}\nb: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


def test_nothing_but_data_is_constructed() -> None:
    with pytest.raises(yaml.YAMLError):
        loads("!!python/object/apply:os.getcwd []")


def test_words_that_are_not_yaml_are_text() -> None:
    assert scalar("[0-9]+ = x") == "[0-9]+ = x"
    assert scalar("a: b: c") == "a: b: c"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
@given(values)
def test_what_is_written_reads_back(value: Any) -> None:
    found = loads(dumps(value))
    assert found == value
    assert type(found) is type(value)


@settings(max_examples=40)
@given(
    st.from_regex(r"[-+]?[0-9.]{1,3}([eE][-+]?[0-9]{1,2})?", fullmatch=True)
    | st.sampled_from(["no", "yes", "null", "~"])
)
def test_text_that_looks_like_something_else_stays_text(value: str) -> None:
    assert loads(dumps({"a": value})) == {"a": value}
