"""Endless rows with images that are drawn when they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, overload

import torch
from torch import Generator, Tensor

Row = dict[str, Any]

BLOCK = 64  # rows drawn together, which costs little more than drawing one


class Demonstrations(Sequence[Row]):
    """Rows of random classes with an image each: row i depends on the stream's name and seed and i alone.

    `len` is the largest there is (`sys.maxsize`): take slices, or positions one by one.

    Args:
        name: of the task.
        seed: of the stream.
        rows: one row for each class, in the order of the labels.
        draw: labels [N] and a generator -> images [N, C, H, W].
    """

    def __init__(self, name: str, seed: int, rows: Sequence[Row], draw: Callable[[Tensor, Generator], Tensor]) -> None:
        self.name, self.seed, self.rows, self.draw = name, seed, rows, draw
        self._kept: tuple[int, list[Row]] = (-1, [])

    def __len__(self) -> int:
        return sys.maxsize

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of an endless stream: rows are numbered from 0.")
        number, place = divmod(int(index), BLOCK)
        if self._kept[0] != number:
            self._kept = (number, self._block(number))
        return self._kept[1][place]

    def _block(self, number: int) -> list[Row]:
        key = blake2b(repr((self.name, self.seed, number)).encode(), digest_size=8).digest()
        generator = Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        labels = torch.randint(len(self.rows), (BLOCK,), generator=generator)
        images = self.draw(labels, generator)
        return [{**self.rows[label], "image": image} for label, image in zip(labels.tolist(), images, strict=True)]
