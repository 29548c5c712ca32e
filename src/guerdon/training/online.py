"""The online loop: sample, score, assign, update.

One step draws P prompts, samples G times each, turns the samples into advantages by a `Signal`, and makes `passes` passes
over `mini_batches` of whole groups. The gradient is that of sum(total) / sum(count) over the mini-batch, so it depends
neither on the micro-batch size nor on the number of processes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from guerdon.errors import DataError, NumericsError, RecipeError, ShapeError
from guerdon.ledger import Attribution, attribute
from guerdon.objectives.loss import Imitation, Loss
from guerdon.rollout import Rollout, beside, join
from guerdon.signal import Signal
from guerdon.stages import call, check, wants
from guerdon.training.allocator import keep_freed_memory
from guerdon.training.loop import Loop, data_length, mix_seed
from guerdon.training.optimisation import Optim
from guerdon.training.policy import PolicyOutput
from guerdon.training.references import Reference
from guerdon.weighting.gradient_alignment import inner_products


class StepResult(NamedTuple):
    """What one step did.

    Attributes:
        step: its number, from 1.
        metrics: flat name -> number, the same on every process.
        rollout: all prompts of the step, without what the policy needs to score them again.
        attribution: the advantages split over the reward components.
    """

    step: int
    metrics: dict[str, float]
    rollout: Rollout
    attribution: Attribution


class Online(Loop):
    """Train a policy on rewards of its own samples.

    Args:
        policy: see `guerdon.training.policy.Policy`; with `keep_reference()` called where a stage reads `logp_ref`.
        rows: data rows; `prompt` is handed to the policy, the other columns to the stages.
        signal: from samples to advantages.
        objective: from log-probabilities and advantages to a `Loss`.
        sampler: which prompts to draw; uniform without replacement by default.
        prompts_per_step: P, over all processes.
        group_size: G.
        samples: `policy`, or `data`: the texts in the rows' column `completions` come first, and the policy adds its own
            up to G. Their `logp_old` is the policy's at the time of the step, so that ratios do not correct for where
            they came from: use an objective that needs no correction, such as `copg`.
        passes: how often each sample is learnt from.
        mini_batches: updates per pass; each holds whole groups.
        micro_batch: prompts per forward pass and process, bounds memory and changes nothing else; None = all.
        old_logp: `sampler` takes the log-probabilities found while sampling as those of the old policy; `recompute`
            scores the samples once more with the training code (worth its time where the two differ, as in bf16).
            With a single update per step the two are the same and ratios are exactly 1.
        reference_samples: M, answers of the policy that training starts from to each prompt, scored once, for stages that
            read `ref_scores` [P, M].
        reference_prompts: prompts whose reference answers calibrate the stages that are calibrated once.
        optim: optimiser settings.
        steps: length of the whole run, for the schedule.
        seed: of everything random in the loop.
        accelerator: processes, device and precision; a plain one by default.

    Raises:
        RecipeError: sizes do not divide.
        BindingError: a stage asks for a field that will not be there.
    """

    def __init__(
        self,
        policy: Any,
        rows: Sequence[Mapping[str, Any]],
        signal: Signal,
        objective: Callable[..., Loss],
        *,
        sampler: Any = None,
        prompts_per_step: int = 8,
        group_size: int = 8,
        samples: Literal["policy", "data"] = "policy",
        passes: int = 1,
        mini_batches: int = 1,
        micro_batch: int | None = None,
        old_logp: Literal["sampler", "recompute"] = "sampler",
        reference_samples: int = 10,
        reference_prompts: int = 64,
        optim: Optim | None = None,
        steps: int = 1000,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        accelerator = accelerator or Accelerator()
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        check_sizes(prompts_per_step, mini_batches, accelerator.num_processes)
        self.signal = signal.to(accelerator.device)
        self.objective = objective
        self.prompts_per_step, self.group_size = prompts_per_step, group_size
        self.given = samples == "data"
        if self.given and not hasattr(policy, "given"):
            raise RecipeError("samples: this policy takes no samples from the data: it has no method `given`.")
        self.passes, self.mini_batches, self.micro_batch = passes, mini_batches, micro_batch
        self.old_logp = old_logp
        self.needs_reference = signal.needs("logp_ref") or wants(objective, "logp_ref")
        # an objective that learns from whole samples as from examples may do without the log-probabilities of steps
        self.needs_logp, self.needs_imitation = wants(objective, "logp"), wants(objective, "imitation")
        self.needs_drift = wants(objective, "drift")
        if wants(objective, "kl"):
            policy.exact_kl = True
        if signal.needs("projections"):
            policy.keep_projections = True
        if signal.needs("offsets"):
            policy.keep_offsets = True
        self.needs_divergence = signal.needs("kl_old")
        if self.needs_divergence and not hasattr(policy, "divergence"):
            raise RecipeError(
                "advantage: this policy has no divergence over all that it could draw (`kl_old`); use kl_estimator: k1."
            )
        self.has_critic = bool(getattr(policy, "has_critic", False))
        prepared = ({"logp_ref"} if self.needs_reference else set()) | (
            {"values", "values_old"} if self.has_critic else set()
        )
        self.needs_answers = signal.needs("ref_scores")
        if self.needs_answers:
            prepared |= {"ref_scores"}
        if self.needs_divergence:
            prepared |= {"kl_old"}
        check_fields(signal, objective, columns=rows[0], policy_fields=policy.fields, prepared=prepared)
        updates = steps * passes * mini_batches
        super().__init__(
            policy, rows, sampler=sampler, optim=optim, updates=updates, seed=seed, accelerator=accelerator
        )
        self.reference = Reference(
            policy,
            signal,
            samples=reference_samples,
            prompts=reference_prompts,
            seed=seed,
            module=self.module,
            rank=self.rank,
            processes=self.processes,
        )

    def step(self) -> StepResult:
        """Make one step.

        Raises:
            ScoreError: a reward failed and the signal says `stop`.
            NumericsError: the loss or its gradient is not finite; that update is not made, earlier ones of the step are.
        """
        self.prepare()
        clock = Clock()
        rollout, everything, draws = self._gather_groups(clock)
        with clock("update"):
            learned = self._update(rollout)
        self.steps_done += 1
        with clock("reward"):
            attribution = attribute(everything)
            fields = everything.available() | {"step": self.steps_done}
            self.signal.observe(fields)
            for stage in (self.objective, self.sampler):
                if hasattr(stage, "observe"):
                    call(stage, fields, method="observe")
        told = {f"sampling/{name}": value for name, value in self.sampler.metrics().items()} | self.signal.metrics()
        metrics = {
            **describe(everything, attribution, tuple(self.signal.watch)),
            **learned,
            **told,
            "draws": float(draws),
            **clock.seconds(),
        }
        metrics["tokens_per_s"] = metrics["tokens"] / max(clock.total(), 1e-9)
        return StepResult(self.steps_done, metrics, everything, attribution)

    def prepare(self) -> None:
        """Calibrate the stages that are calibrated once; called before the first step at the latest."""
        self.reference.calibrate(self.rows, data_length(self.rows))

    def with_references(self, rollout: Rollout) -> Rollout:
        """A rollout with `ref_scores` [P, M, K], where a stage asks for them; the same rollout on every process."""
        if not self.needs_answers:
            return rollout
        columns = rollout.columns
        rows = [
            {"prompt": prompt, **{name: columns[name][p] for name in columns}}
            for p, prompt in enumerate(rollout.prompts)
        ]
        return rollout.update({"ref_scores": self.reference.scores(rows).to(rollout.mask.device)})

    def _gather_groups(self, clock: Clock) -> tuple[Rollout, Rollout, int]:
        """Sample and score until the sampler has its prompts: this process's share, all of it, and rounds made."""
        whole_rounds = self.sampler.draws_max == 1
        kept: list[Rollout] = []
        share: Rollout | None = None
        count = draws = 0
        while count < self.prompts_per_step and draws < self.sampler.draws_max:
            mine = self._rollout(draws, clock)
            draws += 1
            with clock("reward"):
                mine = self.signal.score(mine)
                share = mine
                found = self._gather(mine, with_steps=not whole_rounds)
                keep = call(self.sampler, found.available(), method="keep")
                positions = keep.nonzero().flatten().tolist()
                kept.append(found if len(positions) == len(found) else found.select(positions))
                count += len(positions)
        with clock("reward"):
            everything = join([k for k in kept if len(k)] or kept[:1])
            if len(everything) > self.prompts_per_step:
                everything = everything.select(slice(0, self.prompts_per_step))
            if len(everything) < self.prompts_per_step:
                everything = self._shortage(everything)
        whole = share if whole_rounds else None
        if self.signal.adapts is not None:
            with clock("weights"):
                gram = self._gram([self._own(one, whole) for one in self.signal.alone(everything)])
                now = {"gram": gram, "lr": self.optimizer.param_groups[0]["lr"]}
                call(self.signal.adapts, everything.available() | now, method="adapt")
        with clock("reward"):
            everything = self.signal.assign(everything)
            own = self._own(everything, whole)
            if not whole_rounds:
                everything = replace(everything, steps={})
        return own, everything, draws

    def _own(self, everything: Rollout, share: Rollout | None) -> Rollout:
        """This process's prompts, with the steps of its share where they were not gathered."""
        size = len(everything) // self.processes
        own = everything.select(slice(self.rank * size, (self.rank + 1) * size))
        return own if share is None else replace(own, steps=share.extend(own.mask.shape[2]).steps)

    def _gram(self, alone: list[Rollout]) -> Tensor:
        """Inner products [K, K] of the gradients of the loss with each component's own advantages, before any update."""
        if type(self.module).__name__.startswith(("FSDP", "FullySharded", "DeepSpeed")):
            raise RecipeError("weighting: gradients of single components need whole weights; these are sharded.")
        named = [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]
        chosen = [p for name, p in named if self.signal.adapts.pattern.search(name)]
        if not chosen:
            raise RecipeError(f"weighting: no parameter is chosen; there are {', '.join(n for n, _ in named[:5])}, ...")
        counts = [self._count(one) for one in alone]
        sums = [[torch.zeros_like(p) for p in chosen] for _ in alone]
        for parts in zip(*(list(self._micro_batches(one)) for one in alone), strict=True):
            # one forward pass for all of them, on the plain policy: wrappers would take these gradients for the update's
            out = self.policy.log_prob(parts[0]) if self.needs_logp else self._score(parts[0])
            imitation = self._imitation(parts[0], 0)
            for k, (part, count) in enumerate(zip(parts, counts, strict=True)):
                loss = self._loss(part, out, imitation).total / count.clamp(min=1.0)
                grads = torch.autograd.grad(loss, chosen, retain_graph=k < len(parts) - 1, allow_unused=True)
                for total, grad in zip(sums[k], grads, strict=True):
                    if grad is not None:
                        total += grad
        return inner_products([[self.sum_over_processes(grad) for grad in grads] for grads in sums])

    def _shortage(self, found: Rollout) -> Rollout:
        """Fewer groups than wanted: the sampler decides; what is trained on must still divide."""
        self.sampler.shortage(len(found), self.prompts_per_step)
        parts = self.processes * self.mini_batches
        usable = len(found) // parts * parts
        if usable == 0:
            raise DataError(
                f"sampling: {len(found)} of {self.prompts_per_step} groups were kept, too few for {parts} mini-batches and "
                "processes. Raise max_draws, or change the data."
            )
        return found.select(slice(0, usable))

    def _rollout(self, draw: int, clock: Clock) -> Rollout:
        indices = self.sampler.draw(self.prompts_per_step)
        size = len(indices) // self.processes
        block = range(self.rank * size, (self.rank + 1) * size)
        rows = [self.rows[indices[i]] for i in block]
        seeds = [mix_seed(self.seed, self.steps_done, draw, i) for i in block]
        with clock("sample"):
            rollout = self._samples(rows, seeds)
            columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
            rollout = rollout.update({"columns": columns, "indices": [indices[i] for i in block]})
            if self.needs_imitation:
                rollout = rollout.update({"seeds": seeds})
            if self.needs_answers:
                wanted = self.reference.scores([self.rows[i] for i in indices])
                rollout = rollout.update({"ref_scores": wanted[block.start : block.stop].to(rollout.mask.device)})
        with clock("score"):
            return self._rescore(rollout)

    def _samples(self, rows: list[Mapping[str, Any]], seeds: list[int]) -> Rollout:
        """G samples for each row: the policy's own, after those of the data where it gives any."""
        prompts, size = [row["prompt"] for row in rows], self.group_size
        if not self.given:
            return self.policy.sample(prompts, size, seeds, module=self.module)
        completions = [row.get("completions") for row in rows]
        for row, texts in zip(rows, completions, strict=True):
            if not isinstance(texts, list) or not 1 <= len(texts) <= size:
                raise DataError(
                    f"samples: data needs a column `completions` with a list of 1 to {size} (group_size) texts in each "
                    f"row; got {texts!r:.80} for the prompt {row['prompt']!r:.80}."
                )
        found = self.policy.given(prompts, completions, module=self.module)
        count = found.group_size
        if count < size:
            found = beside(found, self.policy.sample(prompts, size - count, seeds, module=self.module))
        return found.update({"given": (torch.arange(size, device=found.mask.device) < count).expand(len(rows), -1)})

    @torch.no_grad()
    def _rescore(self, rollout: Rollout) -> Rollout:
        """Add what stages ask for and sampling did not give: the reference, recomputed log-probabilities."""
        produced: dict[str, Tensor] = {}
        chunks = list(self._micro_batches(rollout))
        if self.needs_reference:
            found = [self.policy.reference_log_prob(chunk, module=self.module) for chunk in chunks]
            produced["logp_ref"] = _cat(found, rollout)
        if self.needs_divergence:
            produced["kl_old"] = _cat([self.policy.divergence(chunk, module=self.module) for chunk in chunks], rollout)
        if self.old_logp == "recompute" and not self._on_policy:
            scored = [self.policy.log_prob(chunk, module=self.module) for chunk in chunks]
            produced["logp_old"] = _cat([s.logp for s in scored], rollout)
        return rollout.update(produced)

    @property
    def _on_policy(self) -> bool:
        return self.passes * self.mini_batches == 1

    def _gather(self, mine: Rollout, *, with_steps: bool) -> Rollout:
        return self.gather(mine if with_steps else replace(mine, steps={}))

    def _micro_batches(self, rollout: Rollout) -> Iterator[Rollout]:
        size = self.micro_batch or max(len(rollout), 1)
        for start in range(0, len(rollout), size):
            yield rollout.select(slice(start, start + size)).trim()

    def _update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from a rollout: passes over mini-batches of whole groups."""
        record = _Averages()
        for number in range(self.passes):
            for k in range(self.mini_batches):
                # every mini_batches-th prompt: the same prompts whatever the number of processes
                batch = rollout if self.mini_batches == 1 else rollout.select(slice(k, None, self.mini_batches))
                self._update_once(batch, number, record)
        return record.result(self.accelerator)

    def _update_once(self, batch: Rollout, number: int, record: _Averages) -> None:
        count = self._count(batch)
        losses = [partial(self._chunk_loss, chunk, number, record) for chunk in self._micro_batches(batch)]
        total = self.accumulate(losses, count)
        update = self.apply_gradient(total)
        if not update.made:
            raise NumericsError(
                f"step {self.steps_done + 1}: loss {total.item() / max(count.item(), 1):g}, gradient norm {update.norm:g}. "
                "This update was not made. Lower the learning rate, clip log-ratios, or look at the step's rewards."
            )
        record.number("lr", update.lr)
        record.number("loss", (total / count.clamp(min=1.0)).item())
        record.number("grad_norm", update.norm)

    def _chunk_loss(self, chunk: Rollout, number: int, record: _Averages) -> Loss:
        out = self._score(chunk)
        loss = self._loss(chunk, out, self._imitation(chunk, number))
        record.add(loss.metrics, chunk, out)
        return loss

    def _score(self, chunk: Rollout) -> PolicyOutput:
        if self.needs_logp:
            return self.policy.log_prob(chunk, module=self.module)
        return _Blank(chunk.logp_old, None, None)

    def _imitation(self, chunk: Rollout, number: int) -> Imitation | None:
        if not self.needs_imitation:
            return None
        # other noise in every pass, the same whatever the micro-batches
        seeds = [mix_seed(seed, number, 4) for seed in chunk.extras["seeds"]]
        return self.policy.imitation(chunk, seeds, drift=self.needs_drift, module=self.module)

    def _loss(self, chunk: Rollout, out: PolicyOutput, imitation: Imitation | None) -> Loss:
        logp_old = out.logp.detach() if self._on_policy else chunk.logp_old
        fields = chunk.available() | {"logp": out.logp, "logp_old": logp_old}
        if out.entropy is not None:
            fields["entropy"] = out.entropy
        if out.values is not None:
            fields |= {"values": out.values, "values_old": chunk.values}
        if out.kl is not None:
            fields["kl"] = out.kl
        if imitation is not None:
            fields |= {name: value for name, value in imitation._asdict().items() if value is not None}
        return call(self.objective, fields)

    @torch.no_grad()
    def _count(self, batch: Rollout) -> Tensor:
        """The mini-batch's denominator over all processes, found beforehand so that one backward pass is enough."""
        nothing = torch.zeros_like(batch.logp_old)
        blank = _Blank(batch.logp_old, nothing, batch.values, nothing)
        imitation = Imitation(nothing.sum(-1), nothing.sum(-1)) if self.needs_imitation else None
        count = self._loss(batch, blank, imitation).count.detach().to(torch.float32).reshape(())
        return self.sum_over_processes(count)

    def modules(self) -> dict[str, nn.Module]:
        """Everything with state beside the policy, by name."""
        objective = {"objective": self.objective} if isinstance(self.objective, nn.Module) else {}
        answers = {"references": self.reference.kept} if self.needs_answers else {}
        return {**super().modules(), "signal": self.signal, **objective, **answers}


