"""Raw completions: prompts with several answers each, to be scored and compared.

Every row is checked when the data is opened, and every malformed one is reported by its place. In memory is where each
prompt's rows are; the texts are read from the file when they are asked for.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from guerdon.errors import DataError, nearest
from guerdon.language.preferences import FaultError, answer_text, number
from guerdon.language.rows import Faults, Row, Rows, kind, listed

_ROWS = 128  # read at a time: several long texts stand in a row
_OWN = {"prompt", "completions", "completion", "chosen", "rejected"}
_LABELS = ("labels", "label", "scores", "score")
_WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
_ADVICE = (
    "A row is prompt and completions (a list of two or more texts); or prompt and completion, a row for each of two or more; "
    "or prompt, chosen and rejected."
)


class Group(NamedTuple):
    """A prompt with its completions.

    Attributes:
        prompt: a text, or a list of messages.
        completions: two or more texts.
        labels: what each is known to be worth, None where that is not known; None = the data has no labels.
        columns: what else the prompt's rows say, the same in all of them.
    """

    prompt: Any
    completions: list[str]
    labels: list[float | None] | None
    columns: dict[str, Any]


class Groups(Sequence[Group]):
    """Prompts with their completions, in the order in which the prompts first appear.

    Args:
        rows: what `read_rows` gave, with the columns `prompt`, `completions` (lists); or `prompt`, `completion`, a row for
            each, wherever in the file the rows of a prompt stand; or `prompt`, `chosen`, `rejected`, two completions of which
            the first is known to be better.
        label: the column that says what a completion is worth, a number, or true or false (a list of them beside
            `completions`); None = `labels`, `label`, `scores` or `score`, if there is one.

    Raises:
        DataError: the columns are others, or rows are malformed: the first five are named with their places, and all are
            counted.

    Attributes:
        label: the column of labels in use; `chosen` for given pairs; None = there is none.
        varying: columns in which rows of one prompt differ, which are left out.
        columns: the other columns, which a group carries.
    """

    def __init__(self, rows: Rows, label: str | None = None) -> None:
        self.rows = rows
        columns = set(rows.columns)
        self.varying: tuple[str, ...] = ()
        if "completions" in columns:
            self.form: Callable[[Row, str | None], Group] = _listed
        elif {"chosen", "rejected"} <= columns:
            self.form = _paired
        elif "completion" in columns:
            self.form = _single
        else:
            raise DataError(
                f"{rows.name}: there is no column 'completions', nor 'completion'.{nearest('completions', rows.columns)} "
                f"There are: {listed(rows.columns)}. {_ADVICE}"
            )
        if label is not None and (label not in columns or self.form is _paired):
            why = "chosen is the label of pairs" if self.form is _paired else f"there is no column {label!r}"
            raise DataError(
                f"{rows.name}: --label: {why}.{nearest(label, rows.columns)} There are: {listed(rows.columns)}."
            )
        self.label = "chosen" if self.form is _paired else label or next((c for c in _LABELS if c in columns), None)
        self.starts, self.places = self._scan()
        left_out = {*_OWN, *self.varying, *([self.label] if self.label else [])}
        self.columns = tuple(name for name in rows.columns if name not in left_out)

    def row(self, index: int) -> int:
        """The position in the data of the group's first row."""
        return self.places[self.starts[index]]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, stop = self.starts[index % len(self)], self.starts[index % len(self) + 1]
        parts = [self.form(row, self.label) for row in self.rows.take(self.places[start:stop])]
        columns = {name: parts[0].columns.get(name) for name in self.columns}
        if len(parts) == 1:
            return parts[0]._replace(columns=columns)
        labels = [part.labels[0] if part.labels else None for part in parts]
        texts = [part.completions[0] for part in parts]
        return Group(parts[0].prompt, texts, labels if self.label else None, columns)

    def _scan(self) -> tuple[array[int], array[int]]:
        """Check every row; where the rows of each group begin, and the rows' positions group by group."""
        faults = Faults(self.rows.name)
        together = _ByPrompt(self.rows.columns) if self.form is _single else None
        groups = array("q")  # of each row, -1 where it is malformed
        size = 0
        for start in range(0, len(self.rows), _ROWS):
            for position, row in enumerate(self.rows[start : start + _ROWS], start):
                try:
                    part = self.form(row, self.label)
                except FaultError as fault:
                    faults.add(self.rows.where(position), str(fault))
                    groups.append(-1)
                    continue
                groups.append(size if together is None else together.add(part))
                size = max(size, groups[-1] + 1)
        starts = array("q", bytes(8 * (size + 1)))
        for group in groups:
            if group >= 0:
                starts[group + 1] += 1
        if together is not None:
            self.varying = tuple(together.varying)
            if not faults.count:
                for position, group in enumerate(groups):
                    if starts[group + 1] == 1:
                        faults.add(self.rows.where(position), "its prompt has no other completion to compare with")
        faults.check(_ADVICE)
        for group in range(size):
            starts[group + 1] += starts[group]
        places, at = array("q", bytes(8 * len(groups))), array("q", starts)
        for position, group in enumerate(groups):
            places[at[group]] = position
            at[group] += 1
        return starts, places


