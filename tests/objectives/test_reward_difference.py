"""Reward difference prediction: squares by hand, what cancels, the proximal bound, the two-pass gradient."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guerdon.errors import NumericsError, RecipeError, ScoreError, ShapeError
from guerdon.objectives import prdp
from guerdon.objectives.reward_difference import CLIPS, prdp_coefficients, reward_pairs

INF, NAN = math.inf, math.nan
P, G, T = 2, 4, 3


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LOGP_OLD = -random(P, G, T, seed=1).abs()
LOGP = LOGP_OLD + random(P, G, T, seed=2, scale=0.2)
LOGP_REF = LOGP_OLD + random(P, G, T, seed=3, scale=0.3)
REWARDS = random(P, G, seed=4)
ALL = torch.ones(P, G, T).bool()
MASK = torch.arange(T) < torch.tensor([[3, 1, 2, 3], [2, 3, 1, 3]]).unsqueeze(-1)


def run(
    logp: Tensor = LOGP,
    rewards: Tensor = REWARDS,
    mask: Tensor = ALL,
    *,
    old: Tensor = LOGP_OLD,
    ref: Tensor = LOGP_REF,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Loss / count, and its gradient with respect to logp."""
    variable = logp.clone().requires_grad_()
    loss = prdp(variable, old, ref, rewards, mask, **{"beta": 0.5, **options})
    value = loss.total / loss.count.clamp(min=1)
    (grad,) = torch.autograd.grad(value, variable)
    return value.detach(), grad


def one_group(logp: list[float], rewards: list[float], **options: Any) -> Any:
    """The loss of one group of samples of one step, whose old policy and reference have log-probability 0."""
    values = torch.tensor(logp, dtype=torch.float64).view(1, -1, 1)
    zero = torch.zeros_like(values)
    return prdp(values, zero, zero, torch.tensor([rewards], dtype=torch.float64), zero == 0, **options)


class TestByHand:
    def test_three_samples(self):
        loss = one_group([0.5, 0.0, -0.25], [2.0, 1.0, 1.0], beta=2.0, clip=INF)
        # wanted: 0.5, 0.5, 0; predicted: 0.5, 0.75, 0.25
        assert loss.total.item() == pytest.approx(0.0 + 0.25**2 + 0.25**2)
        assert loss.count.item() == 3
        assert {name: round(value.item(), 6) for name, value in loss.metrics.items()} == {
            "clip_share": 0.0,
            "implicit_reward_accuracy": 0.666667,
            "residual": 0.166667,
            "log_ratio": 0.083333,
            "pairs_dropped": 0.0,
        }

    def test_the_clipped_square_counts_where_it_is_the_larger(self):
        # held: 0.1, 0: residuals 0.5 - 1 and 0.1 - 1
        loss = one_group([0.5, 0.0], [1.0, 0.0], beta=1.0, clip=0.1)
        assert loss.total.item() == pytest.approx(0.81)
        assert loss.metrics["clip_share"] == 1
        # beyond the target the plain square is the larger: 1.5 - 1 against 0.1 - 0.05
        assert one_group([1.5, 0.0], [0.05, 0.0], beta=1.0, clip=0.1).total.item() == pytest.approx(1.45**2)

    def test_the_order_of_pairs(self):
        pairs = reward_pairs(LOGP, LOGP_OLD, LOGP_REF, REWARDS, ALL, beta=0.5)
        expected = [(REWARDS[1, a] - REWARDS[1, b]).item() / 0.5 for a, b in itertools.combinations(range(G), 2)]
        assert pairs.wanted[1].tolist() == pytest.approx(expected)
        u = (LOGP - LOGP_REF).sum(-1)
        assert pairs.residual[0, 4].item() == pytest.approx((u[0, 1] - u[0, 3] - pairs.wanted[0, 4]).item())

    def test_default_bounds(self):
        assert torch.equal(run()[0], run(clip=0.1)[0])
        assert torch.equal(run(logp_reduction="mean")[0], run(clip=1e-4)[0])
        assert CLIPS == {"sum": 0.1, "mean": 1e-4}

    def test_a_mean_over_dimensions_divides_beta(self):
        """D times the mean is the sum, so logp / D with beta * D has 1 / D^2 of the loss."""
        parts = (LOGP / 8, REWARDS, ALL)
        small, _ = run(*parts, old=LOGP_OLD / 8, ref=LOGP_REF / 8, beta=4.0, clip=0.1 / 8)
        torch.testing.assert_close(small * 64, run()[0])


