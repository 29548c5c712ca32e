"""Jobs side by side: results, failures, the end of a process, and Ray."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from guerdon.errors import MissingExtraError
from guerdon.workers import Done, RayWorkers, WorkerError, Workers


def double(job):
    return 2 * job


def about(job):
    """What a process is like, after long enough for the others to take a job too."""
    time.sleep(0.2)
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")


def touchy(job):
    if job == "raise":
        raise ValueError("no good")
    if job == "die":
        os._exit(3)
    if job == "interrupt":
        raise KeyboardInterrupt
    return job


def mark(job):
    Path(job).touch()
    return 1 / 0


@pytest.fixture(scope="module")
def two():
    with Workers(2, devices=("7", "9")) as workers:
        yield workers


@pytest.fixture(params=["here", "two"])
def pool(request, two):
    return two if request.param == "two" else Workers(0)


def by_index(found) -> list[Done]:
    return sorted(found, key=lambda done: done.job)


def test_results_come_with_the_job_they_belong_to(pool):
    assert by_index(pool.run(double, [1, 2, 3])) == [Done(0, 2, None), Done(1, 4, None), Done(2, 6, None)]
    assert list(pool.run(double, [])) == []


def test_a_failure_ends_the_run_or_does_not(pool, tmp_path):
    found = by_index(pool.run(touchy, ["a", "raise", "b"], go_on=True))
    assert [done.value for done in found] == ["a", None, "b"]
    assert isinstance(found[1].error, ValueError)
    paths = [tmp_path / str(n) for n in range(5)]
    stopped = list(pool.run(mark, [str(path) for path in paths]))
    assert 1 <= len(stopped) <= 2
    assert sum(path.exists() for path in paths) == len(stopped)


def test_an_interrupt_is_not_swallowed(pool):
    with pytest.raises(KeyboardInterrupt):
        list(pool.run(touchy, ["interrupt"], go_on=True))
    assert [done.value for done in pool.run(double, [4])] == [8]


def test_processes_have_one_thread_and_devices_by_turns(two):
    found = [done.value for done in two.run(about, range(4))]
    assert len({pid for pid, _, _ in found} - {os.getpid()}) == 2
    assert {device for _, device, _ in found} == {"7", "9"}
    assert {threads for _, _, threads in found} == {"1"}


def test_the_end_of_a_process_is_reported_and_others_take_its_place(two):
    found = by_index(two.run(touchy, ["die", "a", "b", "c"], go_on=True))
    assert [done.job for done in found] == [0, 1, 2, 3]
    assert isinstance(found[0].error, WorkerError)
    # the job beside it may have gone down with it; what came after has not
    assert [done.value for done in found[2:]] == ["b", "c"]
    assert [done.value for done in by_index(two.run(double, [1, 2]))] == [2, 4]


def test_a_negative_number_of_processes_is_an_error():
    with pytest.raises(WorkerError, match="at least 0"):
        Workers(-1)


def test_without_ray_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"guerdon\[ray\]"):
        RayWorkers()


@pytest.mark.slow
def test_a_local_ray_of_two_workers():
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'guerdon[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with RayWorkers() as pool:
            assert by_index(pool.run(double, [1, 2, 3])) == [Done(0, 2, None), Done(1, 4, None), Done(2, 6, None)]
            found = by_index(pool.run(touchy, ["a", "raise", "die", "b"], go_on=True))
            assert [done.value for done in found] == ["a", None, None, "b"]
            assert isinstance(found[1].error, ValueError)
            assert isinstance(found[2].error, WorkerError)
            assert len(list(RayWorkers(at_once=1).run(touchy, ["a", "raise", "b"]))) == 2
            assert len({pid for pid, _, _ in (done.value for done in pool.run(about, range(4)))}) >= 2
            with pytest.raises(KeyboardInterrupt):
                list(pool.run(touchy, ["interrupt"], go_on=True))
        assert ray.is_initialized()  # it was there before, and so it stays
    finally:
        ray.shutdown()
