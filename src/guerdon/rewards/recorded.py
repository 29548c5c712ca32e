"""Scores that were given long ago and stand in the data beside the completions they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from guerdon.errors import DataError


def recorded(
    samples: Sequence[Sequence[Any]],
    given: Bool[Tensor, "P G"] | None = None,
    *,
    column: str = "completion_scores",
    **columns: Any,
) -> list[list[float | None]]:
    """The scores of given completions, as the data has them: a sample is scored once, however often it is learnt from.

    For recipes with `samples: data`, where the first samples of a group are the row's `completions`.

    Args:
        samples: [P][G]; only their number counts.
        given: [P, G], True = the sample is the row's; the loop fills it in. None = none is, as on held-out prompts.
        column: of the data, with a list of numbers (or null) in each row, in the order of `completions`.
        **columns: lists of P: what the data carries.

    Returns:
        Scores [P][G]; None for samples that are not the row's.

    Raises:
        DataError: there is no such column, or a row has not one number for each given sample.

    Example:
        >>> import torch
        >>> recorded([["a", "b", "own"]], torch.tensor([[True, True, False]]), completion_scores=[[0.5, 2.0]])
        [[0.5, 2.0, None]]
    """
    if given is None:
        return [[None] * len(group) for group in samples]
    if column not in columns:
        raise DataError(f"rewards.recorded: the data has no column {column!r}; it has: {', '.join(sorted(columns))}.")
    found = []
    for p, (row, group, count) in enumerate(zip(columns[column], samples, given.sum(-1).tolist(), strict=True)):
        if not isinstance(row, (list, tuple)) or len(row) != count:
            raise DataError(
                f"rewards.recorded: {column} of prompt {p} must be a list of {count} numbers, one for each completion; "
                f"got {row!r:.80}."
            )
        found.append([*row, *[None] * (len(group) - count)])
    return found
