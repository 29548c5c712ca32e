"""Win rates: by hand, what they depend on, judges of any kind, categories, failures, and their place on the road."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guerdon.advantages import grpo, normalise_then_sum
from guerdon.components import build
from guerdon.errors import RecipeError, ScoreError, ShapeError, UnknownNameError
from guerdon.ledger import attribute
from guerdon.objectives import policy_gradient
from guerdon.rewards import win_rate
from guerdon.rewards.judges import pairwise, pointwise
from guerdon.rewards.judges.base import Match, Verdict
from guerdon.rewards.win_rate import blend_categories, round_robin, win_rates
from guerdon.rollout import Rollout
from guerdon.signal import Signal
from guerdon.training.online import Online
from guerdon.training.optimisation import Optim
from tests.training.bandit import BanditPolicy, rows

NAN = math.nan
GROUP = [["3", "1", "4", "2"], ["10", "40", "30", "20"]]
PROMPTS = ["p", "q"]
advantage = partial(grpo, eps=1e-8)


class Recorder:
    """A judge that likes large numbers, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Match]] = []

    def __call__(self, matches: Sequence[Match]) -> list[tuple[float, float]]:
        self.asked.append(list(matches))
        return [(float(match.first), float(match.second)) for match in matches]


def number(samples: Sequence[Sequence[str]]) -> list[list[float]]:
    return [[float(s) for s in group] for group in samples]


def table(scores: Sequence[float], margin: float = 0.0) -> Tensor:
    """Outcomes [1, G, G] of scores."""
    s = torch.tensor(scores, dtype=torch.float64)
    gap = s[:, None] - s[None]
    return ((gap > margin).double() + 0.5 * (gap.abs() <= margin).double())[None]


