"""Rows held out by their prompts."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from guerdon.errors import DataError
from guerdon.language.domain import load_data, load_preferences
from guerdon.language.held_out import split_by_prompt
from guerdon.language.tasks import find
from guerdon.language.tasks.stream import Stream
from guerdon.recipes.schema import Evaluation


def prompts(rows, count: int | None = None) -> set[str]:
    return {json.dumps(rows[i]["prompt"]) for i in range(len(rows) if count is None else count)}


def test_no_prompt_is_on_both_sides_and_all_rows_are_on_one():
    rows = [{"prompt": f"{i % 50}", "n": i} for i in range(170)]
    train, held_out = split_by_prompt(rows, 0.2, 100)
    assert not prompts(train) & prompts(held_out)
    assert len(prompts(held_out)) == len(held_out) == 10
    assert prompts(train) | prompts(held_out) == prompts(rows)
    expected = Counter(row["n"] for row in rows if json.dumps(row["prompt"]) in prompts(train))
    assert Counter(row["n"] for row in train) == expected
    assert [row["n"] for row in held_out] == sorted(row["n"] for row in held_out)
    assert max(row["n"] for row in held_out) < 50  # the first row with each prompt


def test_the_split_does_not_depend_on_the_order_of_the_rows():
    rows = [{"prompt": f"{i}"} for i in range(60)]
    mixed = random.Random(0).sample(rows, len(rows))
    assert prompts(split_by_prompt(rows, 0.3, 100)[1]) == prompts(split_by_prompt(mixed, 0.3, 100)[1])


def test_size_bounds_what_is_held_out_and_not_what_is_left_out_of_training():
    rows = [{"prompt": f"{i}"} for i in range(60)]
    few, many = split_by_prompt(rows, 0.5, 4), split_by_prompt(rows, 0.5, 100)
    assert (len(few[1]), len(many[1])) == (4, 30)
    assert prompts(few[0]) == prompts(many[0])
    assert few[1][-1] == many[1][3]
    with pytest.raises(IndexError):
        few[1][4]


def test_an_endless_stream():
    rows = find("sort").train_rows(0)
    train, held_out = split_by_prompt(rows, 0.2, 60)
    assert len(held_out) == len(prompts(held_out)) == 60
    drawn = [train[i] for i in range(400)]
    assert not {json.dumps(row["prompt"]) for row in drawn} & prompts(held_out)
    kept = sum(row == rows[i] for i, row in enumerate(drawn))
    assert 0.72 < kept / 400 < 0.88  # the others stepped aside
    assert [train[i] for i in range(5)] == drawn[:5]
    assert train[2:4] == drawn[2:4]


def test_messages_are_prompts_too():
    rows = [{"prompt": [{"role": "user", "content": f"{i % 10}"}]} for i in range(30)]
    train, held_out = split_by_prompt(rows, 0.2, 10)
    assert (len(train), len(held_out)) == (24, 2)


def test_too_few_prompts_are_an_error():
    with pytest.raises(DataError, match="of 1 different prompts"):
        split_by_prompt([{"prompt": "a"}] * 9, 0.2, 5)
    with pytest.raises(DataError, match=r"too few different prompts|hardly any"):
        split_by_prompt(Stream(lambda i: {"prompt": "a"}), 0.5, 5)


def test_in_a_recipe_the_test_rows_stay_out_of_both(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n" for i in range(100)))
    plain = load_data(str(path), loop="online", evaluation=Evaluation(size=20), seed=0)
    parted = load_data(str(path), loop="online", evaluation=Evaluation(size=20, share=0.25), seed=0)
    assert not prompts(parted.held_out) & prompts(plain.held_out)
    assert prompts(parted.train) | prompts(parted.held_out) == prompts(plain.train)
    assert len(parted.held_out) == 20


def test_pairs_can_be_held_out_by_prompt(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i % 40}", "chosen": "a", "rejected": "b"} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_preferences(str(path), "paired", evaluation=Evaluation(size=10, share=0.25), seed=0)
    assert not prompts(found.train) & prompts(found.held_out)
