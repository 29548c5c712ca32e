"""PPO: the surrogate, the critic's clipped loss, and their sum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.errors import BindingError, RecipeError, ShapeError
from guerdon.objectives import policy_gradient, ppo


def random(seed: int) -> Tensor:
    return torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fields() -> dict[str, Tensor]:
    old = -random(0).abs()
    mask = torch.arange(4) < torch.tensor([[4, 1, 3], [2, 4, 2]]).unsqueeze(-1)
    values_old = random(3)
    return {
        "logp": old + 0.3 * random(1),
        "logp_old": old,
        "advantages": random(2),
        "values": values_old + 0.3 * random(4),
        "values_old": values_old,
        "returns": random(5),
        "mask": mask,
    }


def one(**options: Any) -> float:
    """One step with ratio 1, advantage 0: the critic's loss alone."""
    names = {"value": 0.0, "old": 0.0, "target": 0.0, "value_coefficient": 1.0} | options
    step = {name: torch.full((1, 1, 1), names.pop(name), dtype=torch.float64) for name in ("value", "old", "target")}
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    loss = ppo(zero, zero, zero, step["value"], step["old"], step["target"], zero == 0, **names)
    return loss.total.item()


def test_the_critics_loss():
    assert one(value=2.0, old=2.0, target=5.0) == pytest.approx(4.5)
    assert one(value=2.0, old=2.0, target=5.0, value_coefficient=0.5) == pytest.approx(2.25)
    # the value moved by 1 towards the target, of which 0.2 count: (0.8 ** 2) / 2
    assert one(value=1.0, old=0.0, target=1.0) == pytest.approx(0.32)
    assert one(value=1.0, old=0.0, target=1.0, value_clip=None) == 0.0
    # it moved away from the target: the larger, unclipped error counts
    assert one(value=-1.0, old=0.0, target=1.0) == pytest.approx(2.0)


def test_no_gradient_where_the_value_is_held():
    values = torch.tensor([1.0], dtype=torch.float64).view(1, 1, 1).requires_grad_()
    zero, target = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64) * 1.5
    loss = ppo(zero, zero, zero, values, zero, target, zero == 0)
    assert torch.autograd.grad(loss.total, values)[0].item() == 0.0
    assert loss.metrics["value_clip_share"] == 1.0


def test_without_a_critic_it_is_the_token_mean_policy_gradient(fields):
    found = ppo(**fields, value_coefficient=0.0)
    expected = policy_gradient(
        fields["logp"], fields["logp_old"], fields["advantages"], fields["mask"], denominator="per_token"
    )
    torch.testing.assert_close(found.total, expected.total)
    assert found.count == expected.count == 16


def test_the_sum(fields):
    mask = fields["mask"]
    found = ppo(**fields, value_clip=None, value_coefficient=0.7)
    surrogate = ppo(**fields, value_coefficient=0.0).total
    error = ((fields["values"] - fields["returns"]).square() / 2)[mask]
    torch.testing.assert_close(found.total, surrogate + 0.7 * error.sum())
    torch.testing.assert_close(found.metrics["value_loss"], error.mean())


def several(fields: dict[str, Tensor], **other: Tensor) -> dict[str, Any]:
    """A critic with two heads: the fields' own, and one of other numbers."""
    second = {"values": random(7), "values_old": random(8), "returns": random(9)} | other
    return fields | {name: torch.stack([fields[name], value], -1) for name, value in second.items()}


def test_the_errors_of_several_heads_add_up_each_with_its_coefficient(fields):
    mask, two = fields["mask"], several(fields)
    surrogate = ppo(**fields, value_coefficient=0.0).total
    first = ppo(**fields, value_coefficient=1.0)
    alone = fields | {name: two[name][..., 1] for name in ("values", "values_old", "returns")}
    second = ppo(**alone, value_coefficient=1.0)
    names = ("intent", "kl")
    found = ppo(**two, score_names=names, value_coefficient=1.0, value_coefficients={"kl": 0.4})
    torch.testing.assert_close(
        found.total, surrogate + 1.0 * (first.total - surrogate) + 0.4 * (second.total - surrogate)
    )
    assert found.count == mask.sum()
    for name, one in zip(names, (first, second), strict=True):
        torch.testing.assert_close(found.metrics[f"value_loss/{name}"], one.metrics["value_loss"])
    mean = (first.metrics["value_loss"] + second.metrics["value_loss"]) / 2
    torch.testing.assert_close(found.metrics["value_loss"], mean)
    alike = ppo(**two, value_coefficient=0.5)
    named = ppo(**two, score_names=names, value_coefficient=0.1, value_coefficients={"kl": 0.5, "intent": 0.5})
    torch.testing.assert_close(alike.total, named.total)


def test_what_masked_steps_of_several_heads_hold_does_not_matter(fields):
    two = several(fields)
    dead = ~fields["mask"].unsqueeze(-1)
    holes = {name: value.masked_fill(dead, math.nan) for name, value in two.items() if value.ndim == 4}
    assert torch.equal(ppo(**two | holes).total, ppo(**two).total)


def test_coefficients_by_name_need_a_head_for_each_component(fields, friendly_errors):
    with pytest.raises(RecipeError, match=r"a head for each component; this one has 1 for intent, kl"):
        ppo(**fields, score_names=("intent", "kl"), value_coefficients={"kl": 0.4})
    with pytest.raises(RecipeError, match=r"value_coefficients.ki: there is no such component. Did you mean 'kl'"):
        ppo(**several(fields), score_names=("intent", "kl"), value_coefficients={"ki": 0.4})


def test_the_entropy_bonus(fields):
    entropy = random(6).abs()
    plain, found = ppo(**fields), ppo(**fields, entropy=entropy, entropy_bonus=0.1)
    torch.testing.assert_close(found.total, plain.total - 0.1 * entropy[fields["mask"]].sum())
    torch.testing.assert_close(found.metrics["entropy"], entropy[fields["mask"]].mean())


def test_what_masked_steps_hold_does_not_matter(fields):
    holes = {
        name: value if name == "mask" else value.masked_fill(~fields["mask"], math.nan)
        for name, value in fields.items()
    }
    assert torch.equal(ppo(**holes).total, ppo(**fields).total)


def test_gradient_goes_to_logp_and_values_only(fields):
    for name, value in fields.items():
        if name != "mask":
            value.requires_grad_()
    fields["logp"].retain_grad()
    fields["values"].retain_grad()
    ppo(**fields).total.backward()
    for name in ("logp_old", "advantages", "values_old", "returns"):
        grad = fields[name].grad
        assert grad is None or (grad == 0).all(), name
    assert fields["logp"].grad is not None
    assert fields["values"].grad is not None


def test_errors(fields, friendly_errors):
    with pytest.raises(ShapeError, match=r"objectives.ppo: returns must be \[P, G, T\]; got \[2, 3\]"):
        ppo(**fields | {"returns": torch.zeros(2, 3)})
    with pytest.raises(RecipeError, match="value_clip must be >= 0"):
        ppo(**fields, value_clip=-1.0)
    with pytest.raises(RecipeError, match="clip_low must be >= 0"):
        ppo(**fields, clip_low=-1.0)
    with pytest.raises(BindingError, match=r"entropy_bonus = 0\.1 needs the field entropy"):
        ppo(**fields, entropy_bonus=0.1)
