"""The batteries themselves: every check fails for a member that breaks just what it checks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from guerdon.errors import ShapeError
from tests.contracts import checks
from tests.contracts.checks import BATTERIES, Check
from tests.contracts.fields import make
from tests.contracts.members import Member


class Result(NamedTuple):
    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor]


class Weighted(NamedTuple):
    rewards: Tensor
    weights: Tensor


# ---------------------------------------------------------------- members that keep the contract


def good_objective(logp: Tensor, advantages: Tensor, mask: Tensor) -> Result:
    """A loss.

    Args:
        logp: of the policy.
        advantages: per sample.
        mask: of live steps.

    Returns:
        The loss.

    Raises:
        ValueError: never.

    Source:
        None.
    """
    steps = (logp.where(mask, 0.0) * advantages.unsqueeze(-1)).where(mask, 0.0)
    return Result(-steps.sum(), mask.sum().double(), {"length": mask.double().mean()})


def good_advantage(rewards: Tensor) -> Tensor:
    """The reward minus the group's mean.

    Args:
        rewards: per sample.

    Returns:
        Advantages.

    Raises:
        ValueError: never.

    Source:
        None.
    """
    rewards = rewards.detach()
    scored = ~rewards.isnan()
    low = rewards.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
    high = rewards.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    return (rewards - rewards.nanmean(-1, keepdim=True)).where(scored & (high > low), 0.0)


def good_weighting(scores: Tensor) -> Weighted:
    """The sum of scores.

    Args:
        scores: per component.

    Returns:
        The sum and weights of 1.

    Raises:
        ValueError: never.

    Source:
        None.
    """
    return Weighted(scores.nansum(-1).masked_fill(scores.isnan().all(-1), torch.nan), scores.new_ones(scores.shape[-1]))


def good_shaping(scores: Tensor) -> Tensor:
    """The square of a score.

    Args:
        scores: of one component.

    Returns:
        Its square.

    Raises:
        ValueError: never.

    Source:
        None.
    """
    return scores.square()


class GoodSampler(nn.Module):
    """Positions in the data's order.

    Source:
        None.
    """

    draws_max = 1
    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.size: int | None = None

    def prepare(self, size: int | None, seed: int) -> None:
        self.size = size

    def draw(self, count: int) -> list[int]:
        start = int(self.position)
        self.position += count
        return [index if self.size is None else index % self.size for index in range(start, start + count)]

    def keep(self, scores: Tensor) -> Tensor:
        return torch.ones(len(scores), dtype=torch.bool)


GOOD: dict[str, Any] = {
    "objectives": good_objective,
    "advantages": good_advantage,
    "weighting": good_weighting,
    "shaping": good_shaping,
    "sampling": GoodSampler,
    "rewards": good_weighting,
    "optim": good_shaping,
}


@pytest.mark.parametrize(
    ("stage", "check"), [(stage, check) for stage, battery in BATTERIES.items() for check in battery]
)
def test_a_good_member_passes(stage: str, check: Check) -> None:
    check(Member(stage, "good", GOOD[stage]))


# ---------------------------------------------------------------- members that each break one thing


def undocumented(rewards: Tensor) -> Tensor:
    """Args are missing, and so is all else."""
    return rewards


def half_documented(scores: Tensor, weights: Tensor) -> Tensor:
    """One argument is not described.

    Args:
        scores: described.

    Returns:
        Something.

    Raises:
        ValueError: never.

    Source:
        None.
    """
    return scores.sum(-1)


def undeclared(rewards, *, strength):
    return rewards * strength


class Positional(nn.Module):
    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()


def changes_inputs(stage: str, field: str) -> Any:
    good = GOOD[stage]

    @functools.wraps(good)
    def broken(*args: Tensor, **fields: Tensor) -> Any:
        result = good(**fields)
        with torch.no_grad():
            fields[field].add_(1.0)
        return result

    return broken


def random_advantage(rewards: Tensor) -> Tensor:
    return torch.rand_like(rewards)


class HiddenState(nn.Module):
    """Counts its calls where no state_dict sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, rewards: Tensor) -> Tensor:
        return good_advantage(rewards) * self.calls

    def observe(self, rewards: Tensor) -> None:
        self.calls += 1


