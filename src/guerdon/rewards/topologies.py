"""Tournaments inside a group: who meets whom, and what place that gives each sample.

A topology is a generator. It yields the matches of a round as pairs (i, j) of positions in the group, is sent the
points (x_i, x_j) of each, and returns a `Standing`; what can be judged at the same time is in one round. It knows no
judge and no prompts, so many groups can be played in step.

Ranking a group by comparisons in place of scores: ArenaRL, 2026, arXiv 2601.06487.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from random import Random
from typing import NamedTuple

from guerdon.errors import ScoreError, UnknownNameError, nearest

Pair = tuple[int, int]
Points = tuple[float, float]


class Standing(NamedTuple):
    """Where each of the N samples of a group ended.

    Attributes:
        ranks: 1 = best; samples that tie share the smallest rank.
        quantiles: in [0, 1], 1 = best: the rewards.
        comparisons: matches that were judged.
    """

    ranks: list[int]
    quantiles: list[float]
    comparisons: int


Rounds = Generator[list[Pair], list[Points], Standing]


def by_score(scores: Sequence[float], comparisons: int) -> Standing:
    """Ranks by descending score, q = (R - rank) / (R - 1) with R the largest rank; q = 0 for all if all tie."""
    ranks = [1 + sum(other > own for other in scores) for own in scores]
    last = max(ranks)
    return Standing(ranks, [(last - rank) / (last - 1) if last > 1 else 0.0 for rank in ranks], comparisons)


def by_order(order: Sequence[int], comparisons: int) -> Standing:
    """Strict ranks from the best to the last: q = 1 - k / (N - 1) for the k-th after the best."""
    place = {player: k for k, player in enumerate(order)}
    last = max(len(order) - 1, 1)
    ranks = [place[player] + 1 for player in range(len(order))]
    return Standing(ranks, [(len(order) - rank) / last for rank in ranks], comparisons)


def anchor(size: int, draw: Random) -> Rounds:
    """All against sample 0, in N - 1 comparisons: a sample's score is its points, sample 0's the mean of its own."""
    seeding = yield from _against_the_first(size)
    return by_score([_mean(points) for points in seeding], size - 1)


def round_robin(size: int, draw: Random) -> Rounds:
    """Everyone against everyone, in N (N - 1) / 2 comparisons; 1 for a win, 0.5 for a draw."""
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    wins = [0.0] * size
    for (i, j), (x, y) in zip(pairs, (yield pairs), strict=True):
        wins[i] += _won(x, y)
        wins[j] += _won(y, x)
    return by_score(wins, len(pairs))


def single_elimination(size: int, draw: Random) -> Rounds:
    """Seeded by the anchor, then knocked out: 2 (N - 1) comparisons.

    Losers are ranked by the round they reached, inside a round by the mean of all their points. A draw goes to the
    first named; an odd one out advances to the head of the next round.
    """
    points = yield from _against_the_first(size)
    seeds = _best_first(range(size), points)
    players = [seeds[number] for number in bracket(size)]
    out: list[list[int]] = []
    while len(players) > 1:
        pairs, byes = _neighbours(players)
        winners, losers = _knock_out(pairs, (yield pairs), points)
        players = byes + winners
        out.append(losers)
    order = players + [player for losers in reversed(out) for player in _best_first(losers, points)]
    return by_order(order, 2 * (size - 1))


def swiss(size: int, draw: Random) -> Rounds:
    """ceil(log2 N) rounds between samples of like points who have not met; ties are split by Buchholz.

    1 for a win or a bye, 0.5 for a draw. Buchholz is the sum of the opponents' final points. Samples equal in both
    share the mean of their quantiles.
    """
    points, met = [0.0] * size, [[] for _ in range(size)]
    comparisons = 0
    for _ in range(min(math.ceil(math.log2(size)), size - 1)):
        players = list(range(size))
        draw.shuffle(players)
        players.sort(key=lambda player: -points[player])
        if size % 2:
            points[players.pop()] += 1.0
        pairs = _unmet(players, met)
        for (i, j), (x, y) in zip(pairs, (yield pairs), strict=True):
            points[i] += _won(x, y)
            points[j] += _won(y, x)
            met[i].append(j)
            met[j].append(i)
        comparisons += len(pairs)
    keys = [(points[player], sum(points[other] for other in met[player])) for player in range(size)]
    ranks = [1 + sum(other > own for other in keys) for own in keys]
    # k - 1 better ones and n equal ones: the mean of the quantiles of places k ... k + n - 1
    shared = [(size - rank - (keys.count(own) - 1) / 2) / (size - 1) for own, rank in zip(keys, ranks, strict=True)]
    return Standing(ranks, shared, comparisons)


def double_elimination(size: int, draw: Random) -> Rounds:
    """Out at the second loss: pairings are drawn, one grand final; 2 (N - 1) comparisons.

    Losers of the winners' bracket play on among themselves; a losers' round is judged together with the next
    winners' round. Ranked: grand final, then those out of the losers' bracket, last round first, by mean points.
    """
    points: list[list[float]] = [[] for _ in range(size)]
    winners, losers = list(range(size)), list[int]()
    out: list[list[int]] = []
    while len(winners) > 1 or len(losers) > 1:
        draw.shuffle(winners)
        draw.shuffle(losers)
        upper, upper_byes = _neighbours(winners)
        lower, lower_byes = _neighbours(losers)
        results = yield upper + lower
        ahead, dropped = _knock_out(upper, results[: len(upper)], points)
        staying, gone = _knock_out(lower, results[len(upper) :], points)
        winners, losers = upper_byes + ahead, lower_byes + staying + dropped
        out.append(gone)
    final = [(winners[0], losers[0])]
    first, second = _knock_out(final, (yield final), points)
    order = first + second + [player for gone in reversed(out) for player in _best_first(gone, points)]
    return by_order(order, 2 * (size - 1))


TOPOLOGIES: dict[str, Callable[[int, Random], Rounds]] = {
    "anchor": anchor,
    "round_robin": round_robin,
    "single_elimination": single_elimination,
    "swiss": swiss,
    "double_elimination": double_elimination,
}


def start(topology: str, size: int, seed: int = 0) -> Rounds:
    """The rounds of a topology for a group of `size` samples, two or more.

    Raises:
        UnknownNameError: there is no such topology.
    """
    if topology not in TOPOLOGIES:
        raise UnknownNameError(
            f"rewards.tournament: there is no topology {topology!r}.{nearest(topology, TOPOLOGIES)} "
            f"There are: {', '.join(TOPOLOGIES)}."
        )
    return TOPOLOGIES[topology](size, Random(seed))


def play(
    topology: str,
    size: int,
    compare: Callable[[list[Pair]], Sequence[Points]],
    *,
    seed: int = 0,
    failure_value: float = 5.0,
) -> Standing:
    """Hold one tournament.

    Args:
        topology: anchor, round_robin, single_elimination, swiss or double_elimination.
        size: N, samples in the group.
        compare: from the pairs (i, j) of a round to their points (x_i, x_j).
        seed: of the pairings that swiss and double_elimination draw.
        failure_value: points of both samples of a match where either's are not finite.

    Returns:
        Ranks, quantiles and the number of comparisons; a group of one has rank 1, quantile 0 and no comparison.

    Raises:
        UnknownNameError: there is no such topology.
        ScoreError: compare gave another number of results than there were pairs.

    Example:
        >>> quality = [3, 1, 4, 2]
        >>> play("single_elimination", 4, lambda pairs: [(quality[i], quality[j]) for i, j in pairs])
        Standing(ranks=[2, 4, 1, 3], quantiles=[0.6666666666666666, 0.0, 1.0, 0.3333333333333333], comparisons=6)
    """
    rounds = start(topology, size, seed)
    if size == 1:
        return Standing([1], [0.0], 0)
    pairs = next(rounds)
    while True:
        results = [
            (float(x), float(y)) if math.isfinite(x) and math.isfinite(y) else (failure_value, failure_value)
            for x, y in compare(pairs)
        ]
        if len(results) != len(pairs):
            raise ScoreError(f"rewards.tournament: compare gave {len(results)} results for {len(pairs)} pairs.")
        try:
            pairs = rounds.send(results)
        except StopIteration as end:
            return end.value


def bracket(size: int) -> list[int]:
    """Seed numbers, from 0, in the order of the bracket: the best two can meet only in the final.

    Example:
        >>> bracket(8), bracket(5)
        ([0, 7, 3, 4, 1, 6, 2, 5], [0, 3, 4, 1, 2])
    """
    places = [0]
    while len(places) < size:
        count = 2 * len(places)
        places = [number for place in places for number in (place, count - 1 - place)]
    return [number for number in places if number < size]


def _against_the_first(size: int) -> Generator[list[Pair], list[Points], list[list[float]]]:
    results = yield [(i, 0) for i in range(1, size)]
    return [[_mean([y for _, y in results])], *([x] for x, _ in results)]


def _neighbours(players: Sequence[int]) -> tuple[list[Pair], list[int]]:
    """First against second, third against fourth; and the odd one out."""
    pairs = list(zip(players[::2], players[1::2], strict=False))
    return pairs, list(players[2 * len(pairs) :])


def _unmet(players: list[int], met: Sequence[Sequence[int]]) -> list[Pair]:
    """Go down the list, pairing each with the next it has not met, or else the next that is free."""
    free, pairs = list(players), []
    while free:
        player = free.pop(0)
        rival = next((other for other in free if other not in met[player]), free[0])
        free.remove(rival)
        pairs.append((player, rival))
    return pairs


def _knock_out(
    pairs: Sequence[Pair], results: Sequence[Points], points: Sequence[list[float]]
) -> tuple[list[int], list[int]]:
    """Winners and losers; their points are added."""
    winners, losers = [], []
    for (i, j), (x, y) in zip(pairs, results, strict=True):
        points[i].append(x)
        points[j].append(y)
        winners.append(i if x >= y else j)
        losers.append(j if x >= y else i)
    return winners, losers


def _best_first(players: Iterable[int], points: Sequence[Sequence[float]]) -> list[int]:
    return sorted(players, key=lambda player: -_mean(points[player]))


def _won(own: float, other: float) -> float:
    return float(own > other) + 0.5 * float(own == other)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
