from __future__ import annotations

import asyncio
import functools
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from guerdon.advantages import dr_grpo, grpo
from guerdon.errors import BindingError, RecipeError, ScoreError
from guerdon.ledger import attribute, entry
from guerdon.rewards.scoring import score
from guerdon.rollout import Rollout
from guerdon.signal import Signal
from guerdon.weighting import linear


def make(prompts=("1+1", "2+3"), samples=(("2", "3"), ("5", "5"))) -> Rollout:
    count, size = len(samples), len(samples[0])
    mask = torch.ones(count, size, 3).bool()
    return Rollout(
        list(prompts),
        [list(s) for s in samples],
        mask,
        torch.zeros(mask.shape),
        columns={"answer": ["2", "5"]},
        indices=[7, 8],
    )


def exact(samples, answer, **_):
    return [[float(s == a) for s in group] for group, a in zip(samples, answer, strict=True)]


def trl_style(prompts, completions, answer, **kwargs):
    assert prompts == ["1+1", "1+1", "2+3", "2+3"]
    assert set(kwargs) == set()
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def test_grouped_and_flat_rewards_agree():
    rollout = make()
    grouped, flat = score({"r": exact}, rollout), score({"r": trl_style}, rollout)
    assert grouped.scores.tolist() == flat.scores.tolist() == [[[1.0], [0.0]], [[1.0], [1.0]]]


def test_a_flat_reward_gets_messages_where_prompts_are_messages():
    rollout = make(prompts=([{"role": "user", "content": "1+1"}], [{"role": "user", "content": "2+3"}]))

    def reward(completions, **_):
        return [float(c[0]["role"] == "assistant" and c[0]["content"] == "5") for c in completions]

    assert score({"r": reward}, rollout).scores[..., 0].tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_a_flat_reward_gets_token_ids_of_live_steps():
    rollout = make()
    rollout.steps["completion_ids"] = torch.arange(12).view(2, 2, 3)
    rollout.mask[0, 0, 2] = False

    def reward(completions, completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    assert score({"r": reward}, rollout).scores[..., 0].tolist() == [[2.0, 3.0], [3.0, 3.0]]


def test_coroutines_run_side_by_side():
    running = 0
    most = 0

    async def judge(samples):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return [[1.0] * len(group) for group in samples]

    assert score({"a": judge, "b": judge}, make()).scores.shape == (2, 2, 2)
    assert most == 2

    async def inside_a_loop():
        return score({"a": judge}, make()).scores.sum().item()

    assert asyncio.run(inside_a_loop()) == 4.0


def test_pairs_carry_answers_and_none_means_not_scored():
    def reward(samples, answer):
        return [[(1.0, "two"), None], [(0.0, "x"), (1.0, "y")]]

    found = score({"r": reward}, make())
    assert found.outcomes == [["two", None], ["x", "y"]]
    assert math.isnan(found.scores[0, 1, 0])
    assert found.dropped == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, "high", [1.0]])
def test_a_bad_score_names_component_prompt_sample_and_row(bad):
    def reward(samples):
        return [[0.0, 1.0], [1.0, bad]]

    with pytest.raises(ScoreError, match=r"reward 'r' returned .* for prompt 1, sample 1, data row 8 \(sample: '5'\)"):
        score({"r": reward}, make())
    dropped = score({"r": reward}, make(), on_bad_score="drop")
    assert [(d.prompt, d.sample, d.name) for d in dropped.dropped] == [(1, 1, "r")]
    assert dropped.scores.isnan().sum() == 1


def test_a_reward_that_raises_names_the_sample_that_made_it_raise():
    def fragile(completions, **_):
        return [1.0 / (int(c) - 3) for c in completions]

    with pytest.raises(ScoreError, match=r"reward 'r' raised ZeroDivisionError.*for prompt 0, sample 1"):
        score({"r": fragile}, make())
    found = score({"r": fragile}, make(), on_bad_score="drop")
    assert {(d.prompt, d.sample) for d in found.dropped} == {(0, 0), (0, 1)}
    assert found.scores[1, :, 0].tolist() == [0.5, 0.5]


def test_a_coroutine_that_raises_is_reported_the_same_way():
    async def fragile(completions, **_):
        return [1.0 / (int(c) - 3) for c in completions]

    with pytest.raises(ScoreError, match=r"ZeroDivisionError.*for prompt 0, sample 1"):
        score({"r": fragile}, make())


@pytest.mark.parametrize("result", [[1.0, 2.0, 3.0], [[1.0], [1.0, 2.0]], 1.0, {"a": 1}])
@pytest.mark.parametrize("mode", ["stop", "drop"])
def test_results_of_the_wrong_length_are_always_an_error(result, mode):
    with pytest.raises(ScoreError, match=r"reward 'r' (returned|must return)"):
        score({"r": lambda samples: result}, make(), on_bad_score=mode)


