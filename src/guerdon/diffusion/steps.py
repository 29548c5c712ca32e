"""Denoising steps as Gaussian policy steps: their mean and spread, log-probability, divergence and training targets.

A step with noise, x_next = mean + std z, has an exact log-probability, so everything that trains tokens trains it too.
Deterministic samplers have none: DDIM needs eta > 0, and a flow's ODE becomes an SDE with the same marginals. All maths
runs in float32 at least, whatever the network's precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import RecipeError, ShapeError, nearest

Prediction = Literal["epsilon", "v_prediction", "sample"]
Reduction = Literal["mean", "sum"]
Number = float | Tensor  # one for all samples, or [N]
StdFunction = Callable[[Tensor, Tensor], Tensor]

PREDICTIONS = ("epsilon", "v_prediction", "sample")
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class GaussianStep(NamedTuple):
    """The distribution of the next state, x_next ~ N(mean, std^2).

    Attributes:
        mean: [N, ...], with gradient to the network's output.
        std: [N or 1, 1, ...], the same for all dimensions of a sample; 0 = a deterministic step.
        x0: [N, ...], the clean sample that the network's output stands for.
        eps: [N, ...], the noise that it stands for.
    """

    mean: Tensor
    std: Tensor
    x0: Tensor
    eps: Tensor


class Predicted(NamedTuple):
    """One prediction of a diffusion network in its three forms, each [N, ...]: x0, eps and v."""

    x0: Tensor
    eps: Tensor
    v: Tensor


def precise(value: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is more precise."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def spread(value: Number, like: Tensor) -> Tensor:
    """A number, or one per sample [N], so that it multiplies `like` [N, ...]; in the precision of the maths."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    value = torch.as_tensor(value, dtype=dtype, device=like.device)
    return value.reshape(-1, *([1] * (like.ndim - 1)))


# -- diffusion ---------------------------------------------------------------------------------------------------------


