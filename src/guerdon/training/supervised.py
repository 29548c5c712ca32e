"""The supervised loop: learn from given acts (SFT, behaviour cloning, denoising of given images)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from guerdon.errors import NumericsError, RecipeError
from guerdon.objectives.loss import Loss
from guerdon.rollout import Rollout
from guerdon.stages import call, check, wants
from guerdon.training.loop import Loop, mix_seed
from guerdon.training.optimisation import Optim

REFERENCE_FIELDS = ("logp_ref", "normaliser_ref")


class _Part(NamedTuple):
    """A micro-batch: the demonstrations, and the columns that the objective names."""

    given: Rollout
    columns: dict[str, list[Any]]


class Supervised(Loop):
    """Train a policy on demonstrations.

    Without an objective it minimises the policy's `imitation_loss`, averaged over the live steps of the batch (all
    micro-batches and processes): for texts the negative log-probability of a token, for images the denoising loss. An
    objective is given, of every demonstration [B, 1, T], `logp`, `mask`, and where it names them `logp_ref` of the policy's
    reference, `normaliser` and `normaliser_ref` (of the logits), and columns of the data.

    Args:
        policy: see `guerdon.training.policy.Policy`; with `keep_reference()` called where the objective reads the
            reference.
        rows: data rows with `prompt` and what the policy's `demonstrations` reads: `completion`, `image`.
        objective: from log-probabilities to a `Loss`, for policies that score given samples (and on demand tell the
            `normaliser`, in `log_prob` and `reference_scores`); None = the policy's own loss.
        batch_size: rows per update, over all processes.
        micro_batch: rows per forward pass and process; None = all.
        optim: optimiser settings.
        steps: length of the whole run, for the schedule.
        seed: of the order of the rows, and of what the policy draws for each (noise and times).
        accelerator: processes, device and precision.

    Raises:
        RecipeError: sizes do not divide.
        BindingError: the objective names a field that will not be there.
    """

    def __init__(
        self,
        policy: Any,
        rows: Sequence[Mapping[str, Any]],
        objective: Callable[..., Loss] | None = None,
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
        self.objective = objective
        if objective is not None:
            check_objective(objective, rows[0])
        super().__init__(policy, rows, sampler=None, optim=optim, updates=steps, seed=seed, accelerator=accelerator)
        self.batch_size, self.micro_batch = batch_size, micro_batch

    def step(self) -> dict[str, float]:
        """Make one update.

        Returns:
            `loss`, `lr`, `grad_norm`, `tokens`, `tokens_per_s`; with an objective also `nll` (of a token, in nats), what it
            says a sample is worth as `implicit`, and its own metrics, means over the samples.

        Raises:
            NumericsError: the loss or its gradient is not finite; the policy is left as it was.
        """
        start = time.perf_counter()
        indices = self.sampler.draw(self.batch_size)
        share = len(indices) // self.processes
        first = self.rank * share
        mine = indices[first : first + share]
        seeds = [mix_seed(self.seed, self.steps_done, first + i, 2) for i in range(share)]
        rows = [self.rows[i] for i in mine]
        given = self.policy.demonstrations(rows, seeds)
        live = self.sum_over_processes(given.mask.sum().float())
        size = self.micro_batch or len(mine)
        places = [slice(begin, begin + size) for begin in range(0, len(mine), size)]
        parts = [self._part(given.select(place).trim(), rows[place]) for place in places]
        record = _Means()
        count = live if self.objective is None else self._count(parts)
        total = self.accumulate([partial(self._loss, part, record) for part in parts], count) / count.clamp(min=1.0)
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
            **record.result(self),
        }

    def run(self, steps: int, on_step: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """Make `steps` updates; `on_step(step, metrics)` after each."""
        for _ in range(steps):
            metrics = self.step()
            if on_step is not None:
                on_step(self.steps_done, metrics)

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The loss on held-out rows, of the averaged weights where there are.

        Returns:
            `eval/loss`; with an objective also `eval/nll`, `eval/implicit` and its metrics. Nothing without rows.
        """
        if not len(rows):
            return {}
        with self.averaged():
            return self._evaluate(rows)

    def _evaluate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        rank, processes = self.rank, self.processes
        size = self.micro_batch or max(self.batch_size // processes, 1)
        sums = torch.zeros(2, device=self.accelerator.device)
        record = _Means()
        for start in range(0, len(rows), size * processes):
            picked = range(start, min(start + size * processes, len(rows)))
            mine = (
                picked[rank::processes] or picked[:1]
            )  # every process takes part, so that sharded models stay in step
            # the same seeds in every evaluation
            found = [rows[i] for i in mine]
            given = self.policy.demonstrations(found, [mix_seed(self.seed, i, 3) for i in mine])
            counts = float(rank < len(picked))
            loss = self._loss(self._part(given, found), record, counts)
            sums += counts * torch.stack([loss.total, loss.count.to(loss.total.dtype)])
        total, count = self.sum_over_processes(sums)
        told = {"loss": (total / count).item(), **record.result(self)}
        return {f"eval/{name}": value for name, value in told.items()}

    def _part(self, given: Rollout, rows: Sequence[Mapping[str, Any]]) -> _Part:
        names = [] if self.objective is None else [name for name in rows[0] if wants(self.objective, name)]
        return _Part(given, {name: [row.get(name) for row in rows] for name in names})

    def _loss(self, part: _Part, record: _Means, counts: float = 1.0) -> Loss:
        if self.objective is None:
            return self.policy.imitation_loss(part.given, module=self.module)
        fields = self._fields(part.given)
        loss = call(self.objective, {**part.columns, **fields})
        record.add(loss, fields, counts)
        return loss

    def _fields(self, given: Rollout) -> dict[str, Tensor]:
        """[B, 1, T] under the policy, with gradient, and where they are named under the reference, without."""
        named = {name for name in ("normaliser", *REFERENCE_FIELDS) if wants(self.objective, name)}
        if "normaliser" in named:
            now = self.policy.log_prob(given, entropy=False, normaliser=True, module=self.module)
            found = {"logp": now.logp, "normaliser": now.normaliser, "mask": given.mask}
        else:
            found = {"logp": self.policy.log_prob(given, entropy=False, module=self.module).logp, "mask": given.mask}
        if "normaliser_ref" in named:
            then = self.policy.reference_scores(given, normaliser=True, module=self.module)
            found |= {"logp_ref": then.logp, "normaliser_ref": then.normaliser}
        elif "logp_ref" in named:
            found["logp_ref"] = self.policy.reference_log_prob(given, module=self.module)
        return found

    @torch.no_grad()
    def _count(self, parts: Sequence[_Part]) -> Tensor:
        """The batch's denominator over all processes, found beforehand so that one backward pass is enough."""
        counts = []
        for part in parts:
            nothing = torch.zeros_like(part.given.logp_old)
            blank = dict.fromkeys(("logp", "normaliser", *REFERENCE_FIELDS), nothing)
            loss = call(self.objective, {**part.columns, **blank, "mask": part.given.mask})
            counts.append(loss.count.to(torch.float32).reshape(()))
        return self.sum_over_processes(torch.stack(counts).sum())

    def modules(self) -> dict[str, nn.Module]:
        """Everything with state beside the policy, by name."""
        objective = {"objective": self.objective} if isinstance(self.objective, nn.Module) else {}
        return {**super().modules(), **objective}


def check_objective(objective: Callable[..., Any], columns: Iterable[str]) -> None:
    """Check that an objective will find every field it names.

    Raises:
        BindingError: naming the field and those there are.
    """
    check(objective, {"logp", "normaliser", "mask", *REFERENCE_FIELDS, *columns})


class _Means:
    """Means of an objective's numbers over the samples of all micro-batches and processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, loss: Loss, fields: Mapping[str, Tensor], counts: float) -> None:
        """Note the numbers of a micro-batch; with `counts` 0 it is nothing, but every process notes the same names."""
        mask = fields["mask"]
        samples = torch.tensor(float(len(mask)), device=mask.device)
        told = {"samples": samples, "live": mask.sum()}
        told["nll"] = -fields["logp"].detach().where(mask, 0.0).sum()
        if loss.implicit is not None:
            told["implicit"] = loss.implicit.sum()
        told |= {name: value * samples for name, value in loss.metrics.items()}
        for name, value in told.items():
            self.sums[name] = self.sums.get(name, 0.0) + counts * value.to(torch.float32)

    def result(self, loop: Loop) -> dict[str, float]:
        """Everything in one exchange between processes; nothing where nothing was told."""
        if not self.sums:
            return {}
        values = loop.sum_over_processes(torch.stack(list(self.sums.values()))).tolist()
        found = dict(zip(self.sums, values, strict=True))
        samples, live = found.pop("samples"), found.pop("live")
        return {name: value / (live if name == "nll" else samples) for name, value in found.items()}
