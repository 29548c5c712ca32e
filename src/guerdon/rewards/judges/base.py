"""What a judge of pairs is, how it is named and how it is asked."""

from __future__ import annotations

import asyncio
import math
import numbers
import threading
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from guerdon.components import build
from guerdon.errors import ScoreError

SCALE = (0.0, 10.0)


class Match(NamedTuple):
    """Two samples of one prompt to be compared.

    Attributes:
        prompt: what both were sampled for.
        first: the sample that is shown first.
        second: the other.
        columns: what else the prompt's data row carries.
    """

    prompt: Any
    first: Any
    second: Any
    columns: Mapping[str, Any] = {}

    def swapped(self) -> Match:
        """The same match with the samples shown in the other order."""
        return self._replace(first=self.second, second=self.first)


class Verdict(NamedTuple):
    """What a judge says of a match.

    Attributes:
        first: points of the sample shown first, in the judge's unit; NaN = no verdict.
        second: points of the other.
        calls: how often a model was called for it, tries that failed included.
        malformed: how many of its replies could not be read.
        why: why there is no verdict.
        categories: points of both in each category that was judged apart, such as the criteria of a rubric.
    """

    first: float
    second: float
    calls: int = 1
    malformed: int = 0
    why: str = ""
    categories: Mapping[str, tuple[float, float]] = {}

    @property
    def failed(self) -> bool:
        """Whether there is no verdict."""
        return not (math.isfinite(self.first) and math.isfinite(self.second))


Answer = Verdict | tuple[float, float] | None


class Judge(Protocol):
    """A callable, or coroutine function, from matches to one answer for each, in order.

    An answer is a `Verdict`, a plain pair of points, or None where the judge has no verdict. It may carry `scale`, the
    lowest and the highest points it gives.
    """

    def __call__(self, matches: Sequence[Match], /) -> Sequence[Answer] | Awaitable[Sequence[Answer]]:
        """Judge every match."""
        ...


def resolve(judge: Any, where: str, stage: str = "rewards.judges") -> Any:
    """A judge from a recipe (a name, {name: {option: value}} or `module:attribute`), or a callable as it is.

    Args:
        judge: what the recipe says.
        where: opens the errors.
        stage: the package that names are looked up in; `rewards` for a judge that is made of a reward.

    Raises:
        UnknownNameError: there is nothing of that name.
        RecipeError: an option does not exist, is missing or has a wrong type.
    """
    return judge if callable(judge) else build(stage, judge, where)


def both_orders(matches: Sequence[Match]) -> list[Match]:
    """Every match, and after it the same match with its samples swapped: a judge's liking for a place cancels out."""
    return [shown for match in matches for shown in (match, match.swapped())]


def read_answers(answers: Any, matches: Sequence[Match], where: str) -> list[Verdict]:
    """A judge's answers as verdicts.

    Args:
        answers: what it returned.
        matches: what it was asked.
        where: opens the errors.

    Raises:
        ScoreError: there is not one answer per match, or an answer is none.
    """
    found = answers.tolist() if hasattr(answers, "tolist") else answers
    if not isinstance(found, (list, tuple)) or len(found) != len(matches):
        got = f"{len(found)}" if isinstance(found, (list, tuple)) else f"{type(found).__name__} {found!r:.80}"
        raise ScoreError(f"{where}: a judge must return one answer for each of {len(matches)} matches; got {got}.")
    return [_read(answer, match, where) for answer, match in zip(found, matches, strict=True)]


def _read(answer: Any, match: Match, where: str) -> Verdict:
    if isinstance(answer, Verdict):
        return answer
    if answer is None:
        return Verdict(math.nan, math.nan, why="the judge returned None")
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if isinstance(answer, (tuple, list)) and len(answer) == 2:
        first, second = (point.item() if hasattr(point, "item") else point for point in answer)
        if isinstance(first, numbers.Real) and isinstance(second, numbers.Real):
            verdict = Verdict(float(first), float(second))
            return verdict._replace(why=f"the judge returned {answer!r:.60}") if verdict.failed else verdict
    raise ScoreError(
        f"{where}: a judge must answer a match with two numbers, the points of the first and of the second sample, or "
        f"None; got {answer!r:.80} for the prompt {match.prompt!r:.80}."
    )


def wait_for(value: Awaitable[Any]) -> Any:
    """The result of an awaitable, also where an event loop already runs (a notebook)."""
    result: list[Any] = []

    async def main() -> None:
        try:
            result.append((True, await value))
        except Exception as error:  # carried over to the thread that waits
            result.append((False, error))

    worker = threading.Thread(target=lambda: asyncio.run(main()))
    worker.start()
    worker.join()
    fine, content = result[0]
    if not fine:
        raise content
    return content
