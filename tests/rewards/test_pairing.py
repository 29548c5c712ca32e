"""From scores to pairs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guerdon.errors import RecipeError, ShapeError
from guerdon.rewards.pairing import Picked, pick_pair

GROUPS = st.lists(st.sampled_from([None, math.nan, -1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=6)


@given(GROUPS, st.floats(0, 1, exclude_max=True), st.sampled_from(["random", "worst"]))
def test_the_best_is_chosen_and_one_that_it_beats_rejected(scores, uniform, rejected):
    texts = [str(g) for g in range(len(scores))]
    found = pick_pair(scores, texts, rejected=rejected, uniform=uniform)
    known = [score for score in scores if score is not None and not math.isnan(score)]
    if len(known) < 2:
        assert found == Picked(None, None, "unscored")
    elif len(set(known)) == 1:
        assert found == Picked(None, None, "constant")
    else:
        assert scores[found.chosen] == max(known)
        assert found.chosen == scores.index(max(known))  # the first of equals
        assert scores[found.rejected] < max(known)
        if rejected == "worst":
            assert found.rejected == scores.index(min(known))
    assert found == pick_pair(scores, texts, rejected=rejected, uniform=uniform)


def test_every_lower_one_is_rejected_equally_often():
    scores = [0.2, 0.9, 0.1, 0.9, 0.3]
    found = [pick_pair(scores, list("abcde"), uniform=(i + 0.5) / 300).rejected for i in range(300)]
    assert {g: found.count(g) for g in set(found)} == {0: 100, 2: 100, 4: 100}


def test_equal_and_empty_texts_make_no_pair():
    assert pick_pair([1.0, 0.0], ["same", "same"]).why == "equal"
    assert pick_pair([1.0, 0.0], ["text", ""]).why == "unscored"
    assert pick_pair([1.0, 0.5, 0.0], ["", "b", "c"]) == Picked(1, 2)


def test_the_longest_can_be_left_out():
    scores, texts = [0.0, 3.0, 1.0, 2.0], ["a", "long", "bb", "c"]
    assert pick_pair(scores, texts, rejected="worst") == Picked(1, 0)
    assert pick_pair(scores, texts, rejected="worst", exclude_longest=True) == Picked(3, 0)


def test_mistakes(friendly_errors):
    with pytest.raises(RecipeError, match="must be random or worst"):
        pick_pair([1.0, 2.0], ["a", "b"], rejected="best")
    for scores, texts in (([1.0], ["a"]), ([1.0, 2.0], ["a"])):
        with pytest.raises(ShapeError, match="two or more completions"):
            pick_pair(scores, texts)
