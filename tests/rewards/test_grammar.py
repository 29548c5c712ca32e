"""The grammar of expressions, character by character, against the parser."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import RecipeError
from guerdon.rewards.expression import RewardExpression, random_expression
from guerdon.rewards.grammar import Grammar

NAMES = ["g1", "g2", "g12", "half"]
GRAMMAR = Grammar(NAMES)
ALPHABET = "g12half+-*/(). 0e"


def reads(text: str) -> bool:
    """Whether the parser takes it for an expression, whatever its value."""
    try:
        RewardExpression.parse(text, NAMES)
    except RecipeError as error:
        return "test point" in str(error)
    return True


def walk(rng: random.Random, most: int) -> str:
    """Random characters of those that the grammar lets through, until it may end or must."""
    state, text = GRAMMAR.start, ""
    while not (GRAMMAR.complete(state) and (rng.random() < 0.2 or GRAMMAR.shortest(state) + len(text) >= most)):
        choices = [(c, GRAMMAR.advance(state, c)) for c in ALPHABET]
        open_ = [(c, s) for c, s in choices if s is not None and GRAMMAR.shortest(s) + len(text) + 1 <= most]
        assert open_, f"nothing may follow {text!r}, which is no expression"
        character, state = rng.choice(open_)
        text += character
    return text


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.integers(6, 40))
def test_what_is_let_through_is_read(seed, most):
    text = walk(random.Random(seed), most)
    assert len(text) <= most
    assert reads(text), text


@settings(max_examples=250, deadline=None)
@given(st.lists(st.sampled_from([*NAMES, *"+-*/()", "1", "0.5", ".", "e", "2", " "]), max_size=9).map("".join))
def test_what_is_read_is_let_through(text):
    # numbers such as 01.5, which Python reads, are the only ones left out; there is no 0 before a digit here
    state = GRAMMAR.advance(GRAMMAR.start, text)
    assert (state is not None and GRAMMAR.complete(state)) == reads(text)


def test_every_beginning_of_an_expression_is_let_through():
    for seed in range(200):
        text = random_expression(random.Random(seed), NAMES)
        for end in range(len(text) + 1):
            state = GRAMMAR.advance(GRAMMAR.start, text[:end])
            assert state is not None
            assert GRAMMAR.shortest(state) <= len(text) - end
        assert GRAMMAR.complete(state)


@pytest.mark.parametrize(
    ("begun", "left"),
    [
        ("", 2),
        ("(", 3),
        ("0", 3),
        ("1.", 3),
        (".", 4),
        ("1e", 4),
        ("g", 1),
        ("g1", 0),
        ("g1+", 1),
        ("g1*(2", 1),
        ("ha", 2),
    ],
)
def test_how_much_is_missing(begun, left):
    state = GRAMMAR.advance(GRAMMAR.start, begun)
    assert state is not None
    assert GRAMMAR.shortest(state) == left
    assert GRAMMAR.complete(state) == (left == 0)


@pytest.mark.parametrize(
    "text", ["g3", ")", "g1(", "2g1", "g1)", "*", "1..", "1e+*", "01", "halff", "g1 g2", "\n", "(" * 65]
)
def test_what_cannot_be_a_beginning(text):
    assert GRAMMAR.advance(GRAMMAR.start, text) is None


def test_there_must_be_primitives():
    with pytest.raises(RecipeError, match="at least one"):
        Grammar([])
