"""Keeping a long run short: evenly spaced records out of a stream, and curves with a bounded number of points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Evenly(Generic[Item]):
    """At most `2 * limit` evenly spaced items of a stream of unknown length, and its last one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._stride = 1
        self._seen = 0
        self._items: list[Item] = []
        self._last: Item | None = None

    def add(self, item: Item) -> None:
        """Take the next item of the stream."""
        if self._seen % self._stride == 0:
            self._items.append(item)
            if len(self._items) > 2 * self.limit:
                self._items = self._items[::2]
                self._stride *= 2
        self._last = item
        self._seen += 1

    def pick(self) -> list[Item]:
        """At most `limit` of them, the first and the last included."""
        items = list(self._items)
        if self._last is not None and items and items[-1] is not self._last:
            items.append(self._last)
        return thin(items, self.limit)


def thin(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` evenly spaced items, the first and the last included (the last alone if `limit` is 1)."""
    if len(items) <= limit:
        return list(items)
    if limit == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def bin_curve(
    steps: Sequence[int], values: Sequence[float | None], limit: int, largest: bool = False
) -> tuple[list[int], list[float | None]]:
    """A curve of at most `limit` points: each is the mean (or the largest) of as many neighbours as are needed.

    Args:
        steps: x, one a value.
        values: y; None is nothing, a point whose neighbours are all None stays None.
        limit: the largest number of points.
        largest: take the largest of the neighbours, for a metric that is itself a maximum.

    Returns:
        The last step of each bin, and its value.
    """
    width = -(-len(steps) // limit)
    if width <= 1:
        return list(steps), list(values)
    binned: list[float | None] = []
    for start in range(0, len(values), width):
        present = [value for value in values[start : start + width] if value is not None]
        binned.append((max(present) if largest else sum(present) / len(present)) if present else None)
    return [steps[min(start + width, len(steps)) - 1] for start in range(0, len(steps), width)], binned
