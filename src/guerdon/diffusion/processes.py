"""What differs between diffusion and flow models: the grid of times, a step as a Gaussian, and the training loss.

A process is a small object without weights. `DiffusionProcess` is DDPM and DDIM, `FlowProcess` a rectified flow whose
ODE becomes an SDE. Both read their schedule from a scheduler of diffusers, so a saved pipeline brings its own.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Generator, Tensor

from guerdon.diffusion.steps import (
    PREDICTIONS,
    GaussianStep,
    Prediction,
    StdFunction,
    add_noise,
    convert,
    dance_std,
    ddim_step,
    denoising_loss,
    flow_grpo_std,
    flow_sde_step,
    interpolate,
    v_target,
)
from guerdon.errors import RecipeError, nearest

DiffusionSpacing = Literal["leading", "trailing", "linspace"]
FlowSpacing = Literal["scheduler", "even"]
FlowNoise = Literal["flow_grpo", "dance"]

# below this share of signal an x0 computed from predicted noise is that noise's error, many times enlarged
_FAINT = 1e-4


class Grid(NamedTuple):
    """The times of a sampler, from noise to the sample.

    Attributes:
        times: [T], what the network is told at each step.
        levels: [T + 1], the noise level of each state: alpha_bar (rising) or sigma (falling to 0).
        stochastic: T flags, whether the step has noise.
    """

    times: Tensor
    levels: Tensor
    stochastic: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.stochastic)


@dataclass(frozen=True)
class DiffusionProcess:
    """DDPM and DDIM: a variance-preserving process with discrete times.

    Attributes:
        alphas_bar: [N], cumulative products of 1 - beta of the training schedule.
        prediction_type: what the network's output is: `epsilon`, `v_prediction` or `sample`.
        eta: noise of a sampling step: 1 = DDPM's, 0 = none (then there is nothing for a policy gradient to learn from).
        spacing: how the times of a sampler are picked, as diffusers names it.
        offset: added to the times of spacing `leading`.
        alpha_bar_final: of the state after the last step: 1, or that of time 0.
        clip: hold predicted samples within +- this; None = not.
    """

    alphas_bar: Tensor
    prediction_type: Prediction = "epsilon"
    eta: float = 1.0
    spacing: DiffusionSpacing = "leading"
    offset: int = 0
    alpha_bar_final: float = 1.0
    clip: float | None = None

    kind = "diffusion"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise RecipeError(f"policy.eta must be in [0, 1]; got {self.eta}.")
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise RecipeError(f"policy.spacing must be leading, trailing or linspace; got {self.spacing!r}.")
        if self.prediction_type not in PREDICTIONS:
            raise RecipeError(
                f"policy.prediction_type must be one of {', '.join(PREDICTIONS)}; got {self.prediction_type!r}."
                f"{nearest(self.prediction_type, PREDICTIONS)}"
            )

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, *, eta: float = 1.0, spacing: DiffusionSpacing | None = None
    ) -> DiffusionProcess:
        """Read the schedule of any diffusers scheduler with betas (DDPM, DDIM, PNDM, DPM-Solver, ...).

        Args:
            scheduler: its configuration is read; it is not run.
            eta: noise of a sampling step.
            spacing: of the times; None = the scheduler's own.

        Raises:
            RecipeError: the scheduler's configuration asks for dynamic thresholding, or is of another kind.
        """
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        # what a scheduler left at its own default must not become that of another class
        config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
        if "beta_schedule" not in config:
            raise RecipeError(
                f"policy: {type(scheduler).__name__} has no schedule of betas. Use kind: flow for a flow-matching "
                "scheduler."
            )
        if config.get("thresholding"):
            raise RecipeError("policy: schedulers with dynamic thresholding (thresholding: true) are not supported.")
        read = cast(Any, DDIMScheduler.from_config(config))
        clips = config.get("clip_sample", False)  # a scheduler that does not know the setting does not clip
        return cls(
            alphas_bar=read.alphas_cumprod.double(),
            prediction_type=read.config["prediction_type"],
            eta=eta,
            spacing=spacing or read.config["timestep_spacing"],
            offset=read.config["steps_offset"],
            alpha_bar_final=float(read.final_alpha_cumprod),
            clip=float(config.get("clip_sample_range", 1.0)) if clips else None,
        )

    def grid(self, steps: int, *, deterministic: bool = False) -> Grid:
        """The times of a sampler of that many steps.

        Each step leads to the next time of the grid, and the last to `alpha_bar_final`. A step has noise unless eta is
        0, the sampler is deterministic, or it ends at alpha_bar 1.

        Raises:
            RecipeError: there are more steps than times.
        """
        count = len(self.alphas_bar)
        if not 1 <= steps <= count:
            raise RecipeError(f"policy.steps must be from 1 to {count}, the times of the schedule; got {steps}.")
        if self.spacing == "leading":
            times = torch.arange(steps - 1, -1, -1) * (count // steps) + self.offset
        elif self.spacing == "trailing":
            times = (count - torch.arange(steps, dtype=torch.float64) * count / steps).round().long() - 1
        else:
            times = torch.linspace(count - 1, 0, steps, dtype=torch.float64).round().long()
        if times[0] >= count:
            raise RecipeError(
                f"policy.steps = {steps} with steps_offset {self.offset} begins at time {int(times[0])}, beyond the "
                f"schedule's {count}. Take fewer steps."
            )
        levels = torch.cat([self.alphas_bar[times], torch.tensor([self.alpha_bar_final], dtype=torch.float64)])
        if levels[-1] <= levels[-2]:  # the last time is 0 already: what is left is to take the predicted sample
            levels[-1] = 1.0
        if self.prediction_type == "epsilon" and self.clip is None and levels[0] < _FAINT:
            warnings.warn(
                f"the first time of the sampler has alpha_bar = {levels[0]:.1e}: a sample predicted from noise there is "
                "its error, enlarged. Use spacing: leading, a v-prediction model, or clip_sample.",
                stacklevel=2,
            )
        noisy = self.eta > 0 and not deterministic
        return Grid(times, levels, tuple(noisy and level < 1 for level in levels[1:].tolist()))

    def step(self, x: Tensor, model_output: Tensor, grid: Grid, i: int, scale: Tensor | float = 1.0) -> GaussianStep:
        """Step i of a grid.

        Args:
            x: [N, ...], states at level i.
            model_output: [N, ...].
            grid: from `grid`.
            i: from 0.
            scale: multiplies the noise; 0 where a sample's step is to be deterministic; one number or [N].
        """
        before, after = float(grid.levels[i]), float(grid.levels[i + 1])
        eta = self.eta * scale if grid.stochastic[i] else 0.0
        return ddim_step(x, model_output, before, after, eta, self.prediction_type, clip=self.clip)

    def time_step(self, grid: Grid, i: int) -> float:
        """The length of step i, for the divergence per unit of time: 1, as diffusion's times are discrete."""
        return 1.0

    def draw_times(self, count: int, generator: Generator) -> Tensor:
        """Training times [count], uniform over the schedule."""
        return torch.randint(len(self.alphas_bar), (count,), generator=generator).float()

    def network_time(self, times: Tensor) -> Tensor:
        """Training times as the network is told them."""
        return times.long()

    def noised(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """States of the training times."""
        return add_noise(x0, noise, self._alpha_bar(times))

    def loss(self, model_output: Tensor, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """[N], the mean squared error of what the network is trained to say."""
        if self.prediction_type == "epsilon":
            return denoising_loss(model_output, noise)
        if self.prediction_type == "sample":
            return denoising_loss(model_output, x0)
        return denoising_loss(model_output, v_target(x0, noise, self._alpha_bar(times)))

    def predicted_x0(self, x: Tensor, model_output: Tensor, times: Tensor) -> Tensor:
        """[N, ...], the clean sample that an output at training times stands for."""
        return convert(x, model_output, self._alpha_bar(times), self.prediction_type).x0

    def _alpha_bar(self, times: Tensor) -> Tensor:
        return self.alphas_bar.to(times.device)[times.long()]


def _std_function(name: str, noise_level: float) -> StdFunction:
    return flow_grpo_std(noise_level) if name == "flow_grpo" else dance_std(noise_level)


@dataclass(frozen=True)
class FlowProcess:
    """A rectified flow, sampled by the SDE that keeps the marginals of its ODE.

    Attributes:
        scheduler: a FlowMatchEulerDiscreteScheduler of diffusers: its shift and spacing are used.
        std: how much noise a time gets: `flow_grpo`, a sqrt(sigma / (1 - sigma)), or `dance`, the same at all times.
        noise_level: a (0.7 in Flow-GRPO), or DanceGRPO's eta (0.3).
        spacing: `scheduler` takes the scheduler's grid as its pipeline does; `even` divides [0, 1] evenly, then shifts.
        times: how training draws sigma: `logit_normal` (standard normal through a sigmoid) or `uniform`.
        tokens: positions of an image in a transformer, for schedulers that shift by the size of the image.
    """

    scheduler: Any
    std: FlowNoise = "flow_grpo"
    noise_level: float = 0.7
    spacing: FlowSpacing = "scheduler"
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    tokens: int | None = None

    kind = "flow"

    def __post_init__(self) -> None:
        known = {
            "std": ("flow_grpo", "dance"),
            "spacing": ("scheduler", "even"),
            "times": ("logit_normal", "uniform"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise RecipeError(
                    f"policy.{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}."
                    f"{nearest(getattr(self, name), values)}"
                )
        if "shift" not in self.scheduler.config or self.scheduler.config.get("invert_sigmas"):
            raise RecipeError(
                f"policy: a flow needs a FlowMatchEulerDiscreteScheduler; got {type(self.scheduler).__name__}. "
                "Use kind: diffusion for schedulers with betas."
            )
        _std_function(self.std, self.noise_level)  # a wrong noise level is found here

    @classmethod
    def from_scheduler(cls, scheduler: Any, **settings: Any) -> FlowProcess:
        """The process of a scheduler; `settings` are the class's attributes."""
        return cls(scheduler, **settings)

    @property
    def std_fn(self) -> StdFunction:
        """The noise of a time."""
        return _std_function(self.std, self.noise_level)

    def grid(self, steps: int, *, deterministic: bool = False) -> Grid:
        """The times of a sampler of that many steps, from sigma 1 to 0.

        The last step has no noise: what it would add, nothing takes away again.

        Raises:
            RecipeError: there is not at least one step.
        """
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        if steps < 1:
            raise RecipeError(f"policy.steps must be at least 1; got {steps}.")
        if self.spacing == "even":
            sigmas = self._shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
            times = sigmas[:-1] * self.scheduler.config["num_train_timesteps"]
        else:
            # a copy: set_timesteps changes the scheduler, which belongs to the pipeline
            own = cast(Any, FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config))
            own.set_timesteps(steps, **({"mu": self._mu()} if own.config["use_dynamic_shifting"] else {}))
            times, sigmas = own.timesteps, own.sigmas
        noisy = self.noise_level > 0 and not deterministic
        return Grid(times.double(), sigmas.double(), tuple(noisy and i < steps - 1 for i in range(steps)))

    def step(self, x: Tensor, model_output: Tensor, grid: Grid, i: int, scale: Tensor | float = 1.0) -> GaussianStep:
        """Step i of a grid.

        Args:
            x: [N, ...], states at level i.
            model_output: [N, ...], velocities.
            grid: from `grid`.
            i: from 0.
            scale: multiplies the noise; 0 where a sample's step is to be deterministic; one number or [N].
        """
        before, after = float(grid.levels[i]), float(grid.levels[i + 1])
        scale = scale if grid.stochastic[i] else 0.0
        return flow_sde_step(x, model_output, before, after, self.std_fn, scale=scale)

    def time_step(self, grid: Grid, i: int) -> float:
        """The length of step i, sigma - sigma_next."""
        return float(grid.levels[i] - grid.levels[i + 1])

    def draw_times(self, count: int, generator: Generator) -> Tensor:
        """Training times sigma [count], shifted as the scheduler shifts."""
        if self.times == "uniform":
            sigma = torch.rand(count, generator=generator)
        else:
            sigma = torch.randn(count, generator=generator).sigmoid()
        return self._shift(sigma)

    def network_time(self, times: Tensor) -> Tensor:
        """Training times as the network is told them: 1000 sigma."""
        return times * self.scheduler.config["num_train_timesteps"]

    def noised(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """States of the training times."""
        return interpolate(x0, noise, times)

    def loss(self, model_output: Tensor, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """[N], the mean squared error of the velocity."""
        return denoising_loss(model_output, noise - x0)

    def predicted_x0(self, x: Tensor, model_output: Tensor, times: Tensor) -> Tensor:
        """[N, ...], the clean sample that velocities at training times stand for."""
        return x - times.reshape(-1, *([1] * (x.ndim - 1))) * model_output

    def _shift(self, sigma: Tensor) -> Tensor:
        shift = self.scheduler.config["shift"]
        return shift * sigma / (1 + (shift - 1) * sigma)

    def _mu(self) -> float:
        """Shift of a scheduler that shifts by the size of the image: linear in the number of positions."""
        config = self.scheduler.config
        if self.tokens is None:
            raise RecipeError("policy: the scheduler shifts by the size of the image, which only transformers tell.")
        small, large = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
        return low + (high - low) * (self.tokens - small) / (large - small)


Process = DiffusionProcess | FlowProcess


def kind_of(scheduler: Any) -> Literal["diffusion", "flow"]:
    """Which kind of policy a scheduler of diffusers makes: one with betas is of diffusion."""
    return "diffusion" if "beta_schedule" in scheduler.config else "flow"


def process_of(scheduler: Any, **settings: Any) -> Process:
    """The process of a scheduler: a flow where it matches flows, else diffusion.

    Args:
        scheduler: a diffusers scheduler.
        **settings: of the process; None = its default.

    Raises:
        RecipeError: a setting is not one of this process, or its value is not known.
    """
    flow = kind_of(scheduler) == "flow"
    given = {name: value for name, value in settings.items() if value is not None}
    known = {"std", "noise_level", "spacing", "times", "tokens"} if flow else {"eta", "spacing"}
    for name in given:
        if name not in known:
            other = "a diffusion" if flow else "a flow"
            raise RecipeError(
                f"policy.{name} is a setting of {other} policy, and {type(scheduler).__name__} makes this one "
                f"{'a flow' if flow else 'a diffusion'} policy. There are: {', '.join(sorted(known - {'tokens'}))}."
            )
    return (
        FlowProcess.from_scheduler(scheduler, **given) if flow else DiffusionProcess.from_scheduler(scheduler, **given)
    )