class TestIdentities:
    @pytest.mark.parametrize("mask", [ALL, MASK])
    def test_twice_the_variance(self, mask):
        u = (LOGP - LOGP_REF).where(mask, 0.0).sum(-1) - REWARDS / 0.5
        torch.testing.assert_close(run(mask=mask, clip=INF)[0], 2 * u.var(-1).mean())
        centred = u - u.mean(-1, keepdim=True)
        torch.testing.assert_close(run(mask=mask, clip=INF)[0], (2 / (G - 1)) * centred.square().sum(-1).mean())

    @pytest.mark.parametrize("clip", [INF, 0.05])
    def test_what_a_prompt_adds_to_its_rewards_is_nothing_bit_for_bit(self, clip):
        rewards = (REWARDS * 1024).round() / 1024  # so that adding loses nothing
        offset = torch.tensor([[4096.0], [-77.25]], dtype=torch.float64)
        value, grad = run(rewards=rewards, clip=clip)
        moved, moved_grad = run(rewards=rewards + offset, clip=clip)
        assert torch.equal(value, moved)
        assert torch.equal(grad, moved_grad)

    def test_nor_is_what_it_adds_to_its_log_ratios(self):
        shift = torch.zeros(P, G, T, dtype=torch.float64)
        shift[0, :, 1], shift[1, :, 0] = 0.3, -2.0
        value, grad = run(clip=INF)
        moved, moved_grad = run(LOGP + shift, clip=INF)
        torch.testing.assert_close(value, moved)
        torch.testing.assert_close(grad, moved_grad)

    @pytest.mark.parametrize("clip", [INF, 0.1, 0.0])
    def test_the_first_step_is_reinforce_with_the_mean_of_the_group(self, clip):
        _, grad = run(LOGP_OLD, old=LOGP_OLD, ref=LOGP_OLD, mask=MASK, clip=clip, beta=0.5)
        centred = REWARDS - REWARDS.mean(-1, keepdim=True)
        expected = -4 / (P * 0.5 * (G - 1)) * centred.unsqueeze(-1) * MASK
        torch.testing.assert_close(grad, expected)

    def test_it_is_0_where_log_ratios_follow_the_rewards(self):
        """A Gaussian reference tilted by a linear reward: N(mu, s^2) becomes N(mu + s^2 w / beta, s^2)."""
        s, w, beta = 0.7, 1.3, 0.4
        x = random(3, 5, 1, seed=9) * s + 0.2

        def normal(mean: float) -> torch.distributions.Normal:
            return torch.distributions.Normal(
                torch.tensor(mean, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
            )

        reference, best = normal(0.2).log_prob(x), normal(0.2 + s**2 * w / beta)
        options = {"old": best.log_prob(x), "ref": reference, "mask": torch.ones_like(x).bool(), "beta": beta}
        value, grad = run(best.log_prob(x), (w * x).squeeze(-1), **options)
        assert value < 1e-24
        assert grad.abs().max() < 1e-12
        off = normal(0.2 + s**2 * w / beta + 0.1)
        assert run(off.log_prob(x), (w * x).squeeze(-1), **options)[0] > 1e-3

    def test_the_order_of_samples_orders_the_gradient(self):
        order = [2, 0, 3, 1]
        value, grad = run(mask=MASK)
        moved, moved_grad = run(
            LOGP[:, order], REWARDS[:, order], MASK[:, order], old=LOGP_OLD[:, order], ref=LOGP_REF[:, order]
        )
        torch.testing.assert_close(value, moved)
        torch.testing.assert_close(grad[:, order], moved_grad)

    def test_equal_rewards_pull_log_ratios_together(self):
        logp = torch.tensor([0.5, -0.5], dtype=torch.float64).view(1, 2, 1)
        zero = torch.zeros_like(logp)
        _, grad = run(logp, torch.ones(1, 2), zero == 0, old=zero, ref=zero, clip=INF)
        assert grad.flatten().tolist() == [2.0, -2.0]


class TestTheBound:
    @settings(max_examples=50, deadline=None)
    @given(clip=st.floats(0, 1), seed=st.integers(0, 1000))
    def test_it_only_adds(self, clip, seed):
        logp = LOGP_OLD + random(P, G, T, seed=seed, scale=0.3)
        assert run(logp, clip=clip)[0] >= run(logp, clip=INF)[0]

    def test_none_is_the_plain_loss(self):
        pairs = reward_pairs(LOGP, LOGP_OLD, LOGP_REF, REWARDS, ALL, beta=0.5, clip=INF)
        assert torch.equal(pairs.unclipped, pairs.clipped)
        torch.testing.assert_close(run(clip=INF)[0], pairs.unclipped.mean())

    def test_a_bound_of_0_leaves_no_gradient_where_it_counts(self):
        variable = torch.tensor([0.5, 0.0], dtype=torch.float64).view(1, 2, 1).requires_grad_()
        zero = torch.zeros(1, 2, 1, dtype=torch.float64)
        rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        prdp(variable, zero - 1e-9, zero, rewards, zero == 0, beta=1.0, clip=0.0).total.backward()
        assert variable.grad is not None
        assert (variable.grad == 0).all()

    def test_a_step_beyond_it_learns_only_from_pairs_whose_plain_square_is_the_larger(self):
        # sample 0 lies 0.5 above the old policy; its pair with 1 wants more, its pair with 2 less
        logp = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64).view(1, 3, 1)
        zero = torch.zeros_like(logp)

        def grad(rewards: list[float]) -> list[float]:
            found = run(logp, torch.tensor([rewards]).double(), zero == 0, old=zero, ref=zero, beta=1.0, clip=0.1)
            return found[1].flatten().tolist()

        assert grad([1.0, 0.0, 0.0])[0] == 0.0  # both pairs want more
        # with 2 it wants 0: d = 0.5, of which 2 d / 3 reaches it; 1 and 2 are within the bound and learn from all pairs
        assert grad([1.0, 0.0, 1.0])[0] == pytest.approx(2 * 0.5 / 3)


