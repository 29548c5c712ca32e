"""The clipped policy gradient: values and gradients by hand, levels, clips, denominators, edge cases."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.errors import BindingError, RecipeError, ShapeError
from guerdon.objectives import dapo, dr_grpo, gspo, policy_gradient
from guerdon.objectives.loss import Loss
from guerdon.stages import wants

LENGTHS = torch.tensor([[4, 1, 3], [2, 4, 2]])
MASK = torch.arange(4) < LENGTHS.unsqueeze(-1)  # [2, 3, 4]
N = LENGTHS.unsqueeze(-1).double()
DENOMINATORS: dict[str, dict[str, Any]] = {
    "per_sample": {"denominator": "per_sample"},
    "per_token": {"denominator": "per_token"},
    "constant": {"denominator": "constant", "max_length": 9},
}


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture
def logp_old() -> Tensor:
    return -random(2, 3, 4, seed=1).abs()


@pytest.fixture
def advantages() -> Tensor:
    a = random(2, 3, seed=2)
    return a - a.mean(-1, keepdim=True)


def value(loss: Loss) -> Tensor:
    return loss.total / loss.count


def gradient(logp: Tensor, *rest: Any, objective=policy_gradient, **options: Any) -> Tensor:
    variable = logp.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(value(objective(variable, *rest, **options)), variable)
    return found


def single(ratio: float, advantage: float, **options: Any) -> tuple[float, float]:
    """Loss of one step and its derivative with respect to the ratio's logarithm."""
    logp = torch.tensor([[[math.log(ratio)]]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    loss = policy_gradient(logp, zero, torch.tensor([[advantage]], dtype=torch.float64), zero == 0, **options)
    loss.total.backward()
    assert logp.grad is not None
    return loss.total.item(), logp.grad.item()


class TestOnPolicy:
    """With logp = logp_old the ratio is 1 and the gradient is the plain policy gradient."""

    def test_per_sample(self, logp_old, advantages):
        loss = policy_gradient(logp_old, logp_old, advantages, MASK)
        torch.testing.assert_close(value(loss), -advantages.mean())
        assert abs(value(loss).item()) < 1e-15
        expected = -advantages.unsqueeze(-1) * MASK / (6 * N)
        torch.testing.assert_close(gradient(logp_old, logp_old, advantages, MASK), expected)

    def test_per_token(self, logp_old, advantages):
        expected = -advantages.unsqueeze(-1) * MASK / 16
        torch.testing.assert_close(gradient(logp_old, logp_old, advantages, MASK, denominator="per_token"), expected)
        loss = policy_gradient(logp_old, logp_old, advantages, MASK, denominator="per_token")
        assert loss.count == 16
        torch.testing.assert_close(loss.total, -(advantages * LENGTHS).sum())

    def test_constant(self, logp_old, advantages):
        expected = -advantages.unsqueeze(-1) * MASK / (6 * 9)
        options = DENOMINATORS["constant"]
        torch.testing.assert_close(gradient(logp_old, logp_old, advantages, MASK, **options), expected)

    def test_the_gradient_of_the_sequence_level_is_the_same(self, logp_old, advantages):
        token = gradient(logp_old, logp_old, advantages, MASK)
        for level in ("sequence", "sequence_token"):
            torch.testing.assert_close(gradient(logp_old, logp_old, advantages, MASK, level=level), token)

    def test_a_sample_without_steps_counts_as_a_sample(self, logp_old, advantages):
        mask = MASK.clone()
        mask[0, 0] = False
        loss = policy_gradient(logp_old, logp_old, advantages, mask)
        assert loss.count == 6
        torch.testing.assert_close(value(loss), -(advantages.sum() - advantages[0, 0]) / 6)


class TestClip:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "slope"),
        [
            (1.0, 2.0, -2.0, -2.0),
            (1.1, 2.0, -2.2, -2.2),
            (1.5, 2.0, -2.56, 0.0),  # above 1.28: held, no gradient
            (0.5, 2.0, -1.0, -1.0),  # below, but the step is to be raised: passes
            (1.5, -2.0, 3.0, 3.0),  # above, but to be lowered: passes
            (0.5, -2.0, 1.6, 0.0),  # below 0.8: held
        ],
    )
    def test_values_and_slopes(self, ratio, advantage, loss, slope):
        found = single(ratio, advantage, clip_low=0.2, clip_high=0.28)
        assert found == pytest.approx((loss, slope), abs=1e-12)

    @pytest.mark.parametrize(("border", "advantage"), [(1.28, 1.0), (0.8, -1.0)])
    def test_the_value_is_continuous_at_the_border(self, border, advantage):
        near = [single(border * factor, advantage, clip_high=0.28)[0] for factor in (1 - 1e-9, 1.0, 1 + 1e-9)]
        assert near == pytest.approx([-border * advantage] * 3, abs=1e-8)

    def test_no_bound(self):
        assert single(5.0, 1.0, clip_low=None, clip_high=None) == pytest.approx((-5.0, -5.0))
        assert single(0.1, -1.0, clip_low=None, clip_high=None) == pytest.approx((0.1, 0.1))
        assert single(5.0, 1.0, clip_low=None) == pytest.approx((-1.2, 0.0))
        assert single(0.1, -1.0, clip_low=None) == pytest.approx((0.1, 0.1))
        assert single(0.1, -1.0, clip_high=None) == pytest.approx((0.8, 0.0))

    def test_the_two_sided_bound(self):
        assert single(9.0, -1.0, ratio_max=4.0) == pytest.approx((4.0, 0.0))
        assert single(3.0, -1.0, ratio_max=4.0) == pytest.approx((3.0, 3.0))
        assert single(9.0, 1.0, ratio_max=4.0) == pytest.approx((-1.2, 0.0))

    def test_the_dual_clip(self):
        assert single(9.0, -2.0, dual_clip=3.0) == pytest.approx((6.0, 0.0))
        assert single(2.0, -2.0, dual_clip=3.0) == pytest.approx((4.0, 4.0))
        assert single(9.0, 2.0, dual_clip=3.0) == pytest.approx((-2.4, 0.0))

    def test_an_infinite_ratio_stays_finite(self):
        logp = torch.tensor([[[0.0, -500.0]]], requires_grad=True)
        old = torch.tensor([[[-500.0, 0.0]]])
        for level in ("token", "sequence", "sequence_token"):
            loss = policy_gradient(logp, old, torch.tensor([[-1.0]]), torch.ones(1, 1, 2).bool(), level=level)
            (grad,) = torch.autograd.grad(loss.total, logp)
            assert loss.total.isfinite()
            assert grad.isfinite().all()


