"""Values against annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from guerdon.errors import RecipeError
from guerdon.typed import convert, describe


@dataclass
class Inner:
    x: float = 1.0
    y: int = 2


@dataclass
class Outer:
    inner: Inner = field(default_factory=lambda: Inner(y=7))
    maybe: Inner | None = None


@pytest.mark.parametrize(
    ("value", "wanted", "result"),
    [
        (3, float, 3.0),
        (1e3, int, 1000),
        (True, bool, True),
        (None, None, None),
        (None, float | None, None),
        (3, float | None, 3.0),
        (3, float | int, 3),
        ("all", str | list[str], "all"),
        (["a"], str | list[str], ["a"]),
        ("b", Literal["a", "b"], "b"),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, 2, 3], tuple[float, ...], (1.0, 2.0, 3.0)),
        ((1, 2), list[float], [1.0, 2.0]),
        ([1], Sequence[float], [1.0]),
        ([1, "a"], list, [1, "a"]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": 1}, Mapping[str, float], {"a": 1.0}),
        ("x", Path, Path("x")),
        (object, Any, object),
        ({"y": 5}, Inner, Inner(1.0, 5)),
        ({"inner": {"x": 3}}, Outer, Outer(Inner(3.0, 7))),
        ({"maybe": {}}, Outer, Outer(maybe=Inner())),
    ],
    ids=str,
)
def test_converted(value: Any, wanted: Any, result: Any) -> None:
    found = convert(value, wanted, "here")
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(
    ("value", "wanted", "said"),
    [
        (1, bool, "here: must be true or false; got 1."),
        (True, int, "here: must be a whole number; got True."),
        (float("nan"), float, "here: must be a number; got nan."),
        (float("inf"), int, "here: must be a whole number; got inf."),
        ("1", float, "here: must be a number; got '1'."),
        (1, Literal["1", "2"], "here: must be one of '1', '2'; got 1. Did you mean '1'?"),
        (True, Literal[1], "here: must be 1; got True."),
        ("x", float | None, "here: must be a number or null; got 'x'."),
        ("x", list[int], "here: must be a list, each a whole number; got 'x'."),
        ([1, "x"], list[int], "here[1]: must be a whole number; got 'x'."),
        ([1, "x"], list[int] | None, "here[1]: must be a whole number; got 'x'."),
        ({"a": "x"}, dict[str, int], "here.a: must be a whole number; got 'x'."),
        ({"z": 1}, Inner, "here.z: there is no such setting (given: 1). Settings of here: x, y."),
        ({"maybe": {"x": "q"}}, Outer, "here.maybe.x: must be a number; got 'q'."),
        ({"y": 3}, Outer, "Did you mean 'inner.y' or 'maybe.y'?"),
        (3, Inner, "here: must be a mapping with x, y; got 3."),
    ],
    ids=str,
)
def test_refused(value: Any, wanted: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        convert(value, wanted, "here")
    assert said in str(caught.value)


def test_every_kind_has_words() -> None:
    assert describe(dict[str, int]) == "a mapping, each value a whole number"
    assert describe(tuple[int, ...]) == "a list, each a whole number"
    assert describe(Path) == "a path"
    assert describe(object) == "object"
