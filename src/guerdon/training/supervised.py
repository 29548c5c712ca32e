"""The supervised loop: learn from given acts (SFT, behaviour cloning, denoising of given images)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from guerdon.errors import NumericsError, RecipeError
from guerdon.rollout import Rollout
from guerdon.sampling.uniform import uniform
from guerdon.training.average import WeightAverage
from guerdon.training.checkpoint import LoopState, collect, restore
from guerdon.training.online import data_length, mix_seed
from guerdon.training.optimisation import Optim


class Supervised:
    """Train a policy on demonstrations.

    Minimises the policy's `imitation_loss`, averaged over the live steps of the batch (all micro-batches and
    processes): for texts the negative log-probability of a token, for images the denoising loss.

    Args:
        policy: see `guerdon.training.policy.Policy`.
        rows: data rows with `prompt` and what the policy's `demonstrations` reads: `completion`, `image`.
        batch_size: rows per update, over all processes.
        micro_batch: rows per forward pass and process; None = all.
        optim: optimiser settings.
        steps: length of the whole run, for the schedule.
        seed: of the order of the rows, and of what the policy draws for each (noise and times).
        accelerator: processes, device and precision.
    """

    def __init__(
        self,
        policy: Any,
        rows: Sequence[Mapping[str, Any]],
        *,
        batch_size: int = 32,
        micro_batch: int | None = None,
        optim: Optim | None = None,
        steps: int = 1000,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator()
        if batch_size % self.accelerator.num_processes:
            raise RecipeError(
                f"batch_size = {batch_size} must be a multiple of the number of processes, {self.accelerator.num_processes}."
            )
        self.policy, self.rows, self.batch_size, self.micro_batch = policy, rows, batch_size, micro_batch
        self.seed = seed
        self.sampler = uniform()
        self.sampler.prepare(data_length(rows), seed)
        self.settings = optim or Optim()
        optimizer, self.schedule = self.settings.build(policy.parameters(), steps)
        self.module, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        self.average = None if self.settings.ema is None else WeightAverage(self.trained, decay=self.settings.ema)
        self.steps_done = 0

    def step(self) -> dict[str, float]:
        """Make one update.

        Raises:
            NumericsError: the loss or its gradient is not finite; the policy is left as it was.
        """
        start = time.perf_counter()
        indices = self.sampler.draw(self.batch_size)
        share = len(indices) // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        mine = indices[first : first + share]
        seeds = [mix_seed(self.seed, self.steps_done, first + i, 2) for i in range(share)]
        given = self.policy.demonstrations([self.rows[i] for i in mine], seeds)
        live = self._sum(given.mask.sum().float())
        total = torch.zeros((), device=given.mask.device)
        size = self.micro_batch or len(mine)
        starts = range(0, len(mine), size)
        for begin in starts:
            part = given.select(slice(begin, begin + size)).trim()
            with nullcontext() if begin == starts[-1] else self.accelerator.no_sync(self.module):
                loss = self._loss(part)
                self.accelerator.backward(loss * (self.accelerator.num_processes / live.clamp(min=1.0)))
            total += loss.detach()
        total = self._sum(total) / live.clamp(min=1.0)
        clip = self.settings.clip_norm
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.trained, float("inf") if clip is None else clip))
        if not (torch.isfinite(norm) and torch.isfinite(total)):
            self.optimizer.zero_grad()
            raise NumericsError(
                f"supervised step {self.steps_done + 1}: loss {total.item():g}, gradient norm {norm.item():g}. "
                "This update was not made. Lower the learning rate."
            )
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        self.steps_done += 1
        seconds = time.perf_counter() - start
        return {
            "loss": total.item(),
            "lr": rate,
            "grad_norm": norm.item(),
            "tokens": live.item(),
            "tokens_per_s": live.item() / max(seconds, 1e-9),
        }

    def run(self, steps: int, on_step: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """Make `steps` updates; `on_step(step, metrics)` after each."""
        for _ in range(steps):
            metrics = self.step()
            if on_step is not None:
                on_step(self.steps_done, metrics)

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """Mean imitation loss of a live step on held-out rows, of the averaged weights where there are; NaN without rows."""
        with self.averaged():
            return self._evaluate(rows)

    def _evaluate(self, rows: Sequence[Mapping[str, Any]]) -> float:
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        size = self.micro_batch or max(self.batch_size // processes, 1)
        sums = torch.zeros(2, device=self.accelerator.device)
        for start in range(0, len(rows), size * processes):
            picked = range(start, min(start + size * processes, len(rows)))
            mine = (
                picked[rank::processes] or picked[:1]
            )  # every process takes part, so that sharded models stay in step
            # the same seeds in every evaluation
            given = self.policy.demonstrations([rows[i] for i in mine], [mix_seed(self.seed, i, 3) for i in mine])
            loss = self._loss(given)
            if rank < len(picked):
                sums += torch.stack([loss, given.mask.sum().to(loss.dtype)])
        total, live = self._sum(sums)
        return (total / live).item()

    def _loss(self, given: Rollout) -> Tensor:
        return self.policy.imitation_loss(given, module=self.module).total

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the policy has the averaged weights, if an average is kept."""
        return nullcontext() if self.average is None else self.average.applied()

    def finish(self) -> None:
        """Give the policy the averaged weights for good, if an average is kept."""
        if self.average is not None:
            self.average.copy_to_weights()

    def _modules(self) -> dict[str, nn.Module]:
        average = {} if self.average is None else {"average": self.average}
        return {"sampler": self.sampler, **average}

    def state(self) -> LoopState:
        """All that a resumed loop needs beside the policy's weights."""
        state = collect(self._modules(), self.optimizer, self.schedule)
        return LoopState(state.tensors, {**state.facts, "steps_done": self.steps_done})

    def load_state(self, state: LoopState) -> None:
        """Go on from what `state` returned."""
        restore(state, self._modules(), self.optimizer, self.schedule)
        self.steps_done = state.facts["steps_done"]

    def _sum(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        return cast(Tensor, self.accelerator.reduce(value, reduction="sum"))
