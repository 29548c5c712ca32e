"""Ending a run that gets no better: how long ago a metric was at its best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal


class Patience:
    """Counts the measurements of a metric since its best one.

    Args:
        metric: its name, such as `eval/sampled/gold`.
        patience: measurements without a new best that end the run.
        goal: whether the highest or the lowest value is the best.

    Example:
        >>> patience = Patience("gold", 2)
        >>> [patience.spent(step, {"gold": value}) for step, value in enumerate([0.5, 0.4, 0.5])]
        ['', '', 'gold has been no higher than 0.5 for 2 measurements']
    """

    def __init__(self, metric: str, patience: int, goal: Literal["highest", "lowest"] = "highest") -> None:
        self.metric, self.patience, self.goal = metric, patience, goal
        self.found: dict[int, float] = {}

    def spent(self, step: int, metrics: Mapping[str, float]) -> str:
        """Take a step's metrics, again if they are known; why the run ends with this step, empty if it does not.

        A value that is not finite counts as a measurement that is no better.
        """
        if self.metric not in metrics:
            return ""
        self.found[step] = round(metrics[self.metric], 9)  # as the record has it, so that a resumed run counts alike
        sign = 1.0 if self.goal == "highest" else -1.0
        best, since = -math.inf, 0
        for _, value in sorted(self.found.items()):
            better = math.isfinite(value) and sign * value > best
            best, since = (sign * value, 0) if better else (best, since + 1)
        if since < self.patience:
            return ""
        word = "higher" if self.goal == "highest" else "lower"
        return f"{self.metric} has been no {word} than {sign * best:.4g} for {since} measurements"

    def restore(self, path: Path, last: int) -> None:
        """Take the measurements up to step `last` that stand in a run's `metrics.jsonl`."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in map(json.loads, lines):
            if line["step"] <= last and self.metric in line:
                value = line[self.metric]
                self.found[line["step"]] = math.nan if value is None else value
