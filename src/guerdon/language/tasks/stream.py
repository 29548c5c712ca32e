"""Rows that follow from their position alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, overload

from guerdon.language.tasks import Row


class Stream(Sequence[Row]):
    """Rows that are made when they are asked for, without state.

    Args:
        make: position -> row.
        size: how many; None = without end (`len` is then `sys.maxsize`).

    Example:
        >>> Stream(lambda i: {"prompt": str(i)}, 3)[1:]
        [{'prompt': '1'}, {'prompt': '2'}]
    """

    def __init__(self, make: Callable[[int], Row], size: int | None = None) -> None:
        self.make, self.size = make, sys.maxsize if size is None else size

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not 0 <= index < self.size:
            last = "" if self.size == sys.maxsize else f" to {self.size - 1}"
            raise IndexError(f"row {index}: rows are numbered from 0{last}.")
        return self.make(int(index))
