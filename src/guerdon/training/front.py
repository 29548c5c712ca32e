"""How good the trade-offs are that a run has shown on held-out prompts: its Pareto front over time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from guerdon.metrics.hypervolume import hypervolume, pareto_mask


class FrontTracker:
    """The held-out scores of a run so far, against those before training.

    Args:
        names: the K component names; with fewer than two there is nothing to trade.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.points: list[list[float]] = []

    def add(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take an evaluation; `front/hypervolume`, in units of what each score was before training, and `front/size`.

        The first evaluation is the reference. Nothing where a component has no score, or there is one component only.
        """
        mode = "sampled" if any(key.startswith("eval/sampled/") for key in metrics) else "greedy"
        point = [metrics.get(f"eval/{mode}/{name}") for name in self.names]
        found = [value for value in point if value is not None and math.isfinite(value)]
        if len(self.names) < 2 or len(found) < len(self.names):
            return {}
        self.points.append(found)
        first = self.points[0]
        gains = [[(v - f) / (abs(f) or 1.0) for v, f in zip(row, first, strict=True)] for row in self.points]
        size = sum(pareto_mask(gains))
        return {"front/hypervolume": hypervolume(gains, [0.0] * len(first)), "front/size": float(size)}

    def restore(self, path: Path) -> None:
        """Take the evaluations that stand in a run's `metrics.jsonl`."""
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self.add({key: value for key, value in json.loads(line).items() if key.startswith("eval/")})