def losing(change: Callable[[Result, Tensor, Tensor, Tensor], Result]) -> Any:
    """The good objective with its result changed."""

    def broken(logp: Tensor, advantages: Tensor, mask: Tensor) -> Result:
        return change(good_objective(logp, advantages, mask), logp, advantages, mask)

    return broken


def leaking(logp: Tensor, advantages: Tensor, mask: Tensor) -> Result:
    """Masks the value but not the gradient: NaN * 0 flows back."""
    steps = (logp.exp() * advantages.unsqueeze(-1)).where(mask, 0.0)
    return Result(-steps.sum(), mask.sum().double(), {})


def multiplied_mask(logp: Tensor, advantages: Tensor, mask: Tensor) -> Result:
    return Result((logp * mask * advantages.unsqueeze(-1)).sum(), mask.sum().double(), {})


def mean_of_the_batch(logp: Tensor, advantages: Tensor, mask: Tensor) -> Result:
    total = good_objective(logp, advantages, mask).total
    return Result(total / mask.sum(), mask.sum().double(), {})


def divides_by_live_steps(logp: Tensor, advantages: Tensor, mask: Tensor) -> Result:
    found = good_objective(logp, advantages, mask)
    return found._replace(total=found.total / mask.sum())


def bessel(values: Tensor) -> Tensor:
    """The standard deviation, 0 / 0 for one sample (torch's own warns)."""
    return ((values - values.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / (values.shape[-1] - 1)).sqrt()


def standardised(logp: Tensor, advantages: Tensor, mask: Tensor) -> Result:
    return good_objective(logp, (advantages - advantages.mean(-1, keepdim=True)) / bessel(advantages), mask)


def wrong_gradient(logp: Tensor, advantages: Tensor, mask: Tensor) -> Result:
    return good_objective(2 * logp - logp.detach(), advantages, mask)


def needs_the_optional(logp: Tensor, advantages: Tensor, mask: Tensor, logp_ref: Tensor | None = None) -> Result:
    if logp_ref is None:
        logp = logp * torch.nan
    return good_objective(logp, advantages, mask)


def optional_advantage(rewards: Tensor, values: Tensor | None = None) -> Tensor:
    return good_advantage(rewards) if values is not None else rewards * torch.nan


def optional_weighting(scores: Tensor, score_names: tuple[str, ...] = ()) -> Weighted:
    found = good_weighting(scores)
    return found if score_names else found._replace(rewards=found.rewards * torch.nan)


def optional_shaping(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    return scores if mask is not None else scores * torch.nan


def z_score(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean(-1, keepdim=True)) / (bessel(rewards) + 1e-4)


def unguarded_z_score(rewards: Tensor) -> Tensor:
    return good_advantage(rewards) / bessel(rewards)


def weighs_by_mask(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return (rewards.detach().unsqueeze(-1) - values * mask).nan_to_num(nan=0.0)


def replaced(good: Any, **changes: Callable[[Weighted, Tensor], Tensor]) -> Any:
    def broken(scores: Tensor) -> Weighted:
        found = good(scores)
        return found._replace(**{name: change(found, scores) for name, change in changes.items()})

    return broken


def without_weights(scores: Tensor) -> Tensor:
    return scores.nansum(-1)


class Floats(GoodSampler):
    def draw(self, count: int) -> Any:
        return [float(index) for index in super().draw(count)]


class Beyond(GoodSampler):
    def draw(self, count: int) -> list[int]:
        return [index + 1 for index in super().draw(count)]


class GlobalRandom(GoodSampler):
    def draw(self, count: int) -> list[int]:
        return torch.randint(self.size or 9, (count,)).tolist()


class Repeats(GoodSampler):
    def draw(self, count: int) -> list[int]:
        return [index % 7 for index in super().draw(count)]


class Forgets(GoodSampler):
    def __init__(self) -> None:
        super().__init__()
        self.start = 0

    def draw(self, count: int) -> list[int]:
        self.start += count
        return [index % (self.size or 10**9) for index in range(self.start - count, self.start)]


class KeepsSamples(GoodSampler):
    def keep(self, scores: Tensor) -> Tensor:
        return scores[..., 0] > 0


class KeepChanges(GoodSampler):
    def keep(self, scores: Tensor) -> Tensor:
        scores.zero_()
        return super().keep(scores)


POSITION = torch.arange(1.0, 8.0, dtype=torch.float64)

BROKEN: list[tuple[str, Any, Check]] = [
    ("advantages", undocumented, checks.it_is_documented),
    ("weighting", half_documented, checks.it_is_documented),
    ("rewards", undocumented, checks.it_is_documented),
    ("advantages", undeclared, checks.its_options_are_declared),
    ("sampling", Positional, checks.its_options_are_declared),
    ("objectives", changes_inputs("objectives", "logp"), checks.inputs_are_not_changed),
    ("objectives", changes_inputs("objectives", "advantages"), checks.inputs_are_not_changed),
    ("advantages", changes_inputs("advantages", "rewards"), checks.inputs_are_not_changed),
    ("weighting", changes_inputs("weighting", "scores"), checks.inputs_are_not_changed),
    ("shaping", changes_inputs("shaping", "scores"), checks.inputs_are_not_changed),
    ("advantages", random_advantage, checks.the_same_call_gives_the_same),
    ("advantages", HiddenState, checks.the_state_dict_is_the_whole_state),
    ("objectives", losing(lambda r, *_: r._replace(total=r.total.detach())), checks.it_returns_a_loss),
    ("objectives", losing(lambda r, *_: r._replace(total=r.total.expand(2))), checks.it_returns_a_loss),
    ("objectives", losing(lambda r, logp, *_: r._replace(count=logp.sum() * 0 + 5)), checks.it_returns_a_loss),
    ("objectives", losing(lambda r, *_: r._replace(metrics={"loss": r.total})), checks.it_returns_a_loss),
    ("objectives", losing(lambda r, *_: r.total), checks.it_returns_a_loss),
    ("objectives", leaking, checks.masked_steps_are_nothing_to_the_loss),
    ("objectives", multiplied_mask, checks.masked_steps_are_nothing_to_the_loss),
    (
        "objectives",
        losing(lambda r, logp, *_: r._replace(metrics={"logp": logp.detach().mean()})),
        checks.masked_steps_are_nothing_to_the_loss,
    ),
    (
        "objectives",
        losing(lambda r, logp, a, m: r._replace(total=(logp.where(m, 0.0) * POSITION[: a.shape[1], None]).sum())),
        checks.the_order_of_samples_is_nothing_to_the_loss,
    ),
    ("objectives", mean_of_the_batch, checks.micro_batches_add_up),
    (
        "objectives",
        losing(lambda r, logp, *_: r._replace(count=(logp.detach() > -1).sum().double())),
        checks.the_count_ignores_the_policy,
    ),
    ("objectives", divides_by_live_steps, checks.nothing_live_is_finite),
    ("objectives", standardised, checks.a_loss_of_groups_of_one_is_finite),
    ("objectives", standardised, checks.a_loss_of_constant_groups_is_finite),
    ("objectives", wrong_gradient, checks.the_gradient_is_the_derivative),
    ("objectives", needs_the_optional, checks.optional_fields_are_optional),
    ("advantages", optional_advantage, checks.optional_fields_are_optional),
    ("weighting", optional_weighting, checks.optional_fields_are_optional),
    ("shaping", optional_shaping, checks.optional_fields_are_optional),
    ("advantages", lambda rewards: rewards - rewards.mean(-1, keepdim=True), checks.it_returns_advantages),
    ("advantages", lambda rewards: good_advantage(rewards).float(), checks.it_returns_advantages),
    ("advantages", lambda rewards: good_advantage(rewards).sum(-1), checks.it_returns_advantages),
    (
        "advantages",
        lambda rewards: good_advantage(rewards) * POSITION[: rewards.shape[1]],
        checks.the_order_of_samples_only_orders_advantages,
    ),
    ("advantages", z_score, checks.a_constant_group_has_no_advantage),
    ("advantages", z_score, checks.an_unscored_sample_has_no_advantage),
    ("advantages", lambda rewards: rewards.nan_to_num(nan=1.0), checks.an_unscored_sample_has_no_advantage),
    ("advantages", weighs_by_mask, checks.masked_steps_are_nothing_to_advantages),
    ("advantages", unguarded_z_score, checks.advantages_of_groups_of_one_are_finite),
    ("weighting", without_weights, checks.it_returns_rewards_and_weights),
    (
        "weighting",
        replaced(good_weighting, weights=lambda found, scores: found.rewards),
        checks.it_returns_rewards_and_weights,
    ),
    ("weighting", replaced(good_weighting, weights=lambda found, s: found.weights * 2), checks.contributions_add_up),
    (
        "weighting",
        replaced(good_weighting, rewards=lambda found, s: found.rewards.tanh()),
        checks.one_component_is_the_reward,
    ),
    ("weighting", replaced(good_weighting, rewards=lambda f, s: s.sum(-1)), checks.what_was_not_scored_is_left_out),
    ("weighting", replaced(good_weighting, rewards=lambda f, s: s.nansum(-1)), checks.what_was_not_scored_is_left_out),
    (
        "weighting",
        replaced(good_weighting, rewards=lambda f, s: f.rewards * POSITION[: s.shape[1]]),
        checks.the_order_of_samples_only_orders_rewards,
    ),
    (
        "weighting",
        replaced(good_weighting, rewards=lambda f, s: f.rewards + POSITION[: s.shape[1]]),
        checks.constant_groups_stay_constant,
    ),
    ("shaping", lambda scores: scores.nan_to_num(), checks.it_returns_scores_of_the_same_shape),
    ("shaping", lambda scores: scores.mean(-1), checks.it_returns_scores_of_the_same_shape),
    (
        "shaping",
        lambda scores: scores * POSITION[: scores.shape[1]],
        checks.the_order_of_samples_only_orders_scores,
    ),
    (
        "shaping",
        lambda scores: (scores - scores.amin()) / (scores.amax() - scores.amin()),
        checks.scores_of_constant_groups_are_finite,
    ),
    ("sampling", Floats, checks.it_draws_positions_of_the_data),
    ("sampling", Beyond, checks.it_draws_positions_of_the_data),
    ("sampling", GlobalRandom, checks.the_seed_decides_what_is_drawn),
    ("sampling", Repeats, checks.endless_data_is_never_repeated),
    ("sampling", Forgets, checks.a_restored_sampler_goes_on),
    ("sampling", KeepsSamples, checks.it_keeps_whole_groups),
    ("sampling", KeepChanges, checks.it_keeps_whole_groups),
]


@pytest.mark.parametrize(("stage", "target", "check"), BROKEN)
def test_a_broken_member_is_caught(stage: str, target: Any, check: Check) -> None:
    with pytest.raises(AssertionError):
        check(Member(stage, "broken", target))


def test_every_check_has_a_member_that_it_catches() -> None:
    caught = {(stage, check) for stage, _, check in BROKEN}
    shared = {*checks.EVERY_STAGE, *checks.CALLED}
    for stage, battery in BATTERIES.items():
        for check in battery:
            assert (stage, check) in caught or (check in shared and any(c is check for _, c in caught)), check.__name__


def test_refusing_a_group_of_one_must_be_said() -> None:
    def refuses(rewards: Tensor) -> Tensor:
        raise ShapeError("too small" if rewards.shape[1] == 1 else "never")

    with pytest.raises(AssertionError, match="without naming G"):
        checks.advantages_of_groups_of_one_are_finite(Member("advantages", "refuses", refuses))


def test_a_field_that_nobody_makes_is_reported() -> None:
    def strange(colour: Tensor) -> Tensor:
        return colour

    fields = make()
    with pytest.raises(pytest.fail.Exception, match=r"takes 'colour': say in tests/contracts/fields.py"):
        Member("advantages", "strange", strange).run(fields)