class TestLevels:
    def test_the_sequence_ratio_is_the_geometric_mean(self):
        logp = torch.tensor([[[0.3, -0.1, math.nan]]], dtype=torch.float64)
        old = torch.zeros(1, 1, 3, dtype=torch.float64)
        mask = torch.tensor([[[True, True, False]]])
        a = torch.ones(1, 1, dtype=torch.float64)
        loss = policy_gradient(logp, old, a, mask, level="sequence")
        assert loss.total.item() == pytest.approx(-math.exp(0.1))
        grad = gradient(logp, old, a, mask, level="sequence")
        assert grad.flatten().tolist() == pytest.approx([-math.exp(0.1) / 2, -math.exp(0.1) / 2, 0.0])

    def test_sequence_token_has_the_value_of_the_sequence(self, logp_old, advantages):
        logp = logp_old + random(2, 3, 4, seed=5, scale=0.3)
        for options in DENOMINATORS.values():
            first, second = (
                policy_gradient(logp, logp_old, advantages, MASK, level=level, **options).total
                for level in ("sequence", "sequence_token")
            )
            torch.testing.assert_close(first, second)

    def test_sequence_token_credits_each_step_with_its_own_advantage(self):
        logp = torch.tensor([[[0.3, -0.1]]], dtype=torch.float64)
        old, each = torch.zeros(1, 1, 2, dtype=torch.float64), torch.tensor([[[1.0, -2.0]]], dtype=torch.float64)
        found = gradient(logp, old, each, old == 0, level="sequence_token", denominator="per_token")
        torch.testing.assert_close(found, -math.exp(0.1) * each / 2)

    def test_advantages_per_step(self, logp_old, advantages):
        logp = logp_old + random(2, 3, 4, seed=5, scale=0.3)
        spread = advantages.unsqueeze(-1).expand(2, 3, 4).clone()
        for level in ("token", "sequence_token"):
            once = policy_gradient(logp, logp_old, advantages, MASK, level=level)
            each = policy_gradient(logp, logp_old, spread, MASK, level=level)
            torch.testing.assert_close(once.total, each.total)
        varied = random(2, 3, 4, seed=6)
        torch.testing.assert_close(
            gradient(logp_old, logp_old, varied, MASK, denominator="per_token"), -varied * MASK / 16
        )


