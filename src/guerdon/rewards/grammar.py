"""What may follow the beginning of a reward expression, so that a model can be kept to expressions while it writes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from guerdon.errors import RecipeError
from guerdon.rewards.expression import DEEPEST

# a number so far: what it is called -> by which character it becomes what; d is a digit
_NUMBERS: dict[str, dict[str, str]] = {
    "zero": {"0": "zero", ".": "fraction", "e": "mark"},
    "whole": {"d": "whole", ".": "fraction", "e": "mark"},
    "point": {"d": "fraction"},
    "fraction": {"d": "fraction", "e": "mark"},
    "mark": {"d": "exponent", "+": "sign", "-": "sign"},
    "sign": {"d": "exponent"},
    "exponent": {"d": "exponent"},
}
_UNFINISHED = {"point", "mark", "sign"}


class State(NamedTuple):
    """How far an expression has been written.

    Attributes:
        after: what was written last: `start` (an operand must follow), `name`, `end` (of an operand), or a part of a number.
        name: the letters of a name so far.
        depth: parentheses that are open.
        named: whether a primitive has been named.
    """

    after: str
    name: str
    depth: int
    named: bool


class Grammar:
    """The expressions over some primitives, character by character.

    All that it lets through is read by `RewardExpression.parse`, if it is not refused for its value at the test point.

    Args:
        names: of the primitives.

    Raises:
        RecipeError: there are none.

    Example:
        >>> grammar = Grammar(["g1", "g2"])
        >>> begun = grammar.advance(grammar.start, "0.5*(g")
        >>> grammar.complete(begun), grammar.shortest(begun), grammar.advance(begun, "3"), grammar.advance(begun, "2)") is None
        (False, 2, None, False)
    """

    start = State("start", "", 0, False)

    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise RecipeError("grammar: there must be at least one primitive to name.")
        self.names = tuple(names)
        self.shortest_name = min(map(len, self.names))
        self._characters: dict[tuple[State, str], State | None] = {}

    @property
    def needed(self) -> str:
        """Characters without which an expression might not come to an end."""
        return "".join(sorted({"1", "+", ")", *"".join(self.names)}))

    def advance(self, state: State, text: str) -> State | None:
        """The state after more text; None if no expression begins so."""
        found: State | None = state
        for character in text:
            if found is None:
                return None
            key = (found, character)
            if key not in self._characters:
                self._characters[key] = self._after(found, character)
            found = self._characters[key]
        return found

    def complete(self, state: State) -> bool:
        """Whether what was written is an expression."""
        ended = state.after == "end" or state.after in _NUMBERS.keys() - _UNFINISHED
        named = state.named or state.name in self.names
        return state.depth == 0 and named and (ended or state.name in self.names)

    def shortest(self, state: State) -> int:
        """Characters that are needed at least to make it an expression."""
        named, count = state.named, 0
        if state.after == "start":
            count, named = (1, True) if named else (self.shortest_name, True)
        elif state.after == "name":
            count = min(len(name) for name in self.names if name.startswith(state.name)) - len(state.name)
            named = True
        elif state.after in _UNFINISHED:
            count = 1
        return count + (0 if named else 1 + self.shortest_name) + state.depth

    def _after(self, state: State, character: str) -> State | None:
        if state.after == "start":
            return self._operand(state, character)
        if state.after == "name":
            longer = state.name + character
            if any(name.startswith(longer) for name in self.names):
                return state._replace(name=longer)
            if state.name not in self.names:
                return None
            return self._operator(State("end", "", state.depth, True), character)
        if state.after in _NUMBERS:
            kind = "d" if character in "0123456789" else "e" if character in "eE" else character
            follows = _NUMBERS[state.after]
            if kind in follows or character in follows:
                return state._replace(after=follows.get(kind) or follows[character])
            if state.after in _UNFINISHED:
                return None
        return self._operator(state, character)

    def _operand(self, state: State, character: str) -> State | None:
        if character in " \t+-":
            return state
        if character == "(":
            return state._replace(depth=state.depth + 1) if state.depth < DEEPEST else None
        if character in "0123456789.":
            return state._replace(after={"0": "zero", ".": "point"}.get(character, "whole"))
        if any(name.startswith(character) for name in self.names):
            return state._replace(after="name", name=character)
        return None

    def _operator(self, state: State, character: str) -> State | None:
        if character in " \t":
            return state._replace(after="end")
        if character in "+-*/":
            return state._replace(after="start")
        if character == ")" and state.depth:
            return state._replace(after="end", depth=state.depth - 1)
        return None
