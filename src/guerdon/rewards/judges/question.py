"""What a language model that judges is asked, and how its reply is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from guerdon.errors import DataError, RecipeError
from guerdon.rewards.judges.asking import Answer
from guerdon.rewards.judges.base import Match, Verdict
from guerdon.rewards.judges.rubric import Rubric
from guerdon.rewards.judges.verdict import Parsing, read_categories, read_verdict

SYSTEM = (
    "You compare two answers to the same task. Judge what they say and how they got there, not their length or order."
)
TEMPLATE = """\
Task:
{prompt}

First answer:
{first}

Second answer:
{second}

{rubric}
Think it over, then end with one JSON object and nothing after it:
{form}
"""
_PLACE = re.compile(r"\{(\w+)\}")


class Question:
    """A template with a rubric.

    Args:
        where: opens the errors.
        template: text with the places {first} and {second}, and any of {prompt}, {rubric}, {form} (the JSON that is
            expected) and the names of data columns. Braces around anything but one name are let be.
        system: a message that goes before it; empty = none.
        rubric: see `Rubric`.
        parsing: see `guerdon.rewards.judges.verdict`.

    Raises:
        RecipeError: the template does not show both answers, or parsing is unknown.
    """

    def __init__(
        self,
        where: str,
        *,
        template: str = TEMPLATE,
        system: str = SYSTEM,
        rubric: Mapping[str, Any] | None = None,
        parsing: Parsing = "lenient",
    ) -> None:
        missing = {"first", "second"} - places(template)
        if missing:
            raise RecipeError(
                f"{where}.template: it must show both answers; there is no {{{sorted(missing)[0]}}} in it."
            )
        if parsing not in ("strict", "lenient"):
            raise RecipeError(f"{where}.parsing: must be strict or lenient; got {parsing!r}.")
        self.where, self.template, self.system = where, template, system
        self.rubric = Rubric(rubric, f"{where}.rubric")
        self.parsing: Parsing = parsing

    def text(self, match: Match) -> str:
        """The template with everything in its place.

        Raises:
            DataError: it names a column that the data does not have.
        """
        form = f'{{"first": {self.rubric.example()}, "second": {self.rubric.example()}}}'
        parts = {
            **match.columns,
            "prompt": match.prompt,
            "first": match.first,
            "second": match.second,
            "rubric": self.rubric.text(),
            "form": form,
        }
        return filled(self.template, parts, self.where)

    def messages(self, match: Match) -> list[dict[str, str]]:
        """The question as a chat."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        return [*start, {"role": "user", "content": self.text(match)}]

    def plain(self, match: Match) -> str:
        """The question for a model without a chat template."""
        return f"{self.system}\n\n{self.text(match)}" if self.system else self.text(match)

    def read(self, reply: str) -> tuple[float, float] | None:
        """The scores in a reply, or None."""
        return read_verdict(reply, self.rubric, self.parsing)

    def categories(self, reply: str) -> dict[str, tuple[float, float]]:
        """The points in a reply for each criterion of the rubric, from 0 to 10."""
        return read_categories(reply, self.rubric, self.parsing)

    def verdict(self, reply: str) -> tuple[tuple[tuple[float, float], dict[str, tuple[float, float]]] | None, str]:
        """Scores and points by category, or None and why."""
        scores = self.read(reply)
        if scores is None:
            return None, f"no verdict in the reply {reply[-120:]!r}"
        return (scores, self.categories(reply)), ""


def places(template: str) -> set[str]:
    """The names in braces of a template."""
    return set(_PLACE.findall(template))


def filled(template: str, parts: Mapping[str, Any], where: str) -> str:
    """A template with everything in its place.

    Raises:
        DataError: it names what there is not.
    """

    def fill(place: re.Match[str]) -> str:
        if place[1] not in parts:
            raise DataError(f"{where}.template: {place[0]} names nothing. There are: {', '.join(sorted(parts))}.")
        return shown(parts[place[1]])

    # in one pass: what a sample says is never taken for a place of the template
    return _PLACE.sub(fill, template)


def as_verdict(answer: Answer) -> Verdict:
    """What came of a question, read by `Question.verdict`, as a verdict."""
    (first, second), categories = answer.content or ((math.nan, math.nan), {})
    return Verdict(first, second, answer.calls, answer.malformed, answer.why, categories)


def shown(value: Any) -> str:
    """A prompt, sample or column as text: messages with their roles and tool calls, a text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Mapping) for part in value):
        return "\n".join(_message(part) for part in value)
    return str(value)


def _message(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    more = f" {json.dumps(calls, ensure_ascii=False, default=str)}" if calls else ""
    return f"{message.get('role', '')}: {message.get('content') or ''}{more}"
