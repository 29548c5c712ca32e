"""Reading written feedback: both forms, what is mended once, and what is no feedback."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guerdon.errors import ScoreError
from guerdon.rewards.critics.base import Response, ask
from guerdon.rewards.critics.feedback import Feedback, parse_feedback
from guerdon.rewards.critics.program import ProgramCritic

phrases = st.lists(st.text(max_size=8), max_size=3)


@given(st.text(max_size=20), phrases, phrases)
def test_what_is_written_as_json_is_read_back(critique, good, poor):
    reply = json.dumps({"textual_feedback": critique, "good_spans": good, "poor_spans": poor})
    found = parse_feedback(f"Let me think. {{not this}} ```json\n{reply}\n``` That is all.")
    assert found == Feedback(critique, (*((g, 1.0) for g in good), *((p, -1.0) for p in poor)))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_no_text_is_an_error(text):
    assert isinstance(parse_feedback(text), Feedback)
    assert isinstance(parse_feedback("{'" + text), Feedback)


@pytest.mark.parametrize(
    ("reply", "spans"),
    [
        ("{'good_spans': ['it\\'s'], 'poor_spans': None}", (("it's", 1.0),)),
        ('{"good_spans": ("a", "b"), "poor_spans": ()}', (("a", 1.0), ("b", 1.0))),
        ("```python\n{'word_score_list': [('a', 1), ('b', -1), ('c', 0)]}\n```", (("a", 1.0), ("b", -1.0), ("c", 0.0))),
        ("{'poor_spans': ['x'], 'fine': true}", (("x", -1.0),)),
    ],
)
def test_what_is_mended_once(reply, spans):
    assert parse_feedback(reply).spans == spans
    assert parse_feedback(reply, repair=False).failed


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("", "no JSON object"),
        ('{"good": ["a"]}', "no JSON object with feedback"),
        ('{"good_spans": ["a"', "no JSON object"),
        ('{"good_spans": [1]}', "good_spans must be a list of texts"),
        ('{"good_spans": [], "poor_spans": "a"}', "poor_spans must be a list of texts"),
        ('{"word_score_list": [["a", 2]]}', "a label must be -1, 0 or 1; got 2"),
        ('{"word_score_list": [["a", true]]}', "a label must be -1, 0 or 1; got True"),
        ('{"word_score_list": [["a", NaN]]}', "a label must be -1, 0 or 1; got nan"),
        ('{"word_score_list": ["a"]}', "must be a list of"),
        ("{'good_spans': [__import__('os')]}", "no JSON object"),
        ("{'good_spans': ['a'] + ['b']}", "no JSON object"),
    ],
)
def test_what_is_no_feedback(reply, why):
    found = parse_feedback(reply)
    assert found.failed
    assert why in found.why


def test_the_last_feedback_counts_and_the_text_before_is_the_critique():
    found = parse_feedback('{"good_spans": ["a"]} No: {"poor_spans": ["a"]} or {"x": {"good_spans": ["b"]}}')
    assert found.spans == (("a", -1.0),)
    assert parse_feedback('Dull. {"word_score_list": [["a", -1]]}').critique == "Dull."


def test_remarks_of_every_form_are_read():
    remarks = [None, '{"good_spans": ["a"]}', {"poor_spans": ["b"]}, Feedback("c"), {"marks": [1, 0]}]
    found = ask(lambda responses: remarks, [Response("p", "ab")] * 5, "here")
    assert [one.spans for one in found] == [(), (("a", 1.0),), (("b", -1.0),), (), ()]
    assert found[0].why == "the critic returned None"
    assert found[4].marks == (1, 0)
    with pytest.raises(ScoreError, match="one remark for each of 2 responses; got 1"):
        ask(lambda responses: [None], [Response("p", "a")] * 2, "here")
    with pytest.raises(ScoreError, match="must answer with a Feedback, a text, a mapping or None; got 3"):
        ask(lambda responses: [3], [Response("p", "a")], "here")
    with pytest.raises(ScoreError, match="each of the 2 characters of a response; got 1"):
        ask(lambda responses: [Feedback(marks=(1,))], [Response("p", "ab")], "here")


def test_a_program_is_handed_the_columns_that_it_names():
    def rule(prompt, response, answer):
        return {"good_spans": [answer] if answer in response else []}

    async def everything(question, text, **columns):
        return {"textual_feedback": f"{question} {text} {sorted(columns.items())}", "good_spans": []}

    responses = [Response("p", "a b", {"answer": "b", "level": 1, "text": "other"})]
    assert ask(ProgramCritic(function=rule), responses, "here")[0].spans == (("b", 1.0),)
    said = ask(ProgramCritic(function=everything), responses, "here")[0].critique
    assert said == "p a b [('answer', 'b'), ('level', 1)]"
