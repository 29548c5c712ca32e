"""SRPO: its value and gradient at the reference, the optimum of its population form, what drafts may shift, and its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guerdon.errors import DataError, NumericsError, RecipeError, ShapeError
from guerdon.objectives import srpo
from guerdon.objectives.pairs import Sides
from guerdon.objectives.srpo import srpo_terms
from tests.objectives.pairs import fields

SIDES = ("chosen", "rejected")
NAMES = [f"{side}{draft}" for draft in ("", "_given_chosen", "_given_rejected") for side in SIDES]
LEARNED = [f"logp_{name}" for name in NAMES]


def given(b: int = 4, *, at_reference: bool = False) -> dict[str, Tensor]:
    """Six sequences a pair, with NaN at masked steps; each sample has the same steps after every prompt."""
    parts = [fields(b, seed=seed) for seed in (0, 1, 2)]
    masks = {f"mask_{side}": parts[0][f"mask_{side}"] for side in SIDES}
    found: dict[str, Tensor] = {}
    for part, draft in zip(parts, ("", "_given_chosen", "_given_rejected"), strict=True):
        for side in SIDES:
            for name in ("logp_ref", "logp"):
                source = f"{'logp_ref' if at_reference else name}_{side}"
                value = part[source].detach().nan_to_num(nan=-0.7).masked_fill(~masks[f"mask_{side}"], math.nan)
                found[f"{name}_{side}{draft}"] = value
    for name in LEARNED:
        found[name].requires_grad_()
    return found | masks


def sums(**ratios: float) -> dict[str, Tensor]:
    """One pair whose log-ratios are given by name, such as `chosen_given_rejected`; the others are 0."""
    live = torch.ones(1, 1).bool()
    found = {f"logp_ref_{name}": torch.zeros(1, 1).double() for name in NAMES}
    found |= {f"logp_{name}": torch.full((1, 1), ratios.get(name, 0.0)).double().requires_grad_() for name in NAMES}
    return found | {"mask_chosen": live, "mask_rejected": live}


def gradients(loss, pairs) -> dict[str, Tensor]:
    return dict(zip(NAMES, torch.autograd.grad(loss.total / loss.count, [pairs[n] for n in LEARNED]), strict=True))


@pytest.mark.parametrize("beta", [0.02, 0.1, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_at_the_reference(alpha, beta):
    """L_imp = 1/2, L_gen = 1, and the gradient of each of the six is known."""
    pairs = given(at_reference=True)
    found = srpo(**pairs, alpha=alpha, beta=beta)
    assert (found.total / found.count).item() == pytest.approx(1 - alpha / 2, rel=1e-14)
    assert found.metrics["generative_loss"].item() == pytest.approx(1.0)
    assert found.metrics["self_improvement_loss"].item() == pytest.approx(0.5)
    generation, improvement = 2 * (1 - alpha) * beta / 4, alpha * beta / 4
    expected = {
        "chosen": -generation,
        "rejected": generation,
        "chosen_given_chosen": -improvement,
        "rejected_given_chosen": generation + improvement,
        "chosen_given_rejected": -generation - improvement,
        "rejected_given_rejected": improvement,
    }
    for name, gradient in gradients(found, pairs).items():
        live = pairs[f"mask_{name.split('_')[0]}"]
        wanted = torch.full_like(gradient, expected[name]).masked_fill(~live, 0.0)
        assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-17), name


def test_the_ends_of_alpha_leave_some_alone():
    pairs = given()
    alone = {0.0: {"chosen_given_chosen", "rejected_given_rejected"}, 1.0: {"chosen", "rejected"}}
    for alpha, names in alone.items():
        found = gradients(srpo(**pairs, alpha=alpha), pairs)
        assert {name for name, gradient in found.items() if (gradient == 0).all()} == names


def test_swapping_the_sides_turns_every_bracket():
    """(b - 1)^2 against (b + 1)^2, and the same for the two brackets of L_imp around 1/2."""
    pairs = given(1)
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    other = {
        "_".join(swapped.get(word, word) for word in name.split("_")): value.detach() for name, value in pairs.items()
    }
    beta = 0.3
    first, second = srpo(**pairs, beta=beta).metrics, srpo(**other, beta=beta).metrics
    ratio = {n: (pairs[f"logp_{n}"] - pairs[f"logp_ref_{n}"]).nansum().item() for n in NAMES}
    bracket = beta * (
        ratio["chosen_given_rejected"] + ratio["chosen"] - ratio["rejected_given_chosen"] - ratio["rejected"]
    )
    assert first["generative_loss"].item() == pytest.approx((bracket - 1) ** 2)
    assert second["generative_loss"].item() == pytest.approx((bracket + 1) ** 2)
    brackets = [beta * (ratio[f"chosen_given_{draft}"] - ratio[f"rejected_given_{draft}"]) for draft in SIDES]
    assert first["self_improvement_loss"].item() == pytest.approx(sum((b - 0.5) ** 2 for b in brackets))
    assert second["self_improvement_loss"].item() == pytest.approx(sum((b + 0.5) ** 2 for b in brackets))


# the population form


def table(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """p(column over row) with p(a, b) + p(b, a) = 1, and references of answers [n] and revisions [n, n]."""
    generator = torch.Generator().manual_seed(seed)
    noise, answers, revisions = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, n), (n,), (n, n))
    )
    return torch.sigmoid(noise - noise.T), answers.log_softmax(0), revisions.log_softmax(1)


def optimum(p: Tensor, reference: Tensor, reference_of_drafts: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the best answers [n] and the best revisions [draft, revision]."""
    tilted = reference_of_drafts + p / beta
    z = tilted.logsumexp(1, keepdim=True)
    return (reference - z.squeeze(1)).log_softmax(0), tilted - z


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_the_closed_form_has_no_loss(seed, beta):
    """Nor does it depend on who wrote the pairs, as each pair alone costs nothing."""
    p, reference, of_drafts = table(5, seed)
    answers, revisions = optimum(p, reference, of_drafts, beta)
    r, rd = answers - reference, revisions - of_drafts  # rd[draft, revision]
    a, b = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T  # b against a
    sides = Sides(r[b], r[a]), Sides(rd[b, b], rd[b, a]), Sides(rd[a, b], rd[a, a])
    terms = srpo_terms(*sides, p[a, b], beta=beta)
    assert terms.generative.max() < 1e-12
    assert terms.self_improvement.max() < 1e-12
    # and certain labels, or those of another order, are not met
    assert srpo_terms(*sides, beta=beta).generative.max() > 1e-3
    assert srpo_terms(*sides, p[b, a], beta=beta).self_improvement.max() > 1e-3


