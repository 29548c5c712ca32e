"""Tiers of closeness."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guerdon.advantages import grpo
from guerdon.errors import BindingError, RecipeError, ScoreError, ShapeError
from guerdon.rewards import block_closeness, exact_answer
from guerdon.rollout import Rollout
from guerdon.shaping import sweet_spot
from guerdon.shaping.sweet_spot import tier_values, zone_of
from guerdon.signal import Signal

shares = st.floats(0, 1)
some = st.lists(shares, min_size=2, max_size=20)


def tiers(values: list[float], **options) -> list[float]:
    return sweet_spot(torch.tensor([values], dtype=torch.float64), **{"alpha": 1.0, **options})[0].tolist()


def test_numbers():
    assert tiers([0.0, 0.24, 0.25, 0.5, 0.99, 1.0]) == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert tiers([0.0, 0.25, 0.5, 0.75, 1.0], amplification=2.0) == [0.0, 0.0625, 0.25, 0.5625, 1.0]
    assert tiers([0.24, 0.25, 0.5, 0.75, 1.0], top="inclusive") == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0, 1.0])
    assert tiers([0.1, 0.6, 1.0], zones=2, tiers=[0.0, 0.9, 1.0]) == [0.0, 0.9, 1.0]
    assert tiers([0.6, 1.0], alpha=0.5) == [0.25, 0.5]
    # a share that is 0.6 = 3 / 5 up to rounding is in the zone that begins there
    assert zone_of(torch.tensor([0.1 + 0.2 + 0.3 - 1e-12]).double(), 5).tolist() == [3]


def test_one_zone_is_the_binary_reward():
    right = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    shaped = right + sweet_spot(torch.tensor([[1.0, 0.9, 0.1, 1.0]]), zones=1, alpha=0.5)
    assert shaped.tolist() == [[1.5, 0.0, 0.0, 1.5]]
    assert torch.allclose(grpo(shaped, eps=1e-9), grpo(right, eps=1e-9))


def test_many_zones_are_the_closeness_itself():
    closeness = torch.rand(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (sweet_spot(closeness, zones=10_000, alpha=1.0) - closeness).abs().max() <= 1e-4


@given(some, st.integers(1, 8), st.sampled_from([1.0, 2.0]), st.sampled_from(["exclusive", "inclusive"]))
def test_tiers_rise_with_closeness_and_are_few(values, zones, m, top):
    zones += top == "inclusive"
    found = tiers(sorted(values), zones=zones, amplification=m, top=top)
    assert found == sorted(found)
    assert set(found) <= set(tier_values(zones, m, None, top))
    assert len(tier_values(zones, m, None, top)) == zones + (top == "exclusive")
    positions = zone_of(torch.tensor(sorted(values), dtype=torch.float64), zones, top).tolist()
    assert [a == b for a, b in pairwise(found)] == [a == b for a, b in pairwise(positions)]


@given(some, some, st.floats(0, 0.999))
def test_any_right_sample_outranks_any_wrong_one(right, wrong, alpha):
    least = 1 + min(tiers(right, alpha=alpha))
    most = max(tiers(wrong, alpha=alpha))
    assert least > most


def test_the_bound_on_alpha_is_sharp():
    # a failure with the highest tier of failures against a success at the lowest
    wrong, right = tiers([0.99, 0.0], alpha=4 / 3)
    assert wrong == pytest.approx(1 + right)


@given(some, st.integers(1, 9))
def test_zones_of_tiers_are_the_same_zones(values, zones):
    closeness = torch.tensor([values], dtype=torch.float64)
    tier = sweet_spot(closeness, zones=zones, alpha=1.0)
    assert torch.equal(zone_of(tier, zones), zone_of(closeness, zones))


def test_steps_and_parts():
    parts = [[[1.0, 0.5, 0.0], [1.0], []]]
    scores = torch.zeros(1, 3)
    assert sweet_spot(scores, parts, aggregate="mean", alpha=1.0).tolist() == [[0.5, 1.0, 0.0]]
    assert sweet_spot(scores, parts, aggregate="last", alpha=1.0).tolist() == [[0.0, 1.0, 0.0]]
    assert sweet_spot(scores, parts, aggregate="tiers", alpha=1.0).tolist() == [[0.5, 1.0, 0.0]]
    # tiers of parts keep what the tier of their mean forgets
    parts = [[[1.0, 0.0], [0.4, 0.4]]]
    scores = torch.zeros(1, 2)
    assert sweet_spot(scores, parts, aggregate="tiers", alpha=1.0, amplification=2.0).tolist() == [[0.5, 0.0625]]
    assert sweet_spot(scores, [[[math.nan, 1.0], [math.nan]]], aggregate="mean", alpha=1.0).tolist() == [[0.5, 0.0]]


def test_an_all_wrong_group_becomes_alive():
    closeness = torch.tensor([[0.1, 0.3, 0.3, 0.8]])
    assert (grpo(torch.zeros(1, 4)) == 0).all()
    assert (grpo(sweet_spot(closeness))[0] != 0).any()
    # and a group that binary rewards tell apart stays so
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        near = torch.rand(1, 4, generator=generator)
        right = (near > 0.6).float()
        alive, before = (bool((grpo(r) != 0).any()) for r in (right + sweet_spot(near), right))
        assert alive >= before


def test_on_the_road():
    rollout = Rollout(
        ["p"], [["123", "124", "999"]], torch.ones(1, 3, 3).bool(), torch.zeros(1, 3, 3), columns={"answer": ["123"]}
    )
    near = {"block_closeness": block_closeness, "exact_answer": exact_answer}
    signal = Signal(
        rewards={"right": near["exact_answer"], "near": near["block_closeness"]},
        shaping={"near": [lambda scores, closeness: sweet_spot(scores, closeness, aggregate="tiers")]},
        advantage=grpo,
    )
    assert signal(rollout).rewards.tolist() == [[1.5, 0.25, 0.0]]


def test_unscored_stays_unscored_and_nothing_flows_back():
    found = sweet_spot(torch.tensor([[0.5, math.nan]], requires_grad=True))
    assert found[0, 0] == 0.25
    assert found[0, 1].isnan()
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"zones": 0}, "zones: must be at least 1 with top exclusive; got 0"),
        ({"zones": 1, "top": "inclusive"}, "zones: must be at least 2 with top inclusive; got 1"),
        ({"alpha": -0.1}, "alpha: must be at least 0; got -0.1"),
        ({"amplification": 0.0}, "amplification: must be above 0"),
        ({"tiers": [0.0, 1.0]}, "tiers: must be 5 numbers rising from 0 to 1"),
        ({"zones": 2, "tiers": [0.0, 0.0, 1.0]}, "rising from 0 to 1"),
        ({"zones": 2, "tiers": [0.1, 0.5, 1.0]}, "rising from 0 to 1"),
        ({"top": "outer"}, "top: must be exclusive or inclusive; got 'outer'"),
        ({"aggregate": "sum"}, "aggregate: must be score, mean, last or tiers; got 'sum'"),
    ],
)
def test_options_out_of_range(options, complaint, friendly_errors):
    with pytest.raises(RecipeError, match=complaint):
        sweet_spot(torch.zeros(1, 2), **options)


def test_faults(friendly_errors):
    with pytest.raises(ScoreError, match=r"closeness must be from 0 to 1; got 1.5. Scale the reward"):
        sweet_spot(torch.tensor([[0.5, 1.5]]))
    assert sweet_spot(torch.tensor([[1 + 1e-7, -1e-7]])).tolist() == [[0.5, 0.0]]
    with pytest.raises(BindingError, match=r"aggregate 'mean' needs the field closeness"):
        sweet_spot(torch.zeros(1, 2), aggregate="mean")
    with pytest.raises(ShapeError, match=r"scores must be \[P, G\]; got \[2\]"):
        sweet_spot(torch.zeros(2))