def add_noise(x0: Float[Tensor, " N *D"], noise: Float[Tensor, " N *D"], alpha_bar: Number) -> Float[Tensor, " N *D"]:
    """Noise a sample: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise.

    Args:
        x0: [N, ...], clean samples.
        noise: [N, ...], standard normal.
        alpha_bar: cumulative product of 1 - beta, one number or [N].

    Returns:
        [N, ...].

    Gradient:
        To x0 and noise.

    Source:
        Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    """
    x0, noise = precise(x0), precise(noise)
    alpha_bar = spread(alpha_bar, x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def v_target(x0: Float[Tensor, " N *D"], noise: Float[Tensor, " N *D"], alpha_bar: Number) -> Float[Tensor, " N *D"]:
    """What a v-prediction network should say: v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0.

    Args:
        x0: [N, ...], clean samples.
        noise: [N, ...], standard normal.
        alpha_bar: one number or [N].

    Returns:
        [N, ...].

    Gradient:
        To x0 and noise.

    Source:
        Salimans & Ho 2022, Progressive Distillation, arXiv 2202.00512.
    """
    x0, noise = precise(x0), precise(noise)
    alpha_bar = spread(alpha_bar, x0)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0


def convert(
    x: Float[Tensor, " N *D"], model_output: Float[Tensor, " N *D"], alpha_bar: Number, prediction_type: Prediction
) -> Predicted:
    """What a diffusion network's output says in each of the three forms.

    With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), x = a x0 + s eps and v = a eps - s x0; so from eps:
    x0 = (x - s eps) / a; from v: x0 = a x - s v, eps = a v + s x; from x0: eps = (x - a x0) / s.

    Args:
        x: [N, ...], noisy states.
        model_output: [N, ...].
        alpha_bar: of the states, one number or [N]; above 0 for `epsilon`, below 1 for `sample`.
        prediction_type: what the output is: `epsilon`, `v_prediction` or `sample` (x0), as diffusers names them.

    Returns:
        x0, eps and v, each [N, ...].

    Raises:
        RecipeError: the prediction type is unknown.

    Gradient:
        To x and model_output.

    Example:
        >>> convert(torch.ones(1, 1), torch.zeros(1, 1), 0.25, "epsilon").x0.item()
        2.0

    Source:
        Ho et al. 2020, arXiv 2006.11239; Salimans & Ho 2022, arXiv 2202.00512.
    """
    x, model_output = precise(x), precise(model_output)
    alpha_bar = spread(alpha_bar, x)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        eps = model_output
        x0 = (x - s * eps) / a
    elif prediction_type == "v_prediction":
        x0, eps = a * x - s * model_output, a * model_output + s * x
    elif prediction_type == "sample":
        x0 = model_output
        eps = (x - a * x0) / s
    else:
        raise RecipeError(
            f"diffusion.steps: prediction_type must be one of {', '.join(PREDICTIONS)}; got {prediction_type!r}."
            f"{nearest(prediction_type, PREDICTIONS)}"
        )
    return Predicted(x0, eps, a * eps - s * x0)


def diffusion_score(eps: Float[Tensor, " N *D"], alpha_bar: Number) -> Float[Tensor, " N *D"]:
    """Gradient of the log-density of noisy states: -eps / sqrt(1 - alpha_bar).

    Args:
        eps: [N, ...], predicted noise.
        alpha_bar: of the states, below 1; one number or [N].

    Returns:
        [N, ...].

    Gradient:
        To eps.
    """
    eps = precise(eps)
    return -eps / (1 - spread(alpha_bar, eps)).sqrt()


def ddim_step(
    x: Float[Tensor, " N *D"],
    model_output: Float[Tensor, " N *D"],
    alpha_bar: Number,
    alpha_bar_prev: Number,
    eta: Number,
    prediction_type: Prediction = "epsilon",
    *,
    clip: float | None = None,
) -> GaussianStep:
    """A step of DDIM from noise level alpha_bar to the lower one alpha_bar_prev.

    std = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) (1 - alpha_bar / alpha_bar_prev)) and
    mean = sqrt(alpha_bar_prev) x0 + sqrt(1 - alpha_bar_prev - std^2) eps. eta = 1 is DDPM's ancestral step with the
    smaller of its two variances, eta = 0 the deterministic sampler.

    Args:
        x: [N, ...], states.
        model_output: [N, ...].
        alpha_bar: of x, in (0, 1); one number or [N].
        alpha_bar_prev: of the next state, above alpha_bar and at most 1; one number or [N].
        eta: share of the ancestral noise, in [0, 1]; one number or [N].
        prediction_type: see `convert`.
        clip: hold x0 within +- this, as schedulers with `clip_sample` do; the noise is left as predicted.

    Returns:
        The step; std is 0 where eta is, or where alpha_bar_prev is 1.

    Raises:
        RecipeError: alpha_bar_prev is not above alpha_bar, or eta is out of range.

    Gradient:
        To x and model_output; none to x0 where it is clipped.

    Example:
        >>> step = ddim_step(torch.ones(1, 1), torch.zeros(1, 1), 0.25, 0.64, 0.0)
        >>> round(step.mean.item(), 4), step.std.item()
        (1.6, 0.0)

    Source:
        Song et al. 2020, Denoising Diffusion Implicit Models, arXiv 2010.02502, equations 12 and 16.
    """
    x0, eps, _ = convert(x, model_output, alpha_bar, prediction_type)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    now, after, eta = spread(alpha_bar, x0), spread(alpha_bar_prev, x0), spread(eta, x0)
    if bool((after <= now).any()):
        raise RecipeError(
            f"diffusion.ddim_step: alpha_bar_prev must be above alpha_bar; got {after.flatten().tolist()} after "
            f"{now.flatten().tolist()}. Time runs from noise to the sample."
        )
    if bool(((eta < 0) | (eta > 1)).any()):
        raise RecipeError(f"diffusion.ddim_step: eta must be in [0, 1]; got {eta.flatten().tolist()}.")
    std = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
    mean = after.sqrt() * x0 + (1 - after - std.square()).clamp(min=0).sqrt() * eps
    return GaussianStep(mean, std, x0, eps)


# -- flow --------------------------------------------------------------------------------------------------------------


def interpolate(x0: Float[Tensor, " N *D"], noise: Float[Tensor, " N *D"], sigma: Number) -> Float[Tensor, " N *D"]:
    """The state of a rectified flow at time sigma: (1 - sigma) x0 + sigma noise. Its velocity is noise - x0.

    Args:
        x0: [N, ...], clean samples.
        noise: [N, ...], standard normal.
        sigma: time in [0, 1], 1 = noise; one number or [N].

    Returns:
        [N, ...].

    Gradient:
        To x0 and noise.

    Source:
        Lipman et al. 2022, Flow Matching, arXiv 2210.02747; Liu et al. 2022, Rectified Flow, arXiv 2209.03003.
    """
    x0, noise = precise(x0), precise(noise)
    sigma = spread(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def flow_score(x: Float[Tensor, " N *D"], velocity: Float[Tensor, " N *D"], sigma: Number) -> Float[Tensor, " N *D"]:
    """Gradient of the log-density of a rectified flow's states: -(x + (1 - sigma) velocity) / sigma.

    Args:
        x: [N, ...], states at time sigma.
        velocity: [N, ...], predicted noise - x0.
        sigma: above 0; one number or [N].

    Returns:
        [N, ...].

    Gradient:
        To x and velocity.
    """
    x, velocity = precise(x), precise(velocity)
    sigma = spread(sigma, x)
    return -(x + (1 - sigma) * velocity) / sigma


def flow_grpo_std(noise_level: float) -> StdFunction:
    """Flow-GRPO's noise: a sqrt(sigma / (1 - sigma)), and where sigma is 1, sigma of the next step below the bar.

    Args:
        noise_level: a, 0 or more; 0.7 in the paper.

    Returns:
        A function of sigma and the sigma that follows it.

    Raises:
        RecipeError: a is negative.

    Example:
        >>> flow_grpo_std(0.7)(torch.tensor(0.5), torch.tensor(0.4)).item()
        0.699999988079071

    Source:
        Liu et al. 2025, Flow-GRPO, arXiv 2505.05470, and its code for sigma = 1.
    """
    _check_level("noise_level", noise_level)

    def std(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_next, sigma))).sqrt()

    return std