class TestDivergenceAndEntropy:
    def test_the_divergence_is_added_per_step(self, logp_old, advantages):
        ref = logp_old + random(2, 3, 4, seed=3, scale=0.5)
        plain = policy_gradient(logp_old, logp_old, advantages, MASK)
        held = policy_gradient(logp_old, logp_old, advantages, MASK, ref, beta=0.3)
        e = ref - logp_old
        k3 = ((e.exp() - e - 1) * MASK).sum(-1) / LENGTHS
        torch.testing.assert_close(held.total - plain.total, 0.3 * k3.sum())
        torch.testing.assert_close(held.metrics["kl"], ((e.exp() - e - 1) * MASK).sum() / 16)

    @pytest.mark.parametrize(("kl", "slope"), [("k1", 1.0), ("k2", -0.5), ("k3", 1 - math.exp(0.5))])
    def test_the_estimators(self, kl, slope):
        logp = torch.full((1, 1, 1), -1.0, dtype=torch.float64)
        grad = gradient(logp, logp, torch.zeros(1, 1).double(), logp < 0, logp + 0.5, beta=1.0, kl_estimator=kl)
        assert grad.item() == pytest.approx(slope)

    def test_the_entropy_bonus(self, logp_old, advantages):
        entropy = random(2, 3, 4, seed=4).abs().requires_grad_()
        loss = policy_gradient(
            logp_old, logp_old, advantages, MASK, entropy=entropy, entropy_bonus=0.1, denominator="per_token"
        )
        (grad,) = torch.autograd.grad(loss.total, entropy)
        torch.testing.assert_close(grad, -0.1 * MASK.double())
        torch.testing.assert_close(loss.metrics["entropy"], entropy.detach()[MASK].mean())


class TestDenominators:
    def test_equal_lengths_agree(self, logp_old, advantages):
        logp, full = logp_old + random(2, 3, 4, seed=5, scale=0.3), torch.ones(2, 3, 4).bool()
        sample, token, constant = (
            value(policy_gradient(logp, logp_old, advantages, full, **options)) for options in DENOMINATORS.values()
        )
        torch.testing.assert_close(sample, token)
        torch.testing.assert_close(sample, constant * 9 / 4)

    def test_doubling_the_steps_of_a_sample(self, logp_old, advantages):
        logp = logp_old + random(2, 3, 4, seed=5, scale=0.1)

        def doubled(x: Tensor) -> Tensor:
            extra = torch.zeros_like(x)
            extra[0, 0] = x[0, 0]
            return torch.cat([x, extra], dim=-1)

        for name, same in (("per_sample", True), ("per_token", False)):
            once = value(policy_gradient(logp, logp_old, advantages, MASK, denominator=name))
            twice = value(
                policy_gradient(doubled(logp), doubled(logp_old), advantages, doubled(MASK), denominator=name)
            )
            assert torch.isclose(once, twice, rtol=1e-9) == same

    @pytest.mark.parametrize("options", DENOMINATORS.values(), ids=DENOMINATORS)
    @pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
    def test_padding_changes_nothing(self, options, level, logp_old, advantages):
        logp = logp_old + random(2, 3, 4, seed=5, scale=0.3)
        pad = torch.full((2, 3, 3), math.nan, dtype=torch.float64)
        wide = [torch.cat([x, pad], dim=-1) for x in (logp, logp_old)]
        mask = torch.cat([MASK, torch.zeros(2, 3, 3).bool()], dim=-1)
        short = policy_gradient(logp, logp_old, advantages, MASK, level=level, **options)
        long = policy_gradient(*wide, advantages, mask, level=level, **options)
        torch.testing.assert_close(short.total, long.total)
        assert short.count == long.count
        grad = gradient(wide[0], wide[1], advantages, mask, level=level, **options)
        torch.testing.assert_close(grad[..., :4], gradient(logp, logp_old, advantages, MASK, level=level, **options))
        assert (grad[..., 4:] == 0).all()

    def test_truncated_samples_can_be_left_out(self, logp_old, advantages):
        truncated = torch.tensor([[True, False, False], [False, True, False]])
        loss = policy_gradient(
            logp_old,
            logp_old,
            advantages,
            MASK,
            truncated=truncated,
            mask_truncated=True,
            denominator="per_token",
        )
        assert loss.count == 16 - 4 - 4
        kept = (advantages * LENGTHS)[~truncated].sum()
        torch.testing.assert_close(loss.total, -kept)
        ignored = policy_gradient(logp_old, logp_old, advantages, MASK, truncated=truncated)
        assert torch.equal(ignored.total, policy_gradient(logp_old, logp_old, advantages, MASK).total)


