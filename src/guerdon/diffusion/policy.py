"""A diffusion or flow model as a policy: it samples images and scores the denoising steps again with gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guerdon.diffusion.denoisers import Condition, Denoiser
from guerdon.diffusion.draws import path_noise, plan, training_generator
from guerdon.diffusion.files import (
    add_lora,
    read_adapters,
    read_parts,
    read_weights,
    write_adapters,
    write_parts,
)
from guerdon.diffusion.pathwise import PathSamples, follow, sample_with_gradient
from guerdon.diffusion.processes import Grid, Process, kind_of, process_of
from guerdon.diffusion.steps import (
    GaussianStep,
    Reduction,
    denoising_loss,
    gaussian_kl,
    gaussian_log_prob,
    guide,
    precise,
)
from guerdon.errors import CheckpointError, DataError, RecipeError, ShapeError, nearest, require
from guerdon.objectives.loss import Imitation, Loss
from guerdon.rollout import Rollout

if TYPE_CHECKING:
    from PIL.Image import Image

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
_CONDITION = "condition_"
# numbers of states, and of images, that are worked on at once while sampling
_STATES, _PIXELS = 2**21, 2**22


class LogProb(NamedTuple):
    """What `log_prob` gives, each [P, G, T], 0 where a step is not live.

    `entropy` is None: the spread of a step is set by the sampler, not by the policy. `kl` is the exact divergence from
    the reference where the loop asked for it.
    """

    logp: Tensor
    entropy: Tensor | None
    values: Tensor | None
    kl: Tensor | None


class Sampled(NamedTuple):
    """What sampling gives before it is decoded.

    Attributes:
        latents: [P, G, T + 1, C, H, W], or [P, G, 1, C, H, W], the last state alone.
        mask: [P, G, T].
        logp: [P, G, T].
        clean: [P, G, T, C, H, W], what the state after each step points to, where it is asked for.
    """

    latents: Tensor
    mask: Tensor
    logp: Tensor
    clean: Tensor | None


class DenoisingPolicy(nn.Module):
    """Any denoiser of diffusers with its sampler, with or without LoRA adapters.

    A step of the sampler is a Gaussian whose mean comes from the (guided) network, so it has a log-probability. The
    network is always in evaluation mode: the same steps must score the same again.

    Everything that runs the network goes through `forward`, so a wrapper of torch (DDP) can be put around the policy;
    hand it to `sample`, `log_prob` and the others as `module`.

    Args:
        network: a model of diffusers; it is the policy's `model`, the only part that is trained.
        denoiser: how the network is called, and what belongs to it, see `guerdon.diffusion.denoisers`.
        process: the sampler and the training loss, see `guerdon.diffusion.processes`.
        scheduler: of diffusers, written beside the network.
        source: where the network came from, written beside adapters.
        steps, eval_steps, guidance, logp_reduction, trained_share, random_share, window, window_range, shared_noise,
            condition_dropout, kl_scaling, gradient_checkpointing, sample_batch: see `load`.

    Raises:
        RecipeError: a setting is out of range.
    """

    # both only where a loop asks for them: see `exact_kl` and `keep_projections`
    fields = ("kl", "projections")
    has_critic = False

    def __init__(
        self,
        network: Any,
        denoiser: Denoiser,
        process: Process,
        scheduler: Any,
        *,
        source: str | None = None,
        steps: int = 10,
        eval_steps: int | None = None,
        guidance: float = 1.0,
        logp_reduction: Reduction = "mean",
        trained_share: float = 1.0,
        random_share: float = 1.0,
        window: int | None = None,
        window_range: tuple[int, int] | None = None,
        shared_noise: bool = False,
        condition_dropout: float = 0.1,
        kl_scaling: Literal["exact", "time"] = "exact",
        gradient_checkpointing: bool = False,
        sample_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.denoiser, self.process, self.scheduler = network, denoiser, process, scheduler
        self.source = source
        self.steps, self.eval_steps, self.guidance = steps, eval_steps or steps, guidance
        self.logp_reduction: Reduction = logp_reduction
        self.trained_share, self.random_share = trained_share, random_share
        self.window, self.window_range = window, window_range
        self.shared_noise, self.condition_dropout, self.kl_scaling = shared_noise, condition_dropout, kl_scaling
        self.gradient_checkpointing, self.sample_batch = gradient_checkpointing, sample_batch
        self._check()
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
        # set by a loop whose objective asks for the field `kl`
        self.exact_kl = False
        # set by a loop with a reward that asks for the field `projections`
        self.keep_projections = False
        # in a tuple, so that it is neither trained nor saved nor wrapped with the policy
        self._reference: tuple[nn.Module, ...] = ()
        self.eval()

    def _check(self) -> None:
        grid = self.process.grid(self.steps)
        self.process.grid(self.eval_steps, deterministic=True)
        if self.logp_reduction not in ("mean", "sum"):
            raise RecipeError(f"policy.logp_reduction must be mean or sum; got {self.logp_reduction!r}.")
        if self.kl_scaling not in ("exact", "time"):
            raise RecipeError(f"policy.kl_scaling must be exact or time; got {self.kl_scaling!r}.")
        for name in ("trained_share", "random_share"):
            if not 0 < getattr(self, name) <= 1:
                raise RecipeError(f"policy.{name} must be in (0, 1]; got {getattr(self, name)}.")
        if not 0 <= self.condition_dropout < 1:
            raise RecipeError(f"policy.condition_dropout must be in [0, 1); got {self.condition_dropout}.")
        if self.window is not None:
            low, high = self.window_range or (0, sum(grid.stochastic))
            if not (low >= 0 and self.window >= 1 and low + self.window <= high <= sum(grid.stochastic)):
                raise RecipeError(
                    f"policy.window = {self.window} steps must lie within [{low}, {high}) and within the "
                    f"{sum(grid.stochastic)} steps that have noise."
                )
        if self.guidance != 1:
            self.denoiser.null(1, self.device)  # a network without a null condition says so now

    @classmethod
    def load(
        cls,
        model: Any,
        *,
        scheduler: Any = None,
        captions: Sequence[str] | None = None,
        patch: int | None = None,
        kind: Literal["diffusion", "flow"] | None = None,
        steps: int = 10,
        eval_steps: int | None = None,
        guidance: float = 1.0,
        eta: float | None = None,
        prediction_type: str | None = None,
        std: str | None = None,
        noise_level: float | None = None,
        shift: float | None = None,
        spacing: str | None = None,
        times: str | None = None,
        logp_reduction: Reduction = "mean",
        trained_share: float = 1.0,
        random_share: float = 1.0,
        window: int | None = None,
        window_range: tuple[int, int] | None = None,
        shared_noise: bool = False,
        condition_dropout: float = 0.1,
        kl_scaling: Literal["exact", "time"] = "exact",
        lora: dict[str, Any] | None = None,
        dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
        sample_batch: int | None = None,
    ) -> DenoisingPolicy:
        """Load a policy from a folder, from the hub, or around a pipeline or network that is there already.

        Args:
            model: a folder written by `save` or by diffusers, a name on the hub, a pipeline, or a network with its
                `scheduler` (or the pair of them). A folder of adapters is loaded onto the pipeline that they were trained on.
            scheduler: in place of the pipeline's; only its configuration is used.
            captions: of a class-conditional network: the prompt of each class, so that prompts may be texts.
            patch: pixels of a side that one position of the network's input holds; 1 unless the folder says otherwise.
            kind: check that the scheduler makes this kind of policy; None = whatever it makes.
            steps: T, denoising steps of a training sample.
            eval_steps: steps of the deterministic sampler (`greedy`); None = `steps`.
            guidance: scale of classifier-free guidance, in sampling, scoring and reference alike; 1 = none.
            eta: diffusion: noise of a step, 0 to 1; 1 by default.
            prediction_type: diffusion: what the network gives, in place of what its scheduler says.
            std: flow: how noise depends on time, `flow_grpo` (default) or `dance`.
            noise_level: flow: of that noise; 0.7 by default.
            shift: flow: of the times towards noise, in place of the scheduler's.
            spacing: of the times; diffusion: `leading`, `trailing`, `linspace`; flow: `scheduler`, `even`. None = the
                scheduler's own.
            times: flow: training times, `logit_normal` (default) or `uniform`.
            logp_reduction: mean or sum over the dimensions of a state, of log-probabilities and divergences; clips of
                1e-4 go with the mean, clips of 0.2 with the sum.
            trained_share: train on this share of the steps, from the first; the last steps are sampled alike.
            random_share: of those, train on a random share, drawn for each sample.
            window: only this many steps in a row have noise and are trained on, at a place drawn for each prompt, the
                others being deterministic; None = all steps have noise.
            window_range: steps [from, to) the window lies within; None = all.
            shared_noise: the samples of a group start from the same state.
            condition_dropout: share of demonstrations learnt without their condition, for guidance.
            kl_scaling: `exact` divergence, or `time`: times the step's length, as in Flow-GRPO's released code.
            lora: train adapters instead of the network: `rank`, `alpha`, `target_modules` (default: the projections of
                attention layers; where there are none, every linear layer and convolution).
            dtype: of the weights; states and log-probabilities are in float32 at least.
            gradient_checkpointing: compute activations again in the backward pass, to save memory: those of one step at
                a time, so that memory does not grow with the number of steps, and within it those of one block.
            sample_batch: samples per forward pass while sampling; None = as many as make two million numbers.

        Raises:
            RecipeError: a setting is out of range, unknown, or of the other kind of policy; the model cannot be loaded.
            MissingExtraError: diffusers (or, for LoRA, peft) is not installed.
        """
        require("diffusers", "diffusion")
        if dtype not in _DTYPES:
            raise RecipeError(
                f"policy.dtype: {dtype!r} is not known.{nearest(dtype, _DTYPES)} There are {sorted(_DTYPES)}."
            )
        adapters = read_adapters(Path(model)) if isinstance(model, (str, Path)) else None
        base = adapters["base_model_name_or_path"] if adapters else model
        if base is None:
            raise RecipeError(f"policy.model: {str(model)!r} holds adapters and does not say of which pipeline.")
        parts = read_parts(base, scheduler, _DTYPES[dtype], captions, patch)
        changes = {name: value for name, value in (("shift", shift), ("prediction_type", prediction_type)) if value}
        own = parts.scheduler
        if changes:
            if unknown := [name for name in changes if name not in own.config]:
                raise RecipeError(f"policy.{unknown[0]}: {type(own).__name__} has no such setting.")
            own = type(own).from_config(own.config, **changes)
        if kind is not None and kind != kind_of(own):
            raise RecipeError(
                f"policy.kind is {kind}, but the scheduler {type(own).__name__} makes a {kind_of(own)} policy."
            )
        process = process_of(
            own,
            eta=eta,
            std=std,
            noise_level=noise_level,
            spacing=spacing,
            times=times,
            tokens=parts.denoiser.tokens if "shift" in own.config else None,
        )
        policy = cls(
            parts.network,
            parts.denoiser,
            process,
            own,
            source=parts.source,
            steps=steps,
            eval_steps=eval_steps,
            guidance=guidance,
            logp_reduction=logp_reduction,
            trained_share=trained_share,
            random_share=random_share,
            window=window,
            window_range=window_range,
            shared_noise=shared_noise,
            condition_dropout=condition_dropout,
            kl_scaling=kl_scaling,
            gradient_checkpointing=gradient_checkpointing,
            sample_batch=sample_batch,
        )
        if adapters:
            targets = adapters["target_modules"]
            policy.add_adapters(rank=adapters["r"], alpha=adapters["lora_alpha"], target_modules=targets)
            policy.load_weights(model)
        elif lora is not None:
            policy.add_adapters(**lora)
        return policy

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network's weights."""
        return next(self.model.parameters()).dtype

    @property
    def max_steps(self) -> int:
        """T."""
        return self.steps

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a state."""
        return self.denoiser.latent_shape

    @property
    def has_adapters(self) -> bool:
        """Whether peft adapters are trained, the reference being the network without them."""
        return hasattr(self.model, "peft_config")

    def add_adapters(self, **lora: Any) -> None:
        """Train LoRA adapters from now on instead of the network, which becomes the reference.

        Args:
            **lora: `rank`, `alpha`, `target_modules`.

        Raises:
            RecipeError: a setting is unknown.
            MissingExtraError: peft is not installed.
        """
        self.model = add_lora(self.model, lora, self.source)
        self.eval()

    def keep_reference(self) -> None:
        """Make the policy as it is now the reference. With adapters nothing is copied: the network without them is it."""
        if not self.has_adapters:
            self._reference = (copy.deepcopy(self.model).requires_grad_(False).eval(),)

    def add_critic(self, heads: int = 1) -> None:
        """There is none for images.

        Args:
            heads: not used.

        Raises:
            RecipeError: always; a stage asked for `values`.
        """
        raise RecipeError(
            "policy: diffusion and flow policies have no critic, so nothing can ask for the field values. "
            "Use an advantage without one, such as grpo, or value_anchored for advantages per step."
        )

    def train(self, mode: bool = True) -> DenoisingPolicy:
        """Set the mode; the network stays in evaluation mode (diffusers drops labels and units in the other)."""
        super().train(mode)
        self.model.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for part in (*self._reference, *self.denoiser.frozen):
            part._apply(fn)
        self.denoiser.forget()
        return super()._apply(fn, recurse)

    @contextmanager
    def _reference_network(self) -> Iterator[Any]:
        if self._reference:
            yield self._reference[0]
        elif self.has_adapters:
            with self.model.disable_adapter():
                yield self.model
        else:
            raise CheckpointError("diffusion.policy: there is no reference; call keep_reference() before training.")

    # -- the sampler, step by step ---------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Any]) -> Condition:
        """Condition of P prompts, name -> [P, ...].

        Args:
            prompts: texts where there is a text encoder; labels or captions for a class-conditional network.

        Raises:
            DataError: naming the prompt that cannot be used.
        """
        if not len(prompts):
            raise DataError("diffusion.policy: no prompts were given.")
        return self.denoiser.encode(prompts, self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] of clean states, a few at a time; with gradient where the states have one."""
        size = max(1, _PIXELS // (latents[0].numel() * (64 if self.denoiser.pipeline is not None else 1)))
        return torch.cat([self.denoiser.decode(part) for part in latents.split(size)])

    def predict(self, x: Tensor, times: Tensor, condition: Condition, *, network: Any = None) -> Tensor:
        """The network's guided output, in float32 at least.

        Args:
            x: [N, C, H, W], states.
            times: what the network is told: one number, or [N].
            condition: name -> [N, ...].
            network: in place of the policy's, such as the reference.

        Returns:
            [N, C, H, W].
        """
        network = self.model if network is None else network
        count = len(x)
        times = times.to(x.device, None if times.dtype == torch.int64 else torch.float32).expand(count)
        x = x.to(self.dtype, memory_format=self.denoiser.layout)
        if self.guidance == 1:
            return precise(self.denoiser.predict(network, x, times, condition))
        null = self.denoiser.null(count, x.device)
        if self.guidance == 0:
            return precise(self.denoiser.predict(network, x, times, null))
        both = {name: torch.cat([null[name], condition[name]]) for name in condition}
        out = self.denoiser.predict(network, torch.cat([x, x]), torch.cat([times, times]), both)
        unconditional, conditional = precise(out).chunk(2)
        return guide(unconditional, conditional, self.guidance)

    def step(
        self,
        x: Tensor,
        condition: Condition,
        grid: Grid,
        i: int,
        *,
        scale: Tensor | float = 1.0,
        network: Any = None,
    ) -> GaussianStep:
        """The distribution of the state after step i.

        Args:
            x: [N, C, H, W], states before it.
            condition: name -> [N, ...].
            grid: times, from `process.grid(steps)`.
            i: from 0.
            scale: multiplies the noise; 0 where a sample's step is to be deterministic; one number or [N].
            network: in place of the policy's.

        Gradient:
            To x and the network's weights.
        """
        out = self.predict(x, grid.times[i], condition, network=network)
        return self.process.step(x, out, grid, i, scale)

    def _unpack(self, steps: Mapping[str, Tensor], group_size: int) -> Condition:
        """The conditions of a rollout's steps, one for each sample."""
        found = {n.removeprefix(_CONDITION): v for n, v in steps.items() if n.startswith(_CONDITION)}
        if not found:
            return {}
        shapes = self._condition_shapes(found)
        return {
            name: value.view(len(value), *shapes[name]).repeat_interleave(group_size, 0)
            for name, value in found.items()
        }

    def _condition_shapes(self, found: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        if all(value.ndim == 1 for value in found.values()):
            return dict.fromkeys(found, ())
        return {name: tuple(value.shape[1:]) for name, value in self.denoiser.null(1, self.device).items()}

    @staticmethod
    def _pack(condition: Condition) -> dict[str, Tensor]:
        """Conditions as steps [P] or [P, n]: flat, so that no dimension can be taken for that of steps."""
        return {f"{_CONDITION}{name}": v.flatten(1) if v.ndim > 1 else v for name, v in condition.items()}

    # -- sampling --------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[Any],
        group_size: int,
        seeds: Sequence[int],
        *,
        greedy: bool = False,
        module: Callable[..., Any] | None = None,
    ) -> Rollout:
        """Sample a group of images for each prompt, without gradient.

        Args:
            prompts: P texts, captions or labels, see `encode`.
            group_size: G.
            seeds: P integers. A sample depends on its prompt's seed and its place in the group only.
            greedy: use the deterministic sampler with `eval_steps` steps instead.
            module: what wraps the policy, if anything does.

        Returns:
            A rollout with `samples` (images [C, H, W] in [0, 1], on the CPU), `steps` (`latents` [P, G, T + 1, C, H, W]
            and the conditions), `mask` (True = a step with noise that is trained on), `logp_old` (0 where masked), and
            `indices` 0 ... P - 1. With `greedy` the mask is False everywhere and `latents` holds the last state only.
            Where a loop has set `keep_projections`, `extras` has `projections` [P, G, T, C, H, W]: the image of the clean
            sample that the network sees in the state after each step, the last of them being the sample; with `greedy`
            that one alone. They cost a decoding each, and no run of the network.

        Raises:
            ShapeError: there is not one seed per prompt.
            DataError: a prompt cannot be used.
        """
        if len(seeds) != len(prompts):
            raise ShapeError(
                f"diffusion.policy: sample needs one seed per prompt (P = {len(prompts)}); got {len(seeds)}."
            )
        steps = self._pack(self.encode(prompts))
        options = {"group_size": group_size, "seeds": list(seeds), "greedy": greedy}
        found: Sampled = (module or self)(steps, kind="sample", **options)
        pictures = self._images(found.latents[:, :, -1:] if found.clean is None else found.clean)
        return Rollout(
            prompts=list(prompts),
            samples=[list(group) for group in pictures[:, :, -1]],
            steps={"latents": found.latents, **steps},
            mask=found.mask,
            logp_old=found.logp,
            extras={} if found.clean is None else {"projections": pictures},
            indices=list(range(len(prompts))),
        )

    def reference_sample(
        self,
        prompts: Sequence[Any],
        group_size: int,
        seeds: Sequence[int],
        *,
        module: Callable[..., Any] | None = None,
    ) -> Rollout:
        """Sample as `sample` does, from the reference.

        Args:
            prompts, group_size, seeds, module: as in `sample`.

        Raises:
            CheckpointError: there are no adapters to switch off and `keep_reference` was not called.
        """
        own = self.model
        with self._reference_network() as network:
            self.model = network
            try:
                return self.sample(prompts, group_size, seeds, module=module)
            finally:
                self.model = own

    @torch.no_grad()
    def _images(self, latents: Tensor) -> Tensor:
        images = self.decode(latents.flatten(0, 2)).float().cpu()
        return images.view(*latents.shape[:3], *images.shape[1:])

    @torch.no_grad()
    def _sample(self, steps: dict[str, Tensor], group_size: int, seeds: Sequence[int], greedy: bool) -> Sampled:
        grid = self.process.grid(self.eval_steps if greedy else self.steps, deterministic=greedy)
        shape, length, size = self.latent_shape, len(grid), len(seeds) * group_size
        noisy, trained = plan(
            seeds,
            group_size,
            grid.stochastic,
            trained_share=self.trained_share,
            random_share=self.random_share,
            window=None if greedy else self.window,
            window_range=self.window_range,
        )
        precision = torch.promote_types(self.dtype, torch.float32)
        kept = 1 if greedy else length + 1
        # each place holds the noise of its step until the state takes it
        noise = path_noise(seeds, group_size, kept, shape, shared=self.shared_noise)
        states = noise.view(size, kept, *shape).to(self.device, precision)
        logp = torch.zeros(size, length, device=self.device, dtype=precision)
        clean = states.new_empty(size, 1 if greedy else length, *shape) if self.keep_projections else None
        condition = self._unpack(steps, group_size)
        noisy_rows, mask = noisy.view(size, length).to(self.device), trained.to(self.device)
        live = mask.view(size, length)
        for part in torch.arange(size).split(self.sample_batch or max(1, _STATES // int(np.prod(shape)))):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            given = {name: value[rows] for name, value in condition.items()}
            x = states[rows, 0]
            for i in range(length):
                step = self.step(x, given, grid, i, scale=noisy_rows[rows, i].to(precision))
                if grid.stochastic[i]:
                    x = step.mean + step.std * states[rows, i + 1]
                    logp[rows, i] = self._log_prob(step, x, live[rows, i])
                else:
                    x = step.mean
                states[rows, 0 if greedy else i + 1] = x
                if clean is not None and not greedy and i:
                    clean[rows, i - 1] = step.x0  # of the state after the step before
            if clean is not None:
                clean[rows, -1] = x
        groups = (len(seeds), group_size)
        return Sampled(
            states.view(*groups, *states.shape[1:]),
            mask,
            logp.view(mask.shape),
            None if clean is None else clean.view(*groups, *clean.shape[1:]),
        )

    def _log_prob(self, step: GaussianStep, x_next: Tensor, live: Tensor) -> Tensor:
        """[N], 0 where a step is not live."""
        std = torch.where(live.view(-1, *([1] * (x_next.ndim - 1))), step.std, 1.0)
        return gaussian_log_prob(x_next, step.mean, std, self.logp_reduction).where(live, 0.0)

    # -- scoring ---------------------------------------------------------------------------------------------------

    def log_prob(self, rollout: Rollout, *, module: Callable[..., Any] | None = None) -> LogProb:
        """Log-probability of every live step under the policy as it is now.

        Args:
            rollout: its `steps` and `mask` are read.
            module: what wraps the policy, if anything does.

        Returns:
            `LogProb` of [P, G, T], 0 where a step is not live. `kl` is there while gradients are on and a loop has set
            `exact_kl`: the divergence from the reference at the same states, which are taken as constants.

        Raises:
            RecipeError: the sampler has no noise, so no step has a log-probability.
            CheckpointError: `exact_kl` is set and there is no reference.

        Gradient:
            Through the network's trained parameters; none to the states.

        Edge cases:
            Where the steps are those of one `sample` call and the policy has not changed, the numbers are those of
            sampling: to the bit on an accelerator and in half precision, as long as both run in the same batches, and
            to rounding on a CPU, where several steps are scored in one batch.
        """
        return (module or self)(rollout.steps, rollout.mask, kind="log_prob")

    @torch.no_grad()
    def reference_log_prob(self, rollout: Rollout, *, module: Callable[..., Any] | None = None) -> Tensor:
        """Log-probability [P, G, T] under the reference, without gradient.

        Args:
            rollout: its `steps` and `mask` are read.
            module: what wraps the policy, if anything does.

        Raises:
            CheckpointError: there are no adapters to switch off and `keep_reference` was not called.
        """
        return (module or self)(rollout.steps, rollout.mask, kind="reference")

    def _score(self, steps: Mapping[str, Tensor], mask: Tensor, network: Any = None, *, kl: bool = False) -> LogProb:
        live = mask.flatten(0, 1)
        latents = steps["latents"].flatten(0, 1)
        condition = self._unpack(steps, mask.shape[1])
        grid = self.process.grid(self.steps)
        if not any(grid.stochastic):
            raise RecipeError(
                "policy: the sampler has no noise, so its steps have no log-probabilities to learn from. "
                "Set eta (diffusion) or noise_level (flow) above 0 and at least 2 steps."
            )
        if not bool(mask.any()):
            return self._nothing(latents, condition, grid, mask, kl=kl)
        nothing = latents.new_zeros(len(live))
        logp, divergence = [nothing] * mask.shape[2], [nothing] * mask.shape[2]
        for block in self._blocks(live):
            rows = [None if bool(live[:, i].all()) else live[:, i].nonzero().squeeze(1) for i in block]

            def of(value: Tensor, rows: Tensor | None) -> Tensor:
                return value if rows is None else value[rows]

            before = [of(latents[:, i], r) for i, r in zip(block, rows, strict=True)]
            after = [of(latents[:, i + 1], r) for i, r in zip(block, rows, strict=True)]
            given = {name: torch.cat([of(value, r) for r in rows]) for name, value in condition.items()}
            reference = self._reference_means(before, given, grid, block) if kl else None
            arguments = (before, after, given, grid, block, network, reference)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # of all steps together only one is ever held with its activations
                found = checkpoint(self._score_block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                found = self._score_block(*arguments)
            for i, r, (value, far) in zip(block, rows, found, strict=True):
                logp[i], divergence[i] = _spread(value, r, len(live)), _spread(far, r, len(live))
        return LogProb(
            torch.stack(logp, 1).view(mask.shape),
            None,
            None,
            torch.stack(divergence, 1).view(mask.shape) if kl else None,
        )

    def _blocks(self, live: Tensor) -> list[list[int]]:
        """The steps with live samples, in blocks that the network reads in one batch each.

        Large batches take a small network on a CPU a fifth less time. Elsewhere a step is a block: on accelerators and in
        half precision the numbers depend on the batch by more than a clip of 1e-4 allows, and scoring is to give those
        of sampling.
        """
        steps = live.any(0).nonzero().squeeze(1).tolist()
        if self.gradient_checkpointing or self.device.type != "cpu" or self.dtype in (torch.float16, torch.bfloat16):
            return [[i] for i in steps]
        room = max(1, _STATES // (len(live) * int(np.prod(self.latent_shape))))
        return [steps[start : start + room] for start in range(0, len(steps), room)]

    def _steps(
        self, states: Sequence[Tensor], condition: Condition, grid: Grid, block: Sequence[int], network: Any
    ) -> list[GaussianStep]:
        """The distributions after the steps of a block, from states [N_i, C, H, W] and the conditions of all of them."""
        times = torch.cat([grid.times[i].expand(len(x)) for i, x in zip(block, states, strict=True)])
        out = self.predict(torch.cat(list(states)), times, condition, network=network)
        parts = out.split([len(x) for x in states])
        return [self.process.step(x, part, grid, i) for i, x, part in zip(block, states, parts, strict=True)]

    def _score_block(
        self,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        condition: Condition,
        grid: Grid,
        block: Sequence[int],
        network: Any,
        reference: Sequence[Tensor] | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Log-probability and divergence [N_i] of each step; the divergence is 0 without a reference."""
        found = []
        for place, step in enumerate(self._steps(before, condition, grid, block, network)):
            logp = gaussian_log_prob(after[place], step.mean, step.std, self.logp_reduction)
            if reference is None:
                found.append((logp, torch.zeros_like(logp)))
                continue
            length = self.process.time_step(grid, block[place]) if self.kl_scaling == "time" else None
            far = gaussian_kl(step.mean, reference[place], step.std, self.logp_reduction, time_step=length)
            found.append((logp, far))
        return found

    @torch.no_grad()
    def _reference_means(
        self, states: Sequence[Tensor], condition: Condition, grid: Grid, block: Sequence[int]
    ) -> list[Tensor]:
        with self._reference_network() as network:
            return [step.mean for step in self._steps(states, condition, grid, block, network)]

    def _nothing(self, latents: Tensor, condition: Condition, grid: Grid, mask: Tensor, *, kl: bool) -> LogProb:
        """Zeros with a graph, for a batch that was masked as a whole: processes must all run backward."""
        first = {name: value[:1] for name, value in condition.items()}
        zero = 0.0 * self.predict(latents[:1, 0], grid.times[0], first).sum()
        zeros = latents.new_zeros(mask.shape) + zero
        return LogProb(zeros, None, None, zeros if kl else None)

    # -- learning from examples ------------------------------------------------------------------------------------

    def demonstrations(self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Rollout:
        """Given images as a rollout with one sample a prompt and one step, for supervised training.

        Args:
            rows: each with `prompt` and `image`: a tensor [C, H, W] in [0, 1] or a PIL image.
            seeds: of the noise, the time and the dropping of the condition of each row.

        Returns:
            A rollout [B, 1, 1] with the steps `x0`, `noise` (both [B, 1, 1, C, H, W]), `time` [B, 1, 1] and conditions;
            `logp_old` is zero.

        Raises:
            DataError: naming the row that cannot be used.
            ShapeError: there is not one seed per row.
        """
        if len(seeds) != len(rows):
            raise ShapeError(f"diffusion.policy: demonstrations need one seed per row ({len(rows)}); got {len(seeds)}.")
        x0 = self._clean(rows)
        prompts = [row["prompt"] for row in rows]
        condition = self.encode(prompts)
        generators = [training_generator(seed) for seed in seeds]
        drawn = self._noise_and_times(generators)
        if self.condition_dropout and condition:
            dropped = torch.stack([torch.rand((), generator=g) for g in generators]) < self.condition_dropout
            condition = self._drop(condition, dropped.to(self.device))
        mask = torch.ones(len(rows), 1, 1, dtype=torch.bool, device=self.device)
        return Rollout(
            prompts=prompts,
            samples=[[row["image"]] for row in rows],
            steps={"x0": x0[:, None, None], **{n: v[:, None, None] for n, v in drawn.items()}, **self._pack(condition)},
            mask=mask,
            logp_old=torch.zeros(mask.shape, device=self.device),
        )

    def _clean(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        images = [_image(index, row.get("image")) for index, row in enumerate(rows)]
        for index, image in enumerate(images):
            if image.shape != images[0].shape:
                raise DataError(
                    f"diffusion.policy: image {index} is {list(image.shape)} where image 0 is {list(images[0].shape)}; "
                    "all images of a batch must have one size."
                )
        batch = torch.stack(images).to(self.device, torch.promote_types(self.dtype, torch.float32))
        x0 = torch.cat([self.denoiser.latents(part) for part in batch.split(max(1, _PIXELS // batch[0].numel()))])
        if tuple(x0.shape[1:]) != self.latent_shape:
            raise DataError(
                f"diffusion.policy: images {list(images[0].shape)} make states {list(x0.shape[1:])}, and the network "
                f"takes {list(self.latent_shape)}. Resize them."
            )
        return x0

    def _noise_and_times(self, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """`noise` [N, C, H, W] and `time` [N] of training examples."""
        noise = torch.stack([torch.randn(self.latent_shape, generator=g) for g in generators])
        times = torch.cat([self.process.draw_times(1, g) for g in generators])
        precision = torch.promote_types(self.dtype, torch.float32)
        return {"noise": noise.to(self.device, precision), "time": times.to(self.device)}

    def _drop(self, condition: Condition, dropped: Tensor) -> Condition:
        if not bool(dropped.any()):
            return condition
        null = self.denoiser.null(len(dropped), self.device)
        return {
            name: torch.where(dropped.view(-1, *([1] * (value.ndim - 1))), null[name].to(value.dtype), value)
            for name, value in condition.items()
        }

    def imitation_loss(self, given: Rollout, *, module: Callable[..., Any] | None = None) -> Loss:
        """The denoising loss of demonstrations: the mean squared error of what the network is trained to say.

        Args:
            given: from `demonstrations`.
            module: what wraps the policy, if anything does.

        Returns:
            The loss, summed over rows; count is their number.

        Gradient:
            Through the network's trained parameters.
        """
        found: Imitation = (module or self)(given.steps, given.mask, kind="imitation", drift=False)
        return Loss(found.imitation[:, :, None].masked_fill(~given.mask, 0.0).sum(), given.mask.sum().float(), {})

    def imitation(
        self, rollout: Rollout, seeds: Sequence[int], *, drift: bool = False, module: Callable[..., Any] | None = None
    ) -> Imitation:
        """What learning from each sample as from an example would cost: its denoising loss.

        Args:
            rollout: samples of a policy; the last of their `latents` are learnt from.
            seeds: P integers, of the noise and time of each sample.
            drift: also the mean squared difference of the network's output from the reference's, at the same states.
            module: what wraps the policy, if anything does.

        Returns:
            `imitation` and `drift` [P, G].

        Raises:
            ShapeError: there is not one seed per prompt.
            CheckpointError: `drift` without a reference.

        Gradient:
            Through the network's trained parameters.

        Source:
            Lee et al. 2023, arXiv 2302.12192 (reward-weighted denoising loss); Fan et al. 2025, ORW-CFM-W2, arXiv
            2502.06061 (the drift bounds the squared Wasserstein distance).
        """
        if len(seeds) != len(rollout):
            raise ShapeError(
                f"diffusion.policy: imitation needs one seed per prompt (P = {len(rollout)}); got {len(seeds)}."
            )
        size = rollout.group_size
        drawn = self._noise_and_times([training_generator(seed, g) for seed in seeds for g in range(size)])
        steps = {name: value for name, value in rollout.steps.items() if name.startswith(_CONDITION)}
        steps["x0"] = rollout.steps["latents"][:, :, -1:]
        steps |= {name: value.view(len(seeds), size, 1, *value.shape[1:]) for name, value in drawn.items()}
        return (module or self)(steps, rollout.mask[:, :, :1], kind="imitation", drift=drift)

    def _imitate(self, steps: Mapping[str, Tensor], drift: bool) -> Imitation:
        x0, noise, times = (steps[name].flatten(0, 2) for name in ("x0", "noise", "time"))
        condition = self._unpack(steps, steps["x0"].shape[1])
        x, told = self.process.noised(x0, noise, times), self.process.network_time(times)

        # without guidance, which is not what the network is trained to say
        def output(network: Any) -> Tensor:
            x_t = x.to(self.dtype, memory_format=self.denoiser.layout)
            return precise(self.denoiser.predict(network, x_t, told, condition))

        out = output(self.model)
        moved = None
        if drift:
            with torch.no_grad(), self._reference_network() as network:
                reference = output(network)
            moved = denoising_loss(out, reference).view(steps["x0"].shape[:2])
        return Imitation(self.process.loss(out, x0, noise, times).view(steps["x0"].shape[:2]), moved)

    def pathwise(
        self, prompts: Sequence[Any], group_size: int, seeds: Sequence[int], *, cut: int = 0, **options: Any
    ) -> PathSamples:
        """Images with a graph to the weights, see `guerdon.diffusion.pathwise.sample_with_gradient`."""
        return sample_with_gradient(self, prompts, group_size, seeds, cut=cut, **options)

    def forward(
        self,
        steps: dict[str, Tensor],
        mask: Tensor | None = None,
        kind: Literal["log_prob", "reference", "sample", "imitation", "pathwise"] = "log_prob",
        **options: Any,
    ) -> Any:
        """Run the network: score `steps` (kind "log_prob", "reference", "imitation"), or sample from their conditions.

        Use `log_prob`, `sample` and the others, which call this one directly or through a wrapper.
        """
        if kind == "sample":
            return self._sample(steps, **options)
        if kind == "pathwise":
            return follow(self, steps, **options)
        if kind == "imitation":
            return self._imitate(steps, **options)
        if mask is None:
            raise ShapeError("diffusion.policy: forward needs the mask [P, G, T] of the steps it scores.")
        if kind == "reference":
            if not bool(mask.any()):  # a deterministic sample: nothing to score
                return mask.new_zeros(mask.shape, dtype=torch.float32)
            with self._reference_network() as network:
                return self._score(steps, mask, network).logp
        return self._score(steps, mask, kl=self.exact_kl and torch.is_grad_enabled())

    # -- files and pictures ----------------------------------------------------------------------------------------

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the policy as diffusers writes its pipeline; with adapters only these, as peft writes them.

        `DiffusionPipeline.from_pretrained` and `DenoisingPolicy.load` read the folder back; adapters also peft's
        `PeftModel.from_pretrained` and the pipeline's `load_lora_weights`. A network without a pipeline is written with
        its scheduler and `guerdon.json`, which holds captions and patch.

        Args:
            folder: where to; made if it is not there.
            state: the policy's `state_dict` with whole tensors, where the policy's own are shards; None = its own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        whole = None if state is None else _under(state, "model")
        if self.has_adapters:
            write_adapters(folder, self.model, self.denoiser, whole)
            return
        (folder / self.denoiser.part).mkdir(exist_ok=True)
        weights = self.model.state_dict() if whole is None else whole
        write_parts(folder, self.model, self.denoiser, self.scheduler, weights)

    def load_weights(self, folder: str | Path) -> None:
        """Put back the weights that `save` wrote, into this policy's network or its adapters.

        Raises:
            CheckpointError: the folder holds another network, or cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            if self.has_adapters:
                from peft import set_peft_model_state_dict

                found = set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
                unexpected = list(found.unexpected_keys)
            else:
                found = self.model.load_state_dict(read_weights(folder, self.denoiser.part), strict=False)
                unexpected = [*found.unexpected_keys, *found.missing_keys]
            if unexpected:
                raise CheckpointError(
                    f"{folder} and this network do not have the same weights, such as {unexpected[0]}."
                )
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{folder}: the weights cannot be read: {error}") from error

    @staticmethod
    def to_pil(samples: Any) -> Any:
        """Images as PIL images.

        Args:
            samples: a tensor [C, H, W] in [0, 1] (C = 1 or 3), or a list of such, nested as deep as it may be.

        Returns:
            A PIL image, or as deep a list of them.

        Raises:
            MissingExtraError: pillow is not installed.
        """
        if not isinstance(samples, Tensor):
            return [DenoisingPolicy.to_pil(sample) for sample in samples]
        return _pil(samples)


def _spread(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Numbers of some rows [n] among `count`, 0 elsewhere."""
    return values if rows is None else values.new_zeros(count).index_copy(0, rows, values)


def _under(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The entries of a submodule, under its own names."""
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


def _pil(image: Tensor) -> Image:
    require("PIL", "diffusion")
    from PIL.Image import fromarray

    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())


def _image(index: int, image: Any) -> Tensor:
    """A tensor [C, H, W] in [0, 1] of a tensor or a PIL image."""
    if isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point():
        return image
    if not isinstance(image, Tensor) and hasattr(image, "convert"):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    raise DataError(
        f"diffusion.policy: image {index} must be a tensor [C, H, W] in [0, 1] or a PIL image; got {type(image).__name__}."
    )