class TestMasksAndScores:
    def test_masked_steps_are_nothing(self):
        poisoned = [value.masked_fill(~MASK, NAN) for value in (LOGP, LOGP_OLD, LOGP_REF)]
        value, grad = run(poisoned[0], mask=MASK, old=poisoned[1], ref=poisoned[2])
        clean, clean_grad = run(mask=MASK)
        assert torch.equal(value, clean)
        assert torch.equal(grad, clean_grad)
        assert (grad[~MASK] == 0).all()

    def test_a_sample_without_live_steps_has_a_log_ratio_of_0(self):
        mask = ALL.clone()
        mask[0, 1] = False
        pairs = reward_pairs(LOGP, LOGP_OLD, LOGP_REF, REWARDS, mask, beta=0.5, clip=INF)
        u = (LOGP - LOGP_REF)[0, 0].sum()
        assert pairs.residual[0, 0].item() == pytest.approx((u - (REWARDS[0, 0] - REWARDS[0, 1]) / 0.5).item())

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_pairs_with_an_unscored_sample_are_left_out(self, bad):
        rewards = REWARDS.clone()
        rewards[0, 2] = bad
        loss = prdp(LOGP, LOGP_OLD, LOGP_REF, rewards, ALL, beta=0.5, clip=INF)
        kept = [0, 1, 3]
        alone = [
            prdp(LOGP[p : p + 1, k], LOGP_OLD[p : p + 1, k], LOGP_REF[p : p + 1, k], REWARDS[p : p + 1, k], ALL[:1, k],
                 beta=0.5, clip=INF).total
            for p, k in ((0, kept), (1, [0, 1, 2, 3]))
        ]  # fmt: skip
        torch.testing.assert_close(loss.total, sum(alone))
        assert loss.count == 3 + 6
        assert loss.metrics["pairs_dropped"].item() == pytest.approx(3 / 12)
        assert (run(rewards=rewards)[1][0, 2] == 0).all()

    def test_without_a_pair_there_is_nothing(self):
        rewards = torch.full_like(REWARDS, NAN)
        rewards[0, 0] = 1.0
        value, grad = run(rewards=rewards)
        assert value == 0
        assert (grad == 0).all()
        with pytest.raises(ScoreError, match="no pair has two finite rewards"):
            prdp_coefficients(LOGP, LOGP_OLD, LOGP_REF, rewards, ALL)


