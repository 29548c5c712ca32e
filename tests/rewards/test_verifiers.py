"""Verifiers."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sympy

from guerdon.errors import DataError, GuerdonError, MissingExtraError, RecipeError
from guerdon.rewards import exact_answer, math_process, math_verify, regex
from guerdon.rewards.math_process import judge
from guerdon.rewards.math_worker import boxed_part, shown


@pytest.fixture(scope="module", autouse=True)
def _end_the_child() -> Iterator[None]:
    yield
    judge().close()


def test_exact_answer() -> None:
    assert exact_answer([["12", " 12\n", "1 2", ""]], ["12"]) == [[(1.0, "12"), (1.0, "12"), (0.0, "1 2"), (0.0, "")]]
    assert exact_answer([["7"], ["a"]], [7, None]) == [[(1.0, "7")], [None]]
    assert exact_answer([["A ", "a"]], ["a"], ignore_case=True, strip=False) == [[(0.0, "a "), (1.0, "a")]]
    assert exact_answer([["Straße"]], ["STRASSE"], ignore_case=True) == [[(1.0, "strasse")]]


def test_columns_of_another_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        exact_answer([["a"], ["b"]], ["a"])
    with pytest.raises(ValueError, match="shorter"):
        regex([["a"], ["b"]], ["a"], pattern="(?P<answer>.)")


def test_regex_for_a_format() -> None:
    assert regex([["<a>x</a>", "y<a>x</a>", "x"]], pattern="<a>.*</a>") == [[(1.0, None), (1.0, None), (0.0, None)]]
    assert regex([["<a>x</a>\n", "y<a>x</a>"]], pattern="<a>.*</a>", where="whole") == [[(1.0, None), (0.0, None)]]
    assert regex([["X"]], ["unread"], pattern="x", ignore_case=True) == [[(1.0, None)]]


def test_regex_for_an_answer_takes_the_last_match() -> None:
    pattern = r"#### (?P<answer>-?\d+)"
    found = regex([["#### 1 #### 2", "#### 1", "2"], ["#### 2"]], [2, None], pattern=pattern)
    assert found == [[(1.0, "2"), (0.0, "1"), (0.0, None)], [None]]
    assert regex([["is: Yes "]], ["yes"], pattern="is: (?P<answer>.*)", ignore_case=True) == [[(1.0, "yes")]]
    assert regex([["b"]], [""], pattern="(?P<answer>a)?b") == [[(1.0, "")]]


def test_regex_faults() -> None:
    with pytest.raises(RecipeError, match=r"rewards.regex: pattern '\(' is not a regular expression"):
        regex([["a"]], pattern="(")
    with pytest.raises(DataError, match="the data has no column 'answer'"):
        regex([["a"]], pattern="(?P<answer>a)")


def test_math_verify_knows_equal_values() -> None:
    samples = [
        [r"so \boxed{\frac{2}{4}}", "it is 0.5", "$1/2$", "first 1/2, then 3", "nothing here", ""],
        [r"thus $x = 3\sqrt{2}$", r"$\sqrt{18}$", r"$3\sqrt{3}$", "4.2426", "3", r"\boxed{3\sqrt{2}}"],
    ]
    found = math_verify(samples, ["1/2", r"3\sqrt{2}"])
    assert [[cell and cell[0] for cell in row] for row in found] == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1]]
    # right answers are all given in one form, so that methods can tell that samples agree
    assert {cell[1] for cell in found[0][:3] if cell} == {"1/2"}
    assert found[0][3:] == [(0.0, "3"), (0.0, None), (0.0, None)]


def test_math_verify_reads_answers_as_data_sets_write_them() -> None:
    golds = ["72", 72, "72.0", r"\boxed{72}", "$72$", "work #### 72", r"\(72\)"]
    assert math_verify([["72"]] * len(golds), golds) == [[(1.0, "72")]] * 2 + [[(1.0, "72.0")]] + [[(1.0, "72")]] * 4
    assert math_verify([["72"]], [None]) == [[None]]


def test_math_verify_can_insist_on_a_box() -> None:
    samples = [[r"\boxed{3} or \boxed{\frac{1}{2}}, say 3", "1/2", r"\boxed{1/2"]]
    assert math_verify(samples, ["1/2"], accept="boxed") == [[(1.0, "1/2"), (0.0, None), (0.0, None)]]


@pytest.mark.parametrize("gold", ["", "blue $$", r"\frac{1}{"])
def test_an_answer_in_the_data_that_is_no_mathematics_is_an_error(gold: str) -> None:
    with pytest.raises(DataError, match=r"rewards.math_verify: the answer '.*' in the data cannot be parsed"):
        math_verify([["1"]], [gold])


def test_a_sample_that_takes_too_long_scores_0_and_the_next_is_judged() -> None:
    math_verify([["1"]], ["1"])  # the child has started
    start = time.perf_counter()
    assert math_verify([[r"$9^{9^{9^{9}}}$", "1"]], ["1"], timeout=0.5) == [[(0.0, None), (1.0, "1")]]
    assert time.perf_counter() - start < 60


def test_an_answer_in_the_data_that_takes_too_long_is_an_error() -> None:
    with pytest.raises(DataError, match=r"takes longer than 0.5 s to parse"):
        math_verify([["1"]], ["(" * 60 + "1" + ")" * 60], timeout=0.5)


def test_math_verify_works_in_threads_and_leaves_signals_alone() -> None:
    def handler(number: int, frame: object) -> None:
        raise AssertionError("the alarm was not to go off")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 600)
    results: list[object] = []
    try:
        threads = [
            threading.Thread(target=lambda: results.append(math_verify([["1/2", "2"]] * 5, ["0.5"] * 5)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        math_verify([["1"]], ["1"])
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 300
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(results) == 3
    assert all(rows == [[(1.0, results[0][0][0][1]), (0.0, "2")]] * 5 for rows in results)  # type: ignore[index]


def test_a_child_that_was_killed_is_replaced() -> None:
    process = judge()
    assert process.verdict("1", "$1$", False, 5.0) == (1.0, "1")
    assert process._child is not None
    process._child.kill()
    process._child.wait()
    assert process.verdict("1", "$1$", False, 5.0) == (1.0, "1")


def test_a_child_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process = math_process.MathJudge()
    program = tmp_path / "worker.py"
    program.write_text("""print('{"error": "ImportError: no sympy"}')""", encoding="utf-8")
    monkeypatch.setattr(math_process, "_WORKER", program)
    with pytest.raises(GuerdonError, match="did not start: ImportError: no sympy"):
        process.verdict("1", "$1$", False, 5.0)
    program.write_text("raise SystemExit(3)", encoding="utf-8")
    with pytest.raises(GuerdonError, match="did not start: no answer"):
        process.verdict("1", "$1$", False, 5.0)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_process.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'guerdon\[language\]'"):
        math_verify([["1"]], ["1"])


def test_helpers_of_the_child() -> None:
    assert boxed_part(r"a \boxed{1} b \boxed{\frac{1}{2}} c") == r"\boxed{\frac{1}{2}}"
    assert boxed_part(r"\boxed{1") == boxed_part("1") == ""
    assert shown(10**5000) is None
    assert shown(3) == "3"
    assert shown(sympy.Float("0.60")) == "0.6"
