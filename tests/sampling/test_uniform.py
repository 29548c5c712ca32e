"""Uniform sampling: every prompt once per epoch, and nothing forgotten by the state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import DataError
from guerdon.sampling import uniform


def sampler(size: int | None, seed: int = 0, **options: bool) -> uniform:
    made = uniform(**options)
    made.prepare(size, seed)
    return made


@given(size=st.integers(1, 12), counts=st.lists(st.integers(0, 9), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_each_epoch_holds_each_prompt_once(size, counts):
    made = sampler(size)
    drawn = [index for count in counts for index in made.draw(count)]
    assert len(drawn) == sum(counts)
    for start in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[start : start + size]) == list(range(size))


def test_epochs_and_seeds_differ():
    made = sampler(50)
    first, second = made.draw(50), made.draw(50)
    assert first != second
    assert sampler(50, seed=1).draw(50) not in (first, second)
    assert sampler(50).draw(100) == first + second


def test_how_it_is_cut_does_not_matter():
    whole = sampler(7).draw(40)
    parts = sampler(7)
    assert [index for count in (3, 0, 11, 1, 25) for index in parts.draw(count)] == whole


def test_the_state_dict_is_the_whole_state():
    first = sampler(7, seed=3)
    first.draw(10)
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    after = first.draw(20)
    late, early = uniform(), uniform()
    late.prepare(7, 3)
    late.load_state_dict(saved)
    early.load_state_dict(saved)
    early.prepare(7, 3)
    assert late.draw(20) == after
    assert early.draw(20) == after


def test_endless_data_is_drawn_in_order():
    made = sampler(None)
    assert made.draw(3) + made.draw(2) == [0, 1, 2, 3, 4]


def test_without_shuffling():
    assert sampler(3, shuffle=False).draw(7) == [0, 1, 2, 0, 1, 2, 0]


def test_drawing_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    sampler(9).draw(20)
    assert torch.equal(before, torch.get_rng_state())


def test_every_group_is_kept():
    made = sampler(9)
    assert made.keep(torch.zeros(3, 2, 1)).tolist() == [True] * 3
    assert made.draws_max == 1
    made.shortage(kept=1, wanted=2)


def test_no_prompts():
    with pytest.raises(DataError, match="the data has 0 prompts"):
        uniform().prepare(0, 0)
