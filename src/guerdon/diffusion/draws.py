"""Everything random in a sample, from seeds: its noise, which of its steps have noise, and which are trained on.

A sample's draws follow from its prompt's seed and its place in the group alone, so the same seed gives the same sample
in any batch and on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

# what the numbers are for: streams that must not meet
_NOISE, _STEPS, _WINDOW, _TRAINING = range(4)


class Plan(NamedTuple):
    """Which steps have noise, and which of these are trained on; bool [P, G, T]."""

    noisy: Tensor
    trained: Tensor


def _words(*key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([number % 2**64 for number in key])


def generator(*key: int) -> Generator:
    """A generator on the CPU, the same for the same numbers."""
    return Generator().manual_seed(int(_words(*key).generate_state(1, np.uint64)[0]) >> 1)


def path_noise(
    seeds: Sequence[int], group_size: int, steps: int, shape: tuple[int, ...], *, shared: bool = False
) -> Tensor:
    """Standard normal numbers [P, G, steps, ...] in float32: the first state of each sample, then noise for its steps.

    The first state does not depend on the number of steps.

    Args:
        seeds: P integers.
        group_size: G.
        steps: how many tensors of `shape` a sample needs.
        shape: of a state.
        shared: the whole group starts from its first sample's state.
    """
    rows = [
        torch.randn(steps, *shape, generator=generator(seed, g, _NOISE)) for seed in seeds for g in range(group_size)
    ]
    noise = torch.stack(rows).view(len(seeds), group_size, steps, *shape)
    if shared:
        noise[:, 1:, 0] = noise[:, :1, 0]
    return noise


def training_generator(seed: int, sample: int = 0) -> Generator:
    """What the noise and time of a training example are drawn from."""
    return generator(seed, sample, _TRAINING)


def plan(
    seeds: Sequence[int],
    group_size: int,
    stochastic: Sequence[bool],
    *,
    trained_share: float = 1.0,
    random_share: float = 1.0,
    window: int | None = None,
    window_range: tuple[int, int] | None = None,
) -> Plan:
    """Which steps have noise and which are trained on.

    Args:
        seeds: P integers.
        group_size: G.
        stochastic: T flags, whether the process gives a step noise.
        trained_share: only the first steps are trained on: this share of all, rounded down.
        random_share: of those, each sample is trained on a random share, rounded down, at least one.
        window: only this many steps in a row have noise, at a place drawn for each prompt; None = all.
        window_range: steps the window lies within, [from, to); None = all.
    """
    steps = len(stochastic)
    noisy = torch.tensor(stochastic).expand(len(seeds), group_size, steps).clone()
    if window is not None:
        low, high = window_range or (0, sum(stochastic))
        starts = torch.tensor(
            [int(np.random.default_rng(_words(seed, _WINDOW)).integers(low, high - window + 1)) for seed in seeds]
        )
        place = torch.arange(steps) - starts[:, None]
        noisy &= ((place >= 0) & (place < window))[:, None]
    trained = noisy.clone()
    trained[..., int(steps * trained_share + 1e-9) :] = False
    if random_share < 1:
        for p, seed in enumerate(seeds):
            for g in range(group_size):
                candidates = trained[p, g].nonzero().flatten()
                kept = min(max(1, int(len(candidates) * random_share + 1e-9)), len(candidates))
                order = torch.randperm(len(candidates), generator=generator(seed, g, _STEPS))
                trained[p, g] = False
                trained[p, g, candidates[order[:kept]]] = True
    return Plan(noisy, trained)
