"""Spans to tokens: the same characters whatever the tokenizer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guerdon.errors import DataError
from guerdon.rewards.spans import align_spans, length_weight

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


def test_length_weight():
    factors = length_weight(torch.tensor([[0.0, 1.0] + [0.0] * 30, [0.0] * 32]), torch.tensor([4, 4]))
    assert factors[0, 10].item() == 0.5  # n = 10 = n0 + 6
    assert (factors[0].diff() <= 0).all()
    assert (factors[1] == 1).all()


@pytest.mark.parametrize("kind", ["align", "length"])
def test_reference_numbers(kind):
    cases = [
        (c["inputs"], c["outputs"])
        for c in json.loads((Path(__file__).parent / "spans.json").read_text())["cases"]
        if c["inputs"]["kind"] == kind
    ]
    assert cases
    for inputs, outputs in cases:
        if kind == "align":
            found = align_spans(inputs["text"], inputs["offsets"], inputs["spans"])
            assert found == (outputs["token_rewards"], outputs["unmatched"])
        else:
            scores = torch.tensor(inputs["scores"], dtype=torch.float64)
            factors = length_weight(scores, torch.tensor(inputs["suggested"]), alpha=float(inputs["alpha"]))
            torch.testing.assert_close(factors, torch.tensor(outputs["weights"], dtype=torch.float64))
            torch.testing.assert_close(factors * scores, torch.tensor(outputs["scores"], dtype=torch.float64))
