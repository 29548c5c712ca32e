"""The outer loop of DERL on inner runs that cost nothing: feedback, the gradient, state, and what is tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guerdon.advantages import grpo, rloo
from guerdon.errors import RecipeError, ScoreError
from guerdon.objectives import policy_gradient
from guerdon.rewards.expression import RewardExpression
from guerdon.rollout import Rollout
from guerdon.signal import Signal
from guerdon.training import Online, Performance, outer_loop
from guerdon.training.bilevel import Inner, Trained, first_line
from tests.training.bandit import Output

TEXTS = ["g1", "g2", "g1+g2", "g1 g2", "2*g1"]
WORTH = {"g1": 0.1, "g2": 0.5, "g1+g2": 0.9, "2*g1": 0.1}


class Table:
    """Inner runs whose outcome is written down; says what it was asked for."""

    def __init__(self, worth: dict[str, float | Exception]) -> None:
        self.worth, self.asked = worth, []

    def train(self, rewards: Sequence[RewardExpression], start: str | None, iteration: int) -> list[Trained]:
        self.asked.append(([reward.text for reward in rewards], start, iteration))
        found = []
        for reward in rewards:
            worth = self.worth[reward.text]
            if isinstance(worth, Exception):
                found.append(Trained(math.nan, None, str(worth)))
            else:
                found.append(Trained(worth, f"{iteration}/{reward.text}"))
        return found


class Chooser(nn.Module):
    """A policy over five texts: softmax of five logits, one step a sample."""

    fields = ("truncated",)
    has_critic = False
    max_steps = 1

    def __init__(self, logits: Sequence[float] = (0.3, -0.2, 0.1, 0.0, -0.5)) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(list(logits), dtype=torch.float64))
        self.reference: Tensor | None = None

    def forward(self, steps: dict[str, Tensor], logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[steps["choice"]]

    def log_prob(self, rollout: Rollout, *, module: Any = None) -> Output:
        logp = (module or self)(rollout.steps, self.logits)
        entropy = torch.distributions.Categorical(logits=self.logits).entropy()
        return Output(logp, entropy.expand_as(logp), None)

    def reference_log_prob(self, rollout: Rollout, *, module: Any = None) -> Tensor:
        assert self.reference is not None
        return self.reference.log_softmax(-1)[rollout.steps["choice"]]

    def keep_reference(self) -> None:
        self.reference = self.logits.detach().clone()

    @torch.no_grad()
    def sample(self, prompts: list[Any], group_size: int, seeds: list[int], **_: Any) -> Rollout:
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [torch.multinomial(self.logits.softmax(-1), group_size, True, generator=draw) for draw in draws]
        choice = torch.stack(rows).unsqueeze(-1)
        mask = torch.ones_like(choice, dtype=torch.bool)
        samples = [[TEXTS[i] for i in row.flatten().tolist()] for row in rows]
        steps = {"choice": choice}
        extras = {"truncated": torch.zeros_like(mask[..., 0])}
        return Rollout(list(prompts), samples, mask, self(steps, self.logits), steps, extras=extras)


ROWS = [{"prompt": "="}]


def values() -> Tensor:
    return torch.tensor([WORTH.get(text, 0.0) for text in TEXTS], dtype=torch.float64)


# what an expression is worth


def test_feedback_is_the_performance_and_zero_for_what_is_invalid_or_failed():
    inner = Table({**WORTH, "g2": RuntimeError("it diverged"), "g1": -0.25})
    performance = Performance(inner, 2)
    assert performance([["g1", "g2", "nonsense", "g1+g2", "g3"]]) == [[-0.25, 0.0, 0.0, 0.9, 0.0]]
    assert inner.asked == [(["g1", "g2", "g1+g2"], None, 0)]


def test_a_performance_that_is_no_number_is_worth_nothing():
    class Broken:
        def train(self, rewards, start, iteration):
            return [Trained(math.nan), Trained(math.inf)]

    assert Performance(Broken(), 2)([["g1", "g2"]]) == [[0.0, 0.0]]


def test_equal_expressions_are_trained_with_once():
    inner = Table({**WORTH, "g1 + g2": 0.9})
    performance = Performance(inner, 2)
    assert performance([["g1+g2", " (g1) + g2", "g1"], ["g1", "g1+g2", "x"]]) == [[0.9, 0.9, 0.1], [0.1, 0.9, 0.0]]
    assert inner.asked == [(["g1+g2", "g1"], None, 0)]


def test_the_first_line_counts_unless_it_was_cut_off():
    assert first_line("  g1 \nbecause") == "g1"
    inner = Table(WORTH)
    cut = torch.tensor([[True, True, False]])
    assert Performance(inner, 2)([["g1", "g2\nfor", "g1+g2"]], cut) == [[0.0, 0.5, 0.9]]


def test_another_number_of_results_is_an_error():
    class Short:
        def train(self, rewards, start, iteration):
            return []

    assert isinstance(Short(), Inner)
    with pytest.raises(ScoreError, match="1 rewards"):
        Performance(Short(), 2)([["g1"]])


def test_the_best_is_the_first_of_the_highest_and_stays():
    performance = Performance(Table({**WORTH, "g2-g1": 0.9}), 2)
    for samples in ([["g1", "x"]], [["g2", "g1+g2", "g2-g1"]], [["g2"]], [["x"]]):
        performance(samples)
        performance.observe(samples)
    assert performance.best == {"iteration": 1, "expression": "g1+g2", "performance": 0.9}
    assert performance.iteration == 4
    assert performance.records == [
        {
            "iteration": 3,
            "expression": "x",
            "performance": 0.0,
            "valid": False,
            "fault": "expression 'x': there is no primitive 'x'. There are: g1, g2.",
        }
    ]
    assert performance.metrics() == {"best": 0.9, "valid": 0.0, "distinct": 0.0, "failed": 0.0}


def test_a_population_starts_from_the_best_of_the_iteration_before():
    inner = Table({**WORTH, "g1": RuntimeError("no")})
    performance = Performance(inner, 2, population=True)
    for samples in ([["g2", "g1+g2"]], [["g1", "x"]], [["g2"]], [["g2", "g1"]]):
        performance(samples)
        performance.observe(samples)
    assert [start for _, start, _ in inner.asked] == [None, "0/g1+g2", "0/g1+g2", "2/g2"]
    assert performance.start == "3/g2"
    plain = Performance(inner, 2)
    plain([["g2"]])
    plain.observe([["g2"]])
    assert plain.start is None


# the update


def test_advantages_keep_invalid_expressions_in_the_group():
    signal = Signal(rewards={"performance": Performance(Table(WORTH), 2)}, advantage=partial(grpo, eps=1e-6))
    policy = Chooser((0.0,) * 5)
    rollout = signal(policy.sample(["="], 16, [3]))
    v = torch.tensor([[WORTH.get(text, 0.0) for text in rollout.samples[0]]], dtype=torch.float64)
    assert (v == 0).any()
    expected = (v - v.mean()) / (v.std() + 1e-6)
    assert rollout.advantages is not None
    assert torch.allclose(rollout.advantages.double(), expected, atol=1e-5)
    assert abs(rollout.advantages.mean().item()) < 1e-6
    assert torch.allclose(grpo(3 * v + 7, eps=0.0), grpo(v, eps=0.0))


@pytest.mark.parametrize("worth", [dict.fromkeys(WORTH, 0.4), {}])
def test_a_group_of_equals_moves_nothing(worth):
    texts = [text for text in TEXTS if text in worth] or ["x"]
    signal = Signal(rewards={"performance": Performance(Table(worth), 2)}, advantage=partial(grpo, eps=1e-6))
    rollout = Chooser().sample(["="], 4, [0]).update({})
    rollout.samples = [[texts[i % len(texts)] for i in range(4)]]
    found = signal(rollout)
    assert found.advantages is not None
    assert (found.advantages == 0).all()


def test_the_meta_gradient_is_that_of_the_expected_performance():
    policy = Chooser()
    signal = Signal(rewards={"performance": Performance(Table(WORTH), 2)}, advantage=rloo)
    expected_value = (policy.logits.softmax(-1) * values()).sum()
    (exact,) = torch.autograd.grad(expected_value, policy.logits)
    groups, size = 2000, 4
    rollout = signal(policy.sample(["="] * groups, size, list(range(groups))))
    assert rollout.advantages is not None
    out = policy.log_prob(rollout)
    loss = policy_gradient(out.logp, out.logp.detach(), rollout.advantages.double(), rollout.mask)
    (found,) = torch.autograd.grad(-loss.total / loss.count, policy.logits)
    # five standard errors, from the spread of single samples' contributions
    scores = torch.eye(5, dtype=torch.float64)[rollout.steps["choice"].flatten()] - policy.logits.softmax(-1).detach()
    error = (scores * rollout.advantages.flatten().unsqueeze(-1)).std(0) / math.sqrt(groups * size)
    assert (exact.abs() > 10 * error).sum() >= 3  # the test could tell a wrong one
    assert ((found - exact).abs() < 5 * error).all()


def loop(inner: Table, steps: int = 12, **more: Any) -> Online:
    performance = Performance(inner, 2, population=True)
    return outer_loop(Chooser(), performance, ROWS, **{"n": 6, "lr": 0.1, "steps": steps, "seed": 5, **more})


def test_the_outer_loop_finds_the_best_expression():
    found = loop(Table(WORTH), steps=40)
    first = found.step().metrics["reward"]
    for _ in range(39):
        last = found.step().metrics
    assert first < 0.5
    assert last["reward"] > 0.8
    assert last["rewards_performance/best"] == 0.9
    assert TEXTS[int(found.policy.logits.argmax())] == "g1+g2"


def test_everything_survives_a_round_trip_in_mid_run():
    whole = loop(Table(WORTH))
    for _ in range(12):
        whole.step()
    first, inner = loop(Table(WORTH)), Table(WORTH)
    for _ in range(5):
        first.step()
    second = loop(inner)
    second.policy.load_state_dict(first.policy.state_dict())
    second.load_state(first.state())
    before = first.signal.rewards["performance"]
    after = second.signal.rewards["performance"]
    assert isinstance(before, Performance)
    assert isinstance(after, Performance)
    assert (after.iteration, after.best, after.start) == (5, before.best, before.start)
    for _ in range(7):
        second.step()
    assert inner.asked[0][1:] == (before.start, 5)
    assert torch.equal(second.policy.logits, whole.policy.logits)
    expected = whole.signal.rewards["performance"]
    assert isinstance(expected, Performance)
    assert (after.iteration, after.best, after.start) == (12, expected.best, expected.start)


def test_an_interrupt_is_not_swallowed():
    class Interrupted:
        def train(self, rewards, start, iteration):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outer_loop(Chooser(), Performance(Interrupted(), 2), ROWS, steps=1).step()


def test_a_group_needs_two():
    with pytest.raises(RecipeError, match="at least 2"):
        loop(Table(WORTH), n=1)
