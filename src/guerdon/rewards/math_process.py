"""A child process that parses and compares mathematical answers, and can be abandoned when one takes too long.

math-verify's own time limit rests on SIGALRM: it works in the main thread only and replaces whatever alarm was set. A
child process has neither limit, and killing it also ends a computation that would not look at a signal.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from guerdon.errors import DataError, GuerdonError, require

_WORKER = Path(__file__).with_name("math_worker.py")
_START_LIMIT = 120.0  # seconds to import sympy, on a machine that may be very busy


class MathJudge:
    """Ask for verdicts; the child is started when first needed, and again after it was abandoned. Safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def verdict(self, sample: str, gold: str, boxed: bool, timeout: float) -> tuple[float, str | None]:
        """Score and found answer of one sample.

        Raises:
            DataError: the gold answer cannot be parsed.
        """
        with self._lock:
            reply = self._ask({"sample": sample, "gold": gold, "boxed": boxed}, timeout)
            if reply is None:
                # too slow: the sample's fault, or the gold answer's? only the second is an error in the data
                reply = self._ask({"sample": "", "gold": gold, "boxed": boxed}, timeout)
                reply = reply and {**reply, "score": 0.0, "answer": None}
        if reply is None or not reply["gold"]:
            why = "cannot be parsed" if reply else f"takes longer than {timeout:g} s to parse"
            raise DataError(
                f"rewards.math_verify: the answer {gold!r:.120} in the data {why} as mathematics. "
                "Mend the data, or use exact_answer or regex for answers in words."
            )
        return reply["score"], reply["answer"]

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """The reply; None if it takes too long, or if the child dies of the request twice."""
        for _ in range(2):
            child = self._running()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps(request) + "\n")
                child.stdin.flush()
                reply = self._replies.get(timeout=timeout)
            except queue.Empty:
                self._stop()
                return None
            except BrokenPipeError:
                reply = None
            if reply is not None:
                return reply
            self._stop()  # it died: perhaps of something else, such as the machine's lack of memory
        return None

    def _running(self) -> subprocess.Popen[str]:
        if self._child is not None:
            return self._child
        # -P: the folder of the worker must not shadow packages (it has modules of common names)
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._replies = queue.SimpleQueue()
        threading.Thread(target=_pump, args=(self._child.stdout, self._replies), daemon=True).start()
        try:
            ready = self._replies.get(timeout=_START_LIMIT)
        except queue.Empty:
            ready = None
        if not ready or "ready" not in ready:
            self._stop()
            raise GuerdonError(
                f"rewards.math_verify: its process did not start: {(ready or {}).get('error', 'no answer')}."
            )
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()  # stdout is closed by the thread that reads it

    def close(self) -> None:
        """End the child process."""
        with self._lock:
            self._stop()


def _pump(stream: Any, replies: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    with stream:
        for line in stream:
            replies.put(json.loads(line))
    replies.put(None)


@functools.cache
def _judge_of(process: int) -> MathJudge:
    found = MathJudge()
    atexit.register(found.close)
    return found


def judge() -> MathJudge:
    """The judge of this process; a forked process has its own.

    Raises:
        MissingExtraError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        require("math_verify", "language")
    return _judge_of(os.getpid())
