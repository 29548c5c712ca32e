"""The running scale: its moments against those of all the data, and its state."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.advantages import group_advantages, running_scale
from guerdon.errors import RecipeError, ScoreError, ShapeError


def batches(count: int, size: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 4, generator=generator) * 2 + 1 for _ in range(count)]


def test_written_out():
    stage = running_scale(momentum=0.5, eps=0.0)
    stage.observe(torch.tensor([[0.0, 4.0]]))  # mean 2, variance 4
    stage.observe(torch.tensor([[4.0, 4.0]]))  # mean 4, variance 0; the mean moved by 2
    assert stage.mean.item() == 3.0
    assert stage.variance.item() == 0.5 * 4 + 0.5 * 0 + 0.25 * 4
    torch.testing.assert_close(
        stage(torch.tensor([[0.0, 2.0]])), torch.tensor([[-1.0, 1.0]]) / math.sqrt(3), rtol=1e-6, atol=1e-6
    )


def test_without_momentum_the_moments_are_those_of_all_samples():
    stage = running_scale(momentum=None).double()
    parts = [part.double() for part in batches(5)]
    for part in parts:
        stage.observe(part)
    everything = torch.cat(parts)
    torch.testing.assert_close(stage.mean, everything.mean())
    torch.testing.assert_close(stage.variance, everything.var(correction=0))
    assert stage.count == everything.numel()


def test_with_momentum_the_moments_are_exponentially_weighted():
    stage = running_scale(momentum=0.9).double()
    parts = [part.double() for part in batches(4)]
    for part in parts:
        stage.observe(part)
    weights = torch.tensor([0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1], dtype=torch.float64)
    values, share = torch.stack([p.flatten() for p in parts]), weights.unsqueeze(-1) / 12
    mean = (values * share).sum()
    torch.testing.assert_close(stage.mean, mean)
    torch.testing.assert_close(stage.variance, ((values - mean).square() * share).sum())


def test_before_anything_is_observed_it_is_the_batch_scale():
    (rewards,) = batches(1)
    n = rewards.numel()
    batch = group_advantages(rewards, scale="batch", eps=0.0) * math.sqrt(n / (n - 1))
    torch.testing.assert_close(running_scale(eps=0.0)(rewards), batch)


def test_calling_changes_no_state():
    stage = running_scale()
    stage(batches(1)[0])
    assert stage.count == 0
    assert stage.variance == 0


def test_unscored_samples_are_left_out():
    stage = running_scale()
    stage.observe(torch.tensor([[0.0, math.nan, 4.0]]))
    assert (stage.mean.item(), stage.variance.item(), stage.count.item()) == (2.0, 4.0, 2)
    stage.observe(torch.full((1, 3), math.nan))
    assert (stage.mean.item(), stage.variance.item(), stage.count.item()) == (2.0, 4.0, 2)
    found = stage(torch.tensor([[0.0, math.nan, 4.0], [math.nan] * 3]))
    assert found[0, 1] == 0
    assert (found[1] == 0).all()


def test_a_constant_group_is_exactly_zero():
    stage = running_scale(eps=0.0)
    stage.observe(torch.full((1, 7), 0.1))
    assert (stage(torch.full((2, 7), 0.1)) == 0).all()


def test_a_group_of_one_warns():
    with pytest.warns(UserWarning, match="G = 1"):
        assert (running_scale()(torch.tensor([[1.0]])) == 0).all()


def test_the_state_dict_is_the_whole_state():
    first, (a, b, c) = running_scale(), batches(3)
    first.observe(a)
    second = running_scale()
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for stage in (first, second):
        stage.observe(b)
    assert torch.equal(first(c), second(c))


def test_errors(friendly_errors):
    with pytest.raises(RecipeError, match=r"momentum must be in \[0, 1\) or None; got 1.0"):
        running_scale(momentum=1.0)
    with pytest.raises(ShapeError, match=r"advantages.running_scale: rewards must be \[P, G\]; got \[16\]"):
        running_scale()(torch.zeros(16))
    with pytest.raises(ScoreError, match=r"rewards\[0, 1\] is infinite"):
        running_scale()(torch.tensor([[0.0, math.inf]]))
