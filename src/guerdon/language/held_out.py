"""Rows held out of training by their prompts, so that no prompt is on both sides, however often it occurs."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from guerdon.errors import DataError

Row = Mapping[str, Any]

# of an endless stream: how many of its rows are looked at for each row to hold out, and how far a row steps aside
_PATIENCE = 200
_ASIDE = 2**40


class Picked(Sequence[Row]):
    """Some rows of others, in an order of one's own, that are not copied.

    Args:
        rows: the others.
        place: from the position here to that among the others.
        size: how many.
    """

    def __init__(self, rows: Sequence[Row], place: Callable[[int], int], size: int) -> None:
        self.rows, self.place, self.size = rows, place, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(index)
        return self.rows[self.place(index % self.size)]


def split_by_prompt(rows: Sequence[Row], share: float, size: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """Hold out a share of the prompts, chosen by a hash of each: the same whatever the order of the rows.

    Args:
        rows: with `prompt`; of an endless stream as many as are asked for.
        share: of the different prompts, in (0, 1).
        size: most rows to hold out; of several rows with one prompt the first.

    Returns:
        Rows to train on, and rows held out.

    Raises:
        DataError: there are too few different prompts for both sides to have one.

    Example:
        >>> train, held_out = split_by_prompt([{"prompt": str(i % 10)} for i in range(40)], 0.2, 5)
        >>> len(train), [row["prompt"] for row in held_out]
        (32, ['0', '8'])
    """
    if len(rows) == sys.maxsize:
        return _split_endless(rows, share, size)
    keys = [_number(row) for row in rows]
    different = sorted(set(keys))
    count = max(round(share * len(different)), 1)
    if count >= len(different):
        raise DataError(
            f"evaluation.share: {share:g} of {len(different)} different prompts cannot be held out with some left to train on."
        )
    limit = different[count - 1]
    inside = [i for i, key in enumerate(keys) if key > limit]
    first: dict[int, int] = {}
    for i, key in enumerate(keys):
        if key <= limit:
            first.setdefault(key, i)
    outside = sorted(first.values())[:size]
    return Picked(rows, inside.__getitem__, len(inside)), Picked(rows, outside.__getitem__, len(outside))


def _split_endless(rows: Sequence[Row], share: float, size: int) -> tuple[Sequence[Row], Sequence[Row]]:
    limit = int(share * 2**64)

    def place(index: int) -> int:
        """The row itself, or the first of those far behind it whose prompt is not held out."""
        for far in itertools.islice(itertools.count(index, _ASIDE), 1000):
            if _number(rows[far]) >= limit:
                return far
        raise DataError(f"evaluation.share: with {share:g} of the prompts held out, hardly any are left to train on.")

    first: dict[int, int] = {}
    for i in range(_PATIENCE * size):
        if (key := _number(rows[i])) < limit:
            first.setdefault(key, i)
        if len(first) == size:
            break
    if not first:
        raise DataError(f"evaluation.share: there are too few different prompts to hold {share:g} of them out.")
    place(0)  # found now where there is nothing left to train on
    outside = list(first.values())
    return Picked(rows, place, sys.maxsize), Picked(rows, outside.__getitem__, len(outside))


def _number(row: Row) -> int:
    text = json.dumps(row["prompt"], sort_keys=True, ensure_ascii=False)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
