"""Running a claim test: what is kept, what is measured, what a failure leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from guerdon.evidence import cache, runner
from guerdon.evidence.base import EvidenceError, Result, Unit
from guerdon.evidence.workers import Workers
from tests.evidence import batched, toy

TRIALS = 12  # 2 arms x 3 learning rates x 2 seeds


def run(**options):
    return runner.run(toy, options.pop("budget", "smoke"), options.pop("seeds", 2), jobs=1, progress=False, **options)


@pytest.fixture(scope="module")
def two_workers():
    with Workers(2) as workers:
        yield workers


def test_tunes_each_arm_and_measures_with_what_it_found(diary):
    found = run()
    lines = diary.lines()
    assert len(lines) == TRIALS + 4
    assert lines[TRIALS:] == [
        "method (measure, seed 0, lr 0.2)",
        "method (measure, seed 1, lr 0.2)",
        "baseline (measure, seed 0, lr 0.3)",
        "baseline (measure, seed 1, lr 0.3)",
    ]
    assert found.holds
    assert found.headline == "shown"
    assert found.arms[0].figures["accuracy"] == pytest.approx([0.6, 0.601])
    assert (found.seeds, found.budget) == ((0, 1), "smoke")
    assert found.seconds > 0
    assert found.environment["guerdon"]


def test_a_claim_that_fails_is_a_result(diary, monkeypatch):
    monkeypatch.setenv("TOY_EDGE", "0.0")
    assert run().headline == "not shown at this scale"


def test_default_seeds(diary, monkeypatch):
    assert len(runner.run(toy, "smoke", jobs=1, progress=False).seeds) == 1
    assert len(runner.run(toy, "full", jobs=1, progress=False).seeds) == 5
    monkeypatch.setattr(toy, "SEEDS", {"full": 3}, raising=False)
    assert len(runner.run(toy, "full", jobs=1, progress=False).seeds) == 3
    with pytest.raises(EvidenceError, match="at least one seed"):
        run(seeds=0)


def test_results_are_kept(diary):
    first = run()
    diary.clear()
    second = run()
    assert diary.lines() == []
    assert second.arms == first.arms
    assert second.seconds == pytest.approx(first.seconds)
    run(seeds=3)
    assert diary.lines() == ["method (measure, seed 2, lr 0.2)", "baseline (measure, seed 2, lr 0.3)"]
    diary.clear()
    run(fresh=True)
    assert len(diary.lines()) == TRIALS + 4


def test_a_damaged_result_is_measured_again(diary):
    run()
    diary.clear()
    unit = Unit("method", 1, {"lr": 0.2})
    path = cache.cache_folder() / "evidence" / "toy" / f"{unit.key(cache.context(toy))}.json"
    path.write_text(path.read_text()[:20])
    run()
    assert diary.lines() == [str(unit)]


def test_changed_code_is_measured_again(diary, monkeypatch):
    run()
    diary.clear()
    monkeypatch.setattr(cache, "context", lambda module: "other code")
    run()
    assert len(diary.lines()) == TRIALS + 4


def test_a_failing_unit_is_named_and_the_others_are_kept(diary, monkeypatch):
    monkeypatch.setenv("TOY_FAULT", "raise:baseline0")
    with pytest.raises(EvidenceError, match=r"evidence toy: baseline \(measure, seed 0, lr 0.3\) failed: ZeroDivision"):
        run()
    diary.clear()
    monkeypatch.delenv("TOY_FAULT")
    run()
    assert diary.lines() == ["baseline (measure, seed 0, lr 0.3)", "baseline (measure, seed 1, lr 0.3)"]


def test_what_is_no_number_is_refused(diary, monkeypatch):
    monkeypatch.setattr(toy, "measure", lambda unit: {"figures": {"accuracy": "high"}})
    with pytest.raises(EvidenceError, match="'high' is text, not a number"):
        run()
    monkeypatch.setattr(toy, "measure", lambda unit: {"curves": {}})
    with pytest.raises(EvidenceError, match="KeyError: 'figures'"):
        run()


def test_units_measured_together(diary):
    found = runner.run(batched, "smoke", 4, jobs=1, progress=False)
    assert found.arms[0].figures == {"together": [4, 4, 4, 4], "seed": [0, 1, 2, 3]}


def test_units_measured_together_are_shared_out(diary, two_workers):
    found = runner.run(batched, "smoke", 5, workers=two_workers, progress=False)
    assert found.arms[0].figures == {"together": [3, 3, 3, 2, 2], "seed": [0, 1, 2, 3, 4]}


def test_in_parallel_as_one_by_one(diary, tmp_path, monkeypatch):
    serial = run()
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path / "other"))
    diary.clear()
    with Workers(2) as workers:  # new ones: they read the diary's place when they start
        parallel = runner.run(toy, "smoke", 2, workers=workers, progress=False)
    assert parallel.arms == serial.arms
    assert parallel.checks == serial.checks
    assert len(diary.lines()) == TRIALS + 4


def test_in_parallel_a_failing_unit_is_named(diary, monkeypatch):
    monkeypatch.setenv("TOY_FAULT", "raise:method1")
    with (
        Workers(2) as workers,
        pytest.raises(EvidenceError, match=r"method \(measure, seed 1, lr 0.2\) failed: ZeroDivisionError"),
    ):
        runner.run(toy, "smoke", 2, workers=workers, progress=False)


def test_a_process_that_ends_is_reported_and_replaced(diary, monkeypatch):
    monkeypatch.setenv("TOY_FAULT", "die:method1")
    with Workers(2) as workers:
        with pytest.raises(EvidenceError, match=r"a process ended while it measured .*seed"):
            runner.run(toy, "smoke", 2, workers=workers, progress=False)
        monkeypatch.delenv("TOY_FAULT")
        assert runner.run(toy, "smoke", 2, workers=workers, progress=False).holds


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_where_it_stopped(diary, monkeypatch, number):
    monkeypatch.setenv("TOY_FAULT", "hang:baseline1")
    # a shell starts what it runs in the background deaf to Ctrl-C
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = (
        f"{hear}; from tests.evidence import toy; from guerdon.evidence.runner import run; run(toy, 'smoke', 2, jobs=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}"],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    kept = cache.cache_folder() / "evidence" / "toy"
    deadline = time.monotonic() + 60
    while len(list(kept.glob("[!.]*.json"))) < TRIALS + 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(30)
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid), "its processes outlived it"
    diary.clear()
    monkeypatch.delenv("TOY_FAULT")
    assert run().holds
    assert diary.lines() == ["baseline (measure, seed 1, lr 0.3)"]


def _alive(session: int) -> bool:
    """Whether any process of a session is there."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def plan_of(*units: Unit, **functions) -> list[Unit]:
    return runner.checked(SimpleNamespace(SLUG="x", **functions), units)


