"""Records of feedback: held against the response, read back to the same labels, and what is no record."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guerdon.errors import DataError
from guerdon.rewards.critics.base import Response
from guerdon.rewards.critics.feedback import Feedback, parse_feedback
from guerdon.rewards.critics.records import checked, record_marks, runs, target
from guerdon.rewards.spans import feedback_marks

TEXT = "a red fox, a red dog"


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=len(TEXT), max_size=len(TEXT)))
def test_labels_of_characters_come_back_from_a_record(marks):
    found = checked(Response("p", TEXT), Feedback("so", marks=tuple(marks)))
    assert found.record is not None
    assert record_marks(json.loads(json.dumps(found.record))) == marks


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=5, max_size=5), st.text(max_size=20))
def test_what_a_generative_model_is_taught_is_read_back(labels, critique):
    text, words = "a red a b, red", ["a", "red", "a", "b,", "red"]
    marks = [0.0] * len(text)
    start = 0
    for word, label in zip(words, labels, strict=True):
        start = text.index(word, start)
        marks[start : start + len(word)] = [label] * len(word)
        start += len(word)
    written = target({"response": text, "textual_feedback": critique, "marks": marks})
    found = parse_feedback(written)
    assert not found.failed
    back, unmatched = feedback_marks(text, found)
    assert unmatched == []
    letters = [i for i, letter in enumerate(text) if letter.isalnum()]
    assert [back[i] for i in letters] == [marks[i] for i in letters]


def test_which_occurrence_is_meant_is_kept():
    found = checked(Response("p", TEXT, {"level": 2, "spans": "not ours"}), Feedback("", (("red", -1.0), ("red", 0.0))))
    assert found.record == {
        "prompt": "p",
        "response": TEXT,
        "textual_feedback": "",
        "good_spans": [],
        "poor_spans": ["red"],
        "spans": [[2, 5, -1]],
        "level": 2,
    }


def test_what_is_left_out_and_why():
    response = Response("p", TEXT)
    assert checked(response, Feedback(why="HTTP 500")) == (None, "no feedback", 0)
    wolf = checked(response, Feedback("", (("wolf", 1.0),)))
    assert wolf == (None, "no phrase stands in the response", 1)
    assert checked(response, Feedback("", (("fox", 2.0),))).why == "a label is none of -1, 0 and 1"
    some = checked(response, Feedback("", (("wolf", 1.0), ("fox", 1.0))))
    assert (some.unmatched, some.record is None) == (1, False)
    nothing = checked(response, Feedback("Nothing to say."))
    assert nothing.record is not None
    assert nothing.record["spans"] == []


def test_a_character_in_a_good_and_a_poor_place_is_poor():
    assert record_marks({"response": "abc", "spans": [[0, 2, 1], [1, 3, -1], [0, 3, 0]]}) == [1, -1, -1]
    assert record_marks({"response": "a b", "good_spans": ["a b"], "poor_spans": ["b"]}) == [1, 1, -1]
    assert record_marks({"response": "ab", "good_spans": None}) == [0, 0]
    assert runs([]) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": 3}, "response must be a text; got 3"),
        ({"response": "a", "good_spans": "a"}, "good_spans must be a list of texts; got 'a'"),
        ({"response": "a", "poor_spans": [1]}, "poor_spans must be a list of texts"),
        (
            {"response": "a", "spans": [[0, 2, 1]]},
            r"spans must be \[from, to, -1 \| 0 \| 1\] within 'a'; got \[0, 2, 1\]",
        ),
        ({"response": "a", "spans": [[0, 1, 2]]}, "spans must be"),
        ({"response": "a", "spans": 3}, "spans must be"),
        ({"response": "ab", "marks": [1]}, "marks must be -1, 0 or 1 for each of the 2 characters"),
        ({"response": "a", "marks": [True]}, "marks must be"),
    ],
)
def test_what_is_no_record(row, message):
    with pytest.raises(DataError, match=message):
        record_marks(row)
