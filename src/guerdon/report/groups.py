"""The ledger, streamed: all-right and all-wrong groups over time, dropped samples, and the groups worth looking at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guerdon.errors import DataError
from guerdon.report.records import read_lines
from guerdon.report.thinning import Evenly
from guerdon.report.words import Number

SHOWN_STEPS = 12
SHOWN_GROUPS = 3
SHOWN_DROPPED = 12


@dataclass
class Scored:
    """One sample of a group: [K] raw scores, shaped scores and contributions, and what they add up to."""

    position: int
    raw: list[Number]
    shaped: list[Number]
    contributions: list[Number]
    total: Number
    remainder: Number
    advantage: Number
    dropped: str = ""


@dataclass
class Group:
    """One prompt's samples at one step; `spread` is the largest minus the smallest weighted score."""

    prompt_index: int
    spread: float | int
    constant: bool
    samples: list[Scored]


@dataclass
class StepGroups:
    """The groups of one step with the largest and with the smallest spread."""

    step: int
    widest: list[Group]
    narrowest: list[Group]


@dataclass
class LedgerView:
    """What the page shows of a ledger.

    Attributes:
        components: the K names.
        steps: steps of the ledger.
        groups: groups at each step.
        right: for each component that ever has such a group, how many groups have all samples at its highest score.
        wrong: the same for its lowest score.
        dropped: how often each (component, reason) dropped a sample.
        dropped_first: the first of them as (step, prompt index, sample, component, reason).
        views: the groups of a few evenly spaced steps.
    """

    components: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    right: dict[str, list[int]] = field(default_factory=dict)
    wrong: dict[str, list[int]] = field(default_factory=dict)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped_first: list[tuple[int, int, int, str, str]] = field(default_factory=list)
    views: list[StepGroups] = field(default_factory=list)


class _Constants:
    """Scores that whole groups share, per component and step, and the range of all scores."""

    def __init__(self) -> None:
        self.shared: dict[int, list[float | int]] = {}
        self.low, self.high = float("inf"), float("-inf")

    def add(self, step: int, scores: tuple[Number, ...]) -> None:
        present = [score for score in scores if score is not None] if None in scores else scores
        if not present:
            return
        low, high = min(present), max(present)  # type: ignore[type-var]
        self.low, self.high = min(self.low, low), max(self.high, high)
        if low == high and len(present) == len(scores):
            self.shared.setdefault(step, []).append(low)

    def counts(self, steps: list[int]) -> tuple[list[int], list[int]]:
        """Groups at the highest and the lowest score; for scores within 0 and 1 these are 1 and 0, reached or not."""
        unit = self.low >= 0 and self.high <= 1
        low, high = (0.0, 1.0) if unit else (self.low, self.high)
        if low == high:
            return [0] * len(steps), [0] * len(steps)
        shared = [self.shared.get(step, []) for step in steps]
        return [values.count(high) for values in shared], [values.count(low) for values in shared]


def read_ledger(path: Path, wanted: set[int], notes: list[str]) -> LedgerView:
    """Stream a ledger into what a page shows of it, holding a few steps at a time.

    Args:
        path: `ledger.jsonl`; a missing file gives an empty view.
        wanted: steps to show groups of (those whose samples were written); empty means any.
        notes: gets a sentence if the last line is cut off.

    Returns:
        The view. A step that was written twice (a resumed run) counts as it was written last.

    Raises:
        DataError: a line is malformed or its columns do not fit together.
    """
    view = LedgerView()
    constants: dict[str, _Constants] = {}
    groups: dict[int, int] = {}
    dropped: dict[int, list[tuple[int, int, str, str]]] = {}
    shown: Evenly[tuple[int, dict[str, Any]]] = Evenly(SHOWN_STEPS)
    latest: tuple[int, dict[str, Any]] | None = None
    for number, record in read_lines(path, notes):
        try:
            step, names = record["step"], record["components"]
            for name in names:
                column = constants.setdefault(name, _Constants())
                column.shared.pop(step, None)
            for group in record["raw"]:
                for name, scores in zip(names, zip(*group, strict=True), strict=True):
                    constants[name].add(step, scores)
            groups[step] = len(record["raw"])
            dropped[step] = [(record["prompt_index"][p], g, name, why) for p, g, name, why in record["dropped"]]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _malformed(path, number, error) from error
        latest = (number, record)
        if not wanted or step in wanted:
            shown.add(latest)
    view.components, view.steps = list(constants), sorted(groups)
    view.groups = [groups[step] for step in view.steps]
    for name, column in constants.items():
        right, wrong = column.counts(view.steps)
        if any(right) or any(wrong):
            view.right[name], view.wrong[name] = right, wrong
    for step in view.steps:
        for index, position, name, why in dropped[step]:
            view.dropped[name, why] += 1
            if len(view.dropped_first) < SHOWN_DROPPED:
                view.dropped_first.append((step, index, position, name, why))
    records = {record["step"]: (number, record) for number, record in [*shown.pick(), *([latest] if latest else [])]}
    for step in sorted(records):
        number, record = records[step]
        try:
            view.views.append(_step_groups(record))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _malformed(path, number, error) from error
    return view


def _malformed(path: Path, number: int, error: Exception) -> DataError:
    why = f"it has no {error}" if isinstance(error, KeyError) else f"its columns do not fit together ({error})"
    return DataError(f"{path}, line {number}: not a step of a ledger: {why}.")


def _step_groups(record: dict[str, Any]) -> StepGroups:
    reasons = {(p, g): f"{name}: {why}" for p, g, name, why in record["dropped"]}
    groups = [_group(record, p, reasons) for p in range(len(record["raw"]))]
    ordered = sorted((group for group in groups if group is not None), key=lambda group: group.spread)
    narrowest = ordered[:SHOWN_GROUPS]
    widest = [group for group in reversed(ordered) if group not in narrowest and group.spread > 0][:SHOWN_GROUPS]
    return StepGroups(record["step"], widest, narrowest)


def _group(record: dict[str, Any], p: int, reasons: dict[tuple[int, int], str]) -> Group | None:
    weights = record["weights"]
    samples = []
    for g, (raw, shaped) in enumerate(zip(record["raw"][p], record["shaped"][p], strict=True)):
        weight = weights[p][g] if weights and isinstance(weights[0], list) else weights
        parts = [w * s for w, s in zip(weight, shaped, strict=True) if w is not None and s is not None]
        reason = reasons.get((p, g), "")
        total = sum(parts) if parts and not reason else None
        contributions, remainder = record["contributions"][p][g], record["remainder"][p][g]
        samples.append(Scored(g, raw, shaped, contributions, total, remainder, record["advantages"][p][g], reason))
    totals = [sample.total for sample in samples if sample.total is not None]
    if not totals:
        return None
    samples.sort(key=lambda sample: (sample.total is None, -(sample.total or 0.0)))
    return Group(record["prompt_index"][p], max(totals) - min(totals), bool(record["constant"][p]), samples)
