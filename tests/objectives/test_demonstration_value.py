"""The exact supervised loss under a price on leaving the reference: identities, its minimiser, edge cases."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import DataError, RecipeError, ShapeError
from guerdon.objectives.demonstration_value import demonstration_value, value_terms
from guerdon.objectives.f_divergence import PHI, phi
from guerdon.objectives.q_values import read_logits
from tests.objectives.divergences import OTHERS, F, minimise

ALL = sorted(PHI)


def given(seed=0, b=3, t=4, v=5):
    generator = torch.Generator().manual_seed(seed)
    logits, reference = (torch.randn(b, t, v, generator=generator, dtype=torch.float64) for _ in range(2))
    actions = torch.randint(v, (b, t), generator=generator)
    mask = torch.arange(t) < torch.tensor([4, 2, 3])[:b, None]
    return logits.requires_grad_(), reference, actions, mask


def fields(logits, reference, actions, mask):
    return (*read_logits(logits, actions), *read_logits(reference, actions), mask)


@pytest.mark.parametrize("centre", [True, False])
def test_what_it_is_made_of(centre):
    logits, reference, actions, mask = given()
    made = fields(logits, reference, actions, mask)
    x, start = value_terms(*made, centre=centre, beta=0.6)
    # the definition, from whole logits: Q - beta (logit of the reference) - V of the next step
    normaliser = reference.logsumexp(-1)
    zero = normaliser if centre else torch.zeros_like(normaliser)
    value = (0.6 * (logits.logsumexp(-1) - zero)).where(mask, 0.0)
    taken = [table.gather(-1, actions[..., None])[..., 0] for table in (logits, reference)]
    later = torch.cat([value[:, 1:], torch.zeros(3, 1)], 1)
    by_hand = 0.6 * (taken[0] - taken[1] + normaliser - zero) - later
    torch.testing.assert_close(x, by_hand.where(mask, 0.0))
    torch.testing.assert_close(start, value[:, 0])
    ratio = 0.6 * (made[0] - made[2]).where(mask, 0.0).sum(-1)
    torch.testing.assert_close(x.sum(-1) - start, ratio, atol=1e-10, rtol=0)
    linear, square = (
        demonstration_value(*made, divergence=name, centre=centre, beta=0.6).total
        for name in ("total_variation", "pearson")
    )
    assert (square - linear).item() == pytest.approx(x.square().sum().item() / 4)
    (mine,), (theirs,) = (torch.autograd.grad(v, logits, retain_graph=True) for v in (linear, -ratio.sum()))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ALL)
def test_a_shift_of_the_logits_is_nothing_to_supervised_learning_only(name):
    logits, reference, actions, mask = given()
    shift = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    losses = [
        demonstration_value(*fields(at, reference, actions, mask), divergence=name).total
        for at in (logits.detach(), logits.detach() + shift)
    ]
    assert torch.allclose(*losses) is (name == "total_variation")


@pytest.mark.parametrize("name", ALL)
def test_the_first_step_is_supervised(name):
    _, reference, actions, mask = given()
    logits = reference.clone().requires_grad_()
    demonstration_value(*fields(logits, reference, actions, mask), divergence=name).total.backward()
    logp, normaliser = read_logits(logits, actions)
    slope = math.exp(-1) if name == "reverse_kl" else 1.0  # at 1 the start's value has no gradient
    expected = (1 - slope) * normaliser[:, 0].sum() - slope * logp.where(mask, 0.0).sum()
    torch.testing.assert_close(logits.grad, *torch.autograd.grad(expected, logits))


def test_the_two_denominators():
    made = fields(*given())
    first, second = (demonstration_value(*made, denominator=name) for name in ("per_token", "per_sample"))
    assert (first.count.item(), second.count.item()) == (9.0, 3.0)
    assert first.total.item() == second.total.item()
    assert first.metrics["value_start"].item() == pytest.approx(value_terms(*made).start.mean().item())


@pytest.mark.parametrize("name", OTHERS)
def test_the_minimiser_solves_the_problem(name):
    generator = torch.Generator().manual_seed(1)
    reference = 0.5 * torch.randn(6, generator=generator, dtype=torch.float64)
    expert = (0.5 * torch.randn(6, generator=generator, dtype=torch.float64)).softmax(0)
    every = torch.arange(6)[:, None]  # each action once, in proportion to the expert's
    live = torch.ones(6, 1).bool()

    def mine(logits):
        now, then = (read_logits(table.expand(6, 1, 6), every) for table in (logits, reference))
        x, start = value_terms(*now, *then, live)
        return (expert * (start - phi(x, name)[:, 0])).sum()

    def problem(logits):
        p = logits.softmax(0)
        return (expert * F[name](p / expert)).sum() + (p * (p / reference.softmax(0)).log()).sum()

    (first, low), (second, high) = minimise(mine, reference), minimise(problem, reference)
    torch.testing.assert_close(first.softmax(0), second.softmax(0), atol=1e-6, rtol=0)
    assert -low == pytest.approx(high, abs=1e-8)


def test_edge_cases(friendly_errors):
    logits, reference, actions, mask = given()
    mask[1] = False
    made = fields(logits, reference, actions, mask)
    alone = demonstration_value(*(field[[0, 2]] for field in made))
    assert demonstration_value(*made).total.item() == pytest.approx(alone.total.item())
    with pytest.raises(DataError, match="no live step"):
        demonstration_value(*made[:-1], torch.zeros_like(mask))
    mask[2] = torch.tensor([True, False, True, False])
    with pytest.raises(DataError, match=r"mask\[2\] has a gap"):
        demonstration_value(*made)
    deep = [field[:, None] for field in made]
    with pytest.raises(DataError, match=r"mask\[2, 0\] has a gap"):
        demonstration_value(*deep)
    with pytest.raises(RecipeError, match="beta must be above 0"):
        demonstration_value(*made, beta=0.0)
    with pytest.raises(RecipeError, match="denominator must be per_token or per_sample"):
        demonstration_value(*made, denominator="constant")
    with pytest.raises(ShapeError, match=r"normaliser_ref \[3, 3\]"):
        demonstration_value(*made[:3], made[3][:, 1:], mask)
