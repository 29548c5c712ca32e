"""Pref-GRPO's reward: the share of its group that a sample beats, as judged pair by pair.

Where a reward model gives all samples of a group nearly the same score, dividing by their tiny spread makes noise into
advantages of full size. A win rate spreads the group by who beats whom, whatever the gaps; and where a judge sees no
difference, all tie and nothing is learnt.
Y. Wang et al. 2025, Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement Learning,
arXiv 2508.20751.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guerdon.errors import RecipeError, ScoreError, ShapeError, check_shapes
from guerdon.rewards.judges.base import Match, Verdict, both_orders, read_answers, resolve, wait_for

Categories = Literal["ignore", "blend", "normalise"]
Failure = Literal["tie", "skip"]
MISSING = {"tie": 0.5, "skip": math.nan}


class WinRateOutput(NamedTuple):
    """What comparing the samples of P groups gave.

    Attributes:
        scores: [P][G] win rates in [0, 1] (or what they are blended to); None for a group of one.
        comparisons: [P] pairs with a verdict.
        judge_calls: [P] calls of the judge's model, tries that failed included.
        judge_failures: [P] times that a match was shown and there was no verdict.
        judge_malformed: [P] replies that could not be read.
        ties: [P] pairs without a winner.
    """

    scores: list[list[float | None]]
    comparisons: Int[Tensor, " P"]
    judge_calls: Int[Tensor, " P"]
    judge_failures: Int[Tensor, " P"]
    judge_malformed: Int[Tensor, " P"]
    ties: Int[Tensor, " P"]


class WinRate:
    """Compare all pairs of a group once; the reward of a sample is its share of wins, a tie being half of one.

    All G (G - 1) / 2 pairs of all prompts are one call of the judge. The advantage that goes with it is `grpo` with eps =
    1e-8: without ties it is a fixed vector in the order of the ranks. With further rewards, `normalise_then_sum` with
    `whiten: false` z-scores each one before they are added up.

    Args:
        judge: a name of `guerdon.rewards.judges`, {name: {option: value}}, `module:attribute`, or a callable from a
            list of matches to pairs of points, which may be a coroutine function. The sample with more points wins.
        both_orders: show each pair in both orders and take the mean, at twice the calls. Otherwise the sample that comes
            first in the group is shown first, and a judge's liking for a place becomes a liking for places in the group.
        failure: a pair without a verdict is a `tie`, or is left out (`skip`): then win rates are over the pairs judged.
        failures_max: largest share of a step's verdicts that may fail before it is an error; 1 = never.
        round_digits: digits after the point that a win rate is rounded to; None = not.
        categories: what to do with points for single categories, such as the criteria of a judge's rubric. `ignore`;
            `blend` adds the mean win rate over categories to the overall one, (a W + b D) / (a + b); `normalise` z-scores
            both in the group first.
        category_weights: category -> weight in D; those not named weigh 1.
        overall_weight: a.
        category_weight: b.

    Raises:
        RecipeError: an option is out of its range, or there is no such judge.

    Edge cases:
        A group of one is not scored (None). A sample whose pairs were all left out has 0. A group in which all tie has
        0.5 everywhere, a constant group. Judgements need not be transitive. D is over the categories in which the sample
        was compared; without any its reward is W.

    Example:
        >>> def longer(matches): return [(len(m.first), len(m.second)) for m in matches]
        >>> found = WinRate(judge=longer)(["p"], [["a", "aaa", "aa", "bb"]])
        >>> [round(w, 2) for w in found.scores[0]], found.judge_calls.tolist(), found.ties.tolist()
        ([0.0, 1.0, 0.5, 0.5], [6], [1])

    Source:
        Wang et al. 2025, Pref-GRPO, arXiv 2508.20751, and the authors' code, which rounds to 3 digits; `normalise` is its
        variant for judges with several criteria. `both_orders`, `skip` and `failures_max` are ours.
    """

    def __init__(
        self,
        *,
        judge: Any,
        both_orders: bool = False,
        failure: Failure = "tie",
        failures_max: float = 0.5,
        round_digits: int | None = None,
        categories: Categories = "ignore",
        category_weights: Mapping[str, float] | None = None,
        overall_weight: float = 1.0,
        category_weight: float = 1.0,
    ) -> None:
        where = "rewards.win_rate"
        if failure not in ("tie", "skip"):
            raise RecipeError(f"{where}.failure: must be tie or skip; got {failure!r}.")
        if categories not in ("ignore", "blend", "normalise"):
            raise RecipeError(f"{where}.categories: must be ignore, blend or normalise; got {categories!r}.")
        if not 0 <= failures_max <= 1:
            raise RecipeError(f"{where}.failures_max: must be from 0 to 1; got {failures_max}.")
        if not (overall_weight >= 0 and category_weight >= 0 and overall_weight + category_weight > 0):
            raise RecipeError(
                f"{where}: overall_weight and category_weight must be >= 0 and not both 0; got {overall_weight}, "
                f"{category_weight}."
            )
        self.judge = resolve(judge, f"{where}.judge")
        self.both_orders, self.failure, self.failures_max = both_orders, failure, failures_max
        self.round_digits, self.categories = round_digits, categories
        self.category_weights = dict(category_weights or {})
        self.overall_weight, self.category_weight = overall_weight, category_weight

    def __call__(self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]], **columns: Any) -> WinRateOutput:
        """Compare the samples of every group.

        Args:
            prompts: [P].
            samples: [P][G].
            **columns: lists of P: what else the data carries, which the judge may read.

        Returns:
            Win rates as `scores`, and how they came about.

        Raises:
            ScoreError: the judge's answers are not of the form of a judge's, or too many of them failed.
        """
        count, size = len(samples), len(samples[0]) if samples else 0
        if size < 2:
            nothing = torch.zeros(count, dtype=torch.int64)
            return WinRateOutput([[None] * size for _ in samples], *[nothing.clone() for _ in range(5)])
        verdicts = _judge(self.judge, prompts, samples, columns, self.both_orders)
        self._check_failures(verdicts)
        overall = _table(_points(verdicts), count, size, self.both_orders, MISSING[self.failure])
        rates = win_rates(overall, round_digits=self.round_digits)
        if self.categories != "ignore":
            names = dict.fromkeys(name for verdict in verdicts for name in verdict.categories)
            # a category that was not judged in a pair has no outcome there, whatever a failed verdict counts as
            tables = {
                name: _table([v.categories.get(name) for v in verdicts], count, size, self.both_orders, math.nan)
                for name in names
            }
            rates = blend_categories(
                overall,
                tables,
                weights=self.category_weights,
                overall_weight=self.overall_weight,
                category_weight=self.category_weight,
                normalise=self.categories == "normalise",
                round_digits=self.round_digits,
            )
        upper = overall[:, *torch.triu_indices(size, size, 1)]

        def by_prompt(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).view(count, -1).sum(-1)

        return WinRateOutput(
            rates.tolist(),
            (~upper.isnan()).sum(-1),
            by_prompt([verdict.calls for verdict in verdicts]),
            by_prompt([verdict.failed for verdict in verdicts]),
            by_prompt([verdict.malformed for verdict in verdicts]),
            (upper == 0.5).sum(-1),
        )

    def _check_failures(self, verdicts: Sequence[Verdict]) -> None:
        failed = [verdict for verdict in verdicts if verdict.failed]
        if len(failed) > self.failures_max * len(verdicts):
            raise ScoreError(
                f"rewards.win_rate: {len(failed)} of {len(verdicts)} verdicts failed, more than failures_max = "
                f"{self.failures_max:g} of them: the win rates would say little. The first: "
                f"{failed[0].why or 'no reason given'}."
            )


def round_robin(
    judge: Any,
    prompts: Sequence[Any],
    samples: Sequence[Sequence[Any]],
    *,
    both_orders: bool = False,
    failure: Failure = "skip",
    **columns: Any,
) -> Float[Tensor, "P G G"]:
    """Judge all pairs of every group once, the sample that comes first shown first.

    Args:
        judge: as for `win_rate`.
        prompts: [P].
        samples: [P][G].
        both_orders: judge each pair in both orders and take the mean.
        failure: what a pair without a verdict is: `skip` (NaN) or `tie` (0.5).
        **columns: lists of P that the judge may read.

    Returns:
        [P, G, G]: 1 where the row's sample beats the column's, 0.5 for a tie, 0; with both orders also 0.25 and 0.75. The
        diagonal is NaN.

    Raises:
        ScoreError: the judge's answers are not of the form of a judge's.
        ShapeError: G is 1.

    Example:
        >>> def longer(matches): return [(len(m.first), len(m.second)) for m in matches]
        >>> round_robin(longer, ["p"], [["a", "bb"]])
        tensor([[[nan, 0.],
                 [1., nan]]])
    """
    size = len(samples[0])
    if size < 2:
        raise ShapeError(f"rewards.win_rate: a comparison takes two samples of a prompt, G >= 2; got G = {size}.")
    judge = resolve(judge, "rewards.win_rate.judge")
    verdicts = _judge(judge, prompts, samples, columns, both_orders)
    return _table(_points(verdicts), len(samples), size, both_orders, MISSING[failure])


def win_rates(outcomes: Float[Tensor, "*P G G"], *, round_digits: int | None = None) -> Float[Tensor, "*P G"]:
    """Wins over comparisons, w_i = sum over j of o_ij / (number of j that i was compared with).

    Args:
        outcomes: [..., G, G]: 1 where the row's sample wins, 0 where it loses, 0.5 for a tie, NaN = not judged; the
            diagonal is not looked at.
        round_digits: digits after the point; None = not rounded.

    Returns:
        [..., G], 0 for a sample without comparisons. Where all pairs were judged the mean of a group is 1/2.

    Raises:
        ShapeError: outcomes is not [..., G, G], or G is 1.
        ScoreError: o_ij + o_ji is not 1 for a pair that was judged.

    Example:
        >>> win_rates(torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 1.0], [0.5, 0.0, 0.0]]))
        tensor([0.7500, 0.5000, 0.2500])

    Source:
        Wang et al. 2025, arXiv 2508.20751.
    """
    where = "rewards.win_rate"
    sizes = check_shapes(where, outcomes=(outcomes, "... G G"))
    if sizes["G"] < 2:
        raise ShapeError(f"{where}: a comparison takes two samples of a prompt, G >= 2; got G = {sizes['G']}.")
    outside = ~torch.eye(sizes["G"], dtype=torch.bool, device=outcomes.device)
    judged = ~outcomes.isnan() & outside
    both = outcomes + outcomes.transpose(-1, -2)
    bad = (outside & ~(both.sub(1).abs() < 1e-6) & (judged | judged.transpose(-1, -2))).nonzero()
    if len(bad):
        at = bad[0].tolist()
        raise ScoreError(
            f"{where}: the outcomes of a pair must add up to 1; outcomes{at} and its mirror image are "
            f"{outcomes[tuple(at)].item():g} and {outcomes.transpose(-1, -2)[tuple(at)].item():g}."
        )
    rates = outcomes.where(judged, 0.0).sum(-1) / judged.sum(-1).clamp(min=1)
    return rates if round_digits is None else rates.round(decimals=round_digits)


def blend_categories(
    overall: Float[Tensor, "*P G G"],
    categories: Mapping[str, Tensor],
    *,
    weights: Mapping[str, float] | None = None,
    overall_weight: float = 1.0,
    category_weight: float = 1.0,
    normalise: bool = False,
    round_digits: int | None = None,
) -> Float[Tensor, "*P G"]:
    """Win rates of a judge with several criteria: (a W + b D) / (a + b), D the weighted mean over categories.

    Args:
        overall: [..., G, G] outcomes of the whole verdict.
        categories: name -> outcomes [..., G, G] of that category, NaN where it was not judged.
        weights: name -> weight in D; those not named weigh 1.
        overall_weight: a.
        category_weight: b.
        normalise: z-score W and D in the group (Bessel's correction, 1e-8 added to the std) before blending.
        round_digits: of every win rate.

    Returns:
        [..., G]; W alone for a sample that was compared in no category.

    Example:
        >>> overall, clear = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.5], [0.5, 0.0]])
        >>> blend_categories(overall, {"clear": clear})
        tensor([0.7500, 0.2500])

    Source:
        The authors' code of arXiv 2508.20751.
    """
    whole = win_rates(overall, round_digits=round_digits)
    total, weight = torch.zeros_like(whole), torch.zeros_like(whole)
    outside = ~torch.eye(whole.shape[-1], dtype=torch.bool, device=whole.device)
    for name, outcomes in categories.items():
        compared = (~outcomes.isnan() & outside).any(-1)
        share = (weights or {}).get(name, 1.0) * compared.to(whole.dtype)
        total, weight = total + share * win_rates(outcomes, round_digits=round_digits), weight + share
    there = weight > 0
    parts = total / weight.where(there, 1.0)
    if normalise:
        whole, parts = _z_score(whole, torch.ones_like(there)), _z_score(parts, there)
    blended = (overall_weight * whole + category_weight * parts) / (overall_weight + category_weight)
    return blended.where(there, whole)


def _z_score(rates: Tensor, there: Tensor) -> Tensor:
    """Of the rates that are there, with Bessel's correction; 0 where all are equal."""
    count = there.sum(-1, keepdim=True)
    mean = rates.where(there, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = (rates - mean).where(there, 0.0)
    return centred / ((centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-8)


def _judge(
    judge: Any,
    prompts: Sequence[Any],
    samples: Sequence[Sequence[Any]],
    columns: Mapping[str, Any],
    orders: bool,
) -> list[Verdict]:
    """One verdict per pair (i, j), i < j, of every prompt; with both orders two, one after the other."""
    columns = {name: c for name, c in columns.items() if isinstance(c, list) and len(c) == len(prompts)}
    matches = []
    for p, (prompt, group) in enumerate(zip(prompts, samples, strict=True)):
        row = {name: column[p] for name, column in columns.items()}
        matches += [Match(prompt, first, second, row) for first, second in combinations(group, 2)]
    if orders:
        matches = both_orders(matches)
    answers = judge(matches)
    if inspect.isawaitable(answers):
        answers = wait_for(answers)
    return read_answers(answers, matches, "rewards.win_rate")


def _points(verdicts: Sequence[Verdict]) -> list[tuple[float, float] | None]:
    return [None if verdict.failed else (verdict.first, verdict.second) for verdict in verdicts]


def _table(points: Sequence[tuple[float, float] | None], count: int, size: int, orders: bool, missing: float) -> Tensor:
    """Outcomes [P, G, G] from points of the pairs in order; `missing` stands where there are none."""
    values = torch.tensor([_outcome(pair, missing) for pair in points], dtype=torch.get_default_dtype())
    if orders:
        there, back = values.view(-1, 2).unbind(-1)
        # where one order has no verdict the other one decides
        values = torch.stack([there, 1 - back]).nanmean(0)
    table = values.new_full((count, size, size), math.nan)
    first, second = torch.triu_indices(size, size, 1)
    table[:, first, second] = values.view(count, -1)
    table[:, second, first] = 1 - values.view(count, -1)
    return table


def _outcome(points: tuple[float, float] | None, missing: float) -> float:
    if points is None or not (math.isfinite(points[0]) and math.isfinite(points[1])):
        return missing
    first, second = points
    return float(first > second) if first != second else 0.5


win_rate = WinRate