def test_gradient_goes_to_logp_only(logp_old, advantages):
    others = [x.clone().requires_grad_() for x in (logp_old, advantages, logp_old + 0.1)]
    logp = (logp_old + 0.01).requires_grad_()
    loss = policy_gradient(logp, others[0], others[1], MASK, others[2], beta=0.1)
    loss.total.backward()
    assert logp.grad is not None
    assert all(x.grad is None for x in others)
    assert not loss.count.requires_grad
    assert not any(metric.requires_grad for metric in loss.metrics.values())


def test_nothing_live(logp_old, advantages):
    logp = logp_old.clone().requires_grad_()
    for options in DENOMINATORS.values():
        loss = policy_gradient(logp, logp_old, advantages, torch.zeros_like(MASK), **options)
        loss.total.backward()
        assert loss.total == 0
        assert all(metric == 0 for metric in loss.metrics.values())
    assert (logp.grad == 0).all()


def test_metrics():
    old = torch.zeros(1, 2, 3, dtype=torch.float64)
    logp = torch.tensor([[[2.0, 1.0, 0.5], [0.5, 0.9, 9.0]]], dtype=torch.float64).log()
    mask = torch.tensor([[[True, True, True], [True, True, False]]])
    metrics = policy_gradient(logp, old, torch.tensor([[1.0, -1.0]]).double(), mask).metrics
    found = {name: metric.item() for name, metric in metrics.items()}
    expected = {
        "ratio_mean": (2 + 1 + 0.5 + 0.5 + 0.9) / 5,
        "ratio_max": 2.0,
        "clip_share": 0.4,
        "clip_low_share": 0.2,
        "clip_high_share": 0.2,
    }
    assert found == pytest.approx(expected)


class TestPresets:
    def test_dapo(self, logp_old, advantages):
        logp = logp_old + random(2, 3, 4, seed=5, scale=0.5)
        truncated = torch.tensor([[True, False, False], [False, True, False]])
        for masked in (False, True):
            preset = dapo(logp, logp_old, advantages, MASK, truncated, mask_truncated=masked)
            general = policy_gradient(
                logp,
                logp_old,
                advantages,
                MASK,
                truncated=truncated,
                clip_high=0.28,
                denominator="per_token",
                mask_truncated=masked,
            )
            assert torch.equal(preset.total, general.total)
            assert preset.count == general.count

    def test_dr_grpo(self, logp_old, advantages):
        logp = logp_old + random(2, 3, 4, seed=5, scale=0.5)
        preset = dr_grpo(logp, logp_old, advantages, MASK, max_length=9)
        general = policy_gradient(logp, logp_old, advantages, MASK, denominator="constant", max_length=9)
        assert torch.equal(preset.total, general.total)

    def test_gspo(self, logp_old, advantages):
        logp = logp_old + random(2, 3, 4, seed=5, scale=1e-3)
        for level in ("sequence", "sequence_token"):
            preset = gspo(logp, logp_old, advantages, MASK, level=level)
            general = policy_gradient(logp, logp_old, advantages, MASK, level=level, clip_low=3e-4, clip_high=4e-4)
            assert torch.equal(preset.total, general.total)
        assert preset.metrics["clip_share"] > 0


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"logp": torch.zeros(6, 4)}, r"logp must be \[P, G, T\]; got \[6, 4\]"),
            ({"logp_old": torch.zeros(2, 3, 5)}, r"logp_old must be \[P, G, T\] with T = 4; got \[2, 3, 5\]"),
            ({"advantages": torch.zeros(6)}, r"advantages must be \[P, G\]; got \[6\]"),
            ({"advantages": torch.zeros(2, 4)}, r"advantages must be \[P, G\] with G = 3; got \[2, 4\]"),
            ({"logp_ref": torch.zeros(2, 3, 1)}, r"logp_ref must be \[P, G, T\] with T = 4; got \[2, 3, 1\]"),
            ({"entropy": torch.zeros(2, 3)}, r"entropy must be \[P, G, T\]; got \[2, 3\]"),
            (
                {"truncated": torch.zeros(6).bool(), "mask_truncated": True},
                r"truncated must be \[P, G\]; got \[6\]",
            ),
            (
                {"advantages": torch.zeros(2, 3, 4), "level": "sequence"},
                r"advantages must be \[P, G\] with level sequence.*sequence_token",
            ),
        ],
    )
    def test_shapes(self, change, message, friendly_errors):
        zeros = torch.zeros(2, 3, 4)
        arguments = {"logp": zeros, "logp_old": zeros, "advantages": torch.zeros(2, 3), "mask": MASK} | change
        with pytest.raises(ShapeError, match=rf"objectives\.policy_gradient: {message}"):
            policy_gradient(**arguments)

    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            ({"beta": 0.1}, BindingError, "beta = 0.1 needs the field logp_ref"),
            ({"entropy_bonus": 0.1}, BindingError, "entropy_bonus = 0.1 needs the field entropy"),
            ({"mask_truncated": True}, BindingError, "mask_truncated needs the field truncated"),
            ({"level": "sequense"}, RecipeError, "got 'sequense'. Did you mean 'sequence'"),
            ({"denominator": "per_tokens"}, RecipeError, "got 'per_tokens'. Did you mean 'per_token'"),
            ({"denominator": "constant"}, RecipeError, "constant needs max_length"),
            ({"clip_low": -0.1}, RecipeError, "clip_low must be >= 0"),
            ({"clip_high": -0.1}, RecipeError, "clip_high must be >= 0"),
            ({"ratio_max": 1.1}, RecipeError, "ratio_max must be above 1 \\+ clip_high = 1.2; got 1.1"),
            ({"dual_clip": 1.0}, RecipeError, "dual_clip must be above 1"),
        ],
    )
    def test_options(self, options, kind, message, friendly_errors):
        zeros = torch.zeros(2, 3, 4)
        with pytest.raises(kind, match=message):
            policy_gradient(zeros, zeros, torch.zeros(2, 3), MASK, **options)

    def test_an_unknown_estimator(self, friendly_errors):
        zeros = torch.zeros(2, 3, 4)
        with pytest.raises(RecipeError, match="must be k1, k2 or k3; got 'k4'"):
            policy_gradient(zeros, zeros, torch.zeros(2, 3), MASK, zeros, kl_estimator="k4")