class TestRates:
    def test_by_hand(self):
        outcomes = torch.tensor([[NAN, 1.0, 0.5], [0.0, NAN, 1.0], [0.5, 0.0, NAN]])
        assert win_rates(outcomes).tolist() == [0.75, 0.5, 0.25]
        assert win_rates(table([1, 3, 2, 2])).tolist() == [[0.0, 1.0, 0.5, 0.5]]
        assert win_rates(table([1, 2, 3, 4]), round_digits=3).tolist() == [[0.0, 0.333, 0.667, 1.0]]

    def test_the_diagonal_is_not_looked_at(self):
        for value in (NAN, 0.0, 7.0):
            outcomes = table([1, 2, 3])
            outcomes[:, range(3), range(3)] = value
            assert win_rates(outcomes).tolist() == [[0.0, 0.5, 1.0]]

    def test_missing_pairs_are_left_out(self):
        outcomes = table([1, 2, 3, 4])
        outcomes[0, 0, 3] = outcomes[0, 3, 0] = NAN
        assert win_rates(outcomes).tolist() == [[0.0, 1 / 3, 2 / 3, 1.0]]
        outcomes[0, :, 1] = outcomes[0, 1, :] = NAN
        assert win_rates(outcomes).tolist() == [[0.0, 0.0, 0.5, 1.0]]

    @settings(max_examples=50, deadline=None)
    @given(st.integers(2, 8), st.integers(0, 10_000))
    def test_the_mean_is_one_half_also_where_judgements_run_in_circles(self, size, seed):
        upper = torch.randint(0, 3, (3, size, size), generator=torch.Generator().manual_seed(seed)).double() / 2
        outcomes = upper.triu(1) + (1 - upper).triu(1).transpose(-1, -2)
        torch.testing.assert_close(win_rates(outcomes).sum(-1), torch.full((3,), size / 2, dtype=torch.float64))

    def test_a_circle(self):
        assert win_rates(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])).tolist() == [0.5] * 3

    @pytest.mark.parametrize("size", [2, 3, 8, 16])
    def test_without_ties_they_are_the_ranks(self, size):
        scores = torch.randperm(size, generator=torch.Generator().manual_seed(size)).double()
        rates = win_rates(table(scores.tolist()))[0]
        torch.testing.assert_close(rates, scores / (size - 1))
        assert rates.var().item() == pytest.approx(size * (size + 1) / (12 * (size - 1) ** 2))

    @given(st.lists(st.floats(-5, 5), min_size=3, max_size=8, unique=True))
    @settings(max_examples=50, deadline=None)
    def test_only_the_order_of_scores_counts(self, scores):
        ranks = [float(sum(s > other for other in scores)) for s in scores]
        assert torch.equal(advantage(win_rates(table(scores))), advantage(win_rates(table(ranks))))

    def test_gaps_do_not_count_and_a_margin_ends_them(self):
        small, large = torch.tensor([[0.0, 1e-6, 2e-6, 3e-6]]).double(), torch.tensor([[0.0, 1.0, 2.0, 3.0]]).double()
        # a score blows them up
        torch.testing.assert_close(grpo(small, eps=0.0), grpo(large, eps=0.0))
        assert (advantage(win_rates(table(small[0].tolist(), margin=1e-3))) == 0).all()
        assert (advantage(win_rates(table(large[0].tolist(), margin=1e-3))) != 0).all()

    def test_reversed_outcomes_reverse_advantages(self):
        outcomes = table([3, 1, 4, 2, 2])
        torch.testing.assert_close(advantage(win_rates(1 - outcomes)), -advantage(win_rates(outcomes)))

    def test_two_samples(self):
        first = advantage(win_rates(table([2, 1])))[0].tolist()
        assert first == pytest.approx([0.70710678, -0.70710678])
        assert advantage(win_rates(table([1, 1]))).tolist() == [[0.0, 0.0]]

    def test_errors(self, friendly_errors):
        with pytest.raises(ScoreError, match=r"must add up to 1; outcomes\[0, 1\] and its mirror image are 1 and 1"):
            win_rates(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        with pytest.raises(ScoreError, match="are nan and 1"):
            win_rates(torch.tensor([[0.0, NAN], [1.0, 0.0]]))
        with pytest.raises(ShapeError, match="G >= 2; got G = 1"):
            win_rates(torch.zeros(1, 1))
        with pytest.raises(ShapeError, match=r"outcomes must be \[..., G, G\]"):
            win_rates(torch.zeros(2, 3))


class TestStage:
    def test_rates_and_counts(self):
        found = win_rate(judge=Recorder())(PROMPTS, GROUP)
        assert found.scores[0] == pytest.approx([2 / 3, 0.0, 1.0, 1 / 3])
        assert found.scores[1] == pytest.approx([0.0, 1.0, 2 / 3, 1 / 3])
        assert found.comparisons.tolist() == [6, 6]
        assert found.judge_calls.tolist() == [6, 6]
        assert found.judge_failures.tolist() == [0, 0]
        assert found.judge_malformed.tolist() == [0, 0]
        assert found.ties.tolist() == [0, 0]

    def test_all_pairs_of_all_prompts_are_one_call_the_first_shown_first(self):
        judge = Recorder()
        win_rate(judge=judge)(PROMPTS, GROUP, answer=["x", "y"], other=torch.zeros(2))
        assert len(judge.asked) == 1
        shown = [(match.prompt, match.first, match.second, match.columns) for match in judge.asked[0]]
        assert shown[:3] == [("p", "3", other, {"answer": "x"}) for other in ("1", "4", "2")]
        assert shown[-1] == ("q", "30", "20", {"answer": "y"})

    def test_both_orders_cancel_a_liking_for_a_place(self):
        def biased(matches: Sequence[Match]) -> list[tuple[float, float]]:
            return [(float(match.first) + 1.5, float(match.second)) for match in matches]

        assert win_rate(judge=biased)(PROMPTS, GROUP).scores[0] != pytest.approx([2 / 3, 0.0, 1.0, 1 / 3])
        found = win_rate(judge=biased, both_orders=True)(["p"], [["1", "2", "3", "4"]])
        # neighbours differ by less than the liking: each wins where it is shown first
        assert found.scores[0] == pytest.approx([0.5 / 3, 1 / 3, 2 / 3, 2.5 / 3])
        assert found.ties.tolist() == [3]
        assert found.judge_calls.tolist() == [12]

    def test_rounding(self):
        assert win_rate(judge=Recorder(), round_digits=3)(PROMPTS, GROUP).scores[0] == pytest.approx(
            [0.667, 0.0, 1.0, 0.333]
        )

    def test_a_coroutine(self):
        async def slow(matches: Sequence[Match]) -> list[tuple[float, float]]:
            return [(float(match.first), float(match.second)) for match in matches]

        assert win_rate(judge=slow)(PROMPTS, GROUP).scores == win_rate(judge=Recorder())(PROMPTS, GROUP).scores

    def test_a_function_of_one_pair(self):
        judge = pairwise(function=lambda prompt, first, second: float(float(first) > float(second)))
        assert win_rate(judge=judge)(PROMPTS, GROUP).scores == win_rate(judge=Recorder())(PROMPTS, GROUP).scores

    def test_a_group_of_one_is_not_scored(self):
        found = win_rate(judge=Recorder())(["p", "q"], [["1"], ["2"]])
        assert found.scores == [[None], [None]]
        assert found.comparisons.tolist() == [0, 0]
        with pytest.raises(ShapeError, match="G >= 2; got G = 1"):
            round_robin(Recorder(), ["p"], [["1"]])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"failure": "x"}, "failure: must be tie or skip; got 'x'"),
            ({"categories": "x"}, "categories: must be ignore, blend or normalise; got 'x'"),
            ({"failures_max": 2.0}, "failures_max: must be from 0 to 1"),
            ({"overall_weight": 0.0, "category_weight": 0.0}, "not both 0"),
        ],
    )
    def test_options(self, options, message, friendly_errors):
        with pytest.raises(RecipeError, match=message):
            win_rate(judge=Recorder(), **options)

    def test_from_a_recipe(self):
        stage = build("rewards", {"win_rate": {"judge": {"pointwise": {"reward": "exact_answer"}}}}, "rewards.x")
        assert stage(["p"], [["a", "b", "b"]], answer=["b"]).scores == [[0.0, 0.75, 0.75]]
        with pytest.raises(UnknownNameError, match="pointwise"):
            win_rate(judge="pointwize")


