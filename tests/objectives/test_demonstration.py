"""Supervised losses of an implicit reward: the table, the three levels, and logits as values."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import DataError, RecipeError
from guerdon.objectives.demonstration import PHI, demonstration, demonstration_value, phi, q_values, value_terms

ALL = sorted(PHI)
OTHERS = ["pearson", "hellinger", "reverse_kl", "jensen_shannon"]
F = {
    "pearson": lambda t: (t - 1) ** 2,
    "hellinger": lambda t: (t.sqrt() - 1) ** 2,
    "reverse_kl": lambda t: t * t.log(),
    "jensen_shannon": lambda t: -(t + 1) * ((1 + t) / 2).log() + t * t.log(),
}


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def given(seed=0, b=3, t=4, v=5):
    generator = torch.Generator().manual_seed(seed)
    logits, reference = (torch.randn(b, t, v, generator=generator) for _ in range(2))
    actions = torch.randint(v, (b, t), generator=generator)
    mask = torch.arange(t) < torch.tensor([4, 2, 3])[:b, None]
    return logits.requires_grad_(), reference, actions, mask


def taken(logits, actions):
    return logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]


def slope(x, name, **options):
    point = torch.tensor(float(x), requires_grad=True)
    return torch.autograd.grad(phi(point, name, **options), point)[0].item()


def test_total_variation_is_supervised_learning():
    logits, reference, actions, mask = given()
    logp, logp_ref = taken(logits, actions), taken(reference, actions)
    found = demonstration(logp, logp_ref, mask, divergence="total_variation")
    nll = -logp.where(mask, 0.0).sum()
    (mine,), (theirs,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (found.total, nll))
    assert torch.equal(mine, theirs)
    assert (found.total - nll).item() == pytest.approx(logp_ref.where(mask, 0.0).sum().item())
    assert found.count.item() == 9


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ALL)
def test_the_first_step_is_supervised(name, level):
    logits, _, actions, mask = given()
    logp = taken(logits, actions).detach().requires_grad_()
    demonstration(logp, logp.detach(), mask, divergence=name, level=level, beta=1.0).total.backward()
    expected = math.exp(-1) if name == "reverse_kl" else 1.0
    assert torch.allclose(logp.grad, -expected * mask.double())


def test_slopes():
    assert slope(2, "pearson") == 0
    assert slope(3, "pearson") == -0.5
    assert slope(3, "pearson", clamp_positive=True) == 0
    assert slope(1, "hellinger") == 0.25


@pytest.mark.parametrize("name", ALL)
def test_concave_and_smooth_across_the_edge(name):
    x, y = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0)) * 24 - 14
    assert (phi((x + y) / 2, name) >= (phi(x, name) + phi(y, name)) / 2 - 1e-9 * phi(x, name).abs() - 1e-12).all()
    edge = PHI[name].edge
    if edge > -math.inf:
        left, right = edge - 1e-9, edge + 1e-9
        assert slope(left, name) == pytest.approx(slope(right, name), rel=1e-6)
        ends = phi(torch.tensor([left, right]), name)
        assert ends[0].item() == pytest.approx(ends[1].item(), rel=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_the_conjugate(name):
    t = torch.logspace(-6, 6, 200001)
    for x in (-0.4, 0.0, 0.7, 1.5):
        assert (-x * t - F[name](t)).max().item() == pytest.approx(-phi(torch.tensor(x), name).item(), abs=1e-6)


def test_logits_are_values():
    logits, reference, actions, _ = given()
    logits = logits.detach()
    found = q_values(logits, reference, actions, beta=0.7)
    whole = 0.7 * taken(logits, actions).sum(-1)
    assert torch.allclose(found.reward.sum(-1) - found.value[:, 0], whole, atol=1e-10, rtol=0)
    every = torch.stack(
        [q_values(logits, reference, torch.full_like(actions, a), beta=0.7).advantage for a in range(5)]
    )
    assert torch.allclose((every / 0.7).exp().sum(0), torch.ones(3, 4))
    shift = torch.randn(3, 4)
    moved = q_values(logits + shift[..., None], reference, actions, beta=0.7)
    assert torch.allclose(moved.value - found.value, 0.7 * shift)
    assert torch.allclose(moved.q - found.q, 0.7 * shift)
    assert torch.allclose(moved.advantage, found.advantage)
    assert torch.allclose(moved.reward_kl, found.reward_kl)


@pytest.mark.parametrize("centre", [True, False])
def test_the_value_level(centre):
    logits, reference, actions, mask = given()
    logp, logp_ref = taken(logits, actions), taken(reference, actions)
    x, start = value_terms(logits, reference, actions, mask, centre=centre, beta=0.6)
    ratio = 0.6 * (logp - logp_ref).where(mask, 0.0).sum(-1)
    assert torch.allclose(x.sum(-1) - start, ratio, atol=1e-10, rtol=0)
    linear, square = (
        demonstration_value(logits, reference, actions, mask, divergence=name, centre=centre, beta=0.6).total
        for name in ("total_variation", "pearson")
    )
    assert (square - linear).item() == pytest.approx(x.square().sum().item() / 4)
    (mine,), (theirs,) = (torch.autograd.grad(v, logits, retain_graph=True) for v in (linear, -ratio.sum()))
    assert torch.allclose(mine, theirs)
    moved = logits.detach() + torch.randn(3, 4, 1)
    for name in ALL:
        losses = [
            demonstration_value(at, reference, actions, mask, divergence=name, centre=centre).total
            for at in (logits, moved)
        ]
        assert torch.allclose(*losses) is (name == "total_variation")


def minimise(loss, start):
    point = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [point], max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        search.zero_grad()
        value = loss(point)
        value.backward()
        return value

    search.step(closure)
    return point.detach(), loss(point).item()


@pytest.mark.parametrize("name", OTHERS)
def test_the_minimiser_solves_the_problem(name):
    generator = torch.Generator().manual_seed(1)
    reference = 0.5 * torch.randn(6, generator=generator)
    expert = (0.5 * torch.randn(6, generator=generator)).softmax(0)
    ref = reference.softmax(0)

    def mine(logits):
        value = logits.logsumexp(0) - reference.logsumexp(0)
        return value - (expert * phi(logits - reference, name)).sum()

    def problem(logits):
        p = logits.softmax(0)
        return (expert * F[name](p / expert)).sum() + (p * (p / ref).log()).sum()

    (first, low), (second, high) = minimise(mine, reference), minimise(problem, reference)
    assert torch.allclose(first.softmax(0), second.softmax(0), atol=1e-6)
    assert -low == pytest.approx(high, abs=1e-8)


def test_other_divergences_stay_nearer():
    generator = torch.Generator().manual_seed(2)
    ref, expert = torch.randn(2, 6, generator=generator).softmax(-1)
    kl = {}
    for name in ("total_variation", "pearson", "hellinger"):
        best, _ = minimise(lambda z, name=name: -(expert * phi(z.log_softmax(0) - ref.log(), name)).sum(), ref.log())
        p = best.softmax(0)
        kl[name] = (p * (p / ref).log()).sum().item()
        if name == "total_variation":
            assert torch.allclose(p, expert, atol=1e-5)
    assert kl["total_variation"] > kl["pearson"] > kl["hellinger"] > 0


def test_edge_cases():
    logits, reference, actions, mask = given()
    logp = taken(logits, actions).detach()
    mask[1] = False
    hollow = logp.masked_fill(~mask, math.nan).requires_grad_()
    with pytest.warns(UserWarning, match="no live step"):
        found = demonstration(hollow, logp, mask, level="sequence")
    found.total.backward()
    assert (hollow.grad[1] == 0).all()
    assert hollow.grad.isfinite().all()
    with pytest.warns(UserWarning, match="Lower beta"):
        demonstration(logp, logp - 10, torch.ones_like(mask), level="sequence", beta=1.0)
    with pytest.raises(DataError, match="no live step"):
        demonstration(logp, logp, torch.zeros_like(mask))
    value = demonstration_value(logits, reference, actions, mask)
    alone = demonstration_value(logits[[0, 2]], reference[[0, 2]], actions[[0, 2]], mask[[0, 2]])
    assert value.total.item() == pytest.approx(alone.total.item())
    mask[0, 1] = False
    with pytest.raises(DataError, match=r"mask\[0\] has a gap"):
        demonstration_value(logits, reference, actions, mask)
    with pytest.raises(RecipeError, match="beta must be above 0"):
        demonstration(logp, logp, mask, beta=0.0)
    with pytest.raises(RecipeError, match="Did you mean 'pearson'"):
        phi(logp, "pearsn")