def dance_std(eta: float) -> StdFunction:
    """DanceGRPO's noise: the same at all times.

    Args:
        eta: 0 or more; 0.3 in the paper.

    Returns:
        A function of sigma and the sigma that follows it.

    Raises:
        RecipeError: eta is negative.

    Source:
        Xue et al. 2025, DanceGRPO, arXiv 2505.07818.
    """
    _check_level("eta", eta)

    def std(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.full_like(sigma, eta)

    return std


def _check_level(name: str, value: float) -> None:
    if not value >= 0:
        raise RecipeError(f"diffusion.steps: {name} must be 0 or more; got {value}.")


def flow_sde_step(
    x: Float[Tensor, " N *D"],
    velocity: Float[Tensor, " N *D"],
    sigma: Number,
    sigma_next: Number,
    std_fn: StdFunction,
    *,
    scale: Number = 1.0,
) -> GaussianStep:
    """A step of the SDE whose marginals are those of the flow's ODE.

    With the noise s = scale * std_fn(sigma, sigma_next) and dt = sigma_next - sigma < 0:
    mean = x (1 + s^2 / (2 sigma) dt) + velocity (1 + s^2 (1 - sigma) / (2 sigma)) dt, std = s sqrt(-dt). This is the ODE
    plus a drift of -s^2 / 2 times the score, which makes up for the noise. s = 0 is Euler's step, x + velocity dt.

    Args:
        x: [N, ...], states at time sigma.
        velocity: [N, ...], predicted noise - x0.
        sigma: in (0, 1]; one number or [N].
        sigma_next: in [0, sigma); one number or [N].
        std_fn: the noise s of a time, see `flow_grpo_std` and `dance_std`.
        scale: multiplies s: 0 where a sample's step is to be deterministic; one number or [N].

    Returns:
        The step, with x0 = x - sigma velocity and eps = x + (1 - sigma) velocity.

    Raises:
        RecipeError: sigma_next is not below sigma, or a time is out of range.

    Gradient:
        To x and velocity.

    Example:
        >>> step = flow_sde_step(torch.ones(1, 1), torch.ones(1, 1), 0.5, 0.25, dance_std(0.0))
        >>> step.mean.item(), step.x0.item()
        (0.75, 0.5)

    Source:
        Liu et al. 2025, Flow-GRPO, arXiv 2505.05470; Xue et al. 2025, DanceGRPO, arXiv 2505.07818 (the same step with
        another noise).
    """
    x, velocity = precise(x), precise(velocity)
    sigma, sigma_next = spread(sigma, x), spread(sigma_next, x)
    if bool(((sigma_next >= sigma) | (sigma_next < 0) | (sigma > 1)).any()):
        raise RecipeError(
            f"diffusion.flow_sde_step: times must fall from 1 to 0; got {sigma_next.flatten().tolist()} after "
            f"{sigma.flatten().tolist()}."
        )
    dt = sigma_next - sigma
    s = spread(scale, x) * std_fn(sigma, sigma_next)
    mean = x * (1 + s.square() / (2 * sigma) * dt) + velocity * (1 + s.square() * (1 - sigma) / (2 * sigma)) * dt
    return GaussianStep(mean, s * (-dt).sqrt(), x - sigma * velocity, x + (1 - sigma) * velocity)


# -- what both share ---------------------------------------------------------------------------------------------------


def gaussian_log_prob(
    x_next: Float[Tensor, " N *D"], mean: Float[Tensor, " N *D"], std: Number, reduction: Reduction = "mean"
) -> Float[Tensor, " N"]:
    """Log-density of the next state: -(x_next - mean)^2 / (2 std^2) - log std - log sqrt(2 pi), over all dimensions.

    `sum` is the log-density itself; `mean` divides it by the number of dimensions d, so a ratio of such numbers is the
    true one to the power 1 / d. The released code of the image methods takes the mean, with clips of 1e-4 to match.

    Args:
        x_next: [N, ...], the state that was reached; taken as a constant.
        mean: [N, ...], of the step.
        std: of the step; one number, [N], or shaped as in `GaussianStep`.
        reduction: `mean` or `sum` over dimensions.

    Returns:
        [N], in nats (`mean`: nats per dimension).

    Raises:
        RecipeError: std is 0 somewhere: a deterministic step has no log-probability; or the reduction is unknown.

    Gradient:
        To mean and std: (x_next - mean) / std^2, divided by d with `mean`.

    Example:
        >>> round(gaussian_log_prob(torch.zeros(1, 4), torch.zeros(1, 4), 1.0, "sum").item(), 4)
        -3.6758

    Source:
        Black et al. 2023, Training Diffusion Models with Reinforcement Learning (DDPO), arXiv 2305.13301.
    """
    x_next, mean = precise(x_next).detach(), precise(mean)
    std = spread(std, mean)
    if bool((std <= 0).any()):
        raise RecipeError(
            "diffusion.gaussian_log_prob: std must be positive; a deterministic step (eta = 0, or the last one) has no "
            "log-probability. Sample with noise, or mask the step."
        )
    density = -(x_next - mean).square() / (2 * std.square()) - std.log() - _LOG_SQRT_2PI
    return reduce(density, reduction)


def gaussian_kl(
    mean: Float[Tensor, " N *D"],
    mean_ref: Float[Tensor, " N *D"],
    std: Number,
    reduction: Reduction = "mean",
    *,
    time_step: Number | None = None,
) -> Float[Tensor, " N"]:
    """Divergence of two steps with the same std: (mean - mean_ref)^2 / (2 std^2) over all dimensions.

    Args:
        mean: [N, ...], of the policy's step.
        mean_ref: [N, ...], of the reference's step from the same state.
        std: of both; one number, [N], or shaped as in `GaussianStep`.
        reduction: `mean` or `sum` over dimensions, as for the log-probability.
        time_step: sigma - sigma_next: multiply by it, which gives the quantity in the released code of Flow-GRPO, the
            divergence without the step's length. None = the exact divergence.

    Returns:
        [N], 0 or more, in nats.

    Raises:
        RecipeError: std is 0 somewhere, or the reduction is unknown.

    Gradient:
        To mean and mean_ref.

    Example:
        >>> gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2), 0.5).item()
        2.0

    Source:
        Fan et al. 2023, DPOK, arXiv 2305.16381; Liu et al. 2025, Flow-GRPO, arXiv 2505.05470.
    """
    mean, mean_ref = precise(mean), precise(mean_ref)
    std = spread(std, mean)
    if bool((std <= 0).any()):
        raise RecipeError("diffusion.gaussian_kl: std must be positive; mask deterministic steps.")
    divergence = (mean - mean_ref).square() / (2 * std.square())
    if time_step is not None:
        divergence = divergence * spread(time_step, mean)
    return reduce(divergence, reduction)


def reduce(per_dimension: Tensor, reduction: Reduction) -> Tensor:
    """Mean or sum over all dimensions but the first: [N, ...] -> [N]."""
    if reduction not in ("mean", "sum"):
        raise RecipeError(
            f"logp_reduction must be mean or sum; got {reduction!r}.{nearest(reduction, ('mean', 'sum'))}"
        )
    flat = per_dimension.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def denoising_loss(prediction: Float[Tensor, " N *D"], target: Float[Tensor, " N *D"]) -> Float[Tensor, " N"]:
    """Mean squared error of each sample over its dimensions.

    Args:
        prediction: [N, ...], a network's output.
        target: [N, ...], the noise, `v_target`, x0, or for flows noise - x0.

    Returns:
        [N].

    Raises:
        ShapeError: the shapes differ.

    Gradient:
        To both.
    """
    if prediction.shape != target.shape:
        raise ShapeError(
            f"diffusion.denoising_loss: target must have the shape of prediction, {list(prediction.shape)}; "
            f"got {list(target.shape)}."
        )
    return (precise(prediction) - precise(target)).square().flatten(1).mean(1)


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: u + scale (c - u), for outputs of any prediction type.

    Args:
        unconditional: u, the output without a condition, any shape.
        conditional: c, the output with it, the same shape.
        scale: 1 gives c and 0 gives u, to the bit; more than 1 goes beyond c.

    Returns:
        The guided output, in float32 at least.

    Gradient:
        To both.

    Example:
        >>> guide(torch.tensor([0.0]), torch.tensor([1.0]), 4.5)
        tensor([4.5000])

    Source:
        Ho & Salimans 2022, Classifier-Free Diffusion Guidance, arXiv 2207.12598.
    """
    if scale == 1:
        return conditional
    if scale == 0:
        return unconditional
    unconditional, conditional = precise(unconditional), precise(conditional)
    return unconditional + scale * (conditional - unconditional)
