"""Every file of reference numbers against the library, in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vectors.adapters import ADAPTERS, TOLERANCES

FOLDER = Path(__file__).parent
SLUGS = sorted(path.stem for path in FOLDER.glob("*.json"))
RELATIVE, ABSOLUTE = 1e-6, 1e-9


def cases() -> list[Any]:
    found = []
    for slug in SLUGS:
        for number, case in enumerate(json.loads((FOLDER / f"{slug}.json").read_text())["cases"]):
            found.append(pytest.param(slug, case, id=f"{slug}-{case.get('name', number)}"))
    return found


def differences(
    found: Any, expected: Any, path: str = "outputs", relative: float = RELATIVE, absolute: float = ABSOLUTE
) -> list[str]:
    """Where two nested results differ: keys and lengths exactly, words exactly, numbers within the tolerances."""
    if hasattr(found, "tolist"):
        found = found.tolist()
    if isinstance(expected, dict):
        if not isinstance(found, dict) or set(found) != set(expected):
            keys = sorted(found) if isinstance(found, dict) else found
            return [f"{path}: keys {keys}, expected {sorted(expected)}"]
        both = [(f"{path}.{key}", found[key], expected[key]) for key in expected]
        return [line for place, f, e in both for line in differences(f, e, place, relative, absolute)]
    if isinstance(expected, list):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            return [f"{path}: {found}, expected a list of {len(expected)}"]
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, (f, e) in pairs for line in differences(f, e, f"{path}[{i}]", relative, absolute)]
    if isinstance(expected, bool) or isinstance(found, bool) or not isinstance(expected, (int, float)):
        return [] if found == expected else [f"{path}: {found!r}, expected {expected!r}"]
    if not isinstance(found, (int, float)):
        return [f"{path}: {found!r}, expected {expected!r}"]
    same = math.isclose(found, expected, rel_tol=relative, abs_tol=absolute)
    both_nan = math.isnan(found) and math.isnan(expected)
    return [] if same or both_nan else [f"{path}: {found!r}, expected {expected!r}"]


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(("slug", "case"), cases())
def test_reference_numbers(slug: str, case: dict[str, Any]) -> None:
    assert slug in ADAPTERS, f"{slug}.json has no adapter in tests/vectors/adapters.py"
    tolerances = {"relative": TOLERANCES[slug], "absolute": TOLERANCES[slug]} if slug in TOLERANCES else {}
    wrong = differences(ADAPTERS[slug](case["inputs"]), case["outputs"], **tolerances)
    assert not wrong, "\n".join(wrong[:20])


def test_every_adapter_has_a_file() -> None:
    assert sorted(ADAPTERS) == SLUGS


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (1.0, 1.00001),
        ([1.0], [1.0, 2.0]),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0}),
        (math.nan, 1.0),
        (True, 0.0),
        ("x", "y"),
        (torch.tensor([[1.0, 2.0]]), [[1.0, 3.0]]),
        (None, 0.0),
    ],
)
def test_a_difference_is_seen(found: Any, expected: Any) -> None:
    assert differences(found, expected)


def test_what_is_equal_is_not_a_difference() -> None:
    assert differences({"a": torch.tensor([1.0, math.nan]), "b": "x"}, {"a": [1.0 + 1e-9, math.nan], "b": "x"}) == []
