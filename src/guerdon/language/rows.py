"""Rows of a data file: what every reader gives, and how faults in a file are reported."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from guerdon.errors import DataError

Row = dict[str, Any]

SHOWN = 5  # faults written out; the rest are counted


class Rows(Sequence[Row]):
    """Data rows with random access. Positions count from 0, lines of a file from 1.

    Attributes:
        name: the file, as it was asked for.
        columns: every column, in the order in which they first appear.
        present: column -> number of rows that have it with a value other than null.
        complete: column -> number of rows from the start before the first that lacks it.
    """

    def __init__(self, name: str, size: int, present: Mapping[str, int], complete: Mapping[str, int]) -> None:
        self.name = name
        self.size = size
        self.columns = tuple(present)
        self.present = dict(present)
        self.complete = dict(complete)

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(self.size)))
        position = operator.index(index)
        if not -self.size <= position < self.size:
            raise IndexError(f"{self.name}: there is no row {position}; it has {self.size:,}.")
        return self.take([position % self.size])[0]

    @abstractmethod
    def take(self, positions: Sequence[int]) -> list[Row]:
        """The rows at these positions, each from 0 to len - 1."""

    def where(self, position: int) -> str:
        """The row's place, as errors name it."""
        return f"row {position}"


class Columns:
    """Counts which columns the rows have, one row after the other."""

    def __init__(self) -> None:
        self.rows = 0
        self.present: dict[str, int] = {}
        self.complete: dict[str, int] = {}

    def add(self, row: Row) -> None:
        """Count the next row."""
        for name, value in row.items():
            there = value is not None
            self.present[name] = self.present.get(name, 0) + there
            run = self.complete.setdefault(name, 0)
            if there and run == self.rows:
                self.complete[name] = run + 1
        self.rows += 1


class Faults:
    """Collects what is wrong in a file, so that one error can name it all."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shown: list[str] = []
        self.count = 0

    def add(self, place: str, problem: str) -> None:
        """Count a fault, and keep it if it is among the first."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"  {place}: {problem}")

    def check(self, advice: str) -> None:
        """Raise if there were any.

        Raises:
            DataError: the first faults, how many there are, and `advice`.
        """
        if self.count:
            counted = "1 row is malformed" if self.count == 1 else f"{self.count:,} rows are malformed"
            first = f"; the first {SHOWN}" if self.count > SHOWN else ""
            raise DataError("\n".join([f"{self.name}: {counted}{first}:", *self.shown, advice]))


def prompt_fault(prompt: Any) -> str | None:
    """What is wrong with a prompt, which must be text or a list of messages; None if nothing is.

    A missing prompt (None) is no fault here: `require_columns` reports it where one is needed.
    """
    if prompt is None or (isinstance(prompt, str) and prompt):
        return None
    if isinstance(prompt, str):
        return "prompt is empty"
    if not isinstance(prompt, list):
        return f"prompt must be text or a list of messages; got {kind(prompt)}"
    if not prompt:
        return "prompt is an empty list of messages"
    for number, message in enumerate(prompt, 1):
        if not isinstance(message, dict):
            return f"message {number} of prompt must be an object with role and content; got {kind(message)}"
        for name in ("role", "content"):
            if message.get(name) is None:
                return f"message {number} of prompt lacks {name!r}; it has {listed(message)}"
            if not isinstance(message[name], str):
                return f"{name!r} of message {number} of prompt must be text; got {kind(message[name])}"
    return None


def kind(value: Any) -> str:
    """The kind of a value in the words of a data file."""
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def listed(names: Iterable[str], limit: int = 30) -> str:
    """Names with commas, the surplus counted."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(map(str, names[:limit])) or "nothing") + more
