"""Grids and steps of processes, against the schedulers of diffusers they read."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import Generator, Tensor

from guerdon.diffusion.processes import DiffusionProcess, FlowProcess, process_of
from guerdon.errors import RecipeError

# as Stable Diffusion 1.5 has it
STABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def walk(process: DiffusionProcess | FlowProcess, x: Tensor, output: Tensor, steps: int) -> Tensor:
    grid = process.grid(steps, deterministic=True)
    for i in range(steps):
        x = process.step(x, output, grid, i).mean
    return x


# -- diffusion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_deterministic_sampler_is_diffusers_ddim(prediction, spacing):
    scheduler = DDIMScheduler(**STABLE, prediction_type=prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    x, output = noise(2, 3, 4, 4), 0.5 * noise(2, 3, 4, 4, seed=1)
    process = DiffusionProcess.from_scheduler(scheduler)
    grid = process.grid(20)
    assert grid.times.tolist() == scheduler.timesteps.tolist()
    found = walk(process, x, output, 20)
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x, eta=0.0).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_step_with_noise_is_diffusers_ddim(eta):
    scheduler = DDIMScheduler(**STABLE)
    scheduler.set_timesteps(10)
    x, output, z = noise(2, 4), noise(2, 4, seed=1), noise(2, 4, seed=2)
    process = DiffusionProcess.from_scheduler(scheduler, eta=eta)
    grid = process.grid(10)
    for i, t in enumerate(scheduler.timesteps):
        step = process.step(x, output, grid, i)
        expected = scheduler.step(output, t, x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(step.mean + step.std * z, expected, rtol=1e-4, atol=1e-5)
    # with an offset of 1 the last step leads from time 1 to time 0 and has noise
    assert grid.stochastic == (True,) * 10


def test_eta_1_with_all_times_is_ddpm():
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False, variance_type="fixed_small")
    process = DiffusionProcess.from_scheduler(scheduler)
    x, output = noise(2, 4), noise(2, 4, seed=1)
    grid = process.grid(1000)
    i = 1000 - 1 - 500
    step = process.step(x, output, grid, i)
    found = scheduler.step(output, 500, x, generator=Generator().manual_seed(3))
    drawn = (found.prev_sample - step.mean) / step.std
    torch.testing.assert_close(drawn, noise(2, 4, seed=3), rtol=1e-3, atol=1e-3)


def test_clipping_follows_the_scheduler():
    clips = DiffusionProcess.from_scheduler(DDPMScheduler())
    assert clips.clip == 1.0
    assert DiffusionProcess.from_scheduler(DDIMScheduler(clip_sample_range=2.0)).clip == 2.0
    # PNDM ends at the level of time 0 unless told otherwise; DDIM would end at 1
    pndm = DiffusionProcess.from_scheduler(PNDMScheduler())
    assert pndm.alpha_bar_final == pytest.approx(0.9999, abs=1e-6)
    # PNDM knows no clipping: DDIM's own default must not come in
    assert DiffusionProcess.from_scheduler(PNDMScheduler(beta_schedule="scaled_linear")).clip is None


def test_a_last_step_to_the_sample_has_no_noise():
    process = DiffusionProcess.from_scheduler(DDIMScheduler(clip_sample=False))  # ends at alpha_bar 1
    assert process.grid(4).stochastic == (True, True, True, False)
    x, output = noise(1, 4), noise(1, 4, seed=1)
    step = process.step(x, output, process.grid(4), 3)
    assert step.std.item() == 0
    torch.testing.assert_close(step.mean, step.x0)


def test_a_grid_that_ends_where_it_stands_takes_the_sample():
    # offset 0 and the last level that of time 0: there is no step left to make
    process = DiffusionProcess.from_scheduler(DDIMScheduler(set_alpha_to_one=False, clip_sample=False))
    grid = process.grid(4)
    assert grid.levels[-1] == 1
    assert grid.stochastic[-1] is False


def test_eta_0_has_no_noise_anywhere():
    process = DiffusionProcess.from_scheduler(DDIMScheduler(**STABLE), eta=0.0)
    assert not any(process.grid(5).stochastic)


def test_times_of_other_spacings():
    assert process_of(DDIMScheduler(timestep_spacing="linspace")).grid(4).times.tolist() == [999, 666, 333, 0]
    assert process_of(DDIMScheduler(), spacing="trailing").grid(4).times.tolist() == [999, 749, 499, 249]


def test_a_start_without_signal_is_told():
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=False)
    with pytest.warns(UserWarning, match=r"alpha_bar = 2\.4e-09: .*spacing: leading"):
        DiffusionProcess.from_scheduler(scheduler).grid(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiffusionProcess.from_scheduler(DDIMScheduler(**STABLE)).grid(10)


def test_losses_of_a_diffusion_process():
    x0, eps = noise(3, 4), noise(3, 4, seed=1)
    times = torch.tensor([10.0, 500.0, 990.0])
    scheduler = DDPMScheduler(clip_sample=False)
    for prediction, target in (
        ("epsilon", eps),
        ("v_prediction", scheduler.get_velocity(x0, eps, times.long())),
        ("sample", x0),
    ):
        process = DiffusionProcess.from_scheduler(DDPMScheduler(clip_sample=False, prediction_type=prediction))
        torch.testing.assert_close(process.loss(target, x0, eps, times), torch.zeros(3), rtol=0, atol=1e-10)
        x = process.noised(x0, eps, times)
        torch.testing.assert_close(x, scheduler.add_noise(x0, eps, times.long()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(process.predicted_x0(x, target, times), x0, rtol=1e-2, atol=1e-3)
    assert process.network_time(times).tolist() == [10, 500, 990]
    drawn = process.draw_times(2000, Generator().manual_seed(0))
    assert (drawn.min().item(), drawn.max().item()) == (0, 999)


# -- flow --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_deterministic_flow_is_diffusers_euler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = FlowProcess.from_scheduler(scheduler)
    grid = process.grid(8)
    scheduler.set_timesteps(8)
    torch.testing.assert_close(grid.times.float(), scheduler.timesteps)
    torch.testing.assert_close(grid.levels.float(), scheduler.sigmas)
    assert grid.stochastic == (True,) * 7 + (False,)
    x, v = noise(2, 4), noise(2, 4, seed=1)
    found = walk(process, x, v, 8)
    for t in scheduler.timesteps:
        x = scheduler.step(v, t, x).prev_sample
    torch.testing.assert_close(found, x)


def test_an_even_grid_is_shifted():
    process = process_of(FlowMatchEulerDiscreteScheduler(shift=3.0), spacing="even")
    grid = process.grid(4)
    expected = [3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert grid.levels.tolist() == pytest.approx(expected)
    assert grid.times.tolist() == pytest.approx([1000 * s for s in expected[:-1]])


def test_a_scheduler_that_shifts_by_size():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    # 256 positions are the small end: mu = 0.5
    process = process_of(scheduler, tokens=256)
    scheduler.set_timesteps(6, mu=0.5)
    torch.testing.assert_close(process.grid(6).levels.float(), scheduler.sigmas)
    with pytest.raises(RecipeError, match="shifts by the size of the image"):
        process_of(scheduler).grid(6)


def test_a_flow_step_has_the_noise_of_its_setting():
    scheduler = FlowMatchEulerDiscreteScheduler()
    x, v = noise(2, 4), noise(2, 4, seed=1)
    for std, level, expected in (("flow_grpo", 0.7, 0.7 * (0.75 / 0.25) ** 0.5), ("dance", 0.3, 0.3)):
        process = process_of(scheduler, std=std, noise_level=level, spacing="even")
        step = process.step(x, v, process.grid(4), 1)
        assert step.std.item() == pytest.approx(expected * 0.25**0.5, rel=1e-6)
        assert process.time_step(process.grid(4), 1) == pytest.approx(0.25)
    # the first step, at sigma 1, takes the second time for the bar
    step = process_of(scheduler, spacing="even").step(x, v, process.grid(4), 0)
    assert step.std.item() == pytest.approx(0.7 * (1 / 0.25) ** 0.5 * 0.5, rel=1e-6)


def test_losses_of_a_flow():
    process = process_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    x0, eps, times = noise(3, 4), noise(3, 4, seed=1), torch.tensor([0.1, 0.5, 0.9])
    assert process.loss(eps - x0, x0, eps, times).tolist() == [0, 0, 0]
    assert process.loss(eps - x0 + 1, x0, eps, times).tolist() == pytest.approx([1, 1, 1])
    x = process.noised(x0, eps, times)
    torch.testing.assert_close(process.predicted_x0(x, eps - x0, times), x0)
    assert process.network_time(times).tolist() == pytest.approx([100, 500, 900])


def test_training_times_of_a_flow():
    draw = lambda **options: process_of(FlowMatchEulerDiscreteScheduler(**options.pop("scheduler", {})), **options)  # noqa: E731
    generator = Generator().manual_seed(0)
    uniform = draw(times="uniform").draw_times(20_000, generator)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)
    normal = draw().draw_times(20_000, generator).logit()
    assert normal.mean().item() == pytest.approx(0, abs=0.03)
    assert normal.std().item() == pytest.approx(1, abs=0.03)
    # sigma -> 3 sigma / (1 + 2 sigma) adds log 3 to the logit
    shifted = draw(scheduler={"shift": 3.0}).draw_times(20_000, generator).logit()
    assert shifted.mean().item() == pytest.approx(1.0986, abs=0.03)


# -- which process, and what it does not take --------------------------------------------------------------------------


def test_a_scheduler_says_which_process_it_makes():
    assert process_of(DDPMScheduler(), eta=0.5).kind == "diffusion"
    assert process_of(FlowMatchEulerDiscreteScheduler(), std=None).kind == "flow"


@pytest.mark.parametrize(
    ("scheduler", "settings", "words"),
    [
        (DDPMScheduler, {"noise_level": 0.3}, "policy.noise_level is a setting of a flow policy, and DDPMScheduler"),
        (FlowMatchEulerDiscreteScheduler, {"eta": 1.0}, "policy.eta is a setting of a diffusion policy"),
        (
            FlowMatchEulerDiscreteScheduler,
            {"std": "dancing"},
            "std must be one of flow_grpo, dance.*Did you mean 'dance'",
        ),
        (FlowMatchEulerDiscreteScheduler, {"noise_level": -1.0}, "noise_level must be 0 or more"),
        (DDPMScheduler, {"eta": 1.5}, r"eta must be in \[0, 1\]; got 1.5"),
        (DDPMScheduler, {"spacing": "even"}, "spacing must be leading, trailing or linspace"),
    ],
)
def test_wrong_settings(friendly_errors, scheduler, settings, words):
    with pytest.raises(RecipeError, match=words):
        process_of(scheduler(), **settings)


def test_wrong_schedulers():
    with pytest.raises(RecipeError, match="has no schedule of betas"):
        DiffusionProcess.from_scheduler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(RecipeError, match="a flow needs a FlowMatchEulerDiscreteScheduler; got DDPMScheduler"):
        FlowProcess.from_scheduler(DDPMScheduler())
    with pytest.raises(RecipeError, match="dynamic thresholding"):
        process_of(DDPMScheduler(thresholding=True))


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (DDPMScheduler(), 0),
        (DDPMScheduler(), 1001),
        (DDIMScheduler(**STABLE), 1000),
        (FlowMatchEulerDiscreteScheduler(), 0),
    ],
)
def test_wrong_numbers_of_steps(scheduler, steps):
    with pytest.raises(RecipeError, match=r"policy\.steps"):
        process_of(scheduler).grid(steps)
