"""From responses to records of feedback: have a critic criticise each, hold what it says against the response, and keep it.

The file of records grows batch by batch (see `guerdon.training.growing`), so that what was stopped goes on where it was.
Feedback that cannot be used is counted by its cause and left out; it is never mended beyond what `parse_feedback` does.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guerdon.errors import DataError, RecipeError, ScoreError, nearest
from guerdon.language.data import require_columns
from guerdon.language.preferences import FaultError, answer_text
from guerdon.language.rows import Faults, Rows, kind, listed
from guerdon.rewards.critics.base import Response, ask
from guerdon.rewards.critics.records import OWN, checked
from guerdon.training.growing import GrowingFile, line

WHY = ("no feedback", "no phrase stands in the response", "a label is none of -1, 0 and 1")
COUNTS = (
    "records",
    "good_spans",
    "poor_spans",
    "without_spans",
    "unmatched_phrases",
    "critic_calls",
    "malformed_replies",
)
_ROWS = 128  # read at a time
_TEXT = ("response", "completion", "sample", "completions")
_ENOUGH = 20  # responses before a critic is found to fail too often


class Responses(Sequence[Response]):
    """Responses of a data file, each with its prompt; a row with a list of them counts once for each.

    Args:
        rows: what `read_rows` gave, with `prompt`, and `response`, `completion` or `sample` (a text each, as in the
            samples.jsonl of a run), or `completions` (a list of texts). Other columns go to the critic and into the records.

    Raises:
        DataError: there are no such columns, or rows are malformed: the first five are named with their places.

    Attributes:
        rows: as given.
        column: where the responses stand.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        there = [name for name in _TEXT if name in rows.columns]
        if not there:
            raise DataError(
                f"{rows.name}: there is no column 'response'.{nearest('response', rows.columns)} There are: "
                f"{listed(rows.columns)}. A row is prompt, and response, completion or sample (a text), or completions (a list)."
            )
        self.column = there[0]
        require_columns(rows, ["prompt", self.column])
        self.columns = tuple(name for name in rows.columns if name not in {*OWN, *_TEXT})
        self.places = array("q")  # of each response: its row
        faults = Faults(rows.name)
        for start in range(0, len(rows), _ROWS):
            for position, row in enumerate(rows[start : start + _ROWS], start):
                try:
                    self.places.extend([position] * len(self._texts(row)))
                except FaultError as error:
                    faults.add(rows.where(position), str(error))
        faults.check(f"The column {self.column!r} must hold texts.")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = self.places[index]
        first = index % len(self)
        while first and self.places[first - 1] == position:
            first -= 1
        row = self.rows[position]
        text = self._texts(row)[index % len(self) - first]
        return Response(row["prompt"], text, {name: row.get(name) for name in self.columns})

    def _texts(self, row: Mapping[str, Any]) -> list[str]:
        found = row[self.column]
        if self.column != "completions":
            return [answer_text(self.column, found, row["prompt"])]
        if not isinstance(found, list):
            raise FaultError(f"completions must be a list of texts; got {kind(found)}")
        return [answer_text(f"completion {n}", text, row["prompt"]) for n, text in enumerate(found, 1)]


class Criticism(NamedTuple):
    """What has been criticised.

    Attributes:
        responses: how many there are.
        done: how many of them are done.
        counts: `records` written, the phrases in them (`good_spans`, `poor_spans`), records `without_spans`, phrases left out
            (`unmatched_phrases`), `critic_calls`, `malformed_replies`, and responses that were skipped, by why.
        example: why the first response that has no feedback has none.
        records: the file; None while it is not finished.
    """

    responses: int
    done: int
    counts: dict[str, int]
    example: str
    records: Path | None

    @property
    def skipped(self) -> dict[str, int]:
        """Responses without a record, by why."""
        return {why: self.counts[why] for why in WHY if self.counts.get(why)}


def criticise(
    responses: Responses,
    critic: Any,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    batch: int = 64,
    failures_max: float = 0.5,
    show: Callable[[Criticism], None] | None = None,
) -> Criticism:
    """Have every response criticised, and write the feedback that can be used.

    Args:
        responses: what is criticised.
        critic: what `guerdon.rewards.critics.base.resolve` gave.
        out: JSON lines, see `guerdon.rewards.critics.records`: prompt, response, textual_feedback, good_spans, poor_spans,
            spans (from, to, label), and the other columns of the data. While it is being written it is called `out` with
            .part after it; beside it, with .json after it, stands the record of how far it has got.
        settings: what the feedback depends on; a record of other settings is not gone on with.
        batch: responses at a time.
        failures_max: the largest share of responses that may be skipped, once there have been 20.
        show: called after every batch.

    Returns:
        The counts. If the file is there already and was made with these settings, they are read from its record.

    Raises:
        RecipeError: the file is there and was made otherwise, another process is writing it, or a setting is out of range.
        ScoreError: the critic cannot be asked, or too much of what it says is of no use.
        DataError: what was written before has been changed, or a template names a column that the data does not have.
    """
    if batch < 1 or not 0 <= failures_max <= 1:
        raise RecipeError(
            f"annotate: batch must be at least 1 and failures_max from 0 to 1; got {batch} and {failures_max}."
        )
    output = _Output(Path(out), settings or {}, len(responses))
    with output.writing() as file:
        for start in range(output.done, len(responses), batch):
            part = responses[start : start + batch]
            lines = []
            for response, feedback in zip(part, ask(critic, part, "annotate"), strict=True):
                found = checked(response, feedback)
                output.count(found.record, found.why, found.unmatched, feedback)
                if found.record is not None:
                    lines.append(line(found.record))
            output.add(file, lines, len(part))
            output.check(failures_max)
            if show is not None:
                show(output.criticism())
    return output.criticism()


class _Output(GrowingFile):
    """The file of records and the record of its making."""

    def __init__(self, out: Path, settings: Mapping[str, Any], responses: int) -> None:
        self.example = ""
        super().__init__(out, settings, responses, unit="responses", counts=(*COUNTS, *WHY))

    def kept(self) -> dict[str, Any]:
        return {"example": self.example}

    def restore(self, record: Mapping[str, Any]) -> None:
        self.example = str(record["example"])

    def count(self, record: Mapping[str, Any] | None, why: str, unmatched: int, feedback: Any) -> None:
        """Take note of what became of a response."""
        self.tell({"critic_calls": feedback.calls, "malformed_replies": feedback.malformed})
        if record is None:
            self.tell({why: 1})
            self.example = self.example or feedback.why
            return
        spans = {name: len(record[name]) for name in ("good_spans", "poor_spans")}
        self.tell({"records": 1, "without_spans": not any(spans.values()), "unmatched_phrases": unmatched, **spans})

    def check(self, failures_max: float) -> None:
        """Stop where too much is skipped to go on."""
        skipped = {why: self.counts[why] for why in WHY if self.counts[why]}
        if self.done >= _ENOUGH and sum(skipped.values()) > failures_max * self.done:
            causes = "; ".join(f"{number} of {self.done} responses: {why}" for why, number in skipped.items())
            raise ScoreError(
                f"annotate: the critic is of too little use: {causes}. {self.example and f'The first: {self.example}. '}"
                "Give another critic or template, or a larger --failures-max to go on."
            )

    def criticism(self) -> Criticism:
        """What has been done so far."""
        return Criticism(self.items, self.done, dict(self.counts), self.example, self.out if self.finished else None)
