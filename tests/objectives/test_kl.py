"""Divergence estimates: values, and expectations enumerated over a small categorical policy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guerdon.errors import ShapeError
from guerdon.objectives.kl import kl_estimate

LOGITS = torch.tensor([0.4, -1.0, 0.7, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([-0.3, 0.5, 0.2, -0.9], dtype=torch.float64).log_softmax(0)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum()


def test_written_out():
    logp, ref = torch.tensor([-1.0]).double(), torch.tensor([-1.5]).double()
    assert kl_estimate(logp, ref, "k1").item() == pytest.approx(0.5)
    assert kl_estimate(logp, ref, "k2").item() == pytest.approx(0.125)
    assert kl_estimate(logp, ref, "k3").item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    assert torch.equal(kl_estimate(logp, ref), kl_estimate(logp, ref, "k3"))


def test_k2_is_half_the_square_of_k1():
    logp = LOGITS.log_softmax(0)
    torch.testing.assert_close(kl_estimate(logp, REFERENCE, "k1").square() / 2, kl_estimate(logp, REFERENCE, "k2"))


def test_k3_is_positive_unless_the_policies_agree():
    logp = LOGITS.log_softmax(0)
    assert (kl_estimate(logp, REFERENCE, "k3") > 0).all()
    assert (kl_estimate(logp, logp, "k3") == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expected_value_is_the_divergence(estimator):
    logp = LOGITS.log_softmax(0)
    expected = (logp.exp() * kl_estimate(logp, REFERENCE, estimator)).sum()
    torch.testing.assert_close(expected, divergence(logp, REFERENCE), atol=1e-12, rtol=0)


def test_the_expected_value_of_k2_is_not():
    logp = LOGITS.log_softmax(0)
    expected = (logp.exp() * kl_estimate(logp, REFERENCE, "k2")).sum()
    assert abs(expected - divergence(logp, REFERENCE)) > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_expected_gradient(estimator):
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(0)
    weights = logp.detach().exp()  # samples are held fixed
    (found,) = torch.autograd.grad((weights * kl_estimate(logp, REFERENCE, estimator)).sum(), logits, retain_graph=True)
    exact = {
        "k1": torch.zeros(4, dtype=torch.float64),
        "k2": torch.autograd.grad(divergence(logp, REFERENCE), logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(divergence(REFERENCE, logp), logits)[0],
    }
    torch.testing.assert_close(found, exact[estimator], atol=1e-12, rtol=0)


def test_an_improbable_step_does_not_overflow():
    logp = torch.tensor([-500.0, 0.0], requires_grad=True)
    estimate = kl_estimate(logp, torch.tensor([0.0, -500.0]), "k3")
    estimate.sum().backward()
    assert estimate.isfinite().all()
    assert estimate[1] == 499.0
    assert logp.grad is not None
    assert logp.grad.tolist() == [0.0, 1.0]


def test_shapes_must_agree(friendly_errors):
    expected = r"objectives.kl_estimate: logp_ref must have the shape of logp, \[2, 3\]; got \[2, 1\]"
    with pytest.raises(ShapeError, match=expected):
        kl_estimate(torch.zeros(2, 3), torch.zeros(2, 1))