class _Blank(NamedTuple):
    """Stands in for a policy's output where only the shape of the loss is wanted."""

    logp: Tensor
    entropy: Tensor | None
    values: Tensor | None
    kl: Tensor | None = None


def check_sizes(prompts: int, mini_batches: int, processes: int) -> None:
    """Every process and every mini-batch must hold whole groups.

    Raises:
        RecipeError: the prompts of a step do not divide.
    """
    if prompts % (mini_batches * processes):
        raise RecipeError(
            f"prompts_per_step = {prompts} must be a multiple of mini_batches x processes = {mini_batches} x {processes}: "
            "every process and every mini-batch holds whole groups."
        )


def check_fields(
    signal: Signal,
    objective: Callable[..., Loss],
    *,
    columns: Iterable[str],
    policy_fields: Iterable[str],
    prepared: Iterable[str] = (),
) -> None:
    """Check that every stage will find the fields it names.

    Args:
        signal: its stages are checked in order, each seeing what the ones before it produce.
        objective: checked last.
        columns: names of the data's columns.
        policy_fields: what the policy's rollouts carry beside the fields of every rollout; and `kl`, if the policy gives
            objectives the exact divergence.
        prepared: costly fields that will be there because a stage asks for them: `logp_ref`, `kl_old`, `values`.

    Raises:
        BindingError: naming the stage, the field and the fields there are.
    """
    always = {"prompts", "samples", "mask", "logp_old", "lengths", "indices"}
    carried = set(policy_fields) | set(prepared)
    there = signal.check(always | set(columns) | carried - {"values_old", "kl"})
    check(objective, there | {"logp", "entropy", "imitation"} | carried)


