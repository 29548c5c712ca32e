"""The ring: data, steps that score as they were sampled, runs side by side that do not touch each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator

from guerdon.evidence import ring_flow
from guerdon.evidence.base import Unit
from guerdon.evidence.ring_flow import Adam, Policies, centre, data_of, start, train
from guerdon.objectives.loss import Loss


@pytest.fixture(autouse=True)
def _short(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    monkeypatch.setattr(ring_flow, "BASE", {"steps": 30, "batch": 32, "lr": 2e-3})


def generators(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def test_places():
    # the middle mode of class c lies at (3 c + 1) / 12 of the circle
    torch.testing.assert_close(centre(torch.tensor([0, 1])), torch.tensor([[3**0.5, 1.0], [-1.0, 3**0.5]]))
    points = data_of(torch.zeros(3000, dtype=torch.int64), generators(0)[0])
    nearest = torch.stack([(points - centre(torch.tensor(0), m)).norm(dim=-1) for m in range(3)]).amin(0)
    assert nearest.square().mean().sqrt().item() == pytest.approx(0.15 * 2**0.5, rel=0.05)


def test_steps_are_scored_as_they_were_sampled():
    policies = start([0, 1])
    paths = policies.sample(torch.tensor([[0, 3], [1, 2]]), 3, generators(0, 1))
    assert paths.states.shape == (2, 2, 3, 9, 2)
    assert paths.logp.shape == (2, 2, 3, 8)
    torch.testing.assert_close(policies.log_prob(paths), paths.logp)
    x = paths.states[:, :, :, 3].reshape(2, 6, 2)
    velocity = policies.velocity(x, policies.sigmas[3], paths.classes.repeat_interleave(3, 1))
    torch.testing.assert_close(velocity.view(2, 2, 3, 2), paths.velocities[:, :, :, 3])


def test_a_run_does_not_depend_on_the_others():
    both = start([0, 1]).sample(torch.tensor([[0, 3], [1, 2]]), 2, generators(0, 1))
    alone = start([1]).sample(torch.tensor([[1, 2]]), 2, generators(1))
    torch.testing.assert_close(both.states[1:], alone.states)


def test_the_base_is_read_from_the_cache(monkeypatch):
    first = start([3])
    monkeypatch.setattr(ring_flow, "_train_base", lambda seed: pytest.fail("trained again"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, start([3]).parameters, strict=True))


def test_a_flow_of_no_noise_follows_its_velocity():
    policies = start([0])
    monotone = [torch.zeros_like(p) for p in policies.parameters]
    monotone[-1] += torch.tensor([1.0, -2.0])  # a constant velocity
    constant = Policies(monotone)
    end = constant.follow_ode(torch.zeros(1, 4, dtype=torch.int64), generators(5), steps=7)
    noise = torch.randn(4, 2, generator=generators(5)[0])
    torch.testing.assert_close(end[0], noise - torch.tensor([1.0, -2.0]))


def test_adam_is_that_of_torch_with_a_rate_per_run():
    start_at = torch.randn(2, 3, 4, generator=generators(0)[0])
    mine = [start_at.clone()]
    adam = Adam(mine, torch.tensor([0.1, 0.01]), clip_norm=0.5)
    theirs = [start_at[i].clone().requires_grad_() for i in range(2)]
    others = [torch.optim.Adam([p], lr=lr) for p, lr in zip(theirs, (0.1, 0.01), strict=True)]
    for seed in range(3):
        gradient = torch.randn(2, 3, 4, generator=generators(seed)[0])
        adam.step([gradient])
        for p, g, other in zip(theirs, gradient, others, strict=True):
            p.grad = g.clone()
            torch.nn.utils.clip_grad_norm_([p], 0.5)
            other.step()
    torch.testing.assert_close(mine[0], torch.stack([p.detach() for p in theirs]), rtol=1e-4, atol=1e-5)


def test_training_side_by_side_is_training_alone():
    def signal(number, paths):
        return {"log/right": paths.samples[..., 0].mean((1, 2)), "right": paths.samples[..., 0]}

    def loss(logp, paths, given):  # a run's own mean, which does not look at the others
        right = given["right"]
        pull = -(right - right.mean((1, 2), keepdim=True)).unsqueeze(-1) * logp.view_as(paths.logp)
        return Loss(pull.sum(), torch.tensor(float(pull.numel())), {})

    def run(seeds, lr):
        return train(seeds, lr=lr, rounds=6, updates=2, prompts=4, group=4, signal=signal, loss=loss, reference=True)

    policies, curves = run([0, 1], [1e-2, 1e-3])
    alone, curve = run([1], [1e-3])
    assert set(curves) == {"right", "kl"}
    assert curves["right"].shape == (2, 6)
    torch.testing.assert_close(curves["right"][1], curve["right"][0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(policies.parameters[0][1], alone.parameters[0][0], rtol=1e-3, atol=1e-3)
    assert curves["kl"][0, 0].abs() < 1e-5  # nothing has moved yet
    assert curves["kl"][0, -1] > curves["kl"][1, -1]


def test_units_that_train_together():
    units = [
        Unit("a", 0, {"rounds": 3, "lr": 1e-3}),
        Unit("b", 0, {"rounds": 3, "lr": 1e-3}),
        Unit("a", 1, {"rounds": 3, "lr": 3e-3}),
        Unit("a", 0, {"rounds": 4, "lr": 1e-3}),
    ]
    assert list(ring_flow.by_arm(units).values()) == [[0, 2], [1], [3]]


def test_thinned_curves():
    assert ring_flow.thin([1.0, 2.0, 3.0], 2) == [(1.5, 1.5), (3.0, 3.0)]
    assert math.isclose(ring_flow.thin([1.0] * 7)[-1][0], 6.5)
