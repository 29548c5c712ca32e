"""CoPG: the closed-form gradient, the square it is, its special cases and its optimum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guerdon.errors import DataError, NumericsError, RecipeError, ScoreError, ShapeError
from guerdon.objectives import copg
from guerdon.objectives.copg import contrast


def made(P: int = 3, G: int = 2, T: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logp, logp_ref = (-torch.rand(P, G, T, dtype=torch.float64, generator=draw) for _ in range(2))
    rewards = torch.randn(P, G, dtype=torch.float64, generator=draw)
    return logp.requires_grad_(), logp_ref, rewards, torch.ones(P, G, T, dtype=torch.bool)


def mean_loss(*given: Tensor, **options: float) -> Tensor:
    found = copg(*given, **options)
    return found.total / found.count


@pytest.mark.parametrize("G", [2, 3, 5])
def test_the_gradient_is_the_leave_one_out_advantage_of_the_regularised_reward(G):
    logp, logp_ref, rewards, mask = made(G=G)
    mean_loss(logp, logp_ref, rewards, mask, beta=0.7).backward()
    regularised = rewards - 0.7 * (logp.detach() - logp_ref).sum(-1)
    others = (regularised.sum(-1, keepdim=True) - regularised) / (G - 1)
    wanted = (-(regularised - others) / 3).unsqueeze(-1).expand_as(logp)
    torch.testing.assert_close(logp.grad, wanted)


def test_it_is_a_square_up_to_a_constant():
    logp, logp_ref, rewards, mask = made()
    u = (logp - logp_ref).sum(-1)
    distance, difference = u[:, 0] - u[:, 1], rewards[:, 0] - rewards[:, 1]
    square = (difference - 0.4 * distance).square().mean() / 0.8
    torch.testing.assert_close(
        mean_loss(logp, logp_ref, rewards, mask, beta=0.4) + difference.square().mean() / 0.8, square
    )


def test_rewards_of_a_quarter_are_ipo():
    logp, logp_ref, _, mask = made()
    rewards = torch.tensor([[0.25, -0.25]], dtype=torch.float64).expand(3, 2)
    (found,) = torch.autograd.grad(mean_loss(logp, logp_ref, rewards, mask, beta=0.3), logp)
    u = (logp - logp_ref).sum(-1)
    ipo = (0.5 - 0.3 * (u[:, 0] - u[:, 1])).square().mean() / 0.6
    torch.testing.assert_close(found, torch.autograd.grad(ipo, logp)[0])


def test_at_the_reference_the_loss_is_nothing_and_its_gradient_is_not():
    logp, _, _, mask = made(P=1, T=1)
    loss = mean_loss(logp, logp.detach(), torch.tensor([[2.0, 0.5]], dtype=torch.float64), mask)
    loss.backward()
    assert loss.item() == 0.0
    assert logp.grad.flatten().tolist() == [-1.5, 1.5]


def test_what_changes_nothing():
    logp, logp_ref, rewards, mask = made(G=3)
    loss = mean_loss(logp, logp_ref, rewards, mask, beta=0.2)
    offset = torch.tensor([[5.0], [-3.0], [100.0]], dtype=torch.float64)
    torch.testing.assert_close(loss, mean_loss(logp, logp_ref, rewards + offset, mask, beta=0.2))
    torch.testing.assert_close(loss, mean_loss(logp.flip(1), logp_ref.flip(1), rewards.flip(1), mask, beta=0.2))
    torch.testing.assert_close(3 * loss, mean_loss(logp, logp_ref, 3 * rewards, mask, beta=0.6))
    padded = [torch.nn.functional.pad(x, (0, 2), value=math.nan) for x in (logp, logp_ref)]
    torch.testing.assert_close(loss, mean_loss(*padded, rewards, torch.nn.functional.pad(mask, (0, 2)), beta=0.2))


def test_log_probabilities_are_summed_not_averaged():
    logp = torch.tensor([[[-1.0, -1.0], [-1.0, -1.0]]])
    logp_ref = torch.tensor([[[-2.0, -2.0], [-1.0, -1.0]]])
    loss = mean_loss(logp, logp_ref, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, 2).bool(), beta=1.0)
    assert loss.item() == 0.0  # u = (2, 0): 1 * 2 - 1 / 2 * 2^2


def exact(logits: Tensor, laws: list[list[float]], beta: float) -> tuple[Tensor, Tensor]:
    """The expected objective over all pairs of arms, and the best policy's logits."""
    rewards = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    logp = logits.log_softmax(-1)
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    weight = torch.tensor(laws[0], dtype=torch.float64)[first] * torch.tensor(laws[1], dtype=torch.float64)[second]
    pick = torch.stack([first, second], 1)
    given = (logp[pick].unsqueeze(-1), reference[pick].unsqueeze(-1), rewards[pick], torch.ones(9, 2, 1).bool())
    return (weight * contrast(*given, beta=beta).objective).sum(), reference + rewards / beta