def _cat(parts: list[Tensor], rollout: Rollout) -> Tensor:
    """Micro-batches were trimmed to their longest sample: put them back to the rollout's length."""
    length = rollout.mask.shape[2]
    return torch.cat([torch.nn.functional.pad(part, [0, length - part.shape[2]]) for part in parts])


def describe(rollout: Rollout, attribution: Attribution, watch: tuple[str, ...]) -> dict[str, float]:
    """What a step's samples were like, as flat numbers."""
    rewards = rollout.rewards
    if rewards is None:
        raise ShapeError("online: the signal gave no rewards.")
    if rewards.ndim == 3:
        rewards = torch.where(rollout.mask, rewards, 0).sum(-1)
    lengths = rollout.mask.sum(-1)
    scored = rewards[~rewards.isnan()]
    metrics = {
        "reward": scored.mean().item() if len(scored) else float("nan"),
        "reward_std": scored.std(unbiased=False).item() if len(scored) else float("nan"),
        "constant_groups": attribution.constant.float().mean().item(),
        "dropped": float(sum(len(row) for row in rollout.extras.get("dropped", ()))),
        "length": lengths.float().mean().item(),
        "length_max": float(lengths.max().item()),
        "tokens": float(lengths.sum().item()),
    }
    if "truncated" in rollout.extras:
        metrics["truncated"] = rollout.extras["truncated"].float().mean().item()
    for name, value in rollout.extras.items():
        # what a stage counted for every prompt, such as judge_calls
        if isinstance(value, Tensor) and value.ndim == 1 and value.dtype == torch.int64:
            metrics.setdefault(name, float(value.sum()))
    shaped, weights = rollout.extras["shaped"], rollout.extras["weights"]
    moved = attribution.contributions.abs().sum((0, 1))
    total = moved.sum() + attribution.remainder.abs().sum()
    assert rollout.scores is not None
    for k, name in enumerate(rollout.score_names):
        metrics[f"score/{name}"] = rollout.scores[..., k].nanmean().item()
        metrics[f"shaped/{name}"] = shaped[..., k].nanmean().item()
        metrics[f"weight/{name}"] = weights[..., k].float().mean().item()
        metrics[f"share/{name}"] = (moved[k] / total.clamp(min=1e-12)).item()
    for k, name in enumerate(watch):
        metrics[f"watch/{name}"] = rollout.extras["watched"][..., k].nanmean().item()
    return metrics


