"""Rows of preference data: pairs (`prompt`, `chosen`, `rejected`), scored completions, and single judged completions.

Every row is checked when the data is opened, and every malformed one is reported by its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guerdon.errors import DataError, nearest
from guerdon.language.rows import Faults, Row, Rows, kind, listed

BATCH = 1024
_TRUE = {"true", "1", "1.0", "yes"}
_FALSE = {"false", "0", "0.0", "no"}
_ADVICE = {
    "paired": "A pair is prompt, chosen and rejected (texts, or messages that end in one of the assistant).",
    "unpaired": "A row is prompt, completion (text, or one message of the assistant) and label (true or false).",
}


class FaultError(ValueError):
    """What is wrong with one row."""


def preference_rows(rows: Rows, form: str) -> Sequence[Row]:
    """The rows of a data file as pairs, or as single completions with a label.

    Args:
        rows: what `read_rows` gave, with one of these sets of columns: `prompt`, `chosen`, `rejected` (the prompt may be
            left out where both are conversations that begin with the same messages); `prompt`, `completions`, `scores`
            (lists: the best completion is chosen, the worst rejected); `prompt`, `completion`, `label`.
        form: `paired`, or `unpaired`: a pair then makes two rows, its chosen sample with the label true and its
            rejected one with false.

    Returns:
        Rows with `prompt`, `chosen`, `rejected` (and `score_chosen`, `score_rejected` where there are scores) or
        `prompt`, `completion`, `label`, and every other column.

    Raises:
        DataError: the columns are others, or rows are malformed: the first five are named with their places, and all
            are counted.

    Edge cases:
        Conversations: a list of messages with role and content. `chosen` may hold the prompt's messages again; what is
        left must be a single message of the assistant.
    """
    columns = set(rows.columns)
    convert: Callable[[Row], Row]
    if {"completion", "label"} <= columns and form == "unpaired":
        return _checked(rows, labelled, form)
    if {"chosen", "rejected"} <= columns:
        convert = pair
    elif {"completions", "scores"} <= columns:
        convert = best_and_worst
    else:
        wanted = ["chosen", "rejected"] if form == "paired" else ["completion", "label"]
        lacking = next((name for name in wanted if name not in columns), wanted[0])
        hint = ""
        if form == "paired" and {"completion", "label"} <= columns:
            hint = " These are single judged completions: use --objective kto, or pair them first."
        raise DataError(
            f"{rows.name}: there is no column {lacking!r}.{nearest(lacking, rows.columns)} There are: "
            f"{listed(rows.columns)}.{hint} {_ADVICE[form]}"
        )
    found = _checked(rows, convert, "paired")
    return found if form == "paired" else Singles(found)


class Converted(Sequence[Row]):
    """Rows brought to one form when they are asked for."""

    def __init__(self, rows: Sequence[Row], convert: Callable[[Row], Row]) -> None:
        self.rows, self.convert = rows, convert

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.convert(row) for row in self.rows[index]]
        return self.convert(self.rows[index])


class Singles(Sequence[Row]):
    """Pairs as single completions: row 2i is the chosen sample of pair i, row 2i + 1 the rejected one."""

    def __init__(self, pairs: Sequence[Row]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place, rejected = divmod(index % len(self), 2)
        row = dict(self.pairs[place])
        sides = [row.pop("chosen"), row.pop("rejected")]
        return {**row, "completion": sides[rejected], "label": not rejected}


def pair(row: Row) -> Row:
    """A row with `chosen` and `rejected`, checked, its prompt and answers taken apart.

    Raises:
        FaultError: it is malformed.
    """
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            raise FaultError(f"{name} is missing")
    if prompt is None:
        prompt = _shared_start(chosen, rejected)
    found = {
        **row,
        "prompt": prompt,
        "chosen": answer_text("chosen", chosen, prompt),
        "rejected": answer_text("rejected", rejected, prompt),
    }
    scores = [number(name, row[name]) for name in ("score_chosen", "score_rejected") if row.get(name) is not None]
    if len(scores) == 2:
        if scores[0] < scores[1]:
            raise FaultError(f"score_chosen, {scores[0]:g}, is below score_rejected, {scores[1]:g}")
        found |= {"score_chosen": scores[0], "score_rejected": scores[1]}
    return found


def best_and_worst(row: Row) -> Row:
    """A row with `completions` and `scores` as a pair: the first of the best against the first of the worst.

    Raises:
        FaultError: it is malformed, or all scores are the same.
    """
    completions, scores = row.get("completions"), row.get("scores")
    for name, value in (("completions", completions), ("scores", scores)):
        if not isinstance(value, list):
            raise FaultError(f"{name} must be a list; got {kind(value)}")
    assert isinstance(completions, list)
    assert isinstance(scores, list)
    if len(completions) != len(scores) or len(scores) < 2:
        raise FaultError(f"{len(completions)} completions and {len(scores)} scores: there must be 2 or more of each")
    numbers = [number("scores", score) for score in scores]
    best, worst = numbers.index(max(numbers)), numbers.index(min(numbers))
    if best == worst:
        raise FaultError(f"all scores are {numbers[0]:g}: none of the completions is better")
    rest = {name: value for name, value in row.items() if name not in ("completions", "scores")}
    sides = {"chosen": completions[best], "rejected": completions[worst]}
    return pair({**rest, **sides, "score_chosen": numbers[best], "score_rejected": numbers[worst]})


def labelled(row: Row) -> Row:
    """A row with `completion` and `label`.

    Raises:
        FaultError: it is malformed.
    """
    for name in ("prompt", "completion", "label"):
        if row.get(name) is None:
            raise FaultError(f"{name} is missing")
    label = row["label"]
    word = str(label).lower()
    if not isinstance(label, bool | int | float | str) or word not in _TRUE | _FALSE:
        raise FaultError(f"label must be true or false; got {label!r:.40}")
    return {**row, "completion": answer_text("completion", row["completion"], row["prompt"]), "label": word in _TRUE}


def answer_text(name: str, value: Any, prompt: Any) -> str:
    """The text of an answer: as it stands, or the assistant's message that is left after the prompt's messages.

    Raises:
        FaultError: it is empty, or something else.
    """
    if isinstance(value, str):
        if not value:
            raise FaultError(f"{name} is empty")
        return value
    if not isinstance(value, list):
        raise FaultError(f"{name} must be text or a list of messages; got {kind(value)}")
    if isinstance(prompt, list) and value[: len(prompt)] == prompt:
        value = value[len(prompt) :]
    if len(value) != 1 or not isinstance(value[0], Mapping):
        raise FaultError(f"{name} must be one message after the prompt; got {len(value)}")
    message = value[0]
    if message.get("role") != "assistant":
        raise FaultError(f"{name} must be a message of the assistant; got one of {message.get('role')!r:.40}")
    if not isinstance(message.get("content"), str) or not message["content"]:
        raise FaultError(f"the content of {name} must be text; got {kind(message.get('content'))}")
    return message["content"]


def _shared_start(chosen: Any, rejected: Any) -> list[Any]:
    """The messages that two conversations begin with."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise FaultError(
            "prompt is missing, and only conversations (lists of messages) can hold it in chosen and rejected"
        )
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    if not count:
        raise FaultError("prompt is missing, and chosen and rejected do not begin with the same messages")
    return chosen[:count]


def number(name: str, value: Any) -> float:
    """A finite number, or a text of one.

    Raises:
        FaultError: it is neither.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not math.isfinite(found):
        raise FaultError(f"{name} must be a finite number; got {value!r:.40}")
    return found


def _checked(rows: Rows, convert: Callable[[Row], Row], form: str) -> Converted:
    """The rows, after every one was converted once."""
    faults = Faults(rows.name)
    for start in range(0, len(rows), BATCH):
        for position, row in enumerate(rows[start : start + BATCH], start):
            try:
                if convert(row).get("prompt") is None:
                    raise FaultError("prompt is missing")
            except FaultError as fault:
                faults.add(rows.where(position), str(fault))
    faults.check(_ADVICE[form])
    return Converted(rows, convert)