class TestFailures:
    def judge(self, matches: Sequence[Match]) -> list[Any]:
        return [None if match.first == "3" else (float(match.first), float(match.second)) for match in matches]

    def test_a_tie_or_nothing(self):
        # 3 is shown first in its three pairs and has no verdict in any
        tied = win_rate(judge=self.judge)(PROMPTS[:1], GROUP[:1])
        assert tied.scores[0] == pytest.approx([0.5, 0.5 / 3, 2.5 / 3, 1.5 / 3])
        assert tied.comparisons.tolist() == [6]
        assert tied.judge_failures.tolist() == [3]
        left_out = win_rate(judge=self.judge, failure="skip")(PROMPTS[:1], GROUP[:1])
        assert left_out.scores[0] == pytest.approx([0.0, 0.0, 1.0, 0.5])
        assert left_out.comparisons.tolist() == [3]

    def test_one_order_is_enough(self):
        found = win_rate(judge=self.judge, failure="skip", both_orders=True)(PROMPTS[:1], GROUP[:1])
        assert found.scores[0] == pytest.approx([2 / 3, 0.0, 1.0, 1 / 3])

    def test_too_many(self):
        with pytest.raises(ScoreError, match=r"3 of 6 verdicts failed, more than failures_max = 0\.4"):
            win_rate(judge=self.judge, failures_max=0.4)(PROMPTS[:1], GROUP[:1])

    def test_answers_that_are_none(self):
        with pytest.raises(ScoreError, match="one answer for each of 6 matches; got 1"):
            win_rate(judge=lambda matches: [(1, 0)])(PROMPTS[:1], GROUP[:1])


class TestCategories:
    OVERALL = table([3.0, 2.0, 1.0])
    CLEAR = table([1.0, 2.0, 3.0])
    SHORT = torch.tensor([[[NAN, 1.0, NAN], [0.0, NAN, NAN], [NAN, NAN, NAN]]]).double()

    def test_blended(self):
        found = blend_categories(self.OVERALL, {"clear": self.CLEAR, "short": self.SHORT})
        # D: (0 + 1) / 2, (0.5 + 0) / 2, and 1 from clear alone
        assert found.tolist() == [[0.75, 0.375, 0.5]]
        weighted = blend_categories(
            self.OVERALL, {"clear": self.CLEAR, "short": self.SHORT}, weights={"clear": 3.0}, category_weight=3.0
        )
        assert weighted[0].tolist() == pytest.approx([(1 + 3 * 0.25) / 4, (0.5 + 3 * 0.375) / 4, 0.75])

    def test_without_a_category_it_is_the_win_rate(self):
        assert blend_categories(self.OVERALL, {}).tolist() == [[1.0, 0.5, 0.0]]
        found = blend_categories(self.OVERALL, {"short": self.SHORT})
        assert found.tolist() == [[1.0, 0.25, 0.0]]

    def test_normalised_first(self):
        found = blend_categories(self.OVERALL, {"clear": self.CLEAR}, normalise=True, category_weight=3.0)
        assert found[0].tolist() == pytest.approx([-0.5, 0.0, 0.5])

    def test_from_a_judge(self):
        def judge(matches: Sequence[Match]) -> list[Verdict]:
            return [
                Verdict(float(m.first), float(m.second), categories={"low": (-float(m.first), -float(m.second))})
                for m in matches
            ]

        assert win_rate(judge=judge)(["p"], [["1", "2", "3"]]).scores == [[0.0, 0.5, 1.0]]
        assert win_rate(judge=judge, categories="blend")(["p"], [["1", "2", "3"]]).scores == [[0.5, 0.5, 0.5]]
        found = win_rate(judge=judge, categories="blend", category_weight=3.0, both_orders=True)
        assert found(["p"], [["1", "2", "3"]]).scores == [[0.75, 0.5, 0.25]]
        found = win_rate(judge=judge, categories="normalise", category_weight=3.0)
        assert found(["p"], [["1", "2", "3"]]).scores[0] == pytest.approx([0.5, 0.0, -0.5])