class TestTwoPasses:
    @pytest.mark.parametrize("clip", [INF, 0.1, 0.02])
    def test_step_by_step_gives_the_same_gradient(self, clip):
        """A toy policy whose parameter moves every step's log-probability in its own way."""
        parameter = random(G, seed=5, scale=0.1).requires_grad_()
        features = random(P, G, T, G, seed=6)

        def logp(step: slice = slice(None)) -> Tensor:
            return LOGP_OLD[:, :, step] + torch.tanh(features[:, :, step] @ parameter)

        loss = prdp(logp(), LOGP_OLD, LOGP_REF, REWARDS, MASK, beta=0.5, clip=clip)
        (whole,) = torch.autograd.grad(loss.total / loss.count, parameter)
        with torch.no_grad():
            first = logp()
        c = prdp_coefficients(first, LOGP_OLD, LOGP_REF, REWARDS, MASK, beta=0.5, clip=clip)
        assert not c.requires_grad
        parts = [
            torch.autograd.grad((c[:, :, t : t + 1] * logp(slice(t, t + 1))).sum(), parameter)[0] for t in range(T)
        ]
        torch.testing.assert_close(sum(parts), whole)

    def test_it_works_without_grad_mode(self):
        with torch.no_grad():
            c = prdp_coefficients(LOGP, LOGP_OLD, LOGP_REF, REWARDS, ALL, beta=0.5)
        assert torch.equal(c, run()[1])


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"beta": 0.0}, r"objectives.prdp: beta must be above 0; got 0.0"),
            ({"beta": -1.0}, "beta must be above 0"),
            ({"beta": NAN}, "beta must be above 0"),
            ({"clip": -0.1}, r"clip must be >= 0, or .inf for no bound; got -0.1"),
            ({"clip": NAN}, "clip must be >= 0"),
            ({"logp_reduction": "max"}, "logp_reduction must be sum or mean; got 'max'"),
        ],
    )
    def test_options(self, options, message, friendly_errors):
        with pytest.raises(RecipeError, match=message):
            run(**options)

    def test_shapes(self, friendly_errors):
        with pytest.raises(ShapeError, match=r"G >= 2; got G = 1"):
            one_group([0.0], [1.0])
        with pytest.raises(ShapeError, match=r"rewards must be \[P, G\]; got \[2, 4, 3\].*sum it over the live steps"):
            run(rewards=LOGP)
        with pytest.raises(ShapeError, match=r"logp_ref must be \[P, G, T\] with T = 3"):
            run(ref=LOGP_REF[:, :, :2])

    def test_numbers_that_are_none(self):
        logp = LOGP.clone()
        logp[1, 2, 0] = NAN
        with pytest.raises(NumericsError, match="not finite"):
            run(logp)
