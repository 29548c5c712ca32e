"""TGDPO: DPO where the guide says nothing, the weights of its tokens where it does, and its refusals."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch

from guerdon.errors import NumericsError, RecipeError, ShapeError
from guerdon.objectives import dpo, tgdpo
from guerdon.objectives.tgdpo import token_guided
from tests.objectives.pairs import fields

SIDES = ("chosen", "rejected")


def given(seed: int = 0, guide_seed: int = 9):
    pairs, other = fields(seed=seed), fields(seed=guide_seed)
    for side in SIDES:
        guide = other[f"logp_ref_{side}"].nan_to_num(nan=-1.0)
        pairs[f"logp_guide_{side}"] = guide.masked_fill(~pairs[f"mask_{side}"], math.nan)
    return pairs


def without_guide(pairs):
    return {name: value for name, value in pairs.items() if "guide" not in name}


def gradients(loss, pairs):
    return torch.autograd.grad(loss.total, [pairs[f"logp_{side}"] for side in SIDES])


def ones(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def small(**more):
    """One pair of two tokens a side, at the reference; the guide prefers the first token on both sides."""
    zero, live, guide = ones(0, 0), torch.ones(1, 2).bool(), ones(1.0, -1.0)
    found = {}
    for side in SIDES:
        found |= {f"logp_{side}": zero.clone().requires_grad_(), f"logp_ref_{side}": zero}
        found |= {f"logp_guide_{side}": guide, f"mask_{side}": live}
    return found | more


@pytest.mark.parametrize("how", ["alpha 0", "guide is reference"])
def test_without_guidance_it_is_dpo(how):
    pairs = given()
    if how == "guide is reference":
        pairs |= {f"logp_guide_{side}": pairs[f"logp_ref_{side}"] for side in SIDES}
    found = tgdpo(**pairs, beta=0.3, alpha=0.0 if how == "alpha 0" else 0.7)
    expected = dpo(**without_guide(pairs), beta=0.3)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-14)
    for mine, theirs in zip(gradients(found, pairs), gradients(expected, pairs), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-13, atol=1e-16)
    assert torch.allclose(found.implicit, expected.implicit, rtol=1e-13)


def test_the_first_step_is_guided_already():
    pairs = small()
    found = tgdpo(**pairs, beta=0.1, alpha=2.0)
    assert found.total.item() == pytest.approx(math.log(2))
    chosen, rejected = gradients(found, pairs)
    assert chosen[0].tolist() == pytest.approx([-0.05 * 1.2, -0.05 * 0.8])
    assert rejected[0].tolist() == pytest.approx([0.05 * 0.8, 0.05 * 1.2])


def test_gradients_are_as_weights():
    pairs = given()
    found = tgdpo(**pairs, beta=0.2, alpha=0.5)
    chosen, rejected = gradients(found, pairs)
    for side, gradient, sign in (("chosen", chosen, 1), ("rejected", rejected, -1)):
        live = pairs[f"mask_{side}"]
        reward = 0.2 * (pairs[f"logp_guide_{side}"] - pairs[f"logp_ref_{side}"])
        weights = 1 + sign * 0.5 * reward
        for row in range(len(live)):
            g, w = gradient[row][live[row]], weights[row][live[row]]
            assert torch.allclose(g / g[0], w / w[0], rtol=1e-12)
        assert (gradient[~live] == 0).all()


def test_no_gradient_reaches_what_is_frozen():
    pairs = given()
    frozen = [name for name in pairs if "guide" in name or "ref" in name]
    for name in frozen:
        pairs[name] = pairs[name].clone().requires_grad_()
    tgdpo(**pairs, sft_weight=0.5).total.backward()
    assert all(pairs[name].grad is None for name in frozen)
    assert all(pairs[f"logp_{side}"].grad.abs().sum() > 0 for side in SIDES)


def test_steps_add_up():
    """A sequence padded in its middle costs the same: only sums of steps count."""
    pairs, spread = small(logp_chosen=ones(-0.3, 0.8).requires_grad_()), {}
    for name, value in pairs.items():
        gap = torch.full((1, 3), False) if value.dtype == torch.bool else torch.full((1, 3), math.nan).double()
        spread[name] = torch.cat([value[:, :1], gap, value[:, 1:]], 1)
    assert tgdpo(**spread).total.item() == pytest.approx(tgdpo(**pairs).total.item(), rel=1e-14)
    # sum of w u: 1.05 * -0.3 + 0.95 * 0.8 with alpha beta = 0.05
    assert tgdpo(**pairs).total.item() == pytest.approx(math.log1p(math.exp(-0.1 * (1.05 * -0.3 + 0.95 * 0.8))))


def test_masked_steps_are_inert():
    pairs = given()
    filled = {name: value.nan_to_num(nan=7.0) if "logp" in name else value for name, value in pairs.items()}
    assert torch.equal(tgdpo(**pairs).total, tgdpo(**filled).total)
    assert all(gradient.isfinite().all() for gradient in gradients(tgdpo(**pairs), pairs))


def test_constant_weights_are_another_beta():
    pairs = without_guide(given())
    rewards = {f"token_rewards_{side}": torch.randn_like(pairs[f"logp_ref_{side}"]) for side in SIDES}
    constant = partial(torch.full_like, fill_value=2.5)
    found = token_guided(**pairs, **rewards, weigh_chosen=constant, weigh_rejected=constant, beta=0.2)
    expected = dpo(**pairs, beta=0.5)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-14)
    for mine, theirs in zip(gradients(found, pairs), gradients(expected, pairs), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-13)


def test_negative_weights_are_counted_and_can_be_floored():
    pairs = small()
    found = tgdpo(**pairs, beta=0.5, alpha=4.0)  # weights 3, -1 | -1, 3
    assert found.metrics["negative_weight_fraction"].item() == 0.5
    assert gradients(found, pairs)[0][0].tolist() == pytest.approx([-0.75, 0.25])
    floored = tgdpo(**pairs, beta=0.5, alpha=4.0, min_weight=0.1)
    assert floored.metrics["negative_weight_fraction"].item() == 0.5
    assert gradients(floored, pairs)[0][0].tolist() == pytest.approx([-0.75, -0.025])


def test_the_end_can_weigh_one():
    pairs = small()
    pairs["mask_rejected"] = torch.tensor([[True, False]])
    found = tgdpo(**pairs, beta=0.1, alpha=2.0, plain_end=True)
    chosen, rejected = gradients(found, pairs)
    assert chosen[0].tolist() == pytest.approx([-0.06, -0.05])
    assert rejected[0].tolist() == pytest.approx([0.05, 0.0])


def test_the_supervised_term():
    pairs = small(logp_chosen=ones(-1.0, -3.0).requires_grad_())
    found = tgdpo(**pairs, sft_weight=0.5)
    plain = tgdpo(**pairs)
    assert found.total.item() == pytest.approx(plain.total.item() + 0.5 * 2.0)
    assert found.metrics["nll"].item() == pytest.approx(2.0)
    assert found.metrics["preference_loss"].item() == pytest.approx(plain.total.item())


def test_a_side_without_steps_adds_nothing():
    pairs = small(logp_chosen=ones(1.0, 1.0).requires_grad_())
    pairs["mask_rejected"] = torch.zeros(1, 2).bool()
    with pytest.warns(UserWarning, match="no live step"):
        found = tgdpo(**pairs, alpha=0.0)
    assert found.total.item() == pytest.approx(math.log1p(math.exp(-0.2)))
    pairs["mask_chosen"] = torch.zeros(1, 2).bool()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nothing = tgdpo(**pairs)
    assert nothing.total.item() == pytest.approx(math.log(2))
    assert all((gradient == 0).all() for gradient in gradients(nothing, pairs))


def test_refusals():
    for options, message in (
        ({"beta": 0.0}, "beta must be above 0"),
        ({"alpha": -0.5}, "alpha must be 0 or more"),
        ({"sft_weight": -1.0}, "sft_weight must be 0 or more"),
        ({"min_weight": -0.1}, "min_weight must be 0 or more"),
    ):
        with pytest.raises(RecipeError, match=message):
            tgdpo(**given(), **options)
    bad = small(logp_guide_rejected=ones(0.0, math.nan))
    with pytest.raises(NumericsError, match=r"tgdpo \(guide\): .*logp_rejected\[0\]"):
        tgdpo(**bad)
    with pytest.raises((ShapeError, TypeError)):
        tgdpo(**small(logp_guide_chosen=ones(0.0, 0.0, 0.0)))