def test_plans_that_break_a_rule():
    one, other = Unit("a", 0), Unit("b", 0)
    tune = {"tune": lambda results: {}}
    assert plan_of(one, other) == [one, other]
    with pytest.raises(EvidenceError, match="empty"):
        plan_of()
    with pytest.raises(EvidenceError, match=r"twice: a \(measure, seed 0\)"):
        plan_of(one, one)
    with pytest.raises(EvidenceError, match=r"same seeds: \[0\]"):
        plan_of(one, Unit("a", 0, role="tune"), **tune)
    with pytest.raises(EvidenceError, match=r"different numbers of measuring runs: \[1, 2\]"):
        plan_of(one, other, Unit("b", 1))
    with pytest.raises(EvidenceError, match=r"different numbers of tuning runs: \[1, 2\]"):
        plan_of(*(Unit(arm, seed, role="tune") for arm, seed in (("a", 100), ("b", 100), ("b", 101))), **tune)
    with pytest.raises(EvidenceError, match="no function tune"):
        plan_of(one, Unit("a", 100, role="tune"))


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path
    monkeypatch.delenv("GUERDON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache.cache_folder()) == os.path.join("/x", "guerdon")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert str(cache.cache_folder()) == os.path.join("/h", ".cache", "guerdon")


def test_the_code_behind_a_result(monkeypatch):
    imports = "from guerdon.evidence.sort_task import sort_run\nfrom guerdon.evidence import grpo_family, runner\n"
    imports += "def f():\n    import guerdon.evidence.base\n"
    assert cache._imports(imports) == {"sort_task", "grpo_family", "runner", "base"}

    def code(source: str) -> str:
        monkeypatch.setattr(cache.inspect, "getsource", lambda module: source)
        return cache.context(toy)

    plain, base = code("x = 1\n"), code("from guerdon.evidence.base import Unit\n")
    assert len({plain, base, code("from guerdon.evidence.sort_task import sort_run\n")}) == 3


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    result = Result(Unit("a", 0), {"x": float("nan"), "y": 1.0}, {"c": [(0.0, float("inf"))]}, 2.0)
    cache.write(tmp_path, result, "code")
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["figures"] == {"x": None, "y": 1.0}
    again = cache.read(tmp_path, result.unit, "code")
    assert again is not None
    assert again.figures["x"] != again.figures["x"]
    assert (again.figures["y"], again.seconds) == (1.0, 2.0)
    assert cache.read(tmp_path, result.unit, "other code") is None
