"""Processes that do jobs side by side, each with one torch thread: on this machine, or as tasks of Ray.

Nothing here imports torch. A job is a function that can be imported by name, and what it is given; both are pickled.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol, runtime_checkable

from guerdon.errors import GuerdonError, require

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(GuerdonError, RuntimeError):
    """A process could not be started, or ended while it did a job."""


class Done(NamedTuple):
    """What became of a job.

    Attributes:
        job: which of them, counted from 0.
        value: what the function returned; None if it raised.
        error: what it raised; a `WorkerError` if its process ended. None if it returned.
    """

    job: int
    value: Any
    error: Exception | None


@runtime_checkable
class Pool(Protocol):
    """Does jobs side by side; a context manager."""

    def __enter__(self) -> Pool: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...

    def run(self, function: Callable[[Any], Any], jobs: Sequence[Any], *, go_on: bool = False) -> Iterator[Done]:
        """Do a function for every job.

        Args:
            function: of one job; importable by name.
            jobs: what it is given.
            go_on: begin further jobs after one has failed.

        Returns:
            What became of each job that was begun, as it ends.

        Raises:
            KeyboardInterrupt: a job was interrupted.
        """
        ...


class Workers:
    """A pool of processes on this machine. They end when this process does, whatever ends it.

    Args:
        processes: how many; 0 = jobs are done one after the other in this process.
        devices: what the processes see of the accelerators, by turns, as in CUDA_VISIBLE_DEVICES; empty = all see all.

    Raises:
        WorkerError: the number is negative.
    """

    def __init__(self, processes: int, devices: Sequence[str] = ()) -> None:
        if processes < 0:
            raise WorkerError(f"workers: the number of processes must be at least 0; got {processes}.")
        self.processes, self.devices = processes, tuple(devices)
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

    def run(self, function: Callable[[Any], Any], jobs: Sequence[Any], *, go_on: bool = False) -> Iterator[Done]:
        """See `Pool.run`."""
        if self.processes == 0:
            yield from _here(function, jobs, go_on)
            return
        waiting = list(reversed(range(len(jobs))))
        running: dict[Future[Any], int] = {}
        failed = broken = False
        while running or (waiting and (go_on or not failed)):
            if broken and not running:
                self._end(stop=True)
                broken = False
            # no more at a time than there are processes, so that a failure leaves nothing queued
            while waiting and not broken and (go_on or not failed) and len(running) < self.processes:
                index = waiting.pop()
                try:
                    running[self._pool().submit(function, jobs[index])] = index
                except BrokenProcessPool:  # a process ended with nothing to do
                    waiting.append(index)
                    broken = True
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                try:
                    done = Done(index, future.result(), None)
                except BrokenProcessPool:  # so do all that are under way
                    broken = True
                    done = Done(index, None, WorkerError("the process ended; the system may have run out of memory"))
                except Exception as error:
                    done = Done(index, None, error)
                failed |= done.error is not None
                yield done
        if broken:
            self._end(stop=True)  # whoever comes next starts with new processes

    def _pool(self) -> ProcessPoolExecutor:
        if self.pool is None:
            spawn = get_context("spawn")
            reader, self.lifeline = spawn.Pipe(duplex=False)
            with _environment():
                given = (reader, spawn.Value("i", 0), self.devices)
                self.pool = ProcessPoolExecutor(self.processes, spawn, _start, given)
                # all processes start here, where the environment is set
                started = [self.pool.submit(os.getpid) for _ in range(self.processes)]
            try:
                for future in started:
                    future.result()
            except BrokenProcessPool as error:
                self._end(stop=True)
                raise WorkerError(f"workers: the processes could not be started: {error}") from error
        return self.pool


def _here(function: Callable[[Any], Any], jobs: Sequence[Any], go_on: bool) -> Iterator[Done]:
    with _one_thread():
        for index, job in enumerate(jobs):
            try:
                done = Done(index, function(job), None)
            except Exception as error:
                done = Done(index, None, error)
            yield done
            if done.error is not None and not go_on:
                return


def _start(lifeline: Connection, counter: Any, devices: Sequence[str]) -> None:
    """First thing in a process: deaf to Ctrl-C, and an end when the parent's end of the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if devices:
        with counter.get_lock():
            number: int = counter.value
            counter.value += 1
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]

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


class RayWorkers:
    """Jobs as tasks of Ray: on the cluster that RAY_ADDRESS names or that `ray.init` was called for, else on this machine.

    What a job reads and writes must lie where all machines see it under the same path.

    Args:
        cpus: processors a task.
        gpus: accelerators a task; Ray shows each task its own.
        at_once: most tasks at a time; 0 = as many as there is room for.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, *, cpus: float = 1.0, gpus: float = 0.0, at_once: int = 0) -> None:
        self.ray: Any = require("ray", "ray")
        self.cpus, self.gpus, self.at_once = cpus, gpus, at_once
        self.started = False

    def __enter__(self) -> RayWorkers:
        if not self.ray.is_initialized():
            self.ray.init(include_dashboard=False, log_to_driver=False)
            self.started = True
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.started:
            self.ray.shutdown()
            self.started = False

    def run(self, function: Callable[[Any], Any], jobs: Sequence[Any], *, go_on: bool = False) -> Iterator[Done]:
        """See `Pool.run`."""
        task = self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(function)
        waiting = list(reversed(range(len(jobs))))
        running: dict[Any, int] = {}
        failed = False
        try:
            while running or (waiting and (go_on or not failed)):
                room = self.at_once or len(jobs)
                while waiting and (go_on or not failed) and len(running) < room:
                    index = waiting.pop()
                    running[task.remote(jobs[index])] = index
                ready, _ = self.ray.wait(list(running), num_returns=1)
                for reference in ready:
                    done = self._done(running.pop(reference), reference)
                    failed |= done.error is not None
                    yield done
        finally:
            for reference in running:
                self.ray.cancel(reference, force=True)

    def _done(self, index: int, reference: Any) -> Done:
        try:
            return Done(index, self.ray.get(reference), None)
        except self.ray.exceptions.TaskCancelledError as error:  # what becomes of a KeyboardInterrupt
            raise KeyboardInterrupt from error
        except self.ray.exceptions.RayTaskError as error:
            return Done(index, None, error.cause if isinstance(error.cause, Exception) else error)
        except self.ray.exceptions.RayError as error:
            return Done(index, None, WorkerError(f"the task of Ray ended: {error}"))
