"""The preference loop: learn from given samples that were compared or judged.

One step draws rows, scores their samples under the policy (a pair's prompt is computed once for both samples) and, where
the objective asks for it, under the reference, and makes one update. How rows become samples is the affair of a form (see
`forms`), what is learnt that of the objective; the loop knows neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from guerdon.errors import NumericsError, RecipeError
from guerdon.objectives.loss import Loss
from guerdon.rollout import Rollout
from guerdon.stages import call, signature, wants
from guerdon.training.allocator import keep_freed_memory
from guerdon.training.forms import Scores, check_form, form_of
from guerdon.training.loop import Loop
from guerdon.training.optimisation import Optim
from guerdon.training.reference_scores import ReferenceScores

BINS = 40


class _Part(NamedTuple):
    """A micro-batch: the rows' positions in the data, their samples, and the columns that the objective names."""

    positions: list[int]
    rollout: Rollout
    columns: dict[str, list[Any]]


class Judgement(NamedTuple):
    """What an evaluation found.

    Attributes:
        metrics: `eval/loss`, `eval/accuracy`, `eval/margin`, ...
        histograms: implicit rewards and margins of the held-out rows: name -> {"edges", "counts"}.
    """

    metrics: dict[str, float]
    histograms: dict[str, dict[str, list[float]]]