LAWS = [[0.1, 0.2, 0.7], [0.05, 0.05, 0.9]]


def test_the_gradient_vanishes_at_the_optimum_whatever_the_data():
    _, best = exact(torch.zeros(3, dtype=torch.float64), LAWS, 0.5)
    logits = best.clone().requires_grad_()
    (grad,) = torch.autograd.grad(exact(logits, LAWS, 0.5)[0], logits)
    assert grad.abs().max() < 1e-12
    elsewhere = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(exact(elsewhere, LAWS, 0.5)[0], elsewhere)[0].abs().max() > 0.01


def test_gradient_ascent_reaches_the_optimum():
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = -exact(logits, LAWS, 0.5)[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.softmax(-1), exact(logits, LAWS, 0.5)[1].softmax(-1), atol=1e-6, rtol=0)


def test_the_objective_is_concave_in_the_differences_of_logits():
    def value(free: Tensor) -> Tensor:
        return exact(torch.cat([free, torch.zeros(1, dtype=torch.float64)]), LAWS, 0.5)[0]

    for start in ([0.0, 0.0], [3.0, -1.0], [-2.0, 4.0]):
        hessian = torch.autograd.functional.hessian(value, torch.tensor(start, dtype=torch.float64))
        assert (torch.linalg.eigvalsh(hessian) < 0).all()


def test_on_its_own_samples_it_is_twice_the_policy_gradient():
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    law = logits.detach().softmax(-1).tolist()
    (found,) = torch.autograd.grad(exact(logits, [law, law], 0.5)[0], logits)
    rewards = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    logp = logits.log_softmax(-1)
    (plain,) = torch.autograd.grad((logp.exp() * (rewards - 0.5 * (logp - reference))).sum(), logits)
    torch.testing.assert_close(found, 2 * plain)


def test_equal_rewards_pull_the_log_ratios_together():
    logp = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64, requires_grad=True)
    mean_loss(logp, torch.zeros_like(logp).detach(), torch.ones(1, 2).double(), torch.ones(1, 2, 1).bool()).backward()
    torch.testing.assert_close(logp.grad.flatten(), torch.tensor([0.06, -0.06], dtype=torch.float64))


def test_samples_that_do_not_count_are_left_out():
    logp, logp_ref, rewards, mask = made(G=3)
    rewards[0, 2] = math.nan
    rewards[1, :2] = math.nan
    found = copg(logp, logp_ref, rewards, mask, beta=0.2)
    pair = copg(logp[:1, :2], logp_ref[:1, :2], rewards[:1, :2], mask[:1, :2], beta=0.2)
    last = copg(logp[2:], logp_ref[2:], rewards[2:], mask[2:], beta=0.2)
    torch.testing.assert_close(found.total, pair.total + last.total)
    assert found.count.item() == 2.0
    assert found.metrics["left_out"].item() == pytest.approx(4 / 9)
    valid = torch.ones(3, 3, dtype=torch.bool)
    valid[:, 1:] = False
    none = copg(logp, logp_ref, rewards, mask, valid, beta=0.2)
    none.total.backward()
    assert (none.total.item(), none.count.item(), logp.grad.abs().sum().item()) == (0.0, 0.0, 0.0)


def test_errors_say_where():
    logp, logp_ref, rewards, mask = made()
    with pytest.raises(ShapeError, match="G >= 2; got G = 1"):
        copg(logp[:, :1], logp_ref[:, :1], rewards[:, :1], mask[:, :1])
    with pytest.raises(RecipeError, match=r"beta must be 0 or more; got -0\.1"):
        copg(logp, logp_ref, rewards, mask, beta=-0.1)
    with pytest.warns(UserWarning, match="beta = 0 has no optimum"):
        copg(logp, logp_ref, rewards, mask, beta=0.0)
    with pytest.raises(ScoreError, match=r"infinite at \(prompt, sample\) \(1, 0\)"):
        copg(logp, logp_ref, _with(rewards, (1, 0), math.inf), mask)
    with pytest.raises(DataError, match=r"no live step in \(prompt, sample\) \(2, 1\)"):
        copg(logp, logp_ref, rewards, _with(mask, (2, 1), False))
    with pytest.raises(NumericsError, match=r"not finite at \(prompt, sample\) \(0, 1\)"):
        copg(logp, _with(logp_ref, (0, 1), -math.inf), rewards, mask)


def _with(tensor: Tensor, place: tuple[int, int], value: float | bool) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed
