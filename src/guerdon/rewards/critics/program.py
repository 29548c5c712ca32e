"""A function of one response as a critic: a rule, a unit test, a program that traces which lines failed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from guerdon.components import imported
from guerdon.errors import RecipeError
from guerdon.rewards.critics.base import Remark, Response


class ProgramCritic:
    """Calls a function (prompt, response, and the data columns it names) for every response.

    It returns a remark: a `Feedback`, a reply to be read, a mapping with good_spans and poor_spans, or None. Of a coroutine
    function many calls run at a time. Errors it raises are not caught.

    Args:
        function: a callable, or `module:attribute`.
        concurrency: calls of a coroutine function that run at a time.

    Raises:
        RecipeError: the function cannot be called, or concurrency is below 1.

    Example:
        >>> critic = ProgramCritic(function=lambda prompt, response: {"good_spans": [], "poor_spans": response.split()[3:]})
        >>> critic([Response("be short", "one two three four")])
        [{'good_spans': [], 'poor_spans': ['four']}]

    Source:
        Rules and programs as annotators: arXiv 2505.22338.
    """

    def __init__(self, *, function: Any, concurrency: int = 16) -> None:
        where = "critics.program.function"
        function = imported(function, where) if isinstance(function, str) else function
        if not callable(function):
            raise RecipeError(f"{where}: it must be a callable, or module:attribute that names one.")
        if concurrency < 1:
            raise RecipeError(f"critics.program.concurrency: must be 1 or more; got {concurrency}.")
        self.function: Callable[..., Any] = function
        self.concurrency = concurrency
        parameters = list(inspect.signature(function).parameters.values())
        self.anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.taken = {p.name for p in parameters[:2]}
        self.named = {p.name for p in parameters[2:] if p.kind is not p.VAR_KEYWORD}

    def __call__(self, responses: Sequence[Response]) -> list[Remark] | Awaitable[list[Remark]]:
        """Criticise every response.

        Args:
            responses: any number of them.

        Returns:
            One remark per response; to be awaited if the function is a coroutine function.
        """
        if inspect.iscoroutinefunction(self.function):
            return self._side_by_side(responses)
        return [self.function(one.prompt, one.text, **self._columns(one)) for one in responses]

    def _columns(self, response: Response) -> dict[str, Any]:
        wanted = response.columns if self.anything else self.named & response.columns.keys()
        return {name: response.columns[name] for name in wanted if name not in self.taken}

    async def _side_by_side(self, responses: Sequence[Response]) -> list[Remark]:
        room = asyncio.Semaphore(self.concurrency)

        async def one(response: Response) -> Remark:
            async with room:
                return await self.function(response.prompt, response.text, **self._columns(response))

        return list(await asyncio.gather(*(one(response) for response in responses)))


program = ProgramCritic
