"""The DPO family: values by hand, what each loss depends on, its gradient, and its refusals."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from guerdon.errors import DataError, NumericsError, RecipeError, ShapeError
from guerdon.objectives import aot, cpo, diffusion_dpo, dpo, exo, ipo, kto, nca, orpo, slic, sppo
from guerdon.objectives.kto import kto_reference_point
from tests.objectives.pairs import fields, sums

ipo_summed = partial(ipo, average_log_prob=False)
robust = partial(dpo, robust=True)
WITH_REFERENCE = [dpo, ipo, ipo_summed, slic, sppo, exo, nca, aot, partial(aot, paired=False)]


def loss_of(objective, given, **options) -> float:
    found = objective(**given, **options)
    return (found.total / found.count).item()


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (dpo, math.log(2)),
        (ipo, 25.0),  # 1 / (4 beta^2)
        (slic, 1.0),
        (sppo, 50.0),  # 1 / (2 beta^2)
        (nca, 2 * math.log(2)),
        (aot, math.log(2)),
        (partial(exo, label_smoothing=0.1), math.log(0.5) - 0.5 * math.log(0.9 * 0.1)),
    ],
)
def test_at_the_reference(objective, expected):
    assert loss_of(objective, sums(0.0, 0.0), beta=0.1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (dpo, softplus(-0.5)),
        (partial(dpo, label_smoothing=0.2), 0.8 * softplus(-0.5) + 0.2 * softplus(0.5)),
        (partial(robust, label_smoothing=0.2), (0.8 * softplus(-0.5) - 0.2 * softplus(0.5)) / 0.6),
        (ipo_summed, (5.0 - 5.0) ** 2),
        (slic, 0.5),
        (sppo, (3.0 - 5.0) ** 2 + (-2.0 + 5.0) ** 2),
        (nca, softplus(-0.3) + 0.5 * softplus(0.3) + 0.5 * softplus(-0.2)),
        (partial(dpo, divergence="forward_kl"), softplus(-0.1 * (-math.exp(-3) + math.exp(2)))),
        (partial(dpo, divergence="js"), softplus(-0.1 * (-softplus(-3) + softplus(2)))),
    ],
)
def test_by_hand(objective, expected):
    assert loss_of(objective, sums(3.0, -2.0), beta=0.1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("objective", "of_margin"), [(dpo, True), (ipo_summed, True), (slic, True), (nca, False), (sppo, False)]
)
def test_which_losses_are_of_the_margin_alone(objective, of_margin):
    first, second = (loss_of(objective, sums(3.0 + shift, 1.0 + shift), beta=0.1) for shift in (0.0, 2.0))
    assert (first == pytest.approx(second)) is of_margin


def test_label_smoothing():
    even = partial(dpo, label_smoothing=0.5)
    assert loss_of(even, sums(3.0, 1.0)) == pytest.approx(loss_of(even, sums(1.0, 3.0)))
    assert loss_of(robust, sums(3.0, 1.0)) == pytest.approx(loss_of(dpo, sums(3.0, 1.0)))
    # under labels flipped at the rate eps the robust loss is, in the mean, the clean one
    flipped = partial(robust, label_smoothing=0.3)
    mean = 0.7 * loss_of(flipped, sums(3.0, 1.0)) + 0.3 * loss_of(flipped, sums(1.0, 3.0))
    assert mean == pytest.approx(loss_of(dpo, sums(3.0, 1.0)))


def test_where_the_minimum_lies():
    def slope(objective, margin):
        given = sums(margin, 0.0)
        objective(**given, beta=0.1).total.backward()
        return given["logp_chosen"].grad.item()

    assert slope(ipo_summed, 5.0) == pytest.approx(0.0)
    assert slope(ipo_summed, 4.0) < 0 < slope(ipo_summed, 6.0)
    assert slope(dpo, 100.0) < 0
    assert slope(slic, 11.0) == 0 > slope(slic, 9.0)
    assert slope(dpo, 3.0) == pytest.approx(-0.1 / (1 + math.exp(0.3)))


def test_the_tabular_optimum_is_the_rewarded_policy():
    """Pairs labelled by Bradley-Terry: the optimum is the reference times exp(reward / beta), from any pairs."""
    beta, reward = 0.5, torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    first, second = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    first, second = first.flatten(), second.flatten()
    probability = (reward[first] - reward[second]).sigmoid()
    logits = ref.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)
    live = torch.ones(1, 1).bool()

    def closure():
        optimiser.zero_grad()
        logp = logits.log_softmax(-1)
        total = logits.new_zeros(())
        for a, b, p in zip(first.tolist(), second.tolist(), probability.tolist(), strict=True):
            pair = [value[None, None] for value in (logp[a], logp[b], ref[a], ref[b])]
            total = total + p * (1 + a) * (1 + b) * dpo(*pair, live, live, beta=beta).total  # an uneven choice of pairs
        total.backward()
        return total

    optimiser.step(closure)
    wanted = (ref + reward / beta).softmax(-1)
    assert torch.allclose(logits.softmax(-1), wanted, atol=1e-5)


def test_the_alpha_divergence_meets_its_neighbours():
    given = sums(3.0, -2.0)
    near = loss_of(dpo, given, divergence="alpha", alpha=1 + 1e-7)
    assert near == pytest.approx(loss_of(dpo, given), rel=1e-5)
    assert loss_of(dpo, given, divergence="alpha", alpha=1.0) == loss_of(dpo, given)
    assert loss_of(dpo, given, divergence="alpha", alpha=0.0) == pytest.approx(
        loss_of(dpo, given, divergence="forward_kl")
    )


def test_quantiles_are_compared():
    given = fields(6)
    order = [3, 1, 0, 5, 4, 2]
    shuffled = {name: value[order] if name.endswith("rejected") else value for name, value in given.items()}
    unpaired = partial(aot, paired=False)
    assert loss_of(unpaired, given) == pytest.approx(loss_of(unpaired, shuffled))
    assert loss_of(aot, given) != pytest.approx(loss_of(aot, shuffled))
    one = fields(1)
    assert loss_of(aot, one) == loss_of(unpaired, one) == pytest.approx(loss_of(dpo, one))


@pytest.mark.parametrize("objective", WITH_REFERENCE)
def test_masks_and_implicit_rewards(objective):
    given = fields()
    found = objective(**given, beta=0.3)
    found.total.backward()
    for side in ("chosen", "rejected"):
        grad = given[f"logp_{side}"].grad
        assert grad.isfinite().all()
        assert (grad[~given[f"mask_{side}"]] == 0).all()
    assert found.count == 4
    ratio = (given["logp_chosen"] - given["logp_ref_chosen"]).where(given["mask_chosen"], 0).sum(-1)
    if objective is ipo:
        ratio = ratio / given["mask_chosen"].sum(-1)
    assert torch.allclose(found.implicit[:, 0], 0.3 * ratio.detach())


def test_an_empty_side():
    given = fields()
    for side in ("chosen", "rejected"):
        given[f"mask_{side}"] = torch.zeros_like(given[f"mask_{side}"])
    assert loss_of(dpo, given) == pytest.approx(math.log(2))
    with pytest.raises(DataError, match=r"mask_chosen\[0\] has no live step"):
        ipo(**given)


@pytest.mark.parametrize("name", ["logp_chosen", "logp_ref_rejected"])
def test_what_is_not_finite_at_a_live_step(name):
    given = fields()
    given[name] = given[name].detach().clone()
    given[name][2, 0] = math.inf
    with pytest.raises(NumericsError, match=rf"{name.replace('_ref', '')}\[2\] is not finite"):
        dpo(**given)


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (dpo, {"beta": 0.0}, "beta must be above 0"),
        (dpo, {"label_smoothing": 0.6}, r"\[0, 0.5\]"),
        (dpo, {"label_smoothing": 0.5, "robust": True}, r"\[0, 0.5\)"),
        (exo, {"label_smoothing": 0.0}, r"\(0, 0.5\]"),
    ],
)
def test_options_out_of_range(objective, options, message):
    with pytest.raises(RecipeError, match=message):
        objective(**fields(), **options)


def test_shapes_are_checked():
    given = fields()
    given["mask_chosen"] = given["mask_chosen"][:, :-1]
    with pytest.raises((ShapeError, TypeError)):
        dpo(**given)


# without a reference


def test_the_likelihood_term_is_a_mean_over_tokens_of_the_batch():
    given = fields(reference=False)
    mask, logp = given["mask_chosen"], given["logp_chosen"].detach()
    nll = -logp[mask].mean().item()
    gap = torch.stack([given[f"logp_{s}"].where(given[f"mask_{s}"], 0).sum(-1) for s in ("chosen", "rejected")])
    margin = (gap[0] - gap[1]).detach()
    expected = torch.nn.functional.softplus(-0.1 * margin).mean().item() + 2 * nll
    found = cpo(**given, nll_weight=2.0)
    assert (found.total / found.count).item() == pytest.approx(expected)
    assert found.metrics["nll"].item() == pytest.approx(nll)


def test_orpo_by_hand_and_its_gradient():
    a, b = -0.7, -1.9
    given = sums(2 * a, 3 * b, reference=False)
    given |= {
        "logp_chosen": torch.full((1, 2), a, dtype=torch.float64).requires_grad_(),
        "mask_chosen": torch.ones(1, 2).bool(),
    }
    given |= {"logp_rejected": torch.full((1, 3), b, dtype=torch.float64), "mask_rejected": torch.ones(1, 3).bool()}
    odds = a - math.log(1 - math.exp(a)) - b + math.log(1 - math.exp(b))
    found = orpo(**given, beta=0.25)
    assert found.total.item() == pytest.approx(-a + 0.25 * softplus(-odds))
    assert found.metrics["log_odds_ratio"].item() == pytest.approx(odds)
    found.total.backward()
    slope = -1.0 - 0.25 / (1 + math.exp(odds)) / (1 - math.exp(a))
    assert given["logp_chosen"].grad.sum().item() == pytest.approx(slope)


def test_orpo_of_certain_and_impossible_samples():
    certain = sums(0.0, -1.0, reference=False)
    found = orpo(**certain)
    found.total.backward()
    assert found.total.isfinite()
    assert certain["logp_chosen"].grad.isfinite().all()
    with pytest.raises(NumericsError, match="above 0: that is no log-probability"):
        orpo(**sums(0.1, -1.0, reference=False))


# without pairs


def labelled(*ratios: float) -> dict[str, torch.Tensor]:
    logp = torch.tensor(ratios, dtype=torch.float64)[:, None, None].requires_grad_()
    return {"logp": logp, "logp_ref": torch.zeros_like(logp).detach(), "mask": torch.ones(len(ratios), 1, 1).bool()}


def test_kto_by_hand():
    given, labels = labelled(2.0, -1.0, 0.5), torch.tensor([[True], [False], [False]])
    point = torch.tensor(0.4, dtype=torch.float64)
    options = {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    found = kto(given["logp"], given["logp_ref"], labels, given["mask"], point, **options)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    expected = 2 * (1 - sigmoid(0.5 * 1.6)) + 3 * (1 - sigmoid(0.5 * 1.4)) + 3 * (1 - sigmoid(0.5 * -0.1))
    assert found.total.item() == pytest.approx(expected)
    assert found.count == 3
    assert found.implicit[:, 0].tolist() == [1.0, -0.5, 0.25]
    found.total.backward()
    assert (given["logp"].grad[:, 0, 0].sign().tolist()) == [-1.0, 1.0, 1.0]


def test_the_reference_point():
    above, below = labelled(1.0, 2.0), labelled(-1.0, -2.0)
    assert kto_reference_point(above["logp"], above["logp_ref"], above["mask"]).item() == 1.5
    point = kto_reference_point(below["logp"], below["logp_ref"], below["mask"])
    assert point.item() == 0.0
    assert not point.requires_grad
    one = labelled(1.0)
    with pytest.raises(ShapeError, match="at least 2 examples"):
        kto_reference_point(one["logp"], one["logp_ref"], one["mask"])


def test_kto_of_one_kind():
    given = labelled(0.0, 0.0)
    found = kto(given["logp"], given["logp_ref"], torch.ones(2, 1).bool(), given["mask"])
    assert (found.total / found.count).item() == 0.5


# of images


def test_diffusion_dpo():
    errors = [torch.tensor([value], dtype=torch.float64).requires_grad_() for value in (1.0, 1.2, 1.1, 1.1)]
    found = diffusion_dpo(*errors, beta=10.0)
    z = -5.0 * (1.0 - 1.2)
    assert found.total.item() == pytest.approx(softplus(-z))
    assert found.metrics["implicit_accuracy"].item() == 1.0
    found.total.backward()
    assert errors[0].grad.item() == pytest.approx(5.0 / (1 + math.exp(z)))
    assert errors[2].grad is None
    moved = [errors[0] + 3.0, errors[1] + 3.0, *errors[2:]]
    assert diffusion_dpo(*moved, beta=10.0).total.item() == pytest.approx(found.total.item())
    with pytest.raises(NumericsError, match="error_chosen is not finite"):
        diffusion_dpo(torch.tensor([math.nan]), *(torch.ones(1) for _ in range(3)))
