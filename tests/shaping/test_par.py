from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guerdon.errors import RecipeError, ScoreError, ShapeError
from guerdon.shaping import (
    centred,
    log_sigmoid_centred,
    par,
    poly,
    poly_centred,
    sgfc,
    sigmoid,
    tanh,
    tanh_centred,
)

CENTRED = (par, centred, tanh_centred, poly_centred, sgfc, log_sigmoid_centred)
NAN = float("nan")


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_it_is_the_probability_of_beating_a_reference():
    found = par(double([[0.0, 2.0, -2.0]]), double([[0.0]]))
    torch.testing.assert_close(found, double([[0.5, 0.8807970779778823, 0.11920292202211755]]))


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_swapping_sample_and_reference_swaps_the_probability(r, reference):
    there = par(double([[r]]), double([[reference]]))
    back = par(double([[reference]]), double([[r]]))
    assert 0 <= there.item() <= 1
    assert there.item() + back.item() == pytest.approx(1.0)


def test_it_rises_everywhere_and_fastest_at_the_reference():
    r = double([[-3.0, -1.0, 1.0, 2.0, 5.0]]).requires_grad_()
    shaped = par(r, double([[1.0]]), k=2.0)
    (slope,) = torch.autograd.grad(shaped.sum(), r)
    assert (shaped.diff() > 0).all()
    assert slope.argmax().item() == 2
    assert slope[0, 2].item() == pytest.approx(2.0 / 4)


def test_the_sigmoid_comes_before_the_mean_over_references():
    assert par(double([[0.0]]), double([[-4.0, 4.0]])).item() == pytest.approx(0.5)
    assert par(double([[0.0]]), double([[0.0, 8.0]])).item() == pytest.approx((0.5 + logistic(-8)) / 2)
    assert abs(par(double([[0.0]]), double([[0.0, 8.0]])).item() - logistic(-4)) > 0.2


@pytest.mark.parametrize("shape", CENTRED, ids=lambda f: f.__name__)
def test_a_shift_of_a_prompts_scores_changes_nothing(shape):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    references = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    shift = double([[2.0], [-7.0], [0.5]])
    torch.testing.assert_close(shape(scores + shift, references + shift), shape(scores, references))


@pytest.mark.parametrize("shape", [sigmoid, tanh, poly], ids=lambda f: f.__name__)
def test_without_a_reference_a_shift_does_change_it(shape):
    scores = double([[0.0, 1.0]])
    assert not torch.allclose(shape(scores + 2.0), shape(scores))


@pytest.mark.parametrize("shape", CENTRED, ids=lambda f: f.__name__)
def test_a_reference_that_does_not_count_is_not_there(shape):
    scores, references = double([[0.3, -1.0], [2.0, 0.1]]), double([[0.0, 9.0, 1.0], [1.0, 0.5, 0.2]])
    mask = torch.tensor([[True, False, True], [True, True, True]])
    expected = torch.cat([shape(scores[:1], references[:1, [0, 2]]), shape(scores[1:], references[1:])])
    torch.testing.assert_close(shape(scores, references, mask), expected)
    unscored = references.masked_fill(~mask, NAN)
    torch.testing.assert_close(shape(scores, unscored), expected)
    assert scores.tolist() == [[0.3, -1.0], [2.0, 0.1]]  # nothing is written in place


@pytest.mark.parametrize("shape", CENTRED, ids=lambda f: f.__name__)
def test_what_cannot_be_shaped_is_an_error(shape):
    scores, references = double([[0.0, 1.0]]), double([[0.0]])
    with pytest.raises(ShapeError, match=r"at least one reference answer a prompt \(M >= 1\); got M = 0"):
        shape(scores, torch.zeros(1, 0, dtype=torch.float64))
    with pytest.raises(ScoreError, match="prompt 0 has no reference answer"):
        shape(scores, double([[NAN]]))
    with pytest.raises(ScoreError, match=r"scores\[0, 1\] is infinite"):
        shape(double([[0.0, math.inf]]), references)
    with pytest.raises(ScoreError, match=r"ref_scores\[0, 0\] is infinite"):
        shape(scores, double([[math.inf]]))
    assert shape(double([[NAN, 1.0]]), references).isnan().tolist() == [[True, False]]


def test_huge_scores_do_not_overflow():
    scores = torch.tensor([[1e4, -1e4]]).requires_grad_()
    for shape in (par, sgfc, log_sigmoid_centred, tanh_centred):
        found = shape(scores, torch.zeros(1, 1))
        assert found.isfinite().all()
        assert torch.autograd.grad(found.sum(), scores)[0].isfinite().all()


def test_the_log_sigmoid_is_log_half_at_its_quantile():
    references = double([[-1.0, 1.0]])
    q = 1.0364333894937898 * (math.sqrt(2) + 1e-5)
    assert log_sigmoid_centred(double([[q]]), references).item() == pytest.approx(-math.log(2))
    assert log_sigmoid_centred(double([[0.0]]), double([[0.0]])).item() == pytest.approx(math.log(logistic(-1.0364e-5)))
    assert (log_sigmoid_centred(double([[-9.0, 9.0]]), references) <= 0).all()
    with pytest.raises(RecipeError, match=r"quantile: must be between 0 and 1; got 1"):
        log_sigmoid_centred(double([[0.0]]), references, quantile=1.0)


def test_slow_growth_is_a_shifted_sigmoid():
    found = sgfc(double([[0.0, 3.0]]), double([[0.0]]), k=3.0)
    torch.testing.assert_close(found, double([[logistic(-9), 0.5]]))
    for shape in (par, sgfc):
        with pytest.raises(RecipeError, match="k: must be above 0; got 0"):
            shape(double([[0.0]]), double([[0.0]]), k=0.0)
