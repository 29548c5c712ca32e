"""A rubric with several levels: what is looked at, what each number of points means, and how much each part weighs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from guerdon.errors import RecipeError
from guerdon.rewards.judges.base import SCALE


class Criterion(NamedTuple):
    """One thing a judge looks at.

    Attributes:
        name: its key in the verdict.
        levels: points -> what deserves them, ascending; points between two levels may be given.
        about: what it is, in a sentence.
        weight: against the other criteria, above 0.
    """

    name: str
    levels: dict[float, str]
    about: str = ""
    weight: float = 1.0


class Rubric:
    """Criteria that are combined into one score from 0 to 10; without criteria, one overall score from 0 to 10.

    A combined score is 10 * sum_c w_c (x_c - low_c) / (high_c - low_c) / sum_c w_c.

    Args:
        criteria: name -> {levels: {points: text}, about: text, weight: number}; None = one overall score.
        where: opens the errors.

    Raises:
        RecipeError: a criterion has an unknown key, fewer than two levels, or a weight that is not above 0.

    Example:
        >>> answer = {"levels": {0: "wrong", 2: "right"}, "weight": 3}
        >>> rubric = Rubric({"answer": answer, "process": {"levels": {1: "aimless", 5: "to the point"}}})
        >>> rubric.combine({"answer": 2, "process": 3})
        8.75
    """

    def __init__(self, criteria: Mapping[str, Mapping[str, Any]] | None = None, where: str = "rubric") -> None:
        self.criteria = [_criterion(str(name), content, where) for name, content in (criteria or {}).items()]

    def text(self) -> str:
        """The rubric as a judge reads it."""
        if not self.criteria:
            return f"Give each answer one score from {SCALE[0]:g} (useless) to {SCALE[1]:g} (could not be better)."
        lines = ["Give each answer points for every criterion:"]
        for name, levels, about, weight in self.criteria:
            lines.append(f"- {name} (weight {weight:g}){': ' if about else ''}{about}")
            lines += [f"    {points:g}: {meaning}" for points, meaning in levels.items()]
        return "\n".join(lines)

    def example(self) -> str:
        """The form of one answer's points in the JSON of a verdict."""
        if not self.criteria:
            return "<score>"
        return "{" + ", ".join(f'"{criterion.name}": <points>' for criterion in self.criteria) + "}"

    def combine(self, points: Any) -> float | None:
        """The score of one answer from 0 to 10; None if a number is missing, not finite or out of its range.

        Args:
            points: a number without criteria; else a mapping with a number for every criterion.
        """
        if not self.criteria:
            return _within(points, *SCALE)
        if not isinstance(points, Mapping):
            return None
        found = self.points(points)
        if len(found) < len(self.criteria):
            return None
        total = sum(weight * found[name] for name, _, _, weight in self.criteria)
        return total / sum(criterion.weight for criterion in self.criteria)

    def points(self, given: Mapping[str, Any]) -> dict[str, float]:
        """Points from 0 to 10 of one answer for each criterion that has a number within its levels."""
        found = {}
        for name, levels, _, _ in self.criteria:
            low, high = min(levels), max(levels)
            value = _within(given.get(name), low, high)
            if value is not None:
                found[name] = SCALE[1] * (value - low) / (high - low)
        return found


def _within(value: Any, low: float, high: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        return None
    return float(value)


def _criterion(name: str, content: Any, where: str) -> Criterion:
    where = f"{where}.{name}"
    if not isinstance(content, Mapping) or "levels" not in content or set(content) - {"levels", "about", "weight"}:
        raise RecipeError(f"{where}: a criterion has levels, about and weight; got {content!r:.80}.")
    levels = content["levels"]
    try:
        levels = {float(points): str(levels[points]) for points in levels}
    except (TypeError, ValueError):
        raise RecipeError(f"{where}.levels: must be a mapping from points to text; got {levels!r:.80}.") from None
    if len(levels) < 2 or not all(map(math.isfinite, levels)):
        raise RecipeError(f"{where}.levels: at least two different numbers of points are needed; got {list(levels)}.")
    weight = content.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise RecipeError(f"{where}.weight: must be a number above 0; got {weight!r:.40}.")
    return Criterion(name, dict(sorted(levels.items())), str(content.get("about", "")), float(weight))