def test_dropped_samples_move_nothing_and_stand_in_the_ledger():
    def reward(samples):
        return [[0.0, math.nan, 1.0], [1.0, 1.0, 0.0]]

    signal = Signal(rewards={"r": reward}, advantage=grpo, on_bad_score="drop")
    rollout = signal(make(samples=(("a", "b", "c"), ("d", "e", "f"))))
    assert rollout.advantages[0, 1] == 0
    assert rollout.advantages[0].sum().abs() < 1e-6
    line = entry(1, rollout, attribute(rollout))
    assert line["dropped"] == [[0, 1, "r", "returned nan"]]
    assert line["raw"][0][1] == [None]


def test_shaping_weighting_and_advantage_follow_one_another():
    def double(scores):
        return scores * 2

    signal = Signal(
        rewards={"right": exact, "long": lambda samples: [[3.0, 1.0], [2.0, 2.0]]},
        shaping={"right": [double, double], "*": [lambda scores: scores + 1]},
        weighting=functools.partial(linear, weights={"right": 1.0, "long": 0.5}),
        advantage=dr_grpo,
    )
    rollout = signal(make())
    assert rollout.scores[..., 0].tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert rollout.extras["shaped"][0].tolist() == [[8.0, 4.0], [4.0, 2.0]]
    assert rollout.rewards[0].tolist() == [10.0, 5.0]
    assert rollout.advantages[0].tolist() == [2.5, -2.5]
    split = attribute(rollout)
    assert split.contributions[0].tolist() == [[2.0, 0.5], [-2.0, -0.5]]
    assert split.constant.tolist() == [False, True]


def test_contributions_and_remainder_add_up_for_any_advantage():
    def bent(rewards):
        return rewards**2 - 0.3

    signal = Signal(rewards={"right": exact, "long": lambda samples: [[3.0, 1.0], [2.0, 2.5]]}, advantage=bent)
    rollout = signal(make())
    split = attribute(rollout)
    torch.testing.assert_close(split.contributions.sum(-1) + split.remainder, rollout.advantages)
    assert split.remainder.abs().max() > 0.1


def test_watched_rewards_are_recorded_and_move_nothing():
    gold = {"gold": lambda samples: [[9.0, 0.0], [0.0, 9.0]]}
    with_watch = Signal(rewards={"r": exact}, advantage=grpo, watch=gold)(make())
    without = Signal(rewards={"r": exact}, advantage=grpo)(make())
    assert torch.equal(with_watch.advantages, without.advantages)
    assert with_watch.extras["watched"][..., 0].tolist() == [[9.0, 0.0], [0.0, 9.0]]


def test_wiring_is_checked_before_training():
    signal = Signal(rewards={"r": exact}, advantage=grpo)
    with pytest.raises(BindingError, match=r"reward 'r' needs the field 'answer'"):
        signal.check({"samples", "mask"})
    assert "advantages" in signal.check({"samples", "answer", "mask"})
    with pytest.raises(RecipeError, match=r"shaping.rr: there is no reward of that name. Did you mean 'r'"):
        Signal(rewards={"r": exact}, shaping={"rr": []}, advantage=grpo)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, scores):
        return scores

    def observe(self, scores):
        self.seen += scores.numel()


def test_the_state_of_a_signal_is_that_of_its_stages():
    signal = Signal(rewards={"r": exact}, shaping={"r": [Counter()]}, advantage=grpo)
    rollout = signal(make())
    signal.observe(rollout.available())
    assert [v.item() for v in signal.state_dict().values()] == [4.0]
    other = Signal(rewards={"r": exact}, shaping={"r": [Counter()]}, advantage=grpo)
    other.load_state_dict(signal.state_dict())
    assert [v.item() for v in other.state_dict().values()] == [4.0]


def test_a_weighting_sees_raw_scores_beside_shaped_ones():
    seen = {}

    def weigh(scores, raw_scores):
        seen.update(shaped=scores.tolist(), raw=raw_scores.tolist())
        return scores.sum(-1)

    def tenfold(scores):
        return 10 * scores

    Signal(rewards={"r": exact}, shaping={"r": [tenfold]}, weighting=weigh, advantage=dr_grpo)(make())
    assert seen == {"shaped": [[[10.0], [0.0]], [[10.0], [10.0]]], "raw": [[[1.0], [0.0]], [[1.0], [1.0]]]}


class Stepped(NamedTuple):
    scores: list[list[float | None]]
    step_scores: torch.Tensor


STEPS = torch.tensor([[[1.0, 0.0, -1.0], [0.0, 2.0, 9.0]], [[0.0, 0.0, 3.0], [1.0, 1.0, 1.0]]])


def stepped(samples) -> Stepped:
    steps = STEPS[: len(samples)].clone()
    steps[0, 1, 2] = 0.0
    return Stepped(steps.sum(-1).tolist(), steps)


def per_step(rollout: Rollout, **options) -> torch.Tensor:
    rewards = Signal(**options)(rollout).rewards
    assert rewards is not None
    return rewards


