"""Tournaments by hand: rankings, brackets, numbers of comparisons, draws."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guerdon.advantages import grpo
from guerdon.errors import ScoreError, UnknownNameError
from guerdon.rewards.topologies import TOPOLOGIES, Standing, bracket, play, start

STRICT = ("single_elimination", "double_elimination")
SIZES = range(2, 34)


def by_quality(quality: Any) -> Any:
    return lambda pairs: [(quality[i], quality[j]) for i, j in pairs]


def against(quality: list[float]) -> Any:
    """Points that depend on both: 5 + half the difference."""
    return lambda pairs: [(5 + (quality[i] - quality[j]) / 2, 5 - (quality[i] - quality[j]) / 2) for i, j in pairs]


def shuffled(size: int, seed: int = 0) -> list[float]:
    quality = [float(i) for i in range(size)]
    Random(seed).shuffle(quality)
    return quality


def true_ranks(quality: list[float]) -> list[int]:
    return [1 + sum(other > own for other in quality) for own in quality]


@pytest.mark.parametrize("topology", ["anchor", "round_robin"])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 16, 33])
def test_a_consistent_judge_gives_the_true_order(topology: str, size: int) -> None:
    quality = shuffled(size, size)
    quality[0] += 0.5  # a pivot that ties with nobody
    assert play(topology, size, by_quality(quality)).ranks == true_ranks(quality)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 64])
def test_an_elimination_is_exact_in_a_full_bracket(size: int) -> None:
    quality = shuffled(size, size)
    assert play("single_elimination", size, by_quality(quality)).ranks == true_ranks(quality)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("judge", [by_quality, against])
def test_the_best_wins_an_elimination_whatever_the_byes(size: int, judge: Any) -> None:
    quality = shuffled(size, size)
    for topology in STRICT:
        found = play(topology, size, judge(quality))
        assert found.ranks[quality.index(size - 1)] == 1
    assert play("single_elimination", size, judge(quality)).ranks[quality.index(0)] > size / 2 - 1


@pytest.mark.parametrize("topology", ["swiss", "double_elimination"])
def test_the_best_wins_and_the_rest_is_near_its_place(topology: str) -> None:
    errors = []
    for seed in range(50):
        quality = shuffled(16, seed)
        found = play(topology, 16, by_quality(quality), seed=seed)
        expected = true_ranks(quality)
        assert found.quantiles[expected.index(1)] == max(found.quantiles)
        errors += [abs(a - b) for a, b in zip(found.ranks, expected, strict=True)]
    assert sum(errors) / len(errors) < 2.5  # 5.3 for ranks at random


@pytest.mark.parametrize("size", SIZES)
def test_numbers_of_comparisons(size: int) -> None:
    asked: dict[str, int] = {}
    for topology in TOPOLOGIES:
        pairs: list[tuple[int, int]] = []

        def compare(found: list[tuple[int, int]], pairs: list[tuple[int, int]] = pairs) -> list[tuple[float, float]]:
            assert found, "an empty round"
            pairs += found
            return [(float(i * 7 % 5), float(j * 7 % 5)) for i, j in found]

        standing = play(topology, size, compare)
        assert standing.comparisons == len(pairs)
        assert all(i != j and 0 <= i < size and 0 <= j < size for i, j in pairs)
        asked[topology] = len(pairs)
    rounds = min(math.ceil(math.log2(size)), size - 1)
    assert asked == {
        "anchor": size - 1,
        "round_robin": size * (size - 1) // 2,
        "single_elimination": 2 * size - 2,
        "swiss": rounds * (size // 2),
        "double_elimination": 2 * size - 2,
    }


@pytest.mark.parametrize(("topology", "rounds"), [("anchor", 1), ("round_robin", 1), ("single_elimination", 7)])
def test_rounds_are_few(topology: str, rounds: int) -> None:
    calls: list[int] = []

    def compare(pairs: list[tuple[int, int]]) -> list[tuple[float, float]]:
        calls.append(len(pairs))
        return [(float(i), float(j)) for i, j in pairs]

    play(topology, 64, compare)
    assert len(calls) == rounds  # 1 + log2 N for the elimination
    if topology == "single_elimination":
        assert calls == [63, 32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("topology", STRICT)
@pytest.mark.parametrize("size", [2, 3, 5, 8, 16])
def test_strict_ranks_are_a_fixed_vector(topology: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    table = torch.randn(size, size, 2, generator=generator).tolist()
    found = play(topology, size, lambda pairs: [tuple(table[i][j]) for i, j in pairs])
    assert sorted(found.ranks) == list(range(1, size + 1))
    advantages = grpo(torch.tensor([found.quantiles], dtype=torch.float64), eps=1e-6)[0].sort().values
    std = math.sqrt(size * (size + 1) / (12 * (size - 1) ** 2))
    expected = [(k / (size - 1) - 0.5) / (std + 1e-6) for k in range(size)]
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(advantages, -advantages.flip(0))
    assert abs(advantages.sum().item()) < 1e-9


def test_advantages_of_four_strict_ranks() -> None:
    found = play("single_elimination", 4, by_quality([3.0, 1.0, 4.0, 2.0]))
    assert found == Standing([2, 4, 1, 3], [2 / 3, 0.0, 1.0, 1 / 3], 6)
    expected = torch.tensor([[0.3873, -1.1619, 1.1619, -0.3873]])
    torch.testing.assert_close(grpo(torch.tensor([found.quantiles]), eps=1e-6), expected, atol=1e-4, rtol=0)


def test_brackets() -> None:
    assert bracket(1) == [0]
    assert bracket(2) == [0, 1]
    assert bracket(8) == [0, 7, 3, 4, 1, 6, 2, 5]
    assert bracket(6) == [0, 3, 4, 1, 2, 5]
    for size in (4, 8, 16, 64):
        order = bracket(size)
        assert sorted(order) == list(range(size))
        assert all(a + b == size - 1 for a, b in zip(order[::2], order[1::2], strict=True))
        half = order.index(0) // (size // 2)
        assert order.index(1) // (size // 2) != half, "the best two could meet before the final"


def test_the_best_two_seeds_meet_in_the_final() -> None:
    quality = shuffled(16, 3)
    rounds: list[list[tuple[int, int]]] = []

    def compare(pairs: list[tuple[int, int]]) -> list[tuple[float, float]]:
        rounds.append(pairs)
        return [(quality[i], quality[j]) for i, j in pairs]

    play("single_elimination", 16, compare)
    assert {quality[player] for player in rounds[-1][0]} == {15.0, 14.0}


def test_a_bye_comes_first_in_the_next_round() -> None:
    quality = [5.0, 4.0, 3.0, 2.0, 1.0]  # seeds in order: list 0 3 4 1 2, and 2 is the odd one out
    rounds: list[list[tuple[int, int]]] = []

    def compare(pairs: list[tuple[int, int]]) -> list[tuple[float, float]]:
        rounds.append(pairs)
        return [(quality[i], quality[j]) for i, j in pairs]

    assert play("single_elimination", 5, compare).comparisons == 8
    assert rounds[1:] == [[(0, 3), (4, 1)], [(2, 0)], [(1, 0)]]


def test_a_draw_goes_to_the_first_named() -> None:
    found = play("single_elimination", 4, lambda pairs: [(5.0, 5.0)] * len(pairs))
    assert found.ranks == [1, 2, 4, 3]  # list 0 3 1 2: 0 and 1 win, then 0; the first round's losers as they came: 3, 2
    assert found.quantiles == [1.0, 2 / 3, 0.0, 1 / 3]


@pytest.mark.parametrize("topology", ["anchor", "round_robin"])
def test_all_draws_give_nothing(topology: str) -> None:
    found = play(topology, 5, lambda pairs: [(5.0, 5.0)] * len(pairs))
    assert found.ranks == [1] * 5
    assert found.quantiles == [0.0] * 5


def test_ties_share_the_smallest_rank() -> None:
    found = play("anchor", 5, by_quality([0.0, 9.0, 7.0, 7.0, 1.0]))
    assert found.ranks == [5, 1, 2, 2, 4]
    assert found.quantiles == [0.0, 1.0, 0.75, 0.75, 0.25]
    found = play("round_robin", 4, by_quality([1.0, 1.0, 2.0, 2.0]))
    assert found.ranks == [3, 3, 1, 1]
    assert found.quantiles == [0.0, 0.0, 1.0, 1.0]


def test_swiss_splits_by_buchholz_and_shares() -> None:
    found = play("swiss", 2, lambda pairs: [(1.0, 1.0)])
    assert found == Standing([1, 1], [0.5, 0.5], 1)
    for seed in range(20):
        found = play("swiss", 7, by_quality(shuffled(7, seed)), seed=seed)
        assert math.isclose(sum(found.quantiles), 3.5)  # the mean place is always the middle one
        assert 0.0 <= min(found.quantiles) <= max(found.quantiles) <= 1.0


def test_swiss_does_not_repeat_a_match_while_it_need_not() -> None:
    for seed in range(20):
        pairs: list[frozenset[int]] = []

        def compare(found: list[tuple[int, int]], pairs: list[frozenset[int]] = pairs) -> list[tuple[float, float]]:
            pairs += [frozenset(pair) for pair in found]
            return [(float(i), float(j)) for i, j in found]

        play("swiss", 16, compare, seed=seed)
        assert len(pairs) == 32
        assert len(set(pairs)) >= 31


def test_one_loss_is_not_the_end_in_a_double_elimination() -> None:
    losses = [0] * 8

    def compare(pairs: list[tuple[int, int]]) -> list[tuple[float, float]]:
        for pair in pairs:
            losses[min(pair)] += 1
        return [(float(i), float(j)) for i, j in pairs]

    found = play("double_elimination", 8, compare, seed=1)
    assert losses == [2, 2, 2, 2, 2, 2, 2, 0]  # the runner-up lost its way into the losers' bracket and the final
    assert found.ranks[7] == 1
    assert found.ranks[6] == 2


@pytest.mark.parametrize("topology", ["swiss", "double_elimination"])
def test_the_seed_draws_the_pairings(topology: str) -> None:
    def pairs_of(seed: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []

        def compare(pairs: list[tuple[int, int]]) -> list[tuple[float, float]]:
            found.extend(pairs)
            return [(float(i), float(j)) for i, j in pairs]

        play(topology, 16, compare, seed=seed)
        return found

    assert pairs_of(3) == pairs_of(3)
    assert pairs_of(3) != pairs_of(4)


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=12, unique=True))
def test_round_robin_sees_only_the_order(quality: list[int]) -> None:
    found = play("round_robin", len(quality), by_quality([float(q) for q in quality]))
    assert found == play("round_robin", len(quality), by_quality([math.exp(q / 3) for q in quality]))
    assert found.ranks == true_ranks([float(q) for q in quality])


@given(
    st.sampled_from(sorted(TOPOLOGIES)),
    st.integers(2, 12),
    st.integers(0, 2**31),
)
def test_quantiles_and_ranks_agree(topology: str, size: int, seed: int) -> None:
    draw = Random(seed)
    found = play(topology, size, lambda pairs: [(draw.randint(0, 3), draw.randint(0, 3)) for _ in pairs], seed=seed)
    for i in range(size):
        assert 0.0 <= found.quantiles[i] <= 1.0
        for j in range(size):
            assert (found.ranks[i] < found.ranks[j]) == (found.quantiles[i] > found.quantiles[j] + 1e-12)


def test_scores_that_lie_close_together_rank_as_well_as_others() -> None:
    generator = torch.Generator().manual_seed(0)
    quality = torch.randn(16, generator=generator).tolist()
    close = [5 + 0.01 * q for q in quality]
    for topology in TOPOLOGIES:
        assert play(topology, 16, by_quality(quality)) == play(topology, 16, by_quality(close))
    # scored one by one with noise of 0.1 the same close qualities are lost: z-scores hardly follow them
    noisy = torch.tensor([close]) + 0.1 * torch.randn(1, 16, generator=generator)
    pair = torch.stack([grpo(noisy)[0], torch.tensor(quality)])
    assert torch.corrcoef(pair)[0, 1] < 0.5


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_points_that_are_no_numbers_are_a_draw(bad: tuple[float, float]) -> None:
    found = play("round_robin", 2, lambda pairs: [bad])
    assert found.ranks == [1, 1]
    scores = {1: (2.0, 8.0), 2: bad, 3: (9.0, 1.0)}
    found = play("anchor", 4, lambda pairs: [scores[i] for i, _ in pairs])
    assert found.ranks == [3, 4, 2, 1]  # the pivot's mean is (8 + 5 + 1) / 3 = 4.67
    found = play("anchor", 4, lambda pairs: [scores[i] for i, _ in pairs], failure_value=0.0)
    assert found.ranks == [2, 3, 4, 1]


def test_a_group_of_one_plays_nobody() -> None:
    for topology in TOPOLOGIES:
        assert play(topology, 1, lambda pairs: pytest.fail("asked")) == Standing([1], [0.0], 0)


def test_errors() -> None:
    with pytest.raises(UnknownNameError, match=r"no topology 'swis'. Did you mean 'swiss'\? There are: anchor, round_"):
        start("swis", 4)
    with pytest.raises(ScoreError, match=r"compare gave 2 results for 3 pairs"):
        play("anchor", 4, lambda pairs: [(1.0, 2.0)] * 2)