class _ByPrompt:
    """Numbers prompts as they come, and finds the columns in which rows of one prompt differ."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = [name for name in columns if name not in _OWN]
        self.varying: dict[str, None] = {}
        self.known: dict[bytes, int] = {}
        self.firsts = array("Q")  # a hash of each column in the first row of each prompt

    def add(self, part: Group) -> int:
        """The number of the part's prompt."""
        group = self.known.setdefault(_digest(part.prompt), len(self.known))
        seen = [int.from_bytes(_digest(part.columns.get(name))[:8]) for name in self.columns]
        start = group * len(self.columns)
        if start == len(self.firsts):
            self.firsts.extend(seen)
        first = self.firsts[start : start + len(seen)]
        self.varying |= {name: None for name, a, b in zip(self.columns, first, seen, strict=True) if a != b}
        return group


def _listed(row: Row, label: str | None) -> Group:
    prompt, texts = _prompt(row), row.get("completions")
    if isinstance(texts, str):
        raise FaultError("completions must be a list; got text. In a CSV file write a row for each completion")
    if not isinstance(texts, list):
        raise FaultError(f"completions must be a list; got {kind(texts)}")
    if len(texts) < 2:
        raise FaultError(f"completions has {len(texts)}: two or more are needed to compare")
    found = [_text(f"completion {g}", text, prompt) for g, text in enumerate(texts)]
    labels: list[float | None] | None = None
    if label is not None:
        given = row.get(label)
        if given is not None and (not isinstance(given, list) or len(given) != len(texts)):
            size = f"{len(given)}" if isinstance(given, list) else kind(given)
            raise FaultError(f"{label} must be a list with one entry for each of {len(texts)} completions; got {size}")
        labels = [_label(label, value) for value in (given if given is not None else [None] * len(texts))]
    return Group(prompt, found, labels, _rest(row, label))


def _single(row: Row, label: str | None) -> Group:
    prompt = _prompt(row)
    text = _text("completion", row.get("completion"), prompt)
    labels = None if label is None else [_label(label, row.get(label))]
    return Group(prompt, [text], labels, _rest(row, label))


def _paired(row: Row, label: str | None) -> Group:
    prompt = _prompt(row)
    texts = [_text(name, row.get(name), prompt) for name in ("chosen", "rejected")]
    return Group(prompt, texts, [1.0, 0.0], _rest(row, None))


def _prompt(row: Row) -> Any:
    if row.get("prompt") is None:
        raise FaultError("prompt is missing")
    return row["prompt"]


def _text(name: str, value: Any, prompt: Any) -> str:
    """A completion's text. An empty one is what a policy may well say; it is scored, but makes no pair."""
    if value is None:
        raise FaultError(f"{name} is missing")
    return value if isinstance(value, str) else answer_text(name, value, prompt)


def _label(name: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return float(value)
    word = value.lower() if isinstance(value, str) else value
    return _WORDS[word] if word in _WORDS else number(name, value)


def _rest(row: Mapping[str, Any], label: str | None) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _OWN and name != label}


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