def test_step_scores_are_paid_where_they_are_earned_and_the_rest_at_the_end():
    rollout = make()
    rollout.mask[0, 1, 2] = False  # its last step is the one in the middle
    expected = STEPS.masked_fill(~rollout.mask, 0.0)
    assert torch.equal(per_step(rollout, rewards={"s": stepped}), expected)
    # a component without steps, weights, and what shaping changes
    weights = functools.partial(linear, weights={"s": 0.5, "r": 2.0})
    found = per_step(rollout, rewards={"s": stepped, "r": exact}, weighting=weights)
    whole = torch.tensor([[2.0, 0.0], [2.0, 2.0]])
    last = torch.tensor([[[0, 0, 1], [0, 1, 0]], [[0, 0, 1], [0, 0, 1]]]) * whole.unsqueeze(-1)
    torch.testing.assert_close(found, 0.5 * expected + last)
    shaped = per_step(rollout, rewards={"s": stepped}, shaping={"s": [lambda scores: scores * 3]})
    assert torch.equal(shaped.sum(-1), 3 * expected.sum(-1))
    assert torch.equal(shaped[..., 0], expected[..., 0])
    # the same whatever length the rollout is padded to
    extended = Signal(rewards={"s": stepped}).score(rollout).extend(5)
    assert torch.equal(Signal(rewards={"s": stepped}).weigh(extended).rewards[..., :3], expected)


def test_a_sample_without_a_score_has_no_steps():
    def partly(samples) -> Stepped:
        return Stepped([[1.0, None], [2.0, 3.0]], torch.ones(2, 2, 3))

    rollout = make()
    signal = Signal(rewards={"s": partly, "r": exact})
    found = signal(rollout).rewards
    assert found[0, 1].tolist() == [0.0, 0.0, 0.0]  # the other component's 0
    alone = Signal(rewards={"s": partly})(rollout).rewards
    assert alone[0, 1].isnan().any()
    assert alone[1].sum(-1).tolist() == [2.0, 3.0]


def test_step_scores_that_cannot_be_used():
    def broken(samples) -> Stepped:
        steps = STEPS[: len(samples)].clone()
        steps[0, 0, 1] = math.inf
        return Stepped([[1.0, 1.0]] * len(samples), steps)

    def short(samples) -> Stepped:
        return Stepped([[1.0, 1.0]] * 2, torch.ones(2, 2, 2))

    with pytest.raises(ScoreError, match=r"'broken' returned the step score inf for prompt 0, sample 0"):
        Signal(rewards=[broken])(make())
    dropped = Signal(rewards=[broken], on_bad_score="drop")(make())
    assert dropped.rewards.isnan().any(-1).tolist() == [[True, False], [False, False]]
    assert len(dropped.extras["dropped"][0]) == 1
    with pytest.raises(ScoreError, match=r"step_scores must be \[P, G, T\] = \[2, 2, 3\]; got \[2, 2, 2\]"):
        Signal(rewards=[short])(make())


def test_steps_of_a_reward_that_fails_on_one_prompt():
    def picky(samples) -> Stepped:
        if any("2" in group for group in samples):
            raise ValueError("no 2")
        return Stepped([[3.0, 3.0]] * len(samples), torch.ones(len(samples), 2, 3))

    found = Signal(rewards=[picky], on_bad_score="drop")(make()).rewards
    assert found[0].isnan().any(-1).all()
    assert found[1].tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]


def test_components_alone_keep_their_steps():
    signal = Signal(rewards={"s": stepped, "r": exact}, advantage=lambda rewards: rewards)
    rollout = make()
    of_steps, of_sample = signal.alone(signal.score(rollout))
    assert torch.equal(of_steps.rewards, STEPS.where(STEPS != 9, 0.0))
    assert torch.equal(of_sample.rewards[..., -1], torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert (of_sample.rewards[..., :-1] == 0).all()


def test_the_ledger_of_step_rewards_adds_up():
    rollout = Signal(rewards={"s": stepped, "r": exact}, advantage=lambda rewards: rewards)(make())
    found = attribute(rollout)
    assert torch.equal(found.advantages, rollout.rewards.sum(-1))
    torch.testing.assert_close(found.contributions.sum(-1) + found.remainder, found.advantages)


def test_what_a_policy_says_of_each_sample_is_there_when_the_guilty_one_is_looked_for():
    def picky(samples, offsets) -> Stepped:
        assert offsets.shape[:2] == (len(samples), len(samples[0]))
        if any("2" in group for group in samples):
            raise ValueError("no 2")
        return Stepped([[3.0] * len(group) for group in samples], torch.ones(len(samples), len(samples[0]), 3))

    rollout = make()
    rollout.extras["offsets"] = torch.zeros(2, 2, 3, 2, dtype=torch.long)
    dropped = Signal(rewards=[picky], on_bad_score="drop")(rollout).extras["dropped"][0]
    assert [(fault.sample, fault.why) for fault in dropped] == [
        (0, "ValueError: no 2"),
        (1, "another sample of its group could not be scored"),
    ]
