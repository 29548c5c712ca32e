"""The supervised loop: learn from given acts (SFT, behaviour cloning, denoising of given images)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from guerdon.errors import NumericsError, RecipeError
from guerdon.objectives.loss import Loss
from guerdon.rollout import Rollout
from guerdon.training.loop import Loop, mix_seed
from guerdon.training.optimisation import Optim


class Supervised(Loop):
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
        accelerator = accelerator or Accelerator()
        if batch_size % accelerator.num_processes:
            raise RecipeError(
                f"batch_size = {batch_size} must be a multiple of the number of processes, {accelerator.num_processes}."
            )
        super().__init__(policy, rows, sampler=None, optim=optim, updates=steps, seed=seed, accelerator=accelerator)
        self.batch_size, self.micro_batch = batch_size, micro_batch

    def step(self) -> dict[str, float]:
        """Make one update.

        Raises:
            NumericsError: the loss or its gradient is not finite; the policy is left as it was.
        """
        start = time.perf_counter()
        indices = self.sampler.draw(self.batch_size)
        share = len(indices) // self.processes
        first = self.rank * share
        mine = indices[first : first + share]
        seeds = [mix_seed(self.seed, self.steps_done, first + i, 2) for i in range(share)]
        given = self.policy.demonstrations([self.rows[i] for i in mine], seeds)
        live = self.sum_over_processes(given.mask.sum().float())
        size = self.micro_batch or len(mine)
        parts = [given.select(slice(begin, begin + size)).trim() for begin in range(0, len(mine), size)]
        losses = [partial(self._loss, part) for part in parts]
        total = self.accumulate(losses, live) / live.clamp(min=1.0)
        update = self.apply_gradient(total)
        if not update.made:
            raise NumericsError(
                f"supervised step {self.steps_done + 1}: loss {total.item():g}, gradient norm {update.norm:g}. "
                "This update was not made. Lower the learning rate."
            )
        self.steps_done += 1
        seconds = time.perf_counter() - start
        return {
            "loss": total.item(),
            "lr": update.lr,
            "grad_norm": update.norm,
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
        rank, processes = self.rank, self.processes
        size = self.micro_batch or max(self.batch_size // processes, 1)
        sums = torch.zeros(2, device=self.accelerator.device)
        for start in range(0, len(rows), size * processes):
            picked = range(start, min(start + size * processes, len(rows)))
            mine = (
                picked[rank::processes] or picked[:1]
            )  # every process takes part, so that sharded models stay in step
            # the same seeds in every evaluation
            given = self.policy.demonstrations([rows[i] for i in mine], [mix_seed(self.seed, i, 3) for i in mine])
            loss = self._loss(given).total
            if rank < len(picked):
                sums += torch.stack([loss, given.mask.sum().to(loss.dtype)])
        total, live = self.sum_over_processes(sums)
        return (total / live).item()

    def _loss(self, given: Rollout) -> Loss:
        return self.policy.imitation_loss(given, module=self.module)
