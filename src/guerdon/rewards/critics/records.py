"""Records of feedback: what a critic said of a response, checked against it, in the form that reward models learn from.

A record is a row with `prompt`, `response`, `textual_feedback`, `good_spans` and `poor_spans` (phrases of the response).
Where `spans` is there, (from, to, label) in characters, it says which occurrence of a phrase is meant; where `marks` is
there, a label for every character, it takes the place of both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from guerdon.errors import DataError, GuerdonError
from guerdon.rewards.critics.base import Response
from guerdon.rewards.critics.feedback import Feedback
from guerdon.rewards.spans import feedback_marks, find_spans, token_labels

REQUIRED = ("prompt", "response")
OWN = (*REQUIRED, "textual_feedback", "good_spans", "poor_spans", "spans", "marks")
_WORD = re.compile(r"\S+")


class Checked(NamedTuple):
    """Feedback that was held against its response.

    Attributes:
        record: what is written; None where there is nothing to be kept.
        why: why not, in a word or two, the same for the same cause.
        unmatched: phrases that do not stand in the response, which are left out.
    """

    record: dict[str, Any] | None
    why: str
    unmatched: int


def checked(response: Response, feedback: Feedback) -> Checked:
    """Hold feedback against its response.

    Args:
        response: what was criticised.
        feedback: what the critic said.

    Returns:
        The record. There is none where the feedback has failed, where a label is none of -1, 0 and 1, and where it names
        phrases of which not one stands in the response. Feedback that names no phrase is kept: it marks nothing.

    Example:
        >>> checked(Response("p", "a red fox"), Feedback("ok", (("Red", 1.0), ("wolf", -1.0)))).record["spans"]
        [[2, 5, 1]]
    """
    if feedback.failed:
        return Checked(None, "no feedback", 0)
    try:
        marks, unmatched = feedback_marks(response.text, feedback)
    except GuerdonError:
        return Checked(None, "a label is none of -1, 0 and 1", 0)
    named = sum(1 for _, label in feedback.spans if label)
    if feedback.marks is None and named and not any(marks):
        return Checked(None, "no phrase stands in the response", len(unmatched))
    spans = runs(marks)
    record = {
        "prompt": response.prompt,
        "response": response.text,
        "textual_feedback": feedback.critique,
        "good_spans": [response.text[start:end] for start, end, label in spans if label > 0],
        "poor_spans": [response.text[start:end] for start, end, label in spans if label < 0],
        "spans": [[start, end, int(label)] for start, end, label in spans],
        **{name: value for name, value in response.columns.items() if name not in OWN},
    }
    return Checked(record, "", len(unmatched))


def runs(marks: Sequence[float]) -> list[tuple[int, int, float]]:
    """(start, end, label) of the longest stretches with one label that is not 0.

    Example:
        >>> runs([0.0, 1.0, 1.0, -1.0])
        [(1, 3, 1.0), (3, 4, -1.0)]
    """
    found, start = [], 0
    for label, stretch in groupby(marks):
        end = start + sum(1 for _ in stretch)
        if label:
            found.append((start, end, label))
        start = end
    return found


def record_marks(row: Mapping[str, Any], where: str = "records") -> list[float]:
    """The label of each character of a record's response.

    Args:
        row: a record.
        where: opens the errors.

    Raises:
        DataError: the record is malformed.
    """
    text = row.get("response")
    if not isinstance(text, str):
        raise DataError(f"{where}: response must be a text; got {text!r:.80}.")
    if row.get("marks") is not None:
        return _given(text, list(row["marks"]), where)
    if row.get("spans") is not None:
        return _of_places(text, row["spans"], where)
    phrases: list[tuple[str, int]] = []
    for name, label in (("good_spans", 1), ("poor_spans", -1)):
        listed = row.get(name) or []
        if not isinstance(listed, (list, tuple)) or not all(isinstance(phrase, str) for phrase in listed):
            raise DataError(f"{where}: {name} must be a list of texts; got {listed!r:.80}.")
        phrases += [(phrase, label) for phrase in listed]
    return find_spans(text, phrases)[0]


def _given(text: str, marks: list[Any], where: str) -> list[float]:
    if len(marks) != len(text) or any(isinstance(mark, bool) or mark not in (-1, 0, 1) for mark in marks):
        raise DataError(
            f"{where}: marks must be -1, 0 or 1 for each of the {len(text)} characters of {text!r:.80}; got {marks!r:.80}."
        )
    return [float(mark) for mark in marks]


def _of_places(text: str, spans: Any, where: str) -> list[float]:
    marks = [0.0] * len(text)
    for span in spans if isinstance(spans, (list, tuple)) else [spans]:
        fits = isinstance(span, (list, tuple)) and len(span) == 3 and all(type(value) is int for value in span)
        if not fits or not 0 <= span[0] <= span[1] <= len(text) or span[2] not in (-1, 0, 1):
            raise DataError(f"{where}: spans must be [from, to, -1 | 0 | 1] within {text!r:.80}; got {span!r:.80}.")
        for place in range(span[0], span[1]):
            if span[2]:
                marks[place] = min(float(span[2]), marks[place]) if marks[place] else float(span[2])
    return marks


def target(row: Mapping[str, Any], where: str = "records") -> str:
    """What a generative reward model writes for a record: the feedback, then the label of every word.

    Raises:
        DataError: the record is malformed.

    Example:
        >>> target({"response": "a red fox", "textual_feedback": "Vivid.", "good_spans": ["red"]})
        'Vivid.\\n{"word_score_list": [["a", 0], ["red", 1], ["fox", 0]]}'

    Source:
        The form of the authors' code of arXiv 2505.22338.
    """
    marks, text = record_marks(row, where), row["response"]
    words = [(match.start(), match.end()) for match in _WORD.finditer(text)]
    labels = token_labels(text, marks, words)
    listed = [[text[start:end], int(label)] for (start, end), label in zip(words, labels, strict=True)]
    written = json.dumps({"word_score_list": listed}, ensure_ascii=False)
    said = str(row.get("textual_feedback") or "").strip()
    return f"{said}\n{written}" if said else written