def test_a_preference_takes_the_place_of_the_label():
    pairs, one = given(3), torch.ones(3).double()
    certain = srpo(**pairs)
    assert torch.equal(srpo(**pairs, preference=one).total, certain.total)
    assert torch.equal(srpo(**pairs, preference=[1, 1.0, 1]).total, certain.total)
    # a tie aims at no difference
    assert srpo(**sums(), preference=[0.5]).total.item() == 0.0
    # p of w over l is 1 - p of l over w
    ratios = {name: 0.3 * i for i, name in enumerate(NAMES)}
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    turned = {"_".join(swapped.get(word, word) for word in name.split("_")): v for name, v in ratios.items()}
    found = [srpo(**sums(**r), preference=[p]).total.item() for r, p in ((ratios, 0.7), (turned, 0.3))]
    assert found[0] == pytest.approx(found[1], rel=1e-14)


# what may be shifted


def shifted(pairs: dict[str, Tensor], draft: str, by: float, which: tuple[str, ...]) -> dict[str, Tensor]:
    names = {f"{of}_{side}_given_{draft}" for of in which for side in SIDES}
    step = {side: torch.eye(1, pairs[f"mask_{side}"].shape[1]).double() for side in SIDES}  # the first is live
    return {n: v + by * step[n.split("_given_")[0].split("_")[-1]] if n in names else v for n, v in pairs.items()}


