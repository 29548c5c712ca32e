"""The inner side of the bilevel loop as runs of a recipe, side by side in processes; each keeps a run directory of its own.

What a run found stands in its directory, whose name follows from its recipe. So a loop that was stopped finds the inner
runs that had ended, goes on with those that had not, and never trains twice with the same reward from the same start.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from guerdon.cache import replace as replace_file
from guerdon.errors import RecipeError
from guerdon.recipes.schema import Recipe, dump, load_recipe
from guerdon.rewards.expression import RewardExpression
from guerdon.training.bilevel import Trained
from guerdon.training.checkpoint import list_steps
from guerdon.workers import Pool, RayWorkers, WorkerError, Workers

_FAULT = "fault.json"


class Job(NamedTuple):
    """One inner run: what it runs, its directory, and the figure that is wanted of it."""

    recipe: Recipe
    run: Path
    metric: str


def do(job: Job) -> float:
    """Run it, or go on with it where it was stopped; returns the figure.

    Raises:
        GuerdonError: the run failed.
    """
    from guerdon.training.run import resume, train

    if not _ended(job.run):
        with contextlib.redirect_stderr(io.StringIO()):  # many displays would be drawn over one another
            if (job.run / "recipe.yaml").is_file():
                resume(job.run)
            else:
                train(job.recipe)
    return _figure(job)


def _ended(run: Path) -> bool:
    try:
        return json.loads((run / "status.json").read_text(encoding="utf-8"))["state"] == "finished"
    except (OSError, ValueError, KeyError):
        return False


def _figure(job: Job) -> float:
    """The figure in the last record of a run.

    Raises:
        RecipeError: the run has no such figure.
    """
    last = json.loads((job.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    if job.metric not in last:
        there = ", ".join(name for name in last if name.startswith("eval/"))
        raise RecipeError(
            f"bilevel.metric: the inner run measures no {job.metric!r}. It measures: {there or 'nothing'}."
        )
    return math.nan if last[job.metric] is None else float(last[job.metric])


class InnerRuns:
    """Trains policies with given rewards by running a recipe, whose own rewards are the primitives.

    A run differs from the recipe in this: its reward is the expression (`weighting: expression`), it leaves a share of the
    training prompts out and is measured on these, and it starts from the base that all share. Data that the recipe holds
    out is used for the last runs only.

    Args:
        recipe: of the inner runs.
        folder: for their directories.
        pool: where they run.
        metric: of a run, such as `eval/greedy/correct`.
        share: of the training prompts that performance is measured on.
        retries: times that a failed run is begun again from its last checkpoint.
        last: the recipe of the last runs; None = the same.

    Raises:
        RecipeError: the recipe's loop does not learn from rewards.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        pool: Pool,
        *,
        metric: str = "eval/greedy/correct",
        share: float = 0.2,
        retries: int = 0,
        last: Recipe | None = None,
    ) -> None:
        if recipe.loop not in ("online", "pathwise"):
            raise RecipeError(
                f"bilevel.inner: its loop must be online or pathwise, which learn from rewards; got {recipe.loop}."
            )
        self.recipe, self.folder, self.pool = recipe, folder, pool
        self.metric, self.share, self.retries, self.last = metric, share, retries, last or recipe
        self.names = tuple(recipe.rewards)
        self.base: str | None = None

    def prepare(self) -> float:
        """Make the base that all runs start from, and measure it.

        Raises:
            GuerdonError: the recipe does not run; whatever is wrong with it would be wrong in every run.
        """
        job = self._job("base", replace(self._measured(self.recipe, self.share), steps=0))
        (done,) = self.pool.run(do, [job])
        if done.error is not None:
            raise done.error
        if not math.isfinite(done.value):
            raise RecipeError(f"bilevel.metric: {self.metric} of the base is no finite number.")
        base = job.run / "base"
        self.base = str(base) if base.is_dir() else None
        return done.value

    def train(self, rewards: Sequence[RewardExpression], start: str | None, iteration: int) -> list[Trained]:
        """See `guerdon.training.bilevel.Inner`; call `prepare` first. A run that fails says why in its directory."""
        recipe = self._measured(self.recipe, self.share)
        jobs = [self._job("runs", self._rewarded(recipe, e.text, start or self.base)) for e in rewards]
        found: dict[int, Trained] = {}
        for i, job in enumerate(jobs):
            if (fault := _read_fault(job.run)) is not None:
                found[i] = Trained(math.nan, None, fault)
        for _ in range(self.retries + 1):
            found |= self._run(jobs, [i for i in range(len(jobs)) if i not in found])
            if len(found) == len(jobs):
                break
        for i, why in self._failed.items():
            replace_file(jobs[i].run / _FAULT, json.dumps({"why": why}).encode())
            found[i] = Trained(math.nan, None, why)
        return [found[i] for i in range(len(jobs))]

    def _run(self, jobs: list[Job], wanted: list[int]) -> dict[int, Trained]:
        """Those of the wanted runs that end well; `_failed` says why the others did not."""
        self._failed: dict[int, str] = {}
        found: dict[int, Trained] = {}
        alone: list[int] = []

        def take(i: int, value: float | None, error: Exception | None) -> None:
            if error is not None:
                self._failed[i] = f"{type(error).__name__}: {error}"
            elif value is None or not math.isfinite(value):
                self._failed[i] = f"{self.metric} is no finite number"
            else:
                found[i] = Trained(value, _newest(jobs[i].run))

        for done in self.pool.run(do, [jobs[i] for i in wanted], go_on=True):
            if isinstance(done.error, WorkerError):
                alone.append(wanted[done.job])
            else:
                take(wanted[done.job], done.value, done.error)
        for i in alone:  # a process that ends may take those beside it along: one after the other, each for itself
            (done,) = self.pool.run(do, [jobs[i]], go_on=True)
            take(i, done.value, done.error)
        return found

    def conclude(self, expression: str, start: str | None, runs: int) -> list[dict[str, Any]]:
        """What comes of an expression on all training data, by the recipe's own held-out data.

        Args:
            expression: the best one.
            start: the policy that a population has arrived at, which is then measured as it is; None = policies are trained
                afresh, as the recipe says.
            runs: how many, each with a seed of its own.

        Returns:
            For each run its directory, its seed and the metric.

        Raises:
            GuerdonError: a run failed.
        """
        last = self._measured(self.last, None)
        if start is not None:
            jobs = [self._job("last", replace(_started(last, start), steps=0))]
        else:
            seeds = [last.seed + 1000 + number for number in range(runs)]
            jobs = [self._job("last", replace(self._rewarded(last, expression, None), seed=seed)) for seed in seeds]
        found = {}
        for done in self.pool.run(do, jobs):
            if done.error is not None:
                raise done.error
            found[done.job] = done.value
        return [{"run": str(job.run), "seed": job.recipe.seed, self.metric: found[i]} for i, job in enumerate(jobs)]

    def forget(self, kept: Sequence[str | None]) -> None:
        """Delete the checkpoints of runs that have ended, but for those that are kept."""
        for run in (self.folder / "runs").glob("*"):
            checkpoints = run / "checkpoints"
            if (_ended(run) or (run / _FAULT).exists()) and not any(
                k and Path(k).is_relative_to(checkpoints) for k in kept
            ):
                shutil.rmtree(checkpoints, ignore_errors=True)

    def _measured(self, recipe: Recipe, share: float | None) -> Recipe:
        """A recipe whose runs are measured at their end, on a share of the training prompts; None = on held-out data."""
        mode = self.metric.split("/")[1] if self.metric.startswith("eval/") else ""
        samples = recipe.evaluation.samples or 1
        given = {"greedy": mode != "sampled", "samples": 0 if mode == "greedy" else samples}
        return replace(recipe, evaluation=replace(recipe.evaluation, share=share, every=0, **given))

    def _rewarded(self, recipe: Recipe, expression: str, start: str | None) -> Recipe:
        weighting: dict[str, Mapping[str, Any]] = {"expression": {"formula": expression}}
        rewarded = replace(recipe, weighting=weighting)
        return rewarded if start is None else _started(rewarded, start)

    def _job(self, part: str, recipe: Recipe) -> Job:
        plain = replace(recipe.run, name=None, directory="", trackers=[], samples_every=0, keep=1)
        recipe = replace(recipe, run=plain)
        name = blake2b(dump(recipe).encode(), digest_size=8).hexdigest()
        run = self.folder / part / name
        return Job(replace(recipe, run=replace(plain, name=name, directory=str(run.parent))), run, self.metric)


