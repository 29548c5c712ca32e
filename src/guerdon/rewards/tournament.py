"""ArenaRL: a tournament inside each group turns comparisons of its samples into ranks, and ranks into rewards.

Where all samples are good, scores lie close together and their differences are mostly the judge's noise; a judge that
sees two samples side by side tells them apart.
ArenaRL: Scaling RL for Open-Ended Agents via Tournament-based Relative Ranking, 2026, arXiv 2601.06487.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guerdon.errors import RecipeError, ScoreError
from guerdon.rewards.judges.base import Match, Verdict, both_orders, read_answers, resolve, wait_for
from guerdon.rewards.topologies import Pair, Standing, start

Topology = Literal["anchor", "round_robin", "single_elimination", "swiss", "double_elimination"]


class TournamentOutput(NamedTuple):
    """What the tournaments of P groups gave.

    Attributes:
        scores: [P][G] quantiles in [0, 1], 1 = best; None for a group of one, which has nobody to be ranked against.
        ranks: [P, G], 1 = best; ties share the smallest.
        comparisons: [P] matches.
        judge_calls: [P] calls of the judge's model: one per match and order shown, and tries that failed.
        judge_failures: [P] times that a match was shown and there was no verdict.
        judge_malformed: [P] replies that could not be read.
        all_tied: [P] whether no match had a winner.
    """

    scores: list[list[float | None]]
    ranks: Float[Tensor, "P G"]
    comparisons: Int[Tensor, " P"]
    judge_calls: Int[Tensor, " P"]
    judge_failures: Int[Tensor, " P"]
    judge_malformed: Int[Tensor, " P"]
    all_tied: Any


class Tournament:
    """Rank the samples of each group by comparing them in pairs; the reward is a sample's quantile.

    The judge gives each pair points (x_a, x_b). Shown in both orders the points add up, which cancels a liking for the
    first place: x_a = J(a, b)_1 + J(b, a)_2. The topology decides who meets whom. Rewards are z-scored in the group by
    the advantage stage: A = (q - mean q) / (std q + 1e-6) is `grpo` with eps = 1e-6. Strict ranks make that a fixed
    vector in the order of the ranks, whatever the size of the judge's points.

    A round of all P tournaments is one call of the judge, so there are 1 + ceil(log2 G) calls a step for the default.

    Args:
        judge: a name of `guerdon.rewards.judges`, {name: {option: value}}, `module:attribute`, or a callable from a
            list of matches to pairs of points, which may be a coroutine function.
        topology: `anchor` (all against sample 0, G - 1 comparisons), `round_robin` (all pairs, G (G - 1) / 2),
            `single_elimination` (seeded by the anchor, 2 (G - 1)), `swiss` (about G/2 log2 G) or `double_elimination`
            (2 (G - 1)).
        both_orders: show each pair in both orders, at twice the calls. A judge that cannot see places needs it not.
        skip_if_all_tied: a group in which no match had a winner gets 0 for all. Without it eliminations and swiss would
            rank such a group by position: a signal out of nothing.
        failure_value: points of both samples where the judge has no verdict. None = the middle of the judge's `scale`
            (5 for those of guerdon), or else the mean of the points its group has had so far (5 if it has had none).
        failures_max: largest share of a step's verdicts that may fail before it is an error; 1 = never.
        seed: of the pairings that `swiss` and `double_elimination` draw. Samples of a group are exchangeable, so they
            are paired alike in every group and step, which keeps the reward a function of the samples.

    Raises:
        RecipeError: an option is out of its range, or there is no such judge.

    Edge cases:
        A group of one is not scored (None). Two samples meet twice in an elimination: for the seeds and in the final.
        A draw goes to the first named in an elimination. Objectives that need labels, such as `real`, refuse quantiles.

    Example:
        >>> def longer(matches): return [(len(m.first), len(m.second)) for m in matches]
        >>> found = Tournament(judge=longer)(["p"], [["a", "aaa", "aa", ""]])
        >>> [round(q, 2) for q in found.scores[0]], found.comparisons.tolist(), found.judge_calls.tolist()
        ([0.33, 1.0, 0.67, 0.0], [6], [12])

    Source:
        ArenaRL, 2026, arXiv 2601.06487; topologies as in the authors' code. `skip_if_all_tied` and `failures_max` are
        ours; the authors' failure value is 5, the middle of their judge's scale.
    """

    def __init__(
        self,
        *,
        judge: Any,
        topology: Topology = "single_elimination",
        both_orders: bool = True,
        skip_if_all_tied: bool = True,
        failure_value: float | None = None,
        failures_max: float = 0.5,
        seed: int = 0,
    ) -> None:
        start(topology, 2)  # an unknown one is an error now, not at the first step
        if failure_value is not None and not math.isfinite(failure_value):
            raise RecipeError(
                f"rewards.tournament.failure_value: must be a finite number or null; got {failure_value}."
            )
        if not 0 <= failures_max <= 1:
            raise RecipeError(f"rewards.tournament.failures_max: must be from 0 to 1; got {failures_max}.")
        self.judge = resolve(judge, "rewards.tournament.judge")
        self.topology, self.both_orders = topology, both_orders
        self.skip_if_all_tied, self.failures_max, self.seed = skip_if_all_tied, failures_max, seed
        scale = getattr(self.judge, "scale", None)
        self.failure_value = sum(scale) / 2 if failure_value is None and scale else failure_value

    def __call__(self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]], **columns: Any) -> TournamentOutput:
        """Hold a tournament in every group.

        Args:
            prompts: [P].
            samples: [P][G].
            **columns: lists of P: what else the data carries, which the judge may read.

        Returns:
            Quantiles as `scores`, and how they came about.

        Raises:
            ScoreError: the judge's answers are not of the form of a judge's, or too many of them failed.
        """
        columns = {name: c for name, c in columns.items() if isinstance(c, list) and len(c) == len(prompts)}
        rows = [{name: column[p] for name, column in columns.items()} for p in range(len(prompts))]
        groups = [_Group(prompt, group, row, self) for prompt, group, row in zip(prompts, samples, rows, strict=True)]
        matches = _open_matches(groups)
        while matches:
            answers = self.judge(matches)
            if inspect.isawaitable(answers):
                wait_for(self._finish(groups, matches, answers))
                break
            matches = self._record(groups, matches, answers)
        return self._output(groups)

    async def _finish(self, groups: list[_Group], matches: list[Match], answers: Any) -> None:
        """The rest of the tournaments with a judge that is awaited: one event loop for all rounds."""
        while True:
            matches = self._record(groups, matches, await answers)
            if not matches:
                return
            answers = self.judge(matches)

    def _record(self, groups: list[_Group], matches: list[Match], answers: Any) -> list[Match]:
        """Hand the verdicts of a round to its groups; the matches of the next."""
        verdicts = read_answers(answers, matches, "rewards.tournament")
        at = 0
        for group in groups:
            size = len(group.matches)
            if size:
                group.record(verdicts[at : at + size])
                at += size
        self._check_failures(groups)
        return _open_matches(groups)

    def _check_failures(self, groups: list[_Group]) -> None:
        failures, asked = sum(group.failures for group in groups), sum(group.asked for group in groups)
        if failures > self.failures_max * asked:
            raise ScoreError(
                f"rewards.tournament: {failures} of {asked} verdicts failed, more than failures_max = "
                f"{self.failures_max:g} of them: the ranks would say little. The first: "
                f"{next(group.why for group in groups if group.why)}."
            )

    def _output(self, groups: list[_Group]) -> TournamentOutput:
        def numbers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)

        standings = [group.standing for group in groups]
        return TournamentOutput(
            [group.scores(self.skip_if_all_tied) for group in groups],
            torch.tensor([standing.ranks for standing in standings], dtype=torch.get_default_dtype()),
            numbers([standing.comparisons for standing in standings]),
            numbers([group.calls for group in groups]),
            numbers([group.failures for group in groups]),
            numbers([group.malformed for group in groups]),
            torch.tensor([group.all_tied for group in groups], dtype=torch.bool),
        )


class _Group:
    """The tournament of one group, as far as it has got."""

    def __init__(self, prompt: Any, samples: Sequence[Any], row: Mapping[str, Any], stage: Tournament) -> None:
        self.prompt, self.samples, self.row, self.stage = prompt, samples, row, stage
        self.asked = self.calls = self.failures = self.malformed = 0
        self.why = ""
        self.all_tied = True
        self.total, self.count = 0.0, 0
        self.pairs: list[Pair] = []
        self.matches: list[Match] = []
        self.standing = Standing([1] * len(samples), [0.0] * len(samples), 0)
        if len(samples) > 1:
            self.rounds = start(stage.topology, len(samples), stage.seed)
            self._open(next(self.rounds))

    def _open(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        shown = [Match(self.prompt, self.samples[i], self.samples[j], self.row) for i, j in pairs]
        self.matches = both_orders(shown) if self.stage.both_orders else shown

    def record(self, verdicts: Sequence[Verdict]) -> None:
        """Take the verdicts on the open matches and go on to the next round."""
        for verdict in verdicts:
            self.asked += 1
            self.calls += verdict.calls
            self.malformed += verdict.malformed
            if verdict.failed:
                self.failures += 1
                self.why = self.why or verdict.why or "no reason given"
            else:
                self.total, self.count = self.total + verdict.first + verdict.second, self.count + 2
        points = [self._points(verdict) for verdict in verdicts]
        if self.stage.both_orders:
            points = [(x + there, y + here) for (x, y), (here, there) in zip(points[::2], points[1::2], strict=True)]
        self.all_tied &= all(x == y for x, y in points)
        try:
            self._open(self.rounds.send(points))
        except StopIteration as end:
            self.matches, self.standing = [], end.value

    def _points(self, verdict: Verdict) -> tuple[float, float]:
        if not verdict.failed:
            return verdict.first, verdict.second
        value = self.stage.failure_value
        if value is None:
            value = self.total / self.count if self.count else 5.0
        return value, value

    def scores(self, skip_if_all_tied: bool) -> list[float | None]:
        if len(self.samples) == 1:
            return [None]
        if self.all_tied and skip_if_all_tied:
            return [0.0] * len(self.samples)
        return list(self.standing.quantiles)


def _open_matches(groups: Sequence[_Group]) -> list[Match]:
    return [match for group in groups for match in group.matches]


tournament = Tournament
