"""The maths of denoising steps, against numbers written out, closed forms and diffusers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from guerdon.diffusion.steps import (
    add_noise,
    convert,
    dance_std,
    ddim_step,
    denoising_loss,
    diffusion_score,
    flow_grpo_std,
    flow_score,
    flow_sde_step,
    gaussian_kl,
    gaussian_log_prob,
    guide,
    interpolate,
    v_target,
)
from guerdon.errors import RecipeError, ShapeError

D64 = torch.float64


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=D64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=D64, generator=torch.Generator().manual_seed(seed))


# -- forms of a prediction ---------------------------------------------------------------------------------------------


def test_noised_samples_and_targets_by_hand():
    x0, eps = row(2.0, -1.0), row(0.5, 1.0)
    # alpha_bar 0.64: a = 0.8, s = 0.6
    torch.testing.assert_close(add_noise(x0, eps, 0.64), row(1.9, -0.2))
    torch.testing.assert_close(v_target(x0, eps, 0.64), row(-0.8, 1.4))
    torch.testing.assert_close(interpolate(x0, eps, 0.25), row(1.625, -0.5))


def test_one_level_per_sample():
    x0, eps = torch.ones(2, 3, dtype=D64), torch.zeros(2, 3, dtype=D64)
    found = add_noise(x0, eps, torch.tensor([0.25, 0.81], dtype=D64))
    torch.testing.assert_close(found, torch.tensor([[0.5] * 3, [0.9] * 3], dtype=D64))


@pytest.mark.parametrize("alpha_bar", [0.001, 0.3, 0.99])
def test_forms_round_trip(alpha_bar):
    x0, eps = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    x, v = add_noise(x0, eps, alpha_bar), v_target(x0, eps, alpha_bar)
    for output, kind in ((eps, "epsilon"), (v, "v_prediction"), (x0, "sample")):
        found = convert(x, output, alpha_bar, kind)
        for value, expected in ((found.x0, x0), (found.eps, eps), (found.v, v)):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_forms_of_a_flow():
    x0, eps = noise(2, 5), noise(2, 5, seed=1)
    step = flow_sde_step(interpolate(x0, eps, 0.7), eps - x0, 0.7, 0.5, flow_grpo_std(0.7))
    torch.testing.assert_close(step.x0, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step.eps, eps, rtol=1e-12, atol=1e-12)


def test_scores_are_gradients_of_the_log_density():
    # all mass at x0: the states are N(sqrt(alpha_bar) x0, 1 - alpha_bar), or N((1 - sigma) x0, sigma^2)
    x0, eps = noise(1, 4), noise(1, 4, seed=1)
    x = add_noise(x0, eps, 0.3)
    expected = -(x - math.sqrt(0.3) * x0) / 0.7
    torch.testing.assert_close(diffusion_score(convert(x, x0, 0.3, "sample").eps, 0.3), expected)
    x = interpolate(x0, eps, 0.6)
    torch.testing.assert_close(flow_score(x, eps - x0, 0.6), -(x - 0.4 * x0) / 0.36)


def test_an_unknown_prediction_type(friendly_errors):
    with pytest.raises(RecipeError, match=r"prediction_type must be one of .*got 'v'"):
        convert(row(1.0), row(1.0), 0.5, "v")


def test_losses(friendly_errors):
    assert denoising_loss(row(1.0, 3.0), row(0.0, 1.0)).tolist() == [2.5]
    with pytest.raises(ShapeError, match=r"target must have the shape of prediction, \[1, 2\]; got \[1, 1\]"):
        denoising_loss(row(1.0, 3.0), row(0.0))


# -- DDIM --------------------------------------------------------------------------------------------------------------


def test_a_ddim_step_by_hand():
    # x0 = (1 - 0.6 * 0.5) / 0.8 = 0.875; variance 0.19 / 0.36 * (1 - 0.64 / 0.81)
    step = ddim_step(row(1.0), row(0.5), 0.64, 0.81, 0.5)
    variance = 0.25 * 0.19 / 0.36 * (1 - 0.64 / 0.81)
    assert step.x0.item() == pytest.approx(0.875)
    assert step.std.item() == pytest.approx(math.sqrt(variance))
    assert step.mean.item() == pytest.approx(0.9 * 0.875 + math.sqrt(0.19 - variance) * 0.5)


def test_eta_1_is_the_ancestral_posterior():
    now, after = 0.3, 0.45
    x0, eps = noise(2, 3), noise(2, 3, seed=1)
    x = add_noise(x0, eps, now)
    step = ddim_step(x, eps, now, after, 1.0)
    alpha = now / after
    mean = math.sqrt(after) * (1 - alpha) / (1 - now) * x0 + math.sqrt(alpha) * (1 - after) / (1 - now) * x
    torch.testing.assert_close(step.mean, mean, rtol=1e-12, atol=1e-12)
    assert step.std.item() ** 2 == pytest.approx((1 - after) / (1 - now) * (1 - alpha), rel=1e-12)


def test_eta_0_is_deterministic_ddim():
    x0, eps = noise(2, 3), noise(2, 3, seed=1)
    step = ddim_step(add_noise(x0, eps, 0.3), eps, 0.3, 0.6, 0.0)
    assert step.std.item() == 0
    torch.testing.assert_close(step.mean, add_noise(x0, eps, 0.6), rtol=1e-12, atol=1e-12)


def test_eta_may_differ_between_samples():
    x, eps = noise(2, 3), noise(2, 3, seed=1)
    step = ddim_step(x, eps, 0.3, 0.6, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(step.mean[:1], ddim_step(x[:1], eps[:1], 0.3, 0.6, 0.0).mean)
    torch.testing.assert_close(step.mean[1:], ddim_step(x[1:], eps[1:], 0.3, 0.6, 1.0).mean)
    assert step.std.shape == (2, 1)


def test_clipping_holds_x0_and_leaves_the_noise():
    step = ddim_step(row(2.0), row(0.0), 0.25, 0.64, 0.0, clip=1.0)
    assert step.x0.item() == 1.0
    assert step.eps.item() == 0.0
    assert step.mean.item() == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("after", "eta", "words"), [(0.3, 1.0, "above alpha_bar"), (0.6, 1.5, r"eta must be in \[0, 1")]
)
def test_wrong_ddim_steps(after, eta, words):
    with pytest.raises(RecipeError, match=words):
        ddim_step(row(1.0), row(1.0), 0.3, after, eta)


# -- flow SDE ----------------------------------------------------------------------------------------------------------


def test_a_flow_step_by_hand():
    # s = 0.7 sqrt(0.5 / 0.5), dt = -0.1
    step = flow_sde_step(row(1.0), row(2.0), 0.5, 0.4, flow_grpo_std(0.7))
    assert step.std.item() == pytest.approx(0.7 * math.sqrt(0.1))
    assert step.mean.item() == pytest.approx(1 * (1 - 0.049) + 2 * (1 + 0.245) * -0.1)


def test_noise_functions():
    sigma, after = torch.tensor([1.0, 0.8], dtype=D64), torch.tensor([0.9, 0.7], dtype=D64)
    # at sigma = 1 the next one stands in below the bar
    torch.testing.assert_close(flow_grpo_std(0.7)(sigma, after), torch.tensor([0.7 * 10**0.5, 1.4], dtype=D64))
    assert dance_std(0.3)(sigma, after).tolist() == [0.3, 0.3]
    for made in (flow_grpo_std, dance_std):
        with pytest.raises(RecipeError, match="must be 0 or more"):
            made(-0.1)


@pytest.mark.parametrize("made", [flow_grpo_std, dance_std])
def test_without_noise_a_flow_step_is_eulers(made):
    x, v = noise(2, 3), noise(2, 3, seed=1)
    step = flow_sde_step(x, v, 0.6, 0.35, made(0.0))
    assert step.std.item() == 0
    assert torch.equal(step.mean, x + v * (torch.tensor(0.35, dtype=D64) - 0.6))


def test_scale_switches_the_noise_off_for_some_samples():
    x, v = noise(2, 3), noise(2, 3, seed=1)
    step = flow_sde_step(x, v, 0.6, 0.4, flow_grpo_std(0.7), scale=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(step.mean[:1], x[:1] - 0.2 * v[:1])
    torch.testing.assert_close(step.mean[1:], flow_sde_step(x[1:], v[1:], 0.6, 0.4, flow_grpo_std(0.7)).mean)
    assert step.std.flatten().tolist() == pytest.approx([0.0, 0.7 * (0.6 / 0.4 * 0.2) ** 0.5])


def test_dances_step_is_the_same_step():
    # DanceGRPO writes it with the score of x0 = x - sigma v
    x, v, sigma, after, eta = noise(2, 3), noise(2, 3, seed=1), 0.7, 0.5, 0.3
    x0 = x - sigma * v
    score = -(x - (1 - sigma) * x0) / sigma**2
    dt = after - sigma
    expected = x + dt * v - 0.5 * eta**2 * score * dt
    torch.testing.assert_close(flow_sde_step(x, v, sigma, after, dance_std(eta)).mean, expected)


@pytest.mark.parametrize(("sigma", "after"), [(0.5, 0.5), (0.5, 0.6), (1.1, 0.5), (0.5, -0.1)])
def test_wrong_flow_steps(sigma, after):
    with pytest.raises(RecipeError, match="times must fall from 1 to 0"):
        flow_sde_step(row(1.0), row(1.0), sigma, after, dance_std(0.3))


@pytest.mark.parametrize(
    "std_fn", [flow_grpo_std(0.3), flow_grpo_std(0.7), flow_grpo_std(1.0), dance_std(0.3), dance_std(1.0)]
)
def test_the_sde_keeps_the_marginals_of_gaussian_data(std_fn):
    m, s, count, steps = 0.8, 0.5, 100_000, 200
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(count, 1, generator=generator)  # noqa: E731
    x, sigmas = draw(), torch.linspace(1, 0, steps + 1, dtype=D64).tolist()
    for sigma, after in pairwise(sigmas):
        mean, variance = (1 - sigma) * m, (1 - sigma) ** 2 * s**2 + sigma**2
        score = -(x - mean) / variance
        # v = E[noise - x0 | x], from score = -(x + (1 - sigma) v) / sigma; in the limit at sigma = 1
        v = (-sigma * score - x) / (1 - sigma) if sigma < 1 else x - m
        step = flow_sde_step(x, v, sigma, after, std_fn, scale=float(after > 0))
        x = step.mean + step.std * draw()
    assert x.mean().item() == pytest.approx(m, rel=0.02)
    assert x.std().item() == pytest.approx(s, rel=0.02)


def test_ddim_with_noise_keeps_the_marginals_of_gaussian_data():
    m, s, count = 0.8, 0.5, 50_000
    generator = torch.Generator().manual_seed(0)
    levels = [*torch.linspace(-9, 9, 400, dtype=D64).sigmoid().tolist(), 1.0]
    x = torch.randn(count, 1, generator=generator)
    for now, after in pairwise(levels):
        score = -(x - math.sqrt(now) * m) / (now * s**2 + 1 - now)
        step = ddim_step(x, -math.sqrt(1 - now) * score, now, after, 1.0)
        x = step.mean + step.std * torch.randn(count, 1, generator=generator)
    assert x.mean().item() == pytest.approx(m, rel=0.02)
    assert x.std().item() == pytest.approx(s, rel=0.02)


# -- log-probability and divergence ------------------------------------------------------------------------------------


def test_log_probability_at_the_mean():
    mean = noise(2, 3, 2)
    for reduction, dimensions in (("mean", 1), ("sum", 6)):
        found = gaussian_log_prob(mean, mean, 0.3, reduction)
        expected = dimensions * (-math.log(0.3) - 0.5 * math.log(2 * math.pi))
        assert found.tolist() == pytest.approx([expected] * 2)


def test_log_probability_is_torchs():
    x, mean, std = noise(2, 3), noise(2, 3, seed=1), torch.tensor([0.4, 2.0], dtype=D64)
    expected = torch.distributions.Normal(mean, std[:, None]).log_prob(x).sum(1)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std, "sum"), expected)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std, "mean"), expected / 3)


def test_gradient_of_the_log_probability():
    x, mean = noise(2, 4), noise(2, 4, seed=1).requires_grad_()
    x.requires_grad_()
    gaussian_log_prob(x, mean, 0.5, "mean").sum().backward()
    torch.testing.assert_close(mean.grad, ((x - mean) / 0.25 / 4).detach())
    assert x.grad is None  # the state that was reached is a constant


def test_the_mean_of_the_score_function_is_zero():
    z = noise(200_000, 1)
    mean = torch.zeros(1, dtype=D64, requires_grad=True)
    gaussian_log_prob(0.5 * z, mean.expand(200_000, 1), 0.5).mean().backward()
    assert abs(mean.grad.item()) < 4 * 2 / math.sqrt(200_000)


def test_deterministic_steps_have_no_log_probability():
    with pytest.raises(RecipeError, match=r"a deterministic step .* has no log-probability"):
        gaussian_log_prob(row(1.0), row(1.0), 0.0)
    with pytest.raises(RecipeError, match="mask deterministic steps"):
        gaussian_kl(row(1.0), row(1.0), torch.tensor([0.0]))


def test_the_divergence_is_torchs_and_zero_only_at_equality():
    mean, other = noise(2, 3), noise(2, 3, seed=1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, 0.4), normal(other, 0.4)).sum(1)
    found = gaussian_kl(mean, other, 0.4, "sum")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gaussian_kl(mean, other, 0.4, "mean"), expected / 3)
    assert (found > 0).all()
    assert gaussian_kl(mean, mean, 0.4).tolist() == [0, 0]


def test_the_scaled_divergence_is_the_exact_one_times_the_step():
    x, v, v_ref = noise(2, 3), noise(2, 3, seed=1), noise(2, 3, seed=2)
    std_fn = flow_grpo_std(0.7)
    step, reference = flow_sde_step(x, v, 0.6, 0.45, std_fn), flow_sde_step(x, v_ref, 0.6, 0.45, std_fn)
    exact = gaussian_kl(step.mean, reference.mean, step.std)
    scaled = gaussian_kl(step.mean, reference.mean, step.std, time_step=0.15)
    torch.testing.assert_close(scaled, 0.15 * exact)
    s = 0.7 * math.sqrt(0.6 / 0.4)
    torch.testing.assert_close(scaled, (step.mean - reference.mean).square().mean(1) / (2 * s**2))
    # in terms of velocities
    factor = (1 / s + s * 0.4 / (2 * 0.6)) ** 2
    torch.testing.assert_close(exact, (v - v_ref).square().mean(1) * 0.15 / 2 * factor)


def test_an_unknown_reduction(friendly_errors):
    with pytest.raises(RecipeError, match="logp_reduction must be mean or sum; got 'total'"):
        gaussian_log_prob(row(1.0), row(1.0), 1.0, "total")


# -- guidance and precision --------------------------------------------------------------------------------------------


def test_guidance_is_affine():
    u, c = noise(2, 3), noise(2, 3, seed=1)
    assert guide(u, c, 1.0) is c
    assert guide(u, c, 0.0) is u
    torch.testing.assert_close(guide(row(1.0), row(3.0), 4.5), row(10.0))
    torch.testing.assert_close(guide(u, c, 2.5), 2.5 * c - 1.5 * u)


def test_guidance_commutes_with_the_forms():
    x, u, c = noise(2, 3), noise(2, 3, seed=1), noise(2, 3, seed=2)
    before = convert(x, guide(u, c, 3.0), 0.4, "epsilon")
    after = guide(convert(x, u, 0.4, "epsilon").v, convert(x, c, 0.4, "epsilon").v, 3.0)
    torch.testing.assert_close(before.v, after)


def test_half_precision_is_left_at_once():
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    for step in (ddim_step(x, x, 0.3, 0.5, 1.0), flow_sde_step(x, x, 0.999, 0.9, flow_grpo_std(0.7))):
        assert {value.dtype for value in step} == {torch.float32}
        assert gaussian_log_prob(x, step.mean, step.std).dtype == torch.float32
