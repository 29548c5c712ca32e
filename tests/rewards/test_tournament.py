"""The tournament as a reward: batching, judges of any kind, failures, and its place on the road."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from guerdon.advantages import grpo
from guerdon.components import build
from guerdon.errors import RecipeError, ScoreError, UnknownNameError
from guerdon.ledger import attribute
from guerdon.objectives import policy_gradient, real
from guerdon.rewards import tournament
from guerdon.rewards.judges.base import Match, Verdict
from guerdon.rewards.topologies import TOPOLOGIES
from guerdon.rollout import Rollout
from guerdon.signal import Signal
from guerdon.training.online import Online
from guerdon.training.optimisation import Optim
from tests.training.bandit import BanditPolicy, rows

GROUP = [["3", "1", "4", "2"], ["10", "40", "30", "20"]]
PROMPTS = ["p", "q"]


class Recorder:
    """A judge that likes large numbers, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Match]] = []

    def __call__(self, matches: Sequence[Match]) -> list[tuple[float, float]]:
        self.asked.append(list(matches))
        return [(float(match.first), float(match.second)) for match in matches]


def rollout(samples: list[list[str]], **columns: list[Any]) -> Rollout:
    shape = (len(samples), len(samples[0]))
    return Rollout(
        [f"p{p}" for p in range(shape[0])],
        samples,
        torch.ones(*shape, 2).bool(),
        torch.zeros(*shape, 2),
        columns=columns,
    )


def test_quantiles_ranks_and_counts() -> None:
    found = tournament(judge=Recorder())(PROMPTS, GROUP)
    assert found.scores == [[2 / 3, 0.0, 1.0, 1 / 3], [0.0, 1.0, 2 / 3, 1 / 3]]
    assert found.ranks.tolist() == [[2.0, 4.0, 1.0, 3.0], [4.0, 1.0, 2.0, 3.0]]
    assert found.comparisons.tolist() == [6, 6]
    assert found.judge_calls.tolist() == [12, 12]
    assert found.judge_failures.tolist() == [0, 0]
    assert found.judge_malformed.tolist() == [0, 0]
    assert found.all_tied.tolist() == [False, False]


def test_a_round_of_all_groups_is_one_call() -> None:
    judge = Recorder()
    tournament(judge=judge, both_orders=False)(PROMPTS, GROUP, answer=["x", "y"], other=torch.zeros(2))
    assert [len(matches) for matches in judge.asked] == [6, 4, 2]  # seeds, semi-finals, finals
    assert judge.asked[0][0] == Match("p", "1", "3", {"answer": "x"})
    assert judge.asked[0][3] == Match("q", "40", "10", {"answer": "y"})
    judge = Recorder()
    tournament(judge=judge)([f"p{p}" for p in range(3)], [[str(i) for i in range(64)]] * 3)
    assert [len(matches) for matches in judge.asked] == [2 * 3 * n for n in (63, 32, 16, 8, 4, 2, 1)]


