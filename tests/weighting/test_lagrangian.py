from __future__ import annotations

import pytest
import torch

from guerdon.advantages import dr_grpo
from guerdon.errors import BindingError, RecipeError, ScoreError, ShapeError
from guerdon.weighting import lagrangian, proxy_point_search
from guerdon.weighting.lagrangian import Multipliers, mix_advantages
from guerdon.weighting.nelder_mead import NelderMead

NAN = float("nan")


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def streams(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    return found[:, :2], found[:, 2]


def normalised(x):
    return (x - x.mean(0)) / x.std(0)


def test_weights_of_nothing_leave_the_task_and_of_a_half_share_alike():
    rewards, task = streams()
    torch.testing.assert_close(mix_advantages(rewards, task, double([0.0, 0.0])), 2 * normalised(task))
    half = normalised(task) + 0.5 * normalised(rewards).sum(-1)
    torch.testing.assert_close(mix_advantages(rewards, task, double([0.5, 0.5])), half)


def test_scale_and_shift_of_a_stream_are_nothing():
    rewards, task = streams()
    weights = double([0.3, -0.4])
    other = mix_advantages(rewards * double([7.0, 1.0]) + double([3.0, -2.0]), task, weights)
    torch.testing.assert_close(other, mix_advantages(rewards, task, weights))
    constant = torch.ones_like(task)
    torch.testing.assert_close(mix_advantages(rewards, constant, weights), (weights * normalised(rewards)).sum(-1))
    with pytest.raises(ShapeError, match="a batch of one has no standard deviation"):
        mix_advantages(rewards[:1], task[:1], weights)


@pytest.mark.parametrize("mode", ["mu", "xi"])
@pytest.mark.parametrize(("score", "direction"), [(1.0, -1), (0.5, 0), (0.0, 1)])
def test_a_reward_above_its_threshold_loses_weight(mode, score, direction):
    multipliers = Multipliers([0.5, 0.5], mode=mode, start=0.2, momentum=0.0)
    multipliers.step(torch.full((4, 2), score))
    moved = multipliers.values - 0.2
    assert (moved.sign() == direction).all()


def test_a_reward_that_must_stay_below_gains_weight_above():
    multipliers = Multipliers([0.5], mode="all", start=0.0)
    multipliers.step(torch.tensor([[1.0]]))
    assert multipliers.values.item() == pytest.approx(0.1 * 0.25 * 0.5)


def test_a_huge_violation_moves_by_a_clipped_step_and_rows_without_a_score_by_none():
    multipliers = Multipliers([0.0], start=0.0)
    multipliers.step(torch.tensor([[1e6]]))
    assert abs(multipliers.values.item()) <= 0.05
    before = multipliers.values.clone()
    multipliers.step(torch.tensor([[NAN]]))
    assert torch.equal(multipliers.values, before)
    with pytest.raises(ScoreError, match="a return is infinite"):
        multipliers.step(torch.tensor([[float("inf")]]))
    with pytest.raises(ShapeError, match=r"returns must be \[B, K = 1\]; got \[1, 2\]"):
        multipliers.step(torch.zeros(1, 2))
    assert torch.equal(multipliers.values, before)


def test_descent_and_ascent_meet_at_the_threshold():
    """Maximise -|x|^2 / 2 subject to x = theta: the multiplier is theta."""
    theta = [0.3, -0.6]
    multipliers = Multipliers(theta, mode="xi", squash=False, start=0.0, momentum=0.0, max_grad_norm=10.0)
    x = torch.zeros(2, dtype=torch.float64)
    for _ in range(600):
        x += 0.1 * (multipliers.values - x)
        multipliers.step(x.unsqueeze(0))
    assert x.tolist() == pytest.approx(theta, abs=1e-3)
    assert multipliers.values.tolist() == pytest.approx(theta, abs=1e-3)


def test_multipliers_and_momentum_are_restored():
    first, second = Multipliers([0.5]), Multipliers([0.5], seed=3)
    first.step(torch.tensor([[0.9]]))
    second.load_state_dict(first.state_dict())
    for stage in (first, second):
        stage.step(torch.tensor([[0.1]]))
    assert torch.equal(first.values, second.values)


def test_all_weights_sum_to_the_number_of_constraints():
    stage = lagrangian(thresholds={"a": 0.5, "b": 0.2}, mode="xi", start=-0.7)
    scores = torch.randn(2, 3, 3, dtype=torch.float64)
    found = stage(scores, ("a", "kl", "b"))
    assert found.weights.sum().item() == pytest.approx(2.0)
    assert found.weights[0] < 0 < 2 < found.weights[1]
    torch.testing.assert_close(dr_grpo(found.rewards).sum(), double(0.0))
    with pytest.raises(RecipeError, match="there is no component 'b'"):
        stage(scores, ("a", "kl", "c"))


def test_long_samples_count_more_unless_told_otherwise():
    shaped, lengths = double([[[1.0], [0.0]]]), torch.tensor([[3, 1]])
    for average, mean in (("steps", 0.75), ("samples", 0.5)):
        stage = lagrangian(thresholds={"a": mean}, start=0.0, average=average)
        stage.observe(shaped, ("a",), lengths)
        assert stage.multipliers.values.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("size", [1, 2])
def test_the_search_shrinks_a_bowl_and_asks_for_no_point_twice(size):
    simplex = [[0.1] * size] + [[0.1 + 0.8 * (i == k) for i in range(size)] for k in range(size)]
    search = NelderMead(simplex, tolerance=0.0)
    search.minimise(lambda x: sum((a - 0.4) ** 2 for a in x), passes=12)
    assert search.best[1] < 1e-2
    points = [tuple(point) for point, _ in search.evaluated]
    assert len(set(points)) == len(points)
    with pytest.raises(RecipeError, match="all points of the simplex are equal"):
        NelderMead([[0.1], [0.1]])


def test_a_search_that_is_put_down_goes_on_where_it_was():
    def run(stage, steps):
        for _ in range(steps):
            theta = stage.lagrangian.multipliers.thresholds
            shaped = theta.reshape(1, 1, 1).expand(1, 2, 1)  # the policy follows at once
            stage.observe(shaped, ("a",), torch.ones(1, 2).long(), -(shaped - 0.4).square())

    options = {"box": {"a": [0.0, 1.0]}, "steps": 30, "seed": 1}
    whole, first, second = (proxy_point_search(**options) for _ in range(3))
    run(whole, 30)
    run(first, 7)
    second.load_state_dict(first.state_dict())
    run(second, 23)
    assert torch.equal(whole.tried, second.tried)
    final = whole.lagrangian.multipliers.thresholds
    assert final.item() == pytest.approx(0.4, abs=0.05)
    assert torch.equal(final, second.lagrangian.multipliers.thresholds)
    with pytest.raises(BindingError, match="judged by a watched reward"):
        proxy_point_search(**options).observe(double([[[0.1]]]), ("a",), torch.ones(1, 1).long())
