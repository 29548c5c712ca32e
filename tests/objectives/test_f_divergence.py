"""The table of divergences: slopes, concavity, the edge, and that phi is the conjugate it claims to be."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import RecipeError
from guerdon.objectives.f_divergence import PHI, phi
from tests.objectives.divergences import OTHERS, F

ALL = sorted(PHI)


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def slope(x, name, **options):
    point = torch.tensor(float(x), requires_grad=True)
    return torch.autograd.grad(phi(point, name, **options), point)[0].item()


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


def test_an_unknown_one_offers_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'pearson'"):
        phi(torch.zeros(2), "pearsn")
