"""Bundled tasks: small jobs that bring their own tokenizer, model and rows, and train on a CPU in seconds.

A task is one file here that ends in `TASK = Task(...)`, and one line in `TASKS`. Looking one up imports neither torch
nor transformers; its `tokenizer` and `model` do when they are called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guerdon.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Row = dict[str, Any]

# name -> module of this package that defines TASK
TASKS = {
    "drafts": "drafts",
    "experts": "experts",
    "formulas": "formulas",
    "hacking": "hacking",
    "sort": "sort",
    "topics": "topics",
}


@dataclass(frozen=True)
class Task:
    """What a bundled task provides.

    Attributes:
        name: its name in a recipe (`data: sort`, `model: sort`).
        description: one sentence for listings.
        tokenizer: makes the tokenizer.
        model: makes the untrained model; the same seed gives the same weights.
        train_rows: seed -> training rows, a pure function of (seed, position). Each row has `prompt` and the columns
            that the rewards name.
        held_out_rows: count -> that many fixed rows with `completion` too, none of which can occur in training.
        demonstrations: seed -> rows with `prompt` and `completion`, for supervised training.
        pretraining: seed -> such rows for a warm start, where they are others; None = the demonstrations.
        pairs: seed -> rows with `prompt`, `chosen` and `rejected`; None = the task has no preferences.
        held_out_pairs: count -> that many fixed pairs, none of which is trained on.
        feedback: seed -> records of feedback on answers (`prompt`, `response`, `textual_feedback`, `marks`); None = none.
        held_out_feedback: count -> that many fixed records, none of which is trained on.
    """

    name: str
    description: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    model: Callable[[int], PreTrainedModel]
    train_rows: Callable[[int], Sequence[Row]]
    held_out_rows: Callable[[int], Sequence[Row]]
    demonstrations: Callable[[int], Sequence[Row]]
    pretraining: Callable[[int], Sequence[Row]] | None = None
    pairs: Callable[[int], Sequence[Row]] | None = None
    held_out_pairs: Callable[[int], Sequence[Row]] = lambda count: ()
    feedback: Callable[[int], Sequence[Row]] | None = None
    held_out_feedback: Callable[[int], Sequence[Row]] = lambda count: ()


def find(name: str) -> Task:
    """The bundled task of that name.

    Raises:
        UnknownNameError: there is none; the error lists the tasks there are.

    Example:
        >>> find("sort").train_rows(0)[1]
        {'prompt': '0119=', 'answer': '0119', 'length': 4}
    """
    if name not in TASKS:
        raise UnknownNameError(
            f"language.tasks: there is no bundled task {name!r}.{nearest(name, TASKS)} There are: {', '.join(TASKS)}."
        )
    return importlib.import_module(f"{__name__}.{TASKS[name]}").TASK
