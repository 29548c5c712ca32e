"""Processes that measure units, each with one torch thread."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guerdon import workers
from guerdon.evidence import cache
from guerdon.evidence.base import EvidenceError, Result, Unit


class Job(NamedTuple):
    """Units of one module to be measured together, and where their results go."""

    module: str
    units: list[Unit]
    folder: Path
    code: str


def measure(job: Job) -> list[Result]:
    """Measure the units of a job and keep their results.

    Raises:
        EvidenceError: naming the unit that failed.
    """
    module = importlib.import_module(job.module)
    batched = hasattr(module, "measure_all")
    results = []
    for units in [job.units] if batched else [[unit] for unit in job.units]:
        start = time.process_time()
        what = str(units[0]) if len(units) == 1 else f"one of {', '.join(map(str, units))}"
        try:
            found = module.measure_all(units) if batched else [module.measure(units[0])]
            seconds = (time.process_time() - start) / len(units)
            done = [cache.result_of(u, f, seconds) for u, f in zip(units, found, strict=True)]
        except Exception as error:
            trace = traceback.format_exc()
            raise EvidenceError(
                f"evidence {job.module.rsplit('.', 1)[-1]}: {what} failed: {type(error).__name__}: {error}\n{trace}"
            ) from None
        for result in done:
            cache.write(job.folder, result, job.code)
        results += done
    return results


class Workers:
    """Runs jobs, at most `count` at a time; a context manager. With one, everything runs in this process.

    The processes end when this one does, whatever ends it.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise EvidenceError(f"evidence: jobs must be at least 1; got {count}.")
        self.count = count
        self.pool = workers.Workers(0 if count == 1 else count)

    def __enter__(self) -> Workers:
        self.pool.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.pool.__exit__(kind, error, trace)

    def run(self, jobs: Sequence[Job]) -> Iterator[list[Result]]:
        """The results of each job as it ends, in any order.

        Raises:
            EvidenceError: a unit failed. What was under way beside it is measured to its end and kept.
        """
        failure: EvidenceError | None = None
        try:
            for done in self.pool.run(measure, jobs):
                if done.error is None:
                    yield done.value
                elif isinstance(done.error, workers.WorkerError):
                    what = "; ".join(map(str, jobs[done.job].units))
                    failure = failure or EvidenceError(
                        f"evidence: a process ended while it measured {what}. The system may have run out of memory: "
                        "try fewer jobs."
                    )
                elif isinstance(done.error, EvidenceError):
                    failure = failure or done.error
                else:
                    raise done.error
        except workers.WorkerError as error:
            raise EvidenceError(f"evidence: {error}") from error
        if failure is not None:
            raise failure
