"""Verdicts in what a model wrote, and rubrics."""

from __future__ import annotations

from typing import Any

import pytest

from guerdon.errors import RecipeError
from guerdon.rewards.judges.question import Question, shown
from guerdon.rewards.judges.rubric import Rubric
from guerdon.rewards.judges.verdict import read_verdict

RUBRIC = Rubric({"answer": {"levels": {0: "-", 4: "+"}}, "process": {"levels": {1: "-", 5: "+"}, "weight": 3}})


@pytest.mark.parametrize(
    ("reply", "strict", "lenient"),
    [
        ('{"first": 7, "second": 4.5}', (7.0, 4.5), (7.0, 4.5)),
        (' \n{"second": 0, "first": 10, "reason": "{}"}\n', (10.0, 0.0), (10.0, 0.0)),
        ('```json\n{"first": 7, "second": 4}\n```', None, (7.0, 4.0)),
        ('I had {"first": 1, "second": 2} in mind, but: {"first": 8, "second": 2}.', None, (8.0, 2.0)),
        ('{"first": 8, "second": 2} and {"not": "a verdict"}', None, (8.0, 2.0)),
        ('{"verdict": {"first": 8, "second": 2}}', None, None),
        ('<think>{ {"a": 1</think>{"First": "8", "SECOND": " 2.5 "}', None, (8.0, 2.5)),
        ('{"first": "8/10", "second": 2}', None, None),
        ('{"first": true, "second": 2}', None, None),
        ('{"first": NaN, "second": 2}', None, None),
        ('{"first": Infinity, "second": 2}', None, None),
        ('{"first": 10.01, "second": 2}', None, None),
        ('{"first": -1, "second": 2}', None, None),
        ('{"first": null, "second": 2}', None, None),
        ('{"first": 3}', None, None),
        ("[7, 4]", None, None),
        ("7", None, None),
        ("", None, None),
        ("{" * 5000, None, None),
        ('{"a":' * 5000, None, None),
        ('{"first": 1e400, "second": 2}', None, None),
    ],
)
def test_replies(reply: str, strict: Any, lenient: Any) -> None:
    assert read_verdict(reply, parsing="strict") == strict
    assert read_verdict(reply) == lenient


def test_replies_by_criteria() -> None:
    good = '{"first": {"answer": 4, "process": 1}, "second": {"answer": 2, "process": 5}}'
    assert read_verdict(good, RUBRIC, "strict") == (2.5, 8.75)  # (1 * 1 + 3 * 0) / 4, (0.5 + 3) / 4, times 10
    assert read_verdict(f"So: {good.replace('answer', 'Answer')}", RUBRIC) == (2.5, 8.75)
    assert read_verdict(good.replace("5", '"5"'), RUBRIC) == (2.5, 8.75)
    for bad in (
        '{"first": 4, "second": 2}',
        '{"first": {"answer": 4}, "second": {"answer": 2, "process": 5}}',
        '{"first": {"answer": 4, "process": 0}, "second": {"answer": 2, "process": 5}}',
    ):
        assert read_verdict(bad, RUBRIC) is None


def test_a_rubric_whose_names_have_capitals() -> None:
    rubric = Rubric({"Answer": {"levels": {0: "-", 10: "+"}}})
    reply = '{"first": {"Answer": 3}, "second": {"Answer": 4}}'
    assert read_verdict(reply, rubric, "strict") == (3.0, 4.0)
    assert read_verdict(f"ok {reply}", rubric) == (3.0, 4.0)


def test_a_long_reply_is_read_from_its_end_in_good_time() -> None:
    assert read_verdict("{" * 400_000 + '{"first": 1, "second": 2}') == (1.0, 2.0)


@pytest.mark.usefixtures("friendly_errors")
@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ({"a": {}}, r"rubric.a: a criterion has levels, about and weight; got {}"),
        ({"a": "good"}, r"rubric.a: a criterion has levels"),
        ({"a": {"levels": {0: "", 1: ""}, "wieght": 2}}, r"rubric.a: a criterion has levels, about and weight"),
        ({"a": {"levels": ["bad", "good"]}}, r"rubric.a.levels: must be a mapping from points to text"),
        ({"a": {"levels": {"low": "", "high": ""}}}, r"rubric.a.levels: must be a mapping from points to text"),
        ({"a": {"levels": {3: "all"}}}, r"rubric.a.levels: at least two different numbers of points are needed"),
        ({"a": {"levels": {0: "", 1: ""}, "weight": 0}}, r"rubric.a.weight: must be a number above 0; got 0"),
    ],
)
def test_rubrics_that_are_none(criteria: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}"):
        Rubric(criteria)


def test_levels_may_come_from_json() -> None:
    assert Rubric({"a": {"levels": {"10": "good", "0": "bad"}}}).criteria[0].levels == {0.0: "bad", 10.0: "good"}


@pytest.mark.usefixtures("friendly_errors")
def test_parsing_must_be_known() -> None:
    with pytest.raises(RecipeError, match=r"judges.x.parsing: must be strict or lenient; got 'loose'"):
        Question("judges.x", parsing="loose")  # pyright: ignore[reportArgumentType]


def test_trajectories_are_shown_with_their_steps() -> None:
    steps = [
        {"role": "assistant", "content": None, "tool_calls": [{"name": "search", "arguments": {"q": "é"}}]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "It is 4."},
    ]
    assert shown(steps) == 'assistant:  [{"name": "search", "arguments": {"q": "é"}}]\ntool: found\nassistant: It is 4.'
    assert shown("as it is {x}") == "as it is {x}"
    assert shown(4) == "4"