def test_both_orders_add_up() -> None:
    def biased(matches: Sequence[Match]) -> list[tuple[float, float]]:
        return [(float(match.first) + 3.5, float(match.second)) for match in matches]

    for topology in ("anchor", "round_robin", "single_elimination"):
        assert tournament(judge=biased, topology=topology)(PROMPTS, GROUP).ranks[0].tolist() == [2.0, 4.0, 1.0, 3.0]
    found = tournament(judge=biased, topology="round_robin", both_orders=False)(PROMPTS, GROUP)
    assert found.ranks[0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert found.judge_calls.tolist() == [6, 6]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_judge_that_is_awaited_gives_the_same(topology: Any) -> None:
    async def awaited(matches: Sequence[Match]) -> list[tuple[float, float]]:
        return [(float(match.first), float(match.second)) for match in matches]

    plain = tournament(judge=Recorder(), topology=topology)(PROMPTS, GROUP)
    found = tournament(judge=awaited, topology=topology)(PROMPTS, GROUP)
    assert found.scores == plain.scores
    assert found.judge_calls.equal(plain.judge_calls)


def test_one_event_loop_for_all_rounds() -> None:
    import asyncio

    loops: list[Any] = []

    async def awaited(matches: Sequence[Match]) -> list[tuple[float, float]]:
        loops.append(asyncio.get_running_loop())
        return [(float(match.first), float(match.second)) for match in matches]

    tournament(judge=awaited)(PROMPTS, GROUP)
    assert len(loops) == 3
    assert len(set(map(id, loops))) == 1


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_groups_do_not_depend_on_one_another(topology: Any) -> None:
    stage = tournament(judge=Recorder(), topology=topology)
    both, alone = stage(PROMPTS, GROUP), stage(PROMPTS[1:], GROUP[1:])
    assert both.scores[1] == alone.scores[0]
    assert stage(PROMPTS, GROUP).scores == both.scores


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_group_in_which_nobody_wins(topology: Any) -> None:
    def undecided(matches: Sequence[Match]) -> list[tuple[float, float]]:
        return [(7.0, 7.0)] * len(matches)

    found = tournament(judge=undecided, topology=topology)(["p"], [["a", "b", "c", "d", "e"]])
    assert found.scores == [[0.0] * 5]
    assert found.all_tied.tolist() == [True]
    spurious = tournament(judge=undecided, topology=topology, skip_if_all_tied=False)(
        ["p"], [["a", "b", "c", "d", "e"]]
    )
    varies = len(set(spurious.scores[0])) > 1
    assert varies == (topology not in ("anchor", "round_robin"))


def test_one_winner_is_enough_for_a_signal() -> None:
    def once(matches: Sequence[Match]) -> list[tuple[float, float]]:
        return [(float(m.first == "c"), float(m.second == "c")) for m in matches]

    found = tournament(judge=once)(["p"], [["a", "b", "c", "d"]])
    assert found.all_tied.tolist() == [False]
    assert found.scores[0][2] == 1.0


def test_a_group_of_one_is_not_scored() -> None:
    judge = Recorder()
    found = tournament(judge=judge)(PROMPTS, [["a"], ["b"]])
    assert found.scores == [[None], [None]]
    assert judge.asked == []
    assert found.comparisons.tolist() == [0, 0]
    signal = Signal(rewards={"arena": tournament(judge=judge)}, advantage=dr)
    assert signal(rollout([["a"]])).advantages.tolist() == [[0.0]]  # pyright: ignore[reportOptionalMemberAccess]


def dr(rewards: torch.Tensor) -> torch.Tensor:
    return (rewards - rewards.nanmean(-1, keepdim=True)).nan_to_num(nan=0.0)


def test_a_group_of_two_plays_twice() -> None:
    found = tournament(judge=Recorder())(["p"], [["1", "2"]])
    assert found.scores == [[0.0, 1.0]]
    assert found.comparisons.tolist() == [2]
    assert found.judge_calls.tolist() == [4]


@pytest.mark.parametrize("nothing", [None, (math.nan, 3.0), Verdict(math.nan, math.nan)])
def test_no_verdict_is_a_draw_at_the_middle(nothing: Any) -> None:
    def judge(matches: Sequence[Match]) -> list[Any]:
        return [nothing if "3" in (m.first, m.second) else (float(m.first), float(m.second)) for m in matches]

    def ranks(failure_value: float | None, scale: Any = None) -> Any:
        class Scaled:
            def __call__(self, matches: Sequence[Match]) -> list[Any]:
                return judge(matches)

        if scale:
            Scaled.scale = scale  # pyright: ignore[reportAttributeAccessIssue]
        options = {"topology": "anchor", "both_orders": False, "failures_max": 1.0, "failure_value": failure_value}
        found = tournament(judge=Scaled(), **options)(["p"], [["0", "3", "7", "9"]])
        assert found.judge_failures.tolist() == [1]
        return found.ranks.tolist()[0]

    # points: 3 gets the failure value, 7 and 9 their own, the pivot the mean of the failure value, 0 and 0
    assert ranks(8.0) == [4.0, 2.0, 3.0, 1.0]
    assert ranks(1.0) == [4.0, 3.0, 2.0, 1.0]
    assert ranks(10.0) == [4.0, 1.0, 3.0, 2.0]
    assert ranks(None, (0.0, 20.0)) == [4.0, 1.0, 3.0, 2.0]
    assert ranks(None) == [4.0, 3.0, 2.0, 1.0]  # the mean of 7, 0, 9 and 0 is 4


def test_too_many_failures_are_an_error() -> None:
    def judge(matches: Sequence[Match]) -> list[Any]:
        return [None if m.first == "1" or m.second == "1" else (float(m.first), float(m.second)) for m in matches]

    samples = [["1", "2", "3"]]
    with pytest.raises(
        ScoreError, match=r"tournament: 4 of 4 verdicts failed, .* The first: the judge returned None\.$"
    ):
        tournament(judge=judge)(["p"], samples)
    found = tournament(judge=judge, failures_max=1.0, topology="round_robin")(["p"], samples)
    assert found.judge_failures.tolist() == [4]
    assert found.ranks.tolist() == [[2.0, 3.0, 1.0]]
    nothing = tournament(judge=lambda matches: [None] * len(matches), failures_max=1.0)(["p"], samples)
    assert nothing.scores == [[0.0, 0.0, 0.0]]
    assert nothing.all_tied.tolist() == [True]


@pytest.mark.usefixtures("friendly_errors")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"topology": "knockout"},
            UnknownNameError,
            r"there is no topology 'knockout'.*There are: anchor, round_robin",
        ),
        ({"failure_value": math.nan}, RecipeError, r"failure_value: must be a finite number or null; got nan"),
        ({"failures_max": 1.5}, RecipeError, r"failures_max: must be from 0 to 1; got 1.5"),
        (
            {"judge": "chatt"},
            UnknownNameError,
            r"judge: rewards.judges has nothing called 'chatt'. Did you mean 'chat'",
        ),
        ({"judge": {"pairwise": {}}}, RecipeError, r"judge.pairwise: the option function must be given"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^rewards.tournament[.:] ?{message}"):
        tournament(**{"judge": Recorder(), **options})


def test_a_judge_that_breaks_its_form_is_named() -> None:
    with pytest.raises(
        ScoreError, match=r"rewards.tournament: a judge must return one answer for each of 6 matches; got 0"
    ):
        tournament(judge=lambda matches: [])(["p"], [["1", "2", "3", "4"]])


def test_it_is_a_reward_of_a_recipe() -> None:
    spec = {"tournament": {"judge": {"pointwise": {"reward": "exact_answer"}}, "topology": "round_robin"}}
    stage = build("rewards", spec)
    assert stage(["p"], [["4", "5", "4"]], answer=["4"]).scores == [[1.0, 0.0, 1.0]]
    with pytest.raises(RecipeError, match=r"rewards.tournament: the option judge must be given"):
        build("rewards", "tournament")
    with pytest.raises(RecipeError, match=r"topology: must be one of 'anchor', .*got 'swis'. Did you mean 'swiss'"):
        build("rewards", {"tournament": {"judge": "chat", "topology": "swis"}})


def test_its_place_in_a_signal() -> None:
    signal = Signal(rewards={"arena": tournament(judge=Recorder())}, advantage=partial(grpo, eps=1e-6))
    assert {"ranks", "comparisons", "judge_calls", "judge_failures"} <= signal.check({"prompts", "samples"})
    found = signal(rollout(GROUP, answer=["a", "b"]))
    assert found.scores is not None
    assert found.advantages is not None
    expected = [[0.3873, -1.1619, 1.1619, -0.3873], [-1.1619, 1.1619, 0.3873, -0.3873]]
    torch.testing.assert_close(found.advantages, torch.tensor(expected), atol=1e-4, rtol=0)
    assert found.extras["judge_calls"].tolist() == [12, 12]
    found.validate()
    contributions = attribute(found)
    torch.testing.assert_close(contributions.contributions.sum(-1) + contributions.remainder, found.advantages)
    torch.testing.assert_close(contributions.remainder, torch.zeros(2, 4), atol=1e-6, rtol=0)


def test_a_tied_group_is_a_constant_group() -> None:
    signal = Signal(rewards={"arena": tournament(judge=Recorder())}, advantage=partial(grpo, eps=1e-6))
    found = signal(rollout([["5", "5", "5"], ["1", "2", "3"]]))
    assert attribute(found).constant.tolist() == [True, False]
    assert found.advantages is not None
    assert found.advantages[0].tolist() == [0.0, 0.0, 0.0]


def best_of_two(prompt: int, first: list[int], second: list[int]) -> float:
    a, b = (sum(arm == 1 + prompt % 3 for arm in draw) for draw in (first, second))
    return 0.5 + 0.5 * ((a > b) - (a < b))


def online(objective: Any, advantage: Any) -> Online:
    stage = build("rewards", {"tournament": {"judge": {"pairwise": {"function": best_of_two}}}})
    signal = Signal(rewards={"arena": stage}, advantage=advantage)
    return Online(
        BanditPolicy(), rows(), signal, objective, prompts_per_step=6, group_size=6, steps=40, optim=Optim(lr=0.05)
    )


def test_training_on_ranks_learns_and_counts_the_calls() -> None:
    loop = online(policy_gradient, partial(grpo, eps=1e-6))
    before = loop.policy.table.softmax(-1)[torch.arange(6), 1 + torch.arange(6) % 3].mean().item()
    for _ in range(40):
        result = loop.step()
    after = loop.policy.table.softmax(-1)[torch.arange(6), 1 + torch.arange(6) % 3].mean().item()
    assert after > before + 0.2
    assert result.metrics["comparisons"] == 6 * 10
    assert result.metrics["judge_calls"] == 6 * 20
    assert result.metrics["judge_failures"] == 0


def test_real_needs_labels_and_says_so() -> None:
    loop = online(real, None)
    message = r"objectives.real: rewards must be 0 or 1, the labels wrong and right; got .*threshold.*quantile"
    with pytest.raises(ScoreError, match=message):
        loop.step()
    assert loop.steps_done == 0
    labelled = online(partial(real, threshold=0.5), None)
    assert labelled.step().metrics["live_groups"] > 0