class TestImages:
    """What policies with Gaussian steps use: the exact divergence, and advantages within bounds."""

    def test_the_exact_divergence_is_taken_as_it_is(self):
        zeros = torch.zeros(1, 2, 2, dtype=torch.float64)
        mask = torch.tensor([[[True, True], [True, False]]])
        kl = torch.tensor([[[0.1, 0.2], [0.3, math.nan]]], dtype=torch.float64, requires_grad=True)
        options = {"beta": 0.5, "kl_estimator": "exact", "denominator": "per_token"}
        found = policy_gradient(zeros, zeros, torch.zeros(1, 2).double(), mask, kl=kl, **options)
        assert found.total.item() == pytest.approx(0.5 * 0.6)
        assert found.metrics["kl"].item() == pytest.approx(0.2)
        found.total.backward()
        assert kl.grad.tolist() == [[[0.5, 0.5], [0.5, 0.0]]]

    def test_it_needs_no_reference_and_says_what_is_missing(self, friendly_errors):
        zeros = torch.zeros(1, 2, 2)
        with pytest.raises(BindingError, match=r"needs the field kl, which is not there; take kl_estimator: k3"):
            policy_gradient(zeros, zeros, torch.zeros(1, 2), zeros == 0, zeros, beta=0.1, kl_estimator="exact")
        exact = functools.partial(policy_gradient, beta=0.1, kl_estimator="exact")
        estimated = functools.partial(policy_gradient, beta=0.1)
        assert (wants(exact, "kl"), wants(exact, "logp_ref")) == (True, False)
        assert (wants(estimated, "kl"), wants(estimated, "logp_ref")) == (False, True)
        assert not wants(functools.partial(policy_gradient, kl_estimator="exact"), "kl")

    def test_advantages_are_held_within_bounds(self, friendly_errors):
        zeros = torch.zeros(1, 3, 1, dtype=torch.float64, requires_grad=True)
        advantages = torch.tensor([[9.0, -7.0, 1.0]], dtype=torch.float64)
        policy_gradient(zeros, zeros.detach(), advantages, zeros == 0, advantage_clip=5.0).total.backward()
        assert zeros.grad.flatten().tolist() == [-5.0, 5.0, -1.0]
        with pytest.raises(RecipeError, match="advantage_clip must be above 0"):
            policy_gradient(zeros, zeros, advantages, zeros == 0, advantage_clip=0.0)