class Preference(Loop):
    """Train a policy on samples that were compared with one another, or called good and bad.

    Args:
        policy: see `guerdon.training.policy.Policy`, with `pack`; with `keep_reference()` called where the objective
            reads the reference and it was not scored beforehand.
        rows: data rows: `prompt`, `chosen`, `rejected`; or `prompt`, `completion`, `label` for objectives that name
            `desirable`. For objectives that name `logp_chosen_given_rejected`, pairs of the same sample twice are left out.
        objective: from log-probabilities to a `Loss`.
        batch_size: rows per update, over all processes.
        micro_batch: rows per forward pass and process; bounds memory and changes nothing else; None = all.
        reference: scores of the rows under the reference, made beforehand; None = the policy's own reference.
        guides: further frozen policies by name: `logp_<name>` (with the side) becomes a field.
        optim: optimiser settings.
        steps: length of the whole run, for the schedule.
        seed: of the order of the rows.
        accelerator: processes, device and precision; a plain one by default.

    Raises:
        RecipeError: sizes do not divide, or the objective needs what the settings do not give.
        BindingError: the objective is no preference loss, or names a field that will not be there.

    Example:
        >>> from guerdon.language.policy import LanguagePolicy
        >>> from guerdon.language.tasks import topics
        >>> from guerdon.objectives import simpo
        >>> policy = LanguagePolicy.load(topics.model(0), tokenizer=topics.tokenizer(), max_new_tokens=13)
        >>> loop = Preference(policy, topics.pairs(0), simpo, batch_size=4, steps=2)
        >>> sorted(set(loop.step()) & {"loss", "accuracy", "margin"})
        ['accuracy', 'loss', 'margin']
    """

    def __init__(
        self,
        policy: Any,
        rows: Sequence[Mapping[str, Any]],
        objective: Callable[..., Loss],
        *,
        batch_size: int = 32,
        micro_batch: int | None = None,
        reference: ReferenceScores | None = None,
        guides: Mapping[str, Any] | None = None,
        optim: Optim | None = None,
        steps: int = 1000,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        accelerator = accelerator or Accelerator()
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.objective, self.form = objective, form_of(objective)
        rows = self.form.usable(rows)
        self.wanted = signature(objective).fields
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.reference, self.guides = reference, dict(guides or {})
        self.needs_reference = needs_reference(objective)
        scored = ("logp", "logp_ref", *(f"logp_{name}" for name in self.guides))
        check_form(objective, self.form, scored, list(rows[0]))
        if batch_size % accelerator.num_processes:
            raise RecipeError(
                f"prompts_per_step = {batch_size} must be a multiple of the number of processes, "
                f"{accelerator.num_processes}."
            )
        if reference is not None and "reference_point" in self.wanted:
            raise RecipeError(
                "reference.precompute: this objective scores completions after other prompts as well, which are drawn "
                "anew in every step. Leave it off."
            )
        cut = accelerator.num_processes > 1 or (micro_batch or batch_size) < batch_size
        if cut and getattr(getattr(objective, "func", objective), "whole_batch", False):
            raise RecipeError(
                "micro_batch: this objective compares all pairs of a batch with one another, so it must be null, with a "
                "single process."
            )
        super().__init__(policy, rows, sampler=None, optim=optim, updates=steps, seed=seed, accelerator=accelerator)

    def step(self) -> dict[str, float]:
        """Make one update.

        Returns:
            Metrics of the whole batch: `loss`, `grad_norm`, `lr`, `accuracy` (of ranking by implicit rewards), `margin`,
            `margin_std`, `reward_chosen`, `logp_chosen`, `length_chosen`, ... (the same of the rejected), and the
            objective's own.

        Raises:
            NumericsError: the loss or its gradient is not finite; the policy is left as it was.
        """
        start = time.perf_counter()
        indices = self.sampler.draw(self.batch_size)
        share = len(indices) // self.processes
        mine = range(self.rank * share, (self.rank + 1) * share)
        size = self.micro_batch or share
        rows = _Lazy(self.rows, indices)
        parts = [self._pack(rows, mine[i : i + size]) for i in range(0, share, size)]
        shared = self._shared(rows, mine, [part.rollout for part in parts])
        count = self._count(parts, shared)
        record = _Means()
        losses = [partial(self._loss, part, shared, record) for part in parts]
        total = self.accumulate(losses, count)
        mean = (total / count.clamp(min=1.0)).item()
        update = self.apply_gradient(total)
        if not update.made:
            raise NumericsError(
                f"step {self.steps_done + 1}: loss {mean:g}, gradient norm {update.norm:g}. This update was not made. "
                "Lower the learning rate or beta."
            )
        self.steps_done += 1
        found = record.result(self)
        tokens = found.pop("tokens")
        seconds = time.perf_counter() - start
        own = {"loss": mean, "grad_norm": update.norm, "lr": update.lr}
        return {**own, **found, "tokens": tokens, "tokens_per_s": tokens / max(seconds, 1e-9)}

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Mapping[str, Any]], reference: ReferenceScores | None = None) -> Judgement:
        """Loss and ranking accuracy on held-out rows, of the averaged weights where there are.

        Args:
            rows: held-out rows; shared out over the processes.
            reference: their scores under the reference, where training's were made beforehand.
        """
        if not len(rows):
            return Judgement({}, {})
        with self.averaged():
            found = self._judge(self.form.usable(rows), reference)
        weight = found.pop("count")
        metrics = {"eval/loss": found.pop("loss").sum().item() / max(weight.sum().item(), 1e-12)}
        metrics |= {f"eval/{name}": value.mean().item() for name, value in found.items()}
        if "likelihood_gap" in found:
            longer = found["length_chosen"] - found["length_rejected"]
            metrics["eval/length_correlation"] = correlation(longer, found["likelihood_gap"])
        drawn = ("reward", "margin", "length")
        return Judgement(metrics, {name: histogram(v) for name, v in found.items() if name.startswith(drawn)})

    def _judge(self, rows: Sequence[Mapping[str, Any]], reference: ReferenceScores | None) -> Scores:
        """Loss, count and description of every row, in order, on every process."""
        share = max(self.batch_size // self.processes, 1)
        size, width = self.micro_batch or share, share * self.processes
        parts: list[tuple[int, Scores]] = []
        for start in range(0, len(rows), width):
            batch = _Lazy(rows, list(range(start, min(start + width, len(rows)))))
            own = range(self.rank * share, min((self.rank + 1) * share, len(batch)))
            counts = len(own) > 0
            # every process takes part, so that sharded models stay in step
            inside = own if counts else range(1)
            packed = [self._pack(batch, inside[i : i + size]) for i in range(0, len(inside), size)]
            rollouts = [part.rollout for part in packed]
            shared = self._shared(batch, inside, rollouts, counts) if len(batch) > 1 else {}
            for part in packed:
                scores = self._scores(part, reference)
                loss = call(self.objective, self._fields(part, scores, shared))
                told = self.form.describe(part.rollout, scores["logp"], loss.implicit)
                told |= {"loss": loss.total[None], "count": loss.count[None]}
                if counts:
                    kept = {name: value.detach().float().cpu() for name, value in told.items()}
                    parts.append((part.positions[0], kept))
        if self.processes > 1:
            parts = gather_object(parts)
        ordered = [told for _, told in sorted(parts, key=lambda pair: pair[0])]
        return {name: torch.cat([told[name] for told in ordered]) for name in ordered[0]}

    def _pack(self, rows: _Lazy, places: range) -> _Part:
        found = [rows[i] for i in places]
        columns = {name: [row.get(name) for row in found] for name in self.wanted if name in found[0]}
        return _Part([rows.indices[i] for i in places], self.form.pack(self.policy, found), columns)

    def _scores(self, part: _Part, reference: ReferenceScores | None) -> Scores:
        """[P, G, T] under the policy, with gradient, and under all that is frozen, without."""
        rollout = part.rollout
        found: Scores = {}
        if self.needs_reference and reference is not None:
            found["logp_ref"] = reference.of(part.positions, rollout)
        elif self.needs_reference:
            found["logp_ref"] = self.policy.reference_log_prob(rollout, module=self.module)
        for name, guide in self.guides.items():
            with torch.no_grad():
                found[f"logp_{name}"] = guide.log_prob(rollout, entropy=False).logp
        found["logp"] = self.policy.log_prob(rollout, entropy=False, module=self.module).logp
        return found

    def _fields(self, part: _Part, scores: Scores, shared: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**part.columns, **self.form.fields(part.rollout, scores), **shared}

    def _loss(self, part: _Part, shared: Mapping[str, Tensor], record: _Means) -> Loss:
        scores = self._scores(part, self.reference)
        loss = call(self.objective, self._fields(part, scores, shared))
        record.add(loss, self.form.describe(part.rollout, scores["logp"].detach(), loss.implicit), part)
        return loss

    @torch.no_grad()
    def _shared(self, rows: _Lazy, mine: range, parts: Sequence[Rollout], counts: bool = True) -> dict[str, Tensor]:
        """Fields that depend on the whole batch, the same on every process; `counts`: this process's rows are part of it."""

        def score(rollout: Rollout) -> Scores:
            return {
                "logp": self.policy.log_prob(rollout, entropy=False, module=self.module).logp,
                "logp_ref": self.policy.reference_log_prob(rollout, module=self.module),
            }

        sums = self.form.shared(self.wanted, self.policy, rows, mine, parts, score)
        means = {}
        for name, (total, count) in sums.items():
            dtype = torch.promote_types(total.dtype, torch.float32)
            sums_here = torch.stack([total.to(dtype), count.to(dtype)])
            whole = self.sum_over_processes(sums_here if counts else torch.zeros_like(sums_here))
            means[name] = whole[0] / whole[1].clamp(min=1)
        return self.form.finish(means, len(rows))

    @torch.no_grad()
    def _count(self, parts: Sequence[_Part], shared: Mapping[str, Tensor]) -> Tensor:
        """The batch's denominator over all processes, found beforehand so that one backward pass is enough."""
        counts = []
        for part in parts:
            nothing = torch.zeros_like(part.rollout.logp_old)
            names = ("logp", "logp_ref", *(f"logp_{name}" for name in self.guides))
            blank = self._fields(part, dict.fromkeys(names, nothing), shared)
            counts.append(call(self.objective, blank).count.detach().to(torch.float32).reshape(()))
        return self.sum_over_processes(torch.stack(counts).sum())

    def modules(self) -> dict[str, nn.Module]:
        """Everything with state beside the policy, by name."""
        objective = {"objective": self.objective} if isinstance(self.objective, nn.Module) else {}
        return {**super().modules(), **objective}


def needs_reference(objective: Callable[..., Any]) -> bool:
    """Whether an objective reads log-probabilities of the reference."""
    return any(wants(objective, f"logp_ref{suffix}") for suffix in form_of(objective).suffixes)


def histogram(values: Tensor) -> dict[str, list[float]]:
    """Counts of values over even bins between the smallest and the largest.

    Example:
        >>> found = histogram(torch.tensor([0.0, 0.1, 1.0]))
        >>> sum(found["counts"]), found["edges"][0], found["edges"][-1], len(found["edges"])
        (3.0, 0.0, 1.0, 41)
    """
    values = values[values.isfinite()].double()
    if not len(values):
        return {"edges": [], "counts": []}
    low, high = values.min().item(), values.max().item()
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    return {"edges": edges.tolist(), "counts": values.histc(BINS, low, high).tolist()}


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation; NaN where one of them does not vary.

    Example:
        >>> round(correlation(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 5.0])), 6)
        1.0
    """
    first, second = first.double() - first.double().mean(), second.double() - second.double().mean()
    return ((first * second).sum() / (first.square().sum() * second.square().sum()).sqrt()).item()


class _Lazy(Sequence[Mapping[str, Any]]):
    """The rows of a batch, read when they are asked for, each once."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], indices: list[int]) -> None:
        self.rows, self.indices = rows, indices
        self.kept: dict[int, Mapping[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: Any) -> Any:
        place = place % len(self.indices)
        if place not in self.kept:
            self.kept[place] = self.rows[self.indices[place]]
        return self.kept[place]


class _Means:
    """Means of a step's numbers over the rows of all micro-batches and processes."""

    def __init__(self) -> None:
        self.told: list[Scores] = []
        self.metrics: list[dict[str, Tensor]] = []
        self.rows: list[int] = []
        self.tokens: list[Tensor] = []

    def add(self, loss: Loss, told: Scores, part: _Part) -> None:
        self.told.append(told)
        self.metrics.append(loss.metrics)
        self.rows.append(len(part.positions))
        self.tokens.append(part.rollout.mask.sum())

    def result(self, loop: Preference) -> dict[str, float]:
        """Everything in one exchange between processes."""
        device = self.tokens[0].device
        precise = torch.float32 if device.type == "mps" else torch.float64
        told = {name: torch.cat([part[name] for part in self.told]).to(precise) for name in self.told[0]}
        sums = {name: value.sum() for name, value in told.items()}
        if "margin" in told:
            sums["margin_squared"] = told["margin"].square().sum()
        for name in self.metrics[0]:
            parts = zip(self.metrics, self.rows, strict=True)
            sums[name] = torch.stack([part[name].to(precise) * count for part, count in parts]).sum()
        sums["rows"] = torch.tensor(sum(self.rows), dtype=precise, device=device)
        sums["tokens"] = torch.stack(self.tokens).sum().to(precise)
        values = loop.sum_over_processes(torch.stack(list(sums.values()))).tolist()
        found = dict(zip(sums, values, strict=True))
        rows, tokens = found.pop("rows"), found.pop("tokens")
        means = {name: value / rows for name, value in found.items()}
        if "margin_squared" in means:
            means["margin_std"] = max(means.pop("margin_squared") - means["margin"] ** 2, 0.0) ** 0.5
        return {**means, "tokens": tokens}
