"""Processes that measure units, each with one torch thread."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from guerdon.evidence import cache
from guerdon.evidence.base import EvidenceError, Result, Unit

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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
        self.pool: ProcessPoolExecutor | None = None
        self.lifeline: Connection | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._end(stop=kind is not None)

    def _end(self, *, stop: bool) -> None:
        if self.pool is None or self.lifeline is None:
            return
        if stop:
            self.lifeline.close()  # what is under way would run to its end otherwise
        self.pool.shutdown(cancel_futures=True)
        self.lifeline.close()
        self.pool = self.lifeline = None

    def run(self, jobs: Sequence[Job]) -> Iterator[list[Result]]:
        """The results of each job as it ends, in any order.

        Raises:
            EvidenceError: a unit failed. What was under way beside it is measured to its end and kept.
        """
        if self.count == 1:
            with _one_thread():
                for job in jobs:
                    yield measure(job)
            return
        pool = self._pool()
        waiting = list(reversed(jobs))
        running: dict[Future[list[Result]], Job] = {}
        failure: EvidenceError | None = None
        while running or (waiting and failure is None):
            # no more at a time than there are processes, so that a failure leaves nothing queued
            while waiting and failure is None and len(running) < self.count:
                job = waiting.pop()
                running[pool.submit(measure, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    yield future.result()
                except EvidenceError as error:
                    failure = failure or error
                except BrokenProcessPool:
                    self._end(stop=True)  # the next test starts with new processes
                    what = "; ".join(map(str, job.units))
                    failure = failure or EvidenceError(
                        f"evidence: a process ended while it measured {what}. The system may have run out of memory: "
                        "try fewer jobs."
                    )
        if failure is not None:
            raise failure

    def _pool(self) -> ProcessPoolExecutor:
        if self.pool is None:
            spawn = get_context("spawn")
            reader, self.lifeline = spawn.Pipe(duplex=False)
            with _environment():
                self.pool = ProcessPoolExecutor(self.count, spawn, _start, (reader,))
                # all processes start here, where the environment is set
                started = [self.pool.submit(os.getpid) for _ in range(self.count)]
            try:
                for future in started:
                    future.result()
            except BrokenProcessPool as error:
                self._end(stop=True)
                raise EvidenceError(f"evidence: the processes could not be started: {error}") from error
        return self.pool


def _start(lifeline: Connection) -> None:
    """First thing in a process: deaf to Ctrl-C, and an end when the parent's end of the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        lifeline.poll(None)  # nothing is ever sent: this returns when the other end is gone
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _environment() -> Iterator[None]:
    """One thread for torch and numpy, which read the environment when they are loaded."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
