"""Sampling with gradient: from a reward of the finished image back through the denoising steps to weights or noise.

The state after step i depends on the weights through every step up to i. `unroll` follows a sampler and keeps the graph
of its last steps only, each under a checkpoint: what autograd holds is one state a step and the activations of one
step. (The memory of a process grows by more than the states: see the page of benchmarks.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from guerdon.diffusion.denoisers import Condition
from guerdon.diffusion.draws import path_noise, plan, training_generator
from guerdon.diffusion.processes import Grid, Process
from guerdon.diffusion.steps import add_noise, denoising_loss, interpolate
from guerdon.errors import RecipeError, ShapeError

if TYPE_CHECKING:
    from guerdon.diffusion.policy import DenoisingPolicy

State = tuple[Tensor, Tensor]  # where a sample is [N, ...], and how far it has drifted from the reference [N]


def unroll(step: Callable[[Any, int], Any], state: Any, steps: int, *, cut: int = 0, checkpointing: bool = True) -> Any:
    """Follow a chain of steps and keep the graph from step `cut` on: state <- step(state, i) for i = 0 ... steps - 1.

    The same derivative as that of the chain in which the network's output is a constant before `cut`, without running it
    with a graph. With checkpoints a step's activations are computed again in the backward pass, so that of all steps only
    one is ever held with its activations; value and gradient stay the same to the bit.

    Args:
        step: from a state (a tensor, or a tuple of them) and the number of the step to the next state. It must be a pure
            function: it is called twice with checkpoints.
        state: where the chain begins.
        steps: T.
        cut: steps before it are run without a graph; 0 = the whole chain has one.
        checkpointing: hold states only, and compute activations again.

    Returns:
        The last state.

    Raises:
        RecipeError: no step would have a gradient (`cut` is T or more), or `cut` is negative.

    Gradient:
        Through the steps from `cut` on to whatever `step` uses, and through their states to the state at `cut`; where
        `cut` is 0, to the first state too.

    Example:
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> unroll(lambda x, i: w * x, torch.tensor(3.0), 3, cut=1).backward()  # w^2 * (2 * 3)
        >>> w.grad.item()
        24.0

    Source:
        AlignProp: Aligning Text-to-Image Diffusion Models with Reward Backpropagation, arXiv 2310.03739.
    """
    _check_cut(cut, steps)
    state = _without_graph(step, state, cut)
    for i in range(cut, steps):
        state = _once(step, state, i, checkpointing)
    return state


def _check_cut(cut: int, steps: int) -> None:
    if not 0 <= cut < steps:
        raise RecipeError(
            f"diffusion.pathwise: the cut must be from 0 to {steps - 1}, so that one of the {steps} steps has a "
            f"gradient; got {cut}."
        )


@torch.no_grad()
def _without_graph(step: Callable[[Any, int], Any], state: Any, steps: int) -> Any:
    for i in range(steps):
        state = step(state, i)
    return state


def _once(step: Callable[..., Any], state: Any, i: int, checkpointing: bool) -> Any:
    # networks are in evaluation mode: nothing random is to be run again
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(step, state, i, use_reentrant=False, preserve_rng_state=False)
    return step(state, i)


class PathSamples(NamedTuple):
    """Images with a graph.

    Attributes:
        images: [N, C, H, W] in [0, 1], N = P G, or P G R with R new noises a sample; samples of a prompt in a row.
        drift: [N], mean squared difference of the network's output from the reference's over the steps with gradient;
            0 where it is not asked for.
    """

    images: Tensor
    drift: Tensor


def sample_with_gradient(
    policy: DenoisingPolicy,
    prompts: Sequence[Any],
    group_size: int,
    seeds: Sequence[int],
    *,
    cut: int = 0,
    predict: bool = False,
    renoise: int = 0,
    deterministic: bool = False,
    checkpointing: bool = True,
    drift: bool = False,
    module: Callable[..., Any] | None = None,
) -> PathSamples:
    """Sample images whose graph leads back to the policy's weights.

    The images are those that `policy.sample` makes of the same seeds; `cut` changes their gradient only.

    Args:
        policy: its sampler, `steps` and `guidance` are used; both branches of guidance are in one forward pass and both
            have a gradient.
        prompts: P texts, captions or labels.
        group_size: G.
        seeds: P integers.
        cut: the first step with a gradient, see `unroll`.
        predict: stop at step `cut` and take the clean sample that it predicts, as ReFL does.
        renoise: run the whole chain without a graph, then noise each sample so many times to the level of the last step
            and take that step again, with a graph, as DRaFT-LV does; 0 = not. `cut` is then not used.
        deterministic: the sampler without noise. With it, noise is a constant of the graph.
        checkpointing: see `unroll`; an image decoder is then run for one image at a time.
        drift: also compare the network's outputs with the reference's.
        module: what wraps the policy, if anything does.

    Returns:
        Images and drift.

    Raises:
        ShapeError: there is not one seed per prompt.
        RecipeError: no step would have a gradient, or the scheduler clips its predicted samples, where gradients end.
        CheckpointError: `drift` without a reference.

    Gradient:
        To the network's trained weights; none where an image is outside of [0, 1] and held within.

    Source:
        arXiv 2310.03739; Directly Fine-Tuning Diffusion Models on Differentiable Rewards (DRaFT), arXiv 2309.17400;
        ImageReward (ReFL), arXiv 2304.05977.
    """
    if len(seeds) != len(prompts):
        raise ShapeError(
            f"diffusion.pathwise: there must be one seed per prompt (P = {len(prompts)}); got {len(seeds)}."
        )
    _check_clipping(policy.process)
    options = {"group_size": group_size, "seeds": list(seeds), "cut": cut, "predict": predict, "renoise": renoise}
    options |= {"deterministic": deterministic, "checkpointing": checkpointing, "drift": drift}
    steps = policy._pack(policy.encode(prompts))
    latents, drifted = (module or policy)(steps, kind="pathwise", **options)
    return PathSamples(_decode(policy, latents, checkpointing), drifted)


def _check_clipping(process: Process) -> None:
    if getattr(process, "clip", None) is not None:
        raise RecipeError(
            "policy: the scheduler clips its predicted samples (clip_sample: true), and no gradient passes where it does. "
            "Load the pipeline with a scheduler that has clip_sample: false."
        )


def follow(
    policy: DenoisingPolicy,
    steps: dict[str, Tensor],
    *,
    group_size: int,
    seeds: Sequence[int],
    cut: int,
    predict: bool,
    renoise: int,
    deterministic: bool,
    checkpointing: bool,
    drift: bool,
) -> tuple[Tensor, Tensor]:
    """Clean states [N, C, H, W] and drift [N] with a graph: what `policy.forward` runs for `sample_with_gradient`."""
    grid = policy.process.grid(policy.steps, deterministic=deterministic)
    length, size, shape = len(grid), len(seeds) * group_size, policy.latent_shape
    noise = path_noise(seeds, group_size, length + 1, shape, shared=policy.shared_noise).view(size, length + 1, *shape)
    window = None if deterministic else policy.window
    noisy = plan(seeds, group_size, grid.stochastic, window=window, window_range=policy.window_range).noisy
    noise, noisy = _like_states(policy, noise), noisy.view(size, length).to(policy.device)
    chain = _Chain(policy, policy._unpack(steps, group_size), grid, noise[:, 1:], noisy, drift, drift_from=cut)
    start = _start(noise[:, 0])
    if renoise:
        state = _renoised(chain, start, seeds, group_size, renoise, checkpointing)
    elif predict:
        _check_cut(cut, length)
        state = _once(chain.predict, _without_graph(chain.step, start, cut), cut, checkpointing)
    else:
        state = unroll(chain.step, start, length, cut=cut, checkpointing=checkpointing)
    compared = 1 if renoise or predict else length - cut
    return state[0], state[1] / compared


def _start(first: Tensor) -> State:
    return first, first.new_zeros(len(first))


def _like_states(policy: DenoisingPolicy, noise: Tensor) -> Tensor:
    return noise.to(policy.device, torch.promote_types(policy.dtype, torch.float32))


@dataclass
class _Chain:
    """A batch of N samples on its way from noise: the steps are pure functions, so that they can be run twice."""

    policy: DenoisingPolicy
    condition: Condition
    grid: Grid
    noise: Tensor  # [N, T, C, H, W]
    noisy: Tensor  # [N, T], whether a step has noise
    drift: bool = False
    drift_from: int = 0

    def step(self, state: State, i: int) -> State:
        x, moved = state
        out = self.policy.predict(x, self.grid.times[i], self.condition)
        step = self.policy.process.step(x, out, self.grid, i, self.noisy[:, i].to(x.dtype))
        after = step.mean + step.std * self.noise[:, i] if self.grid.stochastic[i] else step.mean
        return after, moved + self._distance(x, out, i)

    def predict(self, state: State, i: int) -> State:
        """The clean sample that step i predicts, in place of the next state."""
        x, moved = state
        out = self.policy.predict(x, self.grid.times[i], self.condition)
        step = self.policy.process.step(x, out, self.grid, i, 0.0)
        return step.x0, moved + self._distance(x, out, i)

    def _distance(self, x: Tensor, out: Tensor, i: int) -> Tensor:
        if not self.drift or i < self.drift_from:
            return out.new_zeros(len(out))
        with self.policy._reference_network() as network:
            return denoising_loss(out, self.policy.predict(x, self.grid.times[i], self.condition, network=network))


def _renoised(
    chain: _Chain, start: State, seeds: Sequence[int], group_size: int, count: int, checkpointing: bool
) -> State:
    """DRaFT-LV: finished samples, noised to the level of the last step, `count` times each, and denoised again."""
    last = len(chain.grid) - 1
    chain.drift_from = last + 1  # only the step that is taken again is compared
    clean, _ = _without_graph(chain.step, start, last + 1)
    generators = [training_generator(seed, g) for seed in seeds for g in range(group_size)]
    fresh = torch.cat([torch.randn(count, *clean.shape[1:], generator=g) for g in generators])
    level = float(chain.grid.levels[last])
    mix = add_noise if chain.policy.process.kind == "diffusion" else interpolate
    x = mix(clean.repeat_interleave(count, 0), _like_states(chain.policy, fresh), level)
    condition = {name: value.repeat_interleave(count, 0) for name, value in chain.condition.items()}
    again = _Chain(chain.policy, condition, chain.grid, chain.noise, chain.noisy, chain.drift)
    return _once(again.predict, _start(x), last, checkpointing)


def _decode(policy: DenoisingPolicy, latents: Tensor, checkpointing: bool) -> Tensor:
    if not checkpointing or policy.denoiser.pipeline is None or not torch.is_grad_enabled():
        return policy.decode(latents)
    parts = [checkpoint(policy.decode, one, use_reentrant=False, preserve_rng_state=False) for one in latents.split(1)]
    return torch.cat(parts)


def generator_of(
    policy: DenoisingPolicy,
    prompts: Sequence[Any],
    *,
    steps: int | None = None,
    seeds: Sequence[int] | None = None,
    checkpointing: bool = True,
) -> Callable[[Float[Tensor, "N C H W"]], Float[Tensor, "N C H W"]]:
    """The policy as a function from first states to images, for methods that optimise noise.

    Args:
        policy: any; one step (`steps=1`) makes it a one-step generator.
        prompts: N, one for each state that the function is given.
        steps: denoising steps; None = the policy's.
        seeds: N integers: use the sampler with noise, the noise of each sample's steps being the same in every call.
            None = the deterministic sampler.
        checkpointing: see `unroll`.

    Returns:
        A function from noise [N, C, H, W] to images [N, C, H, W] in [0, 1], with a graph from one to the other.

    Raises:
        ShapeError: there is not one seed per prompt.
        RecipeError: the scheduler clips its predicted samples.
        DataError: a prompt cannot be used.
    """
    if seeds is not None and len(seeds) != len(prompts):
        raise ShapeError(
            f"diffusion.pathwise: there must be one seed per prompt (N = {len(prompts)}); got {len(seeds)}."
        )
    _check_clipping(policy.process)
    grid = policy.process.grid(steps or policy.steps, deterministic=seeds is None)
    drawn = seeds if seeds is not None else [0] * len(prompts)
    noise = _like_states(policy, path_noise(drawn, 1, len(grid) + 1, policy.latent_shape)[:, 0])
    noisy = torch.tensor(grid.stochastic, device=policy.device).expand(len(prompts), -1)
    chain = _Chain(policy, policy.encode(prompts), grid, noise[:, 1:], noisy)

    def generate(first: Tensor) -> Tensor:
        latents, _ = unroll(chain.step, _start(_like_states(policy, first)), len(grid), checkpointing=checkpointing)
        return _decode(policy, latents, checkpointing)

    return generate


def first_noise(policy: DenoisingPolicy, seeds: Sequence[int]) -> Tensor:
    """The states [N, C, H, W] that samples of these seeds start from, as in `policy.sample` with one sample a prompt."""
    return _like_states(policy, path_noise(seeds, 1, 1, policy.latent_shape)[:, 0, 0])
