"""What sampling holds: states, and nothing for a backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.diffusion.test_policy import CAPTIONS, policy


class Saved:
    """Counts the tensors that are kept for a backward pass."""

    def __init__(self) -> None:
        self.count = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.count += 1
        return tensor

    def watch(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, lambda tensor: tensor)


@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_sampling_keeps_no_graph(greedy, projections):
    made, saved, modes = policy(guidance=2.0), Saved(), []
    made.keep_projections = projections
    made.model.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    assert torch.is_grad_enabled()
    with saved.watch():
        rollout = made.sample(CAPTIONS[:2], 2, [1, 2], greedy=greedy)
    assert saved.count == 0
    assert modes == [False] * made.steps  # of a step one run of the network, for both halves of the guidance
    assert not any(value.requires_grad for value in (*rollout.steps.values(), rollout.logp_old))
    assert not any(image.requires_grad for group in rollout.samples for image in group)


def test_scoring_keeps_one_and_the_count_sees_it():
    made, saved = policy(), Saved()
    rollout = made.sample(CAPTIONS[:2], 2, [1, 2])
    with saved.watch():
        assert made.log_prob(rollout).logp.requires_grad
    assert saved.count > 0


def test_the_reference_keeps_none():
    made, saved = policy(), Saved()
    made.keep_reference()
    rollout = made.sample(CAPTIONS[:2], 2, [1, 2])
    with saved.watch():
        made.reference_log_prob(rollout)
        made.reference_sample(CAPTIONS[:2], 2, [1, 2])
    assert saved.count == 0
