"""What the loops share: processes, the weights with their optimiser, schedule and average, and the state of all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from guerdon.errors import RecipeError
from guerdon.objectives.loss import Loss
from guerdon.rollout import Rollout, join
from guerdon.sampling.uniform import uniform
from guerdon.training import deepspeed
from guerdon.training.average import WeightAverage
from guerdon.training.checkpoint import LoopState, collect, restore
from guerdon.training.optimisation import Optim


class Update(NamedTuple):
    """What became of a gradient.

    Attributes:
        norm: of the whole gradient, before clipping.
        lr: the learning rate it was, or would have been, applied with.
        made: False where loss or gradient were not finite: the weights are as they were.
    """

    norm: float
    lr: float
    made: bool


class Loop:
    """A policy, its rows and its optimiser; a loop adds what a step is.

    Args:
        policy: see `guerdon.training.policy.Policy`.
        rows: data rows.
        sampler: which rows to draw; uniform without replacement by default.
        optim: optimiser settings.
        updates: of the whole run, for the schedule.
        seed: of everything random in the loop.
        accelerator: processes, device and precision; a plain one by default.
    """

    def __init__(
        self,
        policy: Any,
        rows: Sequence[Mapping[str, Any]],
        *,
        sampler: Any,
        optim: Optim | None,
        updates: int,
        seed: int,
        accelerator: Accelerator | None,
    ) -> None:
        self.accelerator = accelerator or Accelerator()
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.policy, self.rows, self.seed = policy, rows, seed
        self.sampler = sampler if sampler is not None else uniform()
        self.sampler.prepare(data_length(rows), seed)
        self.settings = optim or Optim()
        optimizer, schedule = self.settings.build(policy.parameters(), updates)
        self.engine = deepspeed.used(self.accelerator)
        if self.engine:
            deepspeed.settle(self.accelerator, self.settings.clip_norm)
        self.module, self.optimizer = self.accelerator.prepare(policy, optimizer)
        # not prepared by accelerate: that would step it once per process, and a schedule counts updates of the run
        self.schedule = schedule
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        self.average = None if self.settings.ema is None else WeightAverage(self.trained, decay=self.settings.ema)
        self.steps_done = 0

    def accumulate(self, parts: Sequence[Callable[[], Loss]], count: Tensor) -> Tensor:
        """Add up the gradient of a loss that is computed a micro-batch at a time.

        Args:
            parts: each computes the loss of one micro-batch of this process.
            count: what the counts of all parts of all processes add up to; known beforehand, so that one backward pass
                is enough.

        Returns:
            The sum of the totals over all processes.

        Raises:
            RecipeError: the counts add up to something else.
        """
        scale = self.processes / count.clamp(min=1.0)
        total, seen = torch.zeros_like(count), torch.zeros_like(count)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last or self.engine else self.accelerator.no_sync(self.module):
                loss = part()
                if self.engine:
                    deepspeed.backward(self.module, loss.total * scale, last)
                else:
                    self.accelerator.backward(loss.total * scale)
            total += loss.total.detach().to(total.dtype)
            seen += loss.count.detach().to(count.dtype)
        total, seen = self.sum_over_processes(torch.stack([total, seen]))
        if not torch.allclose(seen, count, rtol=1e-6):
            raise RecipeError(
                f"objective: its count was {count.item():g} for the whole mini-batch and {seen.item():g} over the "
                "micro-batches. A count may depend on masks and rewards, never on logp or on the other groups."
            )
        return total

    def prepare(self) -> None:
        """What is done once, before the first step of a run; nothing by default."""

    def with_references(self, rollout: Rollout) -> Rollout:
        """A rollout with the scores of reference samples that a stage asks for; as it is by default."""
        return rollout

    def apply_gradient(self, total: Tensor) -> Update:
        """Clip the gradient and move the weights along it, unless it or the loss `total` is not finite."""
        rate = self.optimizer.param_groups[0]["lr"]
        norm, made = self._move(bool(torch.isfinite(total)))
        if made:
            self.schedule.step()
        if made and self.average is not None:
            self.average.update()
        return Update(norm, rate, made)

    def _move(self, finite: bool) -> tuple[float, bool]:
        """The gradient's norm, and whether the weights were moved along it."""
        if self.engine:
            if finite:
                return deepspeed.step(self.module)
            self.module.zero_grad()
            return float("nan"), False
        clip = self.settings.clip_norm
        found = self.accelerator.clip_grad_norm_(self.trained, float("inf") if clip is None else clip)
        norm = torch.as_tensor(found)
        made = finite and bool(torch.isfinite(norm))
        if made:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item(), made

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the policy has the averaged weights, if an average is kept."""
        return nullcontext() if self.average is None else self.average.applied()

    def finish(self) -> None:
        """Give the policy the averaged weights for good, if an average is kept."""
        if self.average is not None:
            self.average.copy_to_weights()

    def modules(self) -> dict[str, nn.Module]:
        """Everything with state beside the policy, by name."""
        average = {} if self.average is None else {"average": self.average}
        return {"sampler": self.sampler, **average}

    def facts(self) -> dict[str, Any]:
        """Plain numbers that belong to the state."""
        return {"steps_done": self.steps_done}

    def state(self) -> LoopState:
        """All that a resumed loop needs beside the policy's weights."""
        divided = deepspeed.optimizer_state(self.optimizer, self.trained) if self.engine else None
        state = collect(self.modules(), divided or self.optimizer.state_dict(), self.schedule)
        return LoopState(state.tensors, {**state.facts, **self.facts()})

    def load_state(self, state: LoopState) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: it is of other stages or another optimiser.
        """
        load = partial(deepspeed.load_optimizer_state, self.optimizer, self.trained) if self.engine else None
        restore(state, self.modules(), self.optimizer, self.schedule, load)
        for name in self.facts():
            setattr(self, name, state.facts[name])

    def gather(self, mine: Rollout) -> Rollout:
        """The rollouts of all processes as one, in their order."""
        if self.processes == 1:
            return mine
        return join(gather_object([mine.to("cpu")])).to(self.accelerator.device)

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """The sum of each process's value, on all of them."""
        if self.processes == 1:
            return value
        return cast(Tensor, self.accelerator.reduce(value, reduction="sum"))


def data_length(rows: Sequence[Any]) -> int | None:
    """How many rows there are; None for rows without end, which say `sys.maxsize`."""
    return None if len(rows) == sys.maxsize else len(rows)


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed out of several numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
