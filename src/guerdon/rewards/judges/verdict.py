"""Reading a verdict out of what a model wrote.

A verdict is a JSON object with the keys `first` and `second`, each a number or, with a rubric, an object with a number
for every criterion; further keys, such as reasons, are let be.
Strict: the whole reply is that object.
Lenient: the last object in the reply that is a verdict counts, so that reasoning, a code fence or a remark may stand
around it; keys may be in any case, and numbers may be in quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from guerdon.rewards.judges.rubric import Rubric

Parsing = Literal["strict", "lenient"]
_LONGEST = 20_000  # characters that are looked at, from the end
_START = re.compile(r'\{\s*"')
_NUMBER = re.compile(r"\s*[-+]?\d{1,9}(\.\d{1,9})?\s*")


def read_verdict(reply: str, rubric: Rubric | None = None, parsing: Parsing = "lenient") -> tuple[float, float] | None:
    """Scores of the first and the second answer, or None for a reply that is no verdict.

    Args:
        reply: what the model wrote.
        rubric: what it was asked to go by; None = one score from 0 to 10.
        parsing: `strict` or `lenient`, see above.

    Example:
        >>> read_verdict('{"first": 7, "second": 4.5}', parsing="strict")
        (7.0, 4.5)
        >>> read_verdict('The second is terse. {"First": "7", "SECOND": 4}')
        (7.0, 4.0)
        >>> read_verdict('{"first": 11, "second": 4}') is None
        True
    """
    rubric = rubric or Rubric()
    content = _verdict(reply, rubric, parsing)
    return None if content is None else _scores(content, rubric)


def read_categories(reply: str, rubric: Rubric, parsing: Parsing = "lenient") -> dict[str, tuple[float, float]]:
    """Points of both answers from 0 to 10 for every criterion; empty without criteria, and for no verdict.

    Args:
        reply: what the model wrote.
        rubric: what it was asked to go by.
        parsing: `strict` or `lenient`, see above.

    Example:
        >>> rubric = Rubric({"answer": {"levels": {0: "wrong", 2: "right"}}})
        >>> read_categories('{"first": {"answer": 2}, "second": {"answer": 1}}', rubric)
        {'answer': (10.0, 5.0)}
    """
    content = _verdict(reply, rubric, parsing)
    if content is None or not rubric.criteria:
        return {}
    first, second = (rubric.points(content[side]) for side in ("first", "second"))
    return {name: (first[name], second[name]) for name in first}


def _verdict(reply: str, rubric: Rubric, parsing: Parsing) -> Any:
    """The object that is the verdict, or None."""
    if parsing == "strict":
        content = _loads(reply)
        return None if _scores(content, rubric) is None else content
    found = None
    for candidate, _ in json_objects(reply[-_LONGEST:]):
        content = _loosened(candidate)
        found = found if _scores(content, rubric) is None else content
    return found


def _scores(content: Any, rubric: Rubric) -> tuple[float, float] | None:
    if not isinstance(content, Mapping):
        return None
    first, second = rubric.combine(content.get("first")), rubric.combine(content.get("second"))
    return None if first is None or second is None else (first, second)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # what is no JSON is no verdict
        return None


def json_objects(text: str) -> Iterator[tuple[Any, int]]:
    """The JSON objects that stand in a text and where each begins, those inside one another left out."""
    decoder = json.JSONDecoder()
    start = _START.search(text)
    while start is not None:
        end = start.end()
        try:
            content, end = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):  # no JSON from this brace on
            pass
        else:
            yield content, start.start()
        start = _START.search(text, end)


def _loosened(value: Any, depth: int = 2) -> Any:
    """Keys in lower case and quoted numbers as numbers, down to the criteria."""
    if isinstance(value, Mapping) and depth:
        lowered = {str(key).lower(): _loosened(entry, depth - 1) for key, entry in value.items()}
        return {**lowered, **{key: _loosened(entry, depth - 1) for key, entry in value.items()}}
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value