def _started(recipe: Recipe, start: str) -> Recipe:
    """A recipe whose policy is the one in a folder; adapters that it has are trained on."""
    return replace(recipe, policy=replace(recipe.policy, model=start, lora=None), warm_start=None)


def _read_fault(run: Path) -> str | None:
    try:
        return json.loads((run / _FAULT).read_text(encoding="utf-8"))["why"]
    except (OSError, ValueError, KeyError):
        return None


def _newest(run: Path) -> str | None:
    steps = list_steps(run)
    return str(run / "checkpoints" / f"step-{steps[-1]}" / "policy") if steps else None


def inner_recipe(settings: Any, *more: Mapping[str, Any]) -> Recipe:
    """The recipe that a section `bilevel` names, with the settings that it and `more` put over it.

    Raises:
        UnknownNameError, RecipeError: there is no such recipe, or a setting is wrong.
    """
    if settings.inner is None:
        raise RecipeError("bilevel.inner: must be given: a bundled recipe, or the path of one. --bilevel.inner PATH")
    given: dict[str, Any] = {}
    for layer in (settings.settings, *more):
        given |= dict(_dotted(layer))
    try:
        return load_recipe(settings.inner, given)
    except RecipeError as error:
        raise type(error)(f"bilevel.inner: {error}") from None


def _dotted(layer: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A mapping of settings as dotted paths, as they would stand on the command line."""
    found: list[tuple[str, Any]] = []
    for name, value in layer.items():
        inner = isinstance(value, Mapping) and value
        found += _dotted(value, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", value)]
    return found


def make_pool(settings: Any) -> Pool:
    """The pool that a section `bilevel` asks for."""
    if settings.pool == "ray":
        return RayWorkers(gpus=settings.gpus, at_once=settings.workers)
    return Workers(settings.workers, _devices())


def _devices() -> tuple[str, ...]:
    """The accelerators, one for each process by turns; none where there is nothing to share out."""
    import os

    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return ()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(shown.split(",")) if shown else tuple(map(str, range(count)))
