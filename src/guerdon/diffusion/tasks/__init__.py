"""Bundled image tasks: small pictures of known classes, drawn or installed with a package, that need no download.

A task is one file here that ends in `TASK = Task(...)`, and one line in `TASKS`. Looking one up imports neither torch
nor diffusers; its functions do when they are called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guerdon.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    from torch import Generator, Tensor

Row = dict[str, Any]

TASKS = {"digits": "digits", "shapes": "shapes"}  # name -> module of this package that defines TASK


@dataclass(frozen=True)
class Task:
    """What a bundled image task provides.

    Attributes:
        name: its name in a recipe (`data: shapes`, `model: shapes`).
        description: one sentence for listings.
        captions: the prompt of each class, in the order of the labels.
        channels: colour channels of an image.
        size: height and width of an image, in pixels.
        patch: pixels of a side that the denoiser sees as one position (`pixel_unshuffle`, exactly invertible).
        model: makes the untrained class-conditional denoiser; the same seed gives the same weights. Its classes are
            those of `captions`, and one more, the last, for no class.
        draw: labels [N] and a generator -> real images [N, channels, size, size] in [0, 1].
        held_out: the same, of images that no training row can hold where the data is finite.
        prompt_rows: the rows to train on with a reward: one for each class, `prompt`, `caption`, `label` and more.
        demonstrations: seed -> endless rows with `image` as well, for supervised training.
    """

    name: str
    description: str
    captions: tuple[str, ...]
    channels: int
    size: int
    patch: int
    model: Callable[[int], Any]
    draw: Callable[[Tensor, Generator], Tensor]
    held_out: Callable[[Tensor, Generator], Tensor]
    prompt_rows: Callable[[], list[Row]]
    demonstrations: Callable[[int], Sequence[Row]]

    def held_out_rows(self, count: int, *, images: bool = False) -> list[Row]:
        """Fixed rows that go round the classes; fewer rows are the first of more.

        Args:
            count: how many.
            images: give each row a held-out `image` as well.
        """
        rows = self.prompt_rows()
        found = [dict(rows[i % len(rows)]) for i in range(count)]
        if images:
            import torch

            # each drawn alone, so that a row does not depend on how many are asked for
            for i, row in enumerate(found):
                generator = torch.Generator().manual_seed(_HELD_OUT_SEED + i)
                row["image"] = self.held_out(torch.tensor([row["label"]]), generator)[0]
        return found


_HELD_OUT_SEED = 2**40  # away from the seeds that streams are made of


def find(name: str) -> Task:
    """The bundled image task of that name.

    Raises:
        UnknownNameError: there is none; the error lists the tasks there are.

    Example:
        >>> find("shapes").held_out_rows(1)
        [{'prompt': 'a red circle', 'caption': 'a red circle', 'label': 0, 'colour': 'red', 'shape': 'circle'}]
    """
    if name not in TASKS:
        raise UnknownNameError(
            f"diffusion.tasks: there is no bundled image task {name!r}.{nearest(name, TASKS)} "
            f"There are: {', '.join(TASKS)}."
        )
    return importlib.import_module(f"{__name__}.{TASKS[name]}").TASK
