"""Supervised losses of an implicit reward from log-probabilities, of tokens and of sequences."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import DataError, RecipeError, ShapeError
from guerdon.objectives.demonstration import demonstration
from guerdon.objectives.f_divergence import PHI, phi
from tests.objectives.divergences import minimise

ALL = sorted(PHI)


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


def test_edge_cases(friendly_errors):
    logits, _, actions, mask = given()
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
    with pytest.raises(RecipeError, match="beta must be above 0"):
        demonstration(logp, logp, mask, beta=0.0)
    with pytest.raises(RecipeError, match="level must be token or sequence"):
        demonstration(logp, logp, mask, level="value")
    with pytest.raises(ShapeError, match=r"logp \[3, 4\], logp_ref \[3, 3\]"):
        demonstration(logp, logp[:, 1:], mask)
