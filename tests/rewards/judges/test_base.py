"""The judge protocol, and judges made of a function or of a reward."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from guerdon.errors import RecipeError, ScoreError, UnknownNameError
from guerdon.rewards.judges import MEMBERS, pairwise, pointwise
from guerdon.rewards.judges.base import Match, Verdict, both_orders, read_answers, resolve, wait_for
from tests.contracts.checks import it_is_documented, its_options_are_declared
from tests.contracts.fields import OPTIONS
from tests.contracts.members import resolve as member_of

MATCH = Match("p", "a", "bb")


@pytest.mark.parametrize("name", MEMBERS)
def test_judges_are_documented(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    required = {"chat": {"base_url": "", "model": ""}, "local": {"model": ""}, "pairwise": {"function": ""}}
    monkeypatch.setitem(OPTIONS, f"rewards.judges.{name}", required.get(name, {"reward": ""}))
    member = member_of("rewards.judges", name, {})
    it_is_documented(member)
    its_options_are_declared(member)


def test_both_orders() -> None:
    other = Match("q", "c", "d", {"x": 1})
    assert both_orders([MATCH, other]) == [
        MATCH,
        Match("p", "bb", "a"),
        other,
        Match("q", "d", "c", {"x": 1}),
    ]


@pytest.mark.parametrize(
    "answers",
    [
        [(1, 2.5)],
        [[1, 2.5]],
        [Verdict(1.0, 2.5)],
        torch.tensor([[1, 2.5]]),
        np.array([[1, 2.5]]),
        [torch.tensor([1, 2.5])],
    ],
)
def test_answers_of_many_kinds(answers: Any) -> None:
    assert read_answers(answers, [MATCH], "here") == [Verdict(1.0, 2.5)]


@pytest.mark.parametrize(
    ("answer", "why"), [(None, "the judge returned None"), ((math.nan, 1.0), "the judge returned (nan, 1.0)")]
)
def test_no_verdict(answer: Any, why: str) -> None:
    (found,) = read_answers([answer], [MATCH], "here")
    assert found.failed
    assert found.why == why


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], r"here: a judge must return one answer for each of 1 matches; got 0\.$"),
        (3.0, r"here: a judge must return one answer for each of 1 matches; got float 3.0\.$"),
        ([0.5], r"must answer a match with two numbers, .* got 0.5 for the prompt 'p'"),
        ([("a", "b")], r"must answer a match with two numbers, .* got \('a', 'b'\) for the prompt 'p'"),
        ([(1.0, 2.0, 3.0)], r"must answer a match with two numbers"),
    ],
)
def test_answers_that_are_none(answers: Any, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        read_answers(answers, [MATCH], "here")


def test_a_judge_by_name() -> None:
    found = resolve({"pointwise": {"reward": "exact_answer", "margin": 0.5}}, "here")
    assert found([Match("p", "x", "y", {"answer": "y"})]) == [Verdict(0.0, 1.0)]
    assert resolve(len, "here") is len
    with pytest.raises(UnknownNameError, match=r"here: rewards.judges has nothing called 'chta'. Did you mean 'chat'"):
        resolve("chta", "here")
    with pytest.raises(RecipeError, match=r"here.pointwise.margn: there is no such option .* Did you mean 'margin'"):
        resolve({"pointwise": {"reward": "exact_answer", "margn": 1}}, "here")
    with pytest.raises(RecipeError, match=r"here.chat: the options base_url, model must be given"):
        resolve("chat", "here")


@pytest.mark.parametrize(
    ("result", "points"), [(1, (1.0, 0.0)), (0.25, (0.25, 0.75)), ((3.0, 4.0), (3.0, 4.0)), (None, None)]
)
def test_a_function_of_a_pair(result: Any, points: Any) -> None:
    seen: list[Any] = []

    def function(*arguments: Any) -> Any:
        seen.append(arguments)
        return result

    assert pairwise(function=function)([MATCH, MATCH]) == [points, points]
    assert seen == [("p", "a", "bb")] * 2


def test_a_coroutine_function_of_a_pair_runs_side_by_side() -> None:
    running = most = 0

    async def function(prompt: str, first: str, second: str) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return float(first > second)

    matches = [Match("p", str(i), "4") for i in range(9)]
    found = wait_for(pairwise(function=function, concurrency=3)(matches))  # pyright: ignore[reportArgumentType]
    assert found == [(0.0, 1.0)] * 5 + [(1.0, 0.0)] * 4
    assert most == 3


def test_functions_that_are_none() -> None:
    assert pairwise(function="operator:mod").function(7, 4) == 3
    for wrong in ("operator", "operator:no_such", 3):
        with pytest.raises(RecipeError, match=r"judges.pairwise.function: it must be a callable, or module:attribute"):
            pairwise(function=wrong)
    with pytest.raises(RecipeError, match=r"judges.pairwise.concurrency: must be 1 or more; got 0"):
        pairwise(function=len, concurrency=0)


def lengths(samples: Sequence[Sequence[str]]) -> list[list[float]]:
    return [[float(len(sample)) for sample in group] for group in samples]


def test_a_reward_as_a_judge() -> None:
    matches = [Match("p", "a", "bb"), Match("q", "aaa", "a"), Match("r", "aaa", "aa")]
    assert [v[:2] for v in pointwise(reward=lengths)(matches)] == [(1.0, 2.0), (3.0, 1.0), (3.0, 2.0)]
    assert [v[:2] for v in pointwise(reward=lengths, margin=1.0)(matches)] == [(1.5, 1.5), (3.0, 1.0), (2.5, 2.5)]
    assert pointwise(reward=lengths)([]) == []
    with pytest.raises(RecipeError, match=r"judges.pointwise.margin: must be 0 or more; got -1"):
        pointwise(reward=lengths, margin=-1.0)


def test_a_reward_that_reads_columns_and_does_not_always_score() -> None:
    judge = pointwise(reward="exact_answer")
    found = judge([Match("p", "3", "4", {"answer": 4, "level": 1}), Match("p", "3", "4", {"answer": None})])
    assert found[0] == Verdict(0.0, 1.0)
    assert found[1].failed
    assert found[1].why == "the reward gave no score"


def test_a_reward_in_the_flat_form_as_a_judge() -> None:
    def flat(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(prompt in completion) for prompt, completion in zip(prompts, completions, strict=True)]

    assert [v[:2] for v in pointwise(reward=flat)([Match("a", "bab", "b"), Match("b", "a", "b")])] == [
        (1.0, 0.0),
        (0.0, 1.0),
    ]


def test_waiting_works_inside_a_running_loop_and_hands_errors_on() -> None:
    async def fine() -> int:
        return 3

    async def wrong() -> int:
        raise ScoreError("no")

    async def notebook() -> int:
        return wait_for(fine())

    assert asyncio.run(notebook()) == 3
    with pytest.raises(ScoreError, match="no"):
        wait_for(wrong())