class TestPointwise:
    MATCHES = tuple(Match(f"p{i}", "2", "1") for i in range(400))

    def test_bradley_terry(self):
        found = pointwise(reward=number, temperature=0.5)(self.MATCHES)
        assert {(v.first, v.second) for v in found} == {(1.0, 0.0), (0.0, 1.0)}
        share = sum(v.first for v in found) / len(found)
        assert share == pytest.approx(1 / (1 + math.exp(-2)), abs=0.04)  # 2.4 standard errors

    def test_a_match_is_always_decided_the_same_way(self):
        judge = pointwise(reward=number, temperature=0.5)
        assert judge(self.MATCHES[::-1]) == judge(self.MATCHES)[::-1]
        assert judge(self.MATCHES[:3]) == judge(self.MATCHES)[:3]
        assert pointwise(reward=number, temperature=0.5, seed=1)(self.MATCHES) != judge(self.MATCHES)

    def test_images_are_told_apart(self):
        def mean(samples):
            return [[image.mean() for image in group] for group in samples]

        matches = [Match("p", torch.full((64, 64), float(i)), torch.full((64, 64), float(i))) for i in range(50)]
        found = pointwise(reward=mean, temperature=1.0)(matches)
        assert 10 < sum(v.first for v in found) < 40

    def test_far_apart(self):
        (found,) = pointwise(reward=number, temperature=1e-9)([Match("p", "2", "1e9")])
        assert (found.first, found.second) == (0.0, 1.0)

    def test_errors(self):
        with pytest.raises(RecipeError, match="temperature: must be above 0"):
            pointwise(reward=number, temperature=0.0)
        with pytest.raises(RecipeError, match="give one of them"):
            pointwise(reward=number, temperature=1.0, margin=0.1)


class TestOnTheRoad:
    def test_advantages_and_ledger(self):
        signal = Signal(rewards={"wins": win_rate(judge=Recorder())}, advantage=advantage)
        rollout = signal(Rollout(PROMPTS, GROUP, torch.ones(2, 4, 2).bool(), torch.zeros(2, 4, 2)))
        fixed = torch.tensor([-1.1619, -0.3873, 0.3873, 1.1619])
        assert rollout.advantages is not None
        torch.testing.assert_close(rollout.advantages[0], fixed[[2, 0, 3, 1]], atol=1e-4, rtol=0)
        found = attribute(rollout)
        torch.testing.assert_close(found.contributions.sum(-1) + found.remainder, rollout.advantages)
        assert not found.constant.any()

    def test_beside_another_reward(self):
        signal = Signal(
            rewards={"wins": win_rate(judge=Recorder()), "plain": number},
            advantage=partial(normalise_then_sum, eps=1e-8, whiten=False),
        )
        rollout = signal(Rollout(PROMPTS, GROUP, torch.ones(2, 4, 2).bool(), torch.zeros(2, 4, 2)))
        assert rollout.advantages is not None
        parts = (
            advantage(torch.tensor(win_rate(judge=Recorder())(PROMPTS, GROUP).scores)),
            advantage(torch.tensor(number(GROUP))),
        )
        torch.testing.assert_close(rollout.advantages, parts[0] + parts[1])

    def test_all_ties_teach_nothing(self):
        signal = Signal(rewards={"wins": win_rate(judge=lambda m: [(1, 1)] * len(m))}, advantage=advantage)
        rollout = signal(Rollout(PROMPTS, GROUP, torch.ones(2, 4, 2).bool(), torch.zeros(2, 4, 2)))
        assert rollout.advantages is not None
        assert (rollout.advantages == 0).all()
        assert attribute(rollout).constant.all()

    def test_a_policy_learns_from_it(self):
        def more_ones(matches: Sequence[Match]) -> list[tuple[float, float]]:
            return [(m.first.count(1) / len(m.first), m.second.count(1) / len(m.second)) for m in matches]

        loop = Online(
            BanditPolicy(),
            rows(6),
            Signal(rewards={"wins": win_rate(judge=more_ones)}, advantage=advantage),
            policy_gradient,
            prompts_per_step=6,
            group_size=8,
            optim=Optim(lr=0.05),
        )
        before = loop.policy.table.softmax(-1)[:, 1].mean().item()
        result = [loop.step() for _ in range(25)][-1]
        assert loop.policy.table.softmax(-1)[:, 1].mean().item() > before + 0.3
        assert result.metrics["comparisons"] == 6 * 28
        assert "ties" in result.metrics
