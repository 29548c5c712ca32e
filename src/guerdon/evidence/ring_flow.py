"""The job that claims about flow models are tested on: points on a ring, a small rectified flow, many runs in one tensor.

Four classes of three modes each lie on a circle of radius 2. A multilayer perceptron per run learns to generate them;
the weights of all runs are stacked, so that seeds train side by side, each with generators of its own. Steps, losses
and advantages are those of the library.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from guerdon.cache import weights
from guerdon.diffusion.steps import flow_grpo_std, flow_sde_step, gaussian_log_prob
from guerdon.objectives.loss import Loss

CLASSES, MODES, RADIUS, SPREAD = 4, 3, 2.0, 0.15
STEPS, NOISE = 8, 0.7  # of the sampler
WIDTH = 64
BASE = {"steps": 2000, "batch": 256, "lr": 2e-3}  # of the flow that every run starts from
Parameters = list[Tensor]


@dataclass
class Paths:
    """What the policies of R runs sampled: P prompts, G samples each, T steps.

    Attributes:
        classes: [R, P].
        states: [R, P, G, T + 1, 2], from noise to sample.
        velocities: [R, P, G, T, 2], at the states but the last.
        logp: [R, P, G, T], under the policy that sampled them.
    """

    classes: Tensor
    states: Tensor
    velocities: Tensor
    logp: Tensor

    @property
    def samples(self) -> Tensor:
        """[R, P, G, 2]."""
        return self.states[..., -1, :]


def centre(classes: Tensor, mode: int = 1) -> Tensor:
    """Where a mode of each class lies: [..., 2]."""
    angle = 2 * math.pi * (MODES * classes + mode) / (CLASSES * MODES)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], -1)


class Policies:
    """R flows with weights of their own.

    Args:
        parameters: of a net with two hidden layers, each with R first.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.sigmas = torch.linspace(1, 0, STEPS + 1)
        self.std = flow_grpo_std(NOISE)

    def __len__(self) -> int:
        return len(self.parameters[0])

    def velocity(self, x: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """Noise minus data: x [R, N, 2], sigma [N] or [R, N], classes [R, N] -> [R, N, 2]."""
        time = sigma.expand(x.shape[:-1]).unsqueeze(-1)
        hot = torch.nn.functional.one_hot(classes, CLASSES).to(x.dtype)
        hidden = torch.cat([x, time, hot], -1)
        for i in range(0, len(self.parameters), 2):
            hidden = torch.baddbmm(self.parameters[i + 1], hidden, self.parameters[i])
            if i + 2 < len(self.parameters):
                hidden = torch.nn.functional.silu(hidden)
        return hidden

    @torch.no_grad()
    def sample(self, classes: Tensor, group: int, generators: Sequence[Generator]) -> Paths:
        """G samples of each of [R, P] classes by the SDE; each run draws from its own generator."""
        runs, prompts = classes.shape
        draw = torch.stack([torch.randn(STEPS + 1, prompts * group, 2, generator=g) for g in generators])
        x, flat = draw[:, 0], classes.repeat_interleave(group, 1)
        states, velocities, logp = [x], [], []
        for i in range(STEPS):
            velocity = self.velocity(x, self.sigmas[i], flat)
            step = self._step(x, velocity, i)
            x = step.mean.view_as(x) + step.std.view(-1)[0] * draw[:, i + 1]
            states.append(x)
            velocities.append(velocity)
            logp.append(gaussian_log_prob(x.flatten(0, 1), step.mean, step.std, "sum"))

        def shape(parts: list[Tensor], *last: int) -> Tensor:
            return torch.stack([part.view(runs, prompts, group, *last) for part in parts], 3)

        return Paths(classes, shape(states, 2), shape(velocities, 2), shape(logp))

    def _step(self, x: Tensor, velocity: Tensor, i: int) -> Any:
        return flow_sde_step(
            x.flatten(0, 1), velocity.flatten(0, 1), self.sigmas[i].item(), self.sigmas[i + 1].item(), self.std
        )

    def log_prob(self, paths: Paths) -> Tensor:
        """[R, P, G, T], with gradient: the steps of `paths` once more, all at a time."""
        runs, prompts, group = paths.states.shape[:3]
        x, after = paths.states[..., :-1, :], paths.states[..., 1:, :]
        sigma, below = (s.expand(runs, prompts, group, STEPS) for s in (self.sigmas[:-1], self.sigmas[1:]))
        classes = paths.classes[..., None, None].expand(runs, prompts, group, STEPS)
        velocity = self.velocity(x.reshape(runs, -1, 2), sigma.reshape(runs, -1), classes.reshape(runs, -1))
        step = flow_sde_step(x.reshape(-1, 2), velocity.reshape(-1, 2), sigma.reshape(-1), below.reshape(-1), self.std)
        return gaussian_log_prob(after.reshape(-1, 2), step.mean, step.std, "sum").view(runs, prompts, group, STEPS)

    @torch.no_grad()
    def follow_ode(self, classes: Tensor, generators: Sequence[Generator], steps: int = 20) -> Tensor:
        """One sample of each of [R, N] classes without noise on the way: [R, N, 2]."""
        x = torch.stack([torch.randn(classes.shape[1], 2, generator=g) for g in generators])
        sigmas = torch.linspace(1, 0, steps + 1)
        for now, below in itertools.pairwise(sigmas):
            x = x + (below - now) * self.velocity(x, now, classes)
        return x

    def copy(self) -> Policies:
        """The same weights, frozen."""
        return Policies([p.detach().clone() for p in self.parameters])


class Adam:
    """AdamW's betas without decay, each run with a learning rate and a bound on its gradient's norm of its own."""

    def __init__(self, parameters: Parameters, lr: Tensor, clip_norm: float = 1.0) -> None:
        self.parameters, self.lr, self.clip_norm = parameters, lr, clip_norm
        self.first, self.second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        self.count = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move every run's weights."""
        self.count += 1
        norm = sum(g.flatten(1).square().sum(1) for g in gradients)
        assert isinstance(norm, Tensor)
        scale = (self.clip_norm / (norm.sqrt() + 1e-6)).clamp(max=1.0).view(-1, 1, 1)
        size = self.lr.view(-1, 1, 1) * math.sqrt(1 - 0.999**self.count) / (1 - 0.9**self.count)
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
            g = g * scale
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            p -= size * m / (v.sqrt() + 1e-8)


def base(seed: int) -> dict[str, Tensor]:
    """The flow that a run of this seed starts from: trained once, then read from the cache."""
    code = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()
    return weights("bases", f"ring-{seed}", {"seed": seed, **BASE, "code": code}, lambda: _train_base(seed))


def _train_base(seed: int) -> dict[str, Tensor]:
    generator = Generator().manual_seed(1_000_003 + seed)
    sizes = [2 + 1 + CLASSES, WIDTH, WIDTH, 2]
    parameters: Parameters = []
    for narrow, wide in itertools.pairwise(sizes):
        bound = narrow**-0.5
        parameters += [
            (torch.rand(1, narrow, wide, generator=generator) * 2 - 1) * bound,
            (torch.rand(1, 1, wide, generator=generator) * 2 - 1) * bound,
        ]
    for p in parameters:
        p.requires_grad_()
    policy = Policies(parameters)
    steps, batch = int(BASE["steps"]), int(BASE["batch"])
    lr = torch.tensor([BASE["lr"]])
    adam = Adam(parameters, lr, clip_norm=math.inf)
    for step in range(steps):
        adam.lr = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        classes = torch.randint(CLASSES, (1, batch), generator=generator)
        data = data_of(classes, generator)
        noise, sigma = torch.randn(1, batch, 2, generator=generator), torch.rand(1, batch, generator=generator)
        x = (1 - sigma.unsqueeze(-1)) * data + sigma.unsqueeze(-1) * noise
        loss = (policy.velocity(x, sigma, classes) - (noise - data)).square().mean()
        adam.step(torch.autograd.grad(loss, parameters))
    return {str(i): p.detach() for i, p in enumerate(parameters)}


def data_of(classes: Tensor, generator: Generator) -> Tensor:
    """Draw a point of the ring for each class."""
    modes = torch.randint(MODES, classes.shape, generator=generator)
    places = torch.stack([centre(classes, mode) for mode in range(MODES)], -2)
    picked = places.gather(-2, modes[..., None, None].expand(*classes.shape, 1, 2)).squeeze(-2)
    return picked + SPREAD * torch.randn(picked.shape, generator=generator)


def start(seeds: Sequence[int]) -> Policies:
    """A policy for each seed, from its base."""
    bases = {seed: base(seed) for seed in dict.fromkeys(seeds)}
    names = sorted(bases[seeds[0]], key=int)
    return Policies([torch.cat([bases[seed][name] for seed in seeds]).requires_grad_() for name in names])


def together(values: Tensor) -> Tensor:
    """[R, P, ...] -> [R * P, ...]: groups of all runs in a row, as the library's functions take them."""
    return values.flatten(0, 1)


def train(
    seeds: Sequence[int],
    *,
    lr: Sequence[float],
    rounds: int,
    updates: int,
    prompts: int,
    group: int,
    signal: Callable[[int, Paths], dict[str, Tensor]],
    loss: Callable[[Tensor, Paths, Mapping[str, Tensor]], Loss],
    classes: int = CLASSES,
    reference: bool = False,
) -> tuple[Policies, dict[str, Tensor]]:
    """Train a policy per run: sample, score, then some updates on the same samples.

    Args:
        seeds: of the base, the prompts and the samples of each run; R of them.
        lr: learning rate of each run.
        rounds: of sampling.
        updates: on each round's samples.
        prompts: P, classes drawn afresh each round.
        group: G.
        signal: from the round and its paths to what the loss needs (tensors with R * P first, or anything), and to
            curves: the entries whose names begin with `log/`, each [R].
        loss: from the log-probabilities [R * P, G, T], the paths and the signal's tensors to a loss. All runs must have
            the same count, so that each run's gradient is that of its own mean.
        classes: prompts are drawn from the first so many.
        reference: add `logp_ref` [R * P, G, T], under the base, to what the loss is given, and the curve `log/kl`: mean
            over samples of the summed log-ratio.

    Returns:
        The policies, and curves [R, rounds] by name.
    """
    policies = start(seeds)
    frozen = policies.copy()
    adam = Adam(policies.parameters, torch.tensor(list(lr)))
    generators = [Generator().manual_seed(7_000_003 * seed + 11) for seed in seeds]
    curves: dict[str, list[Tensor]] = {}
    for number in range(rounds):
        drawn = torch.stack([torch.randint(classes, (prompts,), generator=g) for g in generators])
        paths = policies.sample(drawn, group, generators)
        given = signal(number, paths)
        if reference:
            with torch.no_grad():
                given["logp_ref"] = together(frozen.log_prob(paths))
            given["log/kl"] = (paths.logp - given["logp_ref"].view_as(paths.logp)).sum(-1).mean((1, 2))
        for name, value in given.items():
            if name.startswith("log/"):
                curves.setdefault(name.removeprefix("log/"), []).append(value.detach())
        for _ in range(updates):
            found = loss(together(policies.log_prob(paths)), paths, given)
            mean = found.total / found.count * len(policies)
            adam.step(torch.autograd.grad(mean, policies.parameters))
    return policies, {name: torch.stack(values, 1) for name, values in curves.items()}


def thin(values: Sequence[float], width: int = 5) -> list[tuple[float, float]]:
    """Means over windows of rounds, each at the middle of its window."""
    parts = [values[i : i + width] for i in range(0, len(values), width)]
    return [(i * width + (len(part) + 1) / 2, sum(part) / len(part)) for i, part in enumerate(parts)]


def side_by_side(
    units: Sequence[Any], trained: Callable[[str, Sequence[Any]], Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Results of units in their order; `trained(arm, units)` runs those of one arm as one tensor."""
    found: list[dict[str, Any]] = [{}] * len(units)
    for (arm, _), places in by_arm(units).items():
        for place, result in zip(places, trained(arm, [units[n] for n in places]), strict=True):
            found[place] = result
    return found


def by_arm(units: Sequence[Any]) -> dict[tuple[str, str], list[int]]:
    """Positions of the units that can train as one tensor: those of one arm and role that differ in seed and lr only."""
    found: dict[tuple[str, str], list[int]] = {}
    for n, unit in enumerate(units):
        rest = sorted((k, v) for k, v in unit.settings.items() if k != "lr")
        found.setdefault((unit.arm, str(rest)), []).append(n)
    return found
