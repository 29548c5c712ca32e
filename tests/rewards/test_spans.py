"""Spans to tokens: the same characters whatever the tokenizer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guerdon.errors import DataError, RecipeError, ScoreError, ShapeError
from guerdon.rewards.critics.feedback import Feedback
from guerdon.rewards.spans import Spans, align_spans, find_spans, length_weight

SPANS = [("red Fox", 1), ("no", -1), ("no", -1), ("absent", 1), ("fox", 0)]
TEXT = "No red\n fox, no nook. Fox\u00e9 ok"


@given(st.sets(st.integers(1, len(TEXT) - 1)))
def test_the_same_characters_are_rewarded_by_any_tokenizer(cuts):
    letters, unmatched = align_spans(TEXT, [(i, i + 1) for i in range(len(TEXT))], SPANS)
    assert unmatched == ["absent"]
    edges = [0, *sorted(cuts), len(TEXT)]
    offsets = list(itertools.pairwise(edges))
    for (start, end), reward in zip(offsets, align_spans(TEXT, offsets, SPANS)[0], strict=True):
        inside = [value for value in letters[start:end] if value]
        assert reward == min(inside, default=0.0)


def test_whole_words_and_negative_wins():
    words = [(0, 2), (3, 6), (8, 11), (11, 12), (13, 15), (16, 20)]
    assert align_spans(TEXT, words, SPANS)[0] == [-1.0, 1.0, 1.0, 0.0, -1.0, 0.0]
    assert align_spans("a b c", [(0, 1), (2, 3), (4, 5)], [("a b", 1), ("b c", -1)])[0] == [1.0, -1.0, -1.0]
    assert align_spans("abc", [(0, 3)], [("", 1), ("ab", 1)]) == ([0.0], ["", "ab"])
    with pytest.raises(DataError, match=r"label must be -1, 0 or 1; got 2"):
        align_spans("a", [(0, 1)], [("a", 2)])
    assert align_spans("a b", [(0, 1), (2, 3)], [("a", 2), ("b", -0.25)], continuous=True)[0] == [1.0, -0.25]
    with pytest.raises(ScoreError, match="label must be finite; got nan"):
        align_spans("a", [(0, 1)], [("a", math.nan)], continuous=True)


def test_length_weight():
    factors = length_weight(torch.tensor([[0.0, 1.0] + [0.0] * 30, [0.0] * 32]), torch.tensor([4, 4]))
    assert factors[0, 10].item() == 0.5  # n = 10 = n0 + 6
    assert (factors[0].diff() <= 0).all()
    assert (factors[1] == 1).all()


def output(critic, samples, **options):
    """What the reward gives for tokens of one character."""
    length = max(len(text) for group in samples for text in group)
    places = [[[(i, i + 1) if i < len(s) else (0, 0) for i in range(length)] for s in group] for group in samples]
    mask = [[[i < len(s) for i in range(length)] for s in group] for group in samples]
    columns = options.pop("columns", {})
    prompts = [f"p{n}" for n in range(len(samples))]
    return Spans(critic=critic, **options)(prompts, samples, torch.tensor(places), torch.tensor(mask), **columns)


def says(**remarks):
    """A critic that has a remark on each text."""
    return lambda responses: [remarks[one.text.split()[0]] for one in responses]


def test_tokens_are_paid_and_counted():
    asked = []

    def critic(responses):
        asked.extend(responses)
        said = {"good_spans": ["ab", "x"], "poor_spans": ["c"]}
        found = {"ab c": said, "d": Feedback("so so"), "e": None, "f": Feedback("", calls=3)}
        return [found[one.text] for one in responses]

    found = output(critic, [["ab c", "d"], ["f", "f"], ["e", "d"]])
    assert found.step_scores.tolist()[0] == [[1, 1, 0, -1], [0, 0, 0, 0]]
    assert found.scores == [[1.0, 0.0], [0.0, 0.0], [None, 0.0]]
    assert found.unmatched.tolist() == [1, 0, 0]
    assert found.no_feedback.tolist() == [1, 2, 1]
    assert found.critic_failures.tolist() == [0, 0, 1]
    assert found.critic_calls.tolist() == [0, 3, 0]
    assert [(one.prompt, one.text) for one in asked] == [
        ("p0", "ab c"),
        ("p0", "d"),
        ("p1", "f"),
        ("p2", "e"),
        ("p2", "d"),
    ]


def test_options_of_the_reward():
    critic = says(a={"good_spans": ["a"]}, b={"good_spans": []})
    assert output(critic, [["a", "b"]], no_feedback="drop").scores == [[1.0, None]]
    assert output(critic, [["a", "b"]], steps=False).step_scores is None
    half = output(lambda r: [Feedback(marks=(1.0,) * 11)], [["a" * 11]], suggested="n", columns={"n": [5]})
    assert half.step_scores[0, 0, 10].item() == 0.5  # n = 11 = 5 + 6
    assert half.scores[0][0] == pytest.approx(half.step_scores.sum().item())
    fixed = output(lambda r: [Feedback(marks=(1.0,) * 11)], [["a" * 11]], suggested=5)
    assert torch.equal(fixed.step_scores, half.step_scores)
    soft = output(lambda r: [Feedback(marks=(0.5, -7.0))], [["ab"]], continuous=True)
    assert soft.step_scores.tolist() == [[[0.5, -1.0]]]


def test_errors_of_the_reward(friendly_errors):
    with pytest.raises(RecipeError, match="no_feedback: must be keep or drop"):
        Spans(critic=says(), no_feedback="x")
    with pytest.raises(RecipeError, match="failures_max: must be from 0 to 1"):
        Spans(critic=says(), failures_max=2)
    with pytest.raises(RecipeError, match="alpha: must be above 0"):
        Spans(critic=says(), alpha=0)
    with pytest.raises(ScoreError, match=r"2 of 3 samples have no feedback.*failures_max = 0.5.*returned None"):
        output(says(a=None, b=None, c={"good_spans": []}), [["a", "b", "c"]])
    with pytest.raises(DataError, match=r"the column 'n' must hold a number of tokens; got None.*There are: m"):
        output(says(a={"good_spans": []}), [["a"]], suggested="n", columns={"m": [1]})
    with pytest.raises(DataError, match=r"label must be -1, 0 or 1; got 0\.5 for character 0"):
        output(lambda r: [Feedback(marks=(0.5,))], [["a"]])
    with pytest.raises(ShapeError, match=r"offsets must be \[P, G, T, 2\]"):
        Spans(critic=says())(["p"], [["a"]], torch.zeros(1, 1, 3, 1), torch.ones(1, 1, 3).bool())


def test_words_in_order_are_each_found_behind_the_last():
    text = "a-b a b"
    words = [("a-b", 0), ("a", 1), ("b", -1)]
    assert find_spans(text, words, in_order=True) == ([0, 0, 0, 0, 1, 0, -1], [])
    assert find_spans(text, words)[0] == [1, 0, -1, 0, 0, 0, 0]
    assert find_spans("x y", [("y", 1), ("x", 1)], in_order=True) == ([0, 0, 1], ["x"])