@pytest.mark.parametrize("draft", SIDES)
def test_a_shift_by_draft(draft):
    """Of policy and reference it is nothing; of the policy alone it is nothing to L_imp, but not to L_gen."""
    pairs = given()
    plain = srpo(**pairs).metrics
    both = srpo(**shifted(pairs, draft, 1.7, ("logp", "logp_ref"))).metrics
    alone = srpo(**shifted(pairs, draft, 1.7, ("logp",))).metrics
    for name in plain:
        assert both[name].item() == pytest.approx(plain[name].item(), rel=1e-12)
    assert alone["self_improvement_loss"].item() == pytest.approx(plain["self_improvement_loss"].item(), rel=1e-12)
    assert abs(alone["generative_loss"].item() - plain["generative_loss"].item()) > 1e-2


def test_the_reference_of_a_revision_is_not_that_of_an_answer():
    """Scoring the reference without the draft gives another loss and another gradient."""
    pairs = given()
    wrong = dict(pairs)
    for side in SIDES:
        for draft in SIDES:
            wrong[f"logp_ref_{side}_given_{draft}"] = pairs[f"logp_ref_{side}"]
    right, mistaken = srpo(**pairs), srpo(**wrong)
    assert abs(right.total.item() - mistaken.total.item()) > 1e-2
    apart = [
        (a - b).abs().max() for a, b in zip(*(gradients(x, pairs).values() for x in (right, mistaken)), strict=True)
    ]
    assert max(apart) > 1e-3


def test_nothing_reaches_the_reference():
    pairs = given()
    frozen = [f"logp_ref_{name}" for name in NAMES]
    for name in frozen:
        pairs[name] = pairs[name].clone().requires_grad_()
    srpo(**pairs).total.backward()
    assert all(pairs[name].grad is None for name in frozen)
    assert all(pairs[name].grad.abs().sum() > 0 for name in LEARNED)


def test_what_it_takes_samples_to_be_worth():
    found = srpo(**sums(chosen=2.0, chosen_given_rejected=3.0, rejected=-1.0, rejected_given_chosen=-4.0), beta=0.1)
    assert found.implicit is not None
    assert found.implicit[0].tolist() == pytest.approx([0.5, -0.5])
    assert found.metrics["generative_loss"].item() == pytest.approx(0.0, abs=1e-15)


def test_the_scale_of_the_answers_part():
    pairs = given()
    found = srpo(**pairs, alpha=0.4, gen_scale=0.25)
    parts = found.metrics
    expected = 0.6 * 0.25 * parts["generative_loss"] + 0.4 * parts["self_improvement_loss"]
    assert (found.total / found.count).item() == pytest.approx(expected.item(), rel=1e-14)
    # one family: alpha' / (1 - alpha') = 4 alpha / (1 - alpha), up to a factor
    same = 1.6 / 2.2
    other = srpo(**pairs, alpha=same)
    ratio = [a / b for a, b in zip(*(gradients(x, pairs).values() for x in (found, other)), strict=True)]
    assert torch.cat([r[r.isfinite()] for r in ratio]).std() < 1e-12


def test_refusals():
    for options, message in (
        ({"beta": 0.0}, "beta must be above 0"),
        ({"alpha": -0.1}, "alpha must be from 0 to 1"),
        ({"alpha": 1.1}, "alpha must be from 0 to 1"),
        ({"gen_scale": -1.0}, "gen_scale must be 0 or more"),
    ):
        with pytest.raises(RecipeError, match=message):
            srpo(**given(), **options)
    pairs = given(3)
    for preference, row in (
        ([0.5, 1.2, 0.1], 1),
        ([0.5, 1.0, None], 2),
        (["1", 0.0, 0.0], 0),
        (torch.tensor([0, 0, -1.0]), 2),
    ):
        with pytest.raises(DataError, match=rf"preference\[{row}\] must be a number from 0 to 1"):
            srpo(**pairs, preference=preference)
    with pytest.raises(ShapeError, match="preference must be"):
        srpo(**pairs, preference=[0.5])
    with pytest.raises(NumericsError, match=r"the rejected sample as draft\): .*logp_chosen\[0\]"):
        srpo(**sums(chosen_given_rejected=math.inf))
    with pytest.raises((ShapeError, TypeError)):
        srpo(**pairs | {"logp_chosen_given_rejected": pairs["logp_chosen"][:, :-1]})
    with pytest.raises(TypeError):
        srpo(**{name: value for name, value in pairs.items() if name != "logp_ref_chosen_given_rejected"})
