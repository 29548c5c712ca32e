"""Runs a claim test: plan, tune, measure, conclude."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from guerdon import __version__
from guerdon.evidence import cache
from guerdon.evidence.base import DEFAULT_SEEDS, Budget, Evidence, EvidenceError, Result, Results, Settings, Unit
from guerdon.evidence.workers import Job, Workers

_PACKAGES = ("torch", "transformers", "numpy")


def run(
    module: Any,
    budget: Budget = "smoke",
    seeds: int | None = None,
    *,
    jobs: int | None = None,
    fresh: bool = False,
    workers: Workers | None = None,
    progress: bool = True,
) -> Evidence:
    """Test one claim.

    Results of units are kept under the user's cache folder; a test that was stopped goes on where it was.

    Args:
        module: see `guerdon.evidence.base`.
        budget: `smoke` or `full`.
        seeds: how many to measure; by default the module's own, or 1 for smoke and 5 for full.
        jobs: processes; by default one per core. Ignored with `workers`.
        fresh: measure everything again.
        workers: processes to use, for several tests in a row.
        progress: whether to show how far it is.

    Returns:
        The evidence, whether the claim holds or not.

    Raises:
        EvidenceError: the plan breaks a rule, or a unit failed; what was measured before is kept.
    """
    count = {**DEFAULT_SEEDS, **getattr(module, "SEEDS", {})}[budget] if seeds is None else seeds
    if count < 1:
        raise EvidenceError(f"evidence {module.SLUG}: there must be at least one seed; got {count}.")
    with nullcontext(workers) if workers is not None else Workers(jobs or cores()) as pool:
        runner = _Run(module, fresh, pool, progress)
        tuned: dict[str, Settings] = {}
        units = checked(module, module.plan(budget, count))
        if hasattr(module, "tune"):
            trials = [unit for unit in units if unit.role == "tune"]
            tuned = module.tune(Results(runner.measure(trials, "tune"), budget))
            units = checked(module, module.plan(budget, count, tuned))
        results = runner.measure(units, "measure")
    measured = sorted({unit.seed for unit in units if unit.role == "measure"})
    return replace(
        module.conclude(Results(results, budget)),
        budget=budget,
        seeds=tuple(measured),
        seconds=sum(result.seconds for result in runner.done.values()),
        environment=_environment(),
    )


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked(module: Any, units: Sequence[Unit]) -> list[Unit]:
    """A plan that keeps the rules.

    Raises:
        EvidenceError: a unit is there twice; a tuning seed is also measured; arms have different numbers of tuning
            or of measuring runs.
    """
    where = f"evidence {module.SLUG}: the plan"
    if not units:
        raise EvidenceError(f"{where} is empty.")
    twice = [str(unit) for key, unit in {u.key(): u for u in units}.items() if sum(u.key() == key for u in units) > 1]
    if twice:
        raise EvidenceError(f"{where} holds a unit twice: {twice[0]}.")
    tune, measure = (_by_role(units, role) for role in ("tune", "measure"))
    if shared := {unit.seed for unit in tune} & {unit.seed for unit in measure}:
        raise EvidenceError(f"{where} tunes and measures on the same seeds: {sorted(shared)}. Tune on 100, 101, ...")
    for name, part in (("tuning", tune), ("measuring", measure)):
        if len(set(numbers := Counter(unit.arm for unit in part).values())) > 1:
            raise EvidenceError(f"{where} gives arms different numbers of {name} runs: {sorted(set(numbers))}.")
    if tune and not hasattr(module, "tune"):
        raise EvidenceError(f"{where} has tuning runs, and the module has no function tune(results).")
    return list(units)


def _by_role(units: Iterable[Unit], role: str) -> list[Unit]:
    return [unit for unit in units if unit.role == role]


class _Run:
    """The units measured so far in one test."""

    def __init__(self, module: Any, fresh: bool, workers: Workers, progress: bool) -> None:
        self.module, self.fresh, self.workers, self.progress = module, fresh, workers, progress
        self.folder = cache.cache_folder() / "evidence" / module.SLUG
        self.code = cache.context(module)
        self.done: dict[str, Result] = {}

    def measure(self, units: Sequence[Unit], what: str) -> list[Result]:
        """Results in the order of the units: those at hand, those kept on disk, and new ones."""
        keys = [unit.key() for unit in units]
        for key, unit in zip(keys, units, strict=True):
            if key not in self.done and not self.fresh and (kept := cache.read(self.folder, unit, self.code)):
                self.done[key] = kept
        missing = [unit for key, unit in zip(keys, units, strict=True) if key not in self.done]
        with _Display(f"{self.module.SLUG} {what}", len(units), len(units) - len(missing), self.progress) as display:
            for results in self.workers.run(self._jobs(missing)):
                for result in results:
                    self.done[result.unit.key()] = result
                    display.update(result)
        return [self.done[key] for key in keys]

    def _jobs(self, units: list[Unit]) -> list[Job]:
        if not units:
            return []
        # nets that train as one tensor are shared out; others go one by one, so that a stop loses little
        size = -(-len(units) // self.workers.count) if hasattr(self.module, "measure_all") else 1
        parts = [units[i : i + size] for i in range(0, len(units), size)]
        return [Job(self.module.__name__, part, self.folder, self.code) for part in parts]


class _Display:
    """A bar on a terminal, a line per unit elsewhere."""

    def __init__(self, title: str, total: int, done: int, enabled: bool) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.title, self.total, self.done = title, total, done
        self.enabled = enabled and done < total
        self.live = self.enabled and self.console.is_terminal
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[unit]}"),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.bar.add_task(title, total=total, completed=done, unit=f"{done} kept" if done else "")

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, result: Result) -> None:
        self.done += 1
        self.bar.update(self.task, completed=self.done, unit=str(result.unit))
        if self.enabled and not self.live:
            line = f"{self.title} {self.done}/{self.total}  {result.unit}  {result.seconds:.1f} CPU s"
            self.console.print(line, soft_wrap=True)


def _environment() -> dict[str, str]:
    found = {"guerdon": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