class _Averages:
    """Means of metrics over the micro-batches of a step, weighted by their prompts; names in `_max` keep the largest."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.prompts = 0
        self.numbers: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor], chunk: Rollout, out: PolicyOutput) -> None:
        live = chunk.mask.sum().clamp(min=1)
        gap = torch.where(chunk.mask, out.logp.detach() - chunk.logp_old, 0).abs().amax()
        found = {**metrics, "logp_gap_max": gap}
        if out.entropy is not None:
            found["entropy"] = torch.where(chunk.mask, out.entropy.detach(), 0).sum() / live
        for name, value in found.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=chunk.mask.device)
            if name.endswith("_max"):
                self.sums[name] = torch.maximum(self.sums[name], value) if name in self.sums else value
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value * len(chunk)
        self.prompts += len(chunk)

    def number(self, name: str, value: float) -> None:
        self.numbers[name] = value

    def result(self, accelerator: Accelerator) -> dict[str, float]:
        names = sorted(self.sums)
        values = torch.stack(
            [self.sums[n] if n.endswith("_max") else self.sums[n] / max(self.prompts, 1) for n in names]
        )
        if accelerator.num_processes > 1:
            stacked = cast(Tensor, accelerator.gather(values[None]))
            largest = torch.tensor([n.endswith("_max") for n in names], device=values.device)
            values = torch.where(largest, stacked.amax(0), stacked.mean(0))
        return {**dict(zip(names, values.tolist(), strict=True)), **self.numbers}


class Clock:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what is done inside as of this phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[phase] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """By phase, as metrics."""
        return {f"seconds/{name}": value for name, value in self.spent.items()}

    def total(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.start
