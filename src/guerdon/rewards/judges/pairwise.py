"""A function of one pair as a judge."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from guerdon.errors import RecipeError
from guerdon.rewards.judges.base import Answer, Match


class PairwiseJudge:
    """Calls a function (prompt, first, second) for every match; a coroutine function is called for many at a time.

    The function returns the points of both, or one number in [0, 1], which is how far the first is preferred (1 = it
    wins, 0.5 = a draw), or None for no verdict. Errors it raises are not caught.

    Args:
        function: a callable, or `module:attribute`.
        concurrency: calls of a coroutine function that run at a time.

    Raises:
        RecipeError: the function cannot be called, or concurrency is below 1.

    Example:
        >>> judge = PairwiseJudge(function=lambda prompt, first, second: float(len(first) > len(second)))
        >>> judge([Match("p", "aa", "b")])
        [(1.0, 0.0)]

    Source:
        The form of a judge in Pref-GRPO, arXiv 2508.20751.
    """

    def __init__(self, *, function: Any, concurrency: int = 16) -> None:
        if isinstance(function, str):
            module, _, name = function.partition(":")
            function = getattr(importlib.import_module(module), name, None) if module and name else None
        if not callable(function):
            raise RecipeError("judges.pairwise.function: it must be a callable, or module:attribute that names one.")
        if concurrency < 1:
            raise RecipeError(f"judges.pairwise.concurrency: must be 1 or more; got {concurrency}.")
        self.function: Callable[..., Any] = function
        self.concurrency = concurrency

    def __call__(self, matches: Sequence[Match]) -> list[Answer] | Awaitable[list[Answer]]:
        """Judge every match.

        Args:
            matches: any number of them.

        Returns:
            One answer per match; to be awaited if the function is a coroutine function.
        """
        if inspect.iscoroutinefunction(self.function):
            return self._side_by_side(matches)
        return [_points(self.function(match.prompt, match.first, match.second)) for match in matches]

    async def _side_by_side(self, matches: Sequence[Match]) -> list[Answer]:
        room = asyncio.Semaphore(self.concurrency)

        async def one(match: Match) -> Answer:
            async with room:
                return _points(await self.function(match.prompt, match.first, match.second))

        return list(await asyncio.gather(*(one(match) for match in matches)))


def _points(result: Any) -> Any:
    if isinstance(result, (int, float)):
        return float(result), 1.0 - result
    return result


pairwise = PairwiseJudge
