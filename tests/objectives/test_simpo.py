"""SimPO: what it depends on, its gradient, and its refusals."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from guerdon.errors import DataError, RecipeError
from guerdon.objectives import dpo, simpo
from tests.objectives.pairs import fields, sums


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def given(seed: int = 0):
    return fields(seed=seed, reference=False)


def test_equal_sides_and_the_margin():
    same = sums(-2.0, -2.0, steps=4, reference=False)
    assert simpo(**same, gamma_beta_ratio=0.0).total.item() == pytest.approx(math.log(2))
    assert simpo(**same, beta=2.0, gamma_beta_ratio=0.5).total.item() == pytest.approx(softplus(1.0))
    far = sums(-2.0, -4.0, steps=4, reference=False)
    found = simpo(**far, beta=2.0, gamma_beta_ratio=50.0)
    found.total.backward()
    assert found.total.item() == pytest.approx(100 - 2 * 0.5)
    assert far["logp_chosen"].grad.sum().item() == pytest.approx(-2.0)


def test_length_does_not_count():
    first = given()
    longer = {
        name: value.detach().repeat_interleave(3, 1).requires_grad_(name.startswith("logp"))
        for name, value in first.items()
    }
    short, long = simpo(**first), simpo(**longer)
    assert short.total.item() == pytest.approx(long.total.item())
    short.total.backward()
    long.total.backward()
    assert torch.allclose(longer["logp_chosen"].grad[:, ::3], first["logp_chosen"].grad / 3)


def test_the_gradient():
    pairs = given()
    found = simpo(**pairs, beta=2.5, gamma_beta_ratio=0.4)
    found.total.backward()
    chosen, rejected = (pairs[f"logp_{side}"].grad.sum(-1) for side in ("chosen", "rejected"))
    z = found.implicit[:, 0] / 2.5 - found.implicit[:, 1] / 2.5 - 0.4
    assert torch.allclose(chosen, -2.5 * torch.sigmoid(-2.5 * z))
    assert torch.allclose(chosen, -rejected)
    lengths = pairs["mask_chosen"].sum(-1, keepdim=True)
    expected = (chosen[:, None] / lengths).expand_as(pairs["mask_chosen"]).where(pairs["mask_chosen"], 0.0)
    assert torch.allclose(pairs["logp_chosen"].grad, expected)


def test_no_reference_is_read():
    assert not [name for name in inspect.signature(simpo).parameters if "ref" in name]
    pairs = given()
    moved = {name: value - 1.5 if name.startswith("logp") else value for name, value in pairs.items()}
    assert simpo(**pairs).total.item() == pytest.approx(simpo(**moved).total.item())


def test_smoothing_is_symmetric_without_a_margin_only():
    pairs = given()
    swapped = {
        name: pairs[name.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected")]
        for name in pairs
    }
    for ratio, equal in ((0.0, True), (0.5, False)):
        first, second = (simpo(**p, label_smoothing=0.5, gamma_beta_ratio=ratio).total.item() for p in (pairs, swapped))
        assert (first == pytest.approx(second)) is equal


def test_it_is_not_dpo_with_a_uniform_reference():
    """The same two pairs, ordered the other way round."""
    long_good = {"chosen": (-8.0, 8), "rejected": (-9.0, 6)}  # means -1 and -1.5, sums 1 apart
    short_good = {"chosen": (-2.0, 2), "rejected": (-6.0, 5)}  # means -1 and -1.2, sums 4 apart

    def pair(sides):
        found = {}
        for side, (total, length) in sides.items():
            found[f"logp_{side}"] = torch.full((1, length), total / length, dtype=torch.float64)
            found[f"mask_{side}"] = torch.ones(1, length).bool()
        return found

    def uniform(given):
        reference = {f"logp_ref_{s}": torch.zeros_like(given[f"logp_{s}"]) for s in ("chosen", "rejected")}
        return dpo(**given, **reference).total

    first, second = pair(long_good), pair(short_good)
    assert simpo(**first).total < simpo(**second).total
    assert uniform(first) > uniform(second)


def test_further_forms():
    one = sums(-1.0, -2.0, steps=2, reference=False)
    assert simpo(**one, beta=2.0, gamma_beta_ratio=0.0, loss_type="hinge").total.item() == pytest.approx(0.0)
    assert simpo(**one, beta=1.0, gamma_beta_ratio=0.0, loss_type="hinge").total.item() == pytest.approx(0.5)
    summed = simpo(**one, beta=1.0, gamma_beta_ratio=0.0, length_normalised=False)
    assert summed.total.item() == pytest.approx(softplus(-1.0))
    alpha = simpo(**one, beta=1.0, gamma_beta_ratio=0.0, alpha=0.5).total.item()
    a, b = ((1 - math.exp(-0.5 * x)) / 0.5 for x in (-0.5, -1.0))
    assert alpha == pytest.approx(softplus(b - a))
    tiny = simpo(**one, alpha=1e-9).total.item()
    assert tiny == pytest.approx(simpo(**one).total.item(), rel=1e-6)
    with_nll = simpo(**one, sft_weight=0.3)
    assert with_nll.total.item() == pytest.approx(simpo(**one).total.item() + 0.3 * 0.5)
    assert with_nll.metrics["nll"].item() == pytest.approx(0.5)


def test_an_empty_side_is_named():
    pairs = given()
    pairs["mask_rejected"][2] = False
    with pytest.raises(DataError, match=r"mask_rejected\[2\] has no live step"):
        simpo(**pairs)


def test_options():
    with pytest.warns(UserWarning, match="rejected sample be ahead"):
        simpo(**given(), gamma_beta_ratio=-0.5)
    for options, message in (
        ({"beta": -1.0}, "beta must be above 0"),
        ({"gamma_beta_ratio": math.inf}, "must be finite"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"sft_weight": -0.1}, "sft_weight must be 0 or more"),
    ):
        with pytest.raises(RecipeError, match=message):
            simpo(**given(), **options)
