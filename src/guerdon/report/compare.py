"""Several runs side by side: what their recipes differ in, where they ended, and their curves over each other."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from guerdon.errors import DataError
from guerdon.report.charts import (
    GROUPS,
    POLICY,
    SPEED,
    UPDATE,
    Chart,
    LineStyle,
    Section,
    chart,
    line,
    section,
)
from guerdon.report.headlines import HELD_OUT, headlines, step_unit
from guerdon.report.records import Run
from guerdon.report.words import Style, figure, setting

ABSENT = "–"
POINTS = 60  # a training curve over other training curves is read by its course, not by its noise


@dataclass
class Member:
    """A run in a comparison: its label and how its lines are drawn."""

    run: Run
    label: str
    family: int
    color: int
    dash: int


@dataclass
class Column:
    """One final figure: its label, how it is written, and the runs' values."""

    label: str
    unit: str
    style: Style
    values: list[float | None]


@dataclass
class Family:
    """Runs whose recipes are equal but for the seed: mean and standard deviation of each final figure."""

    label: str
    runs: int
    figures: list[str]


def members(runs: list[Run]) -> list[Member]:
    """Label the runs and give them colours: one a recipe if seeds were repeated, else one a run.

    Args:
        runs: at least two.

    Returns:
        A member for each run, in the same order.

    Raises:
        DataError: fewer than two runs, or a run given twice.
    """
    if len(runs) < 2:
        raise DataError(f"report.compare: give at least two runs; got {len(runs)}.")
    paths = [run.path.resolve() for run in runs]
    twice = [path for position, path in enumerate(paths) if path in paths[:position]]
    if twice:
        raise DataError(f"report.compare: {twice[0]} is given twice.")
    names = [path.name for path in paths]
    labels = [f"{path.parent.name}/{path.name}" if names.count(path.name) > 1 else path.name for path in paths]
    labels = [str(path) if labels.count(label) > 1 else label for path, label in zip(paths, labels, strict=True)]
    keys = [_but_seed(run.recipe) for run in runs]
    order = list(dict.fromkeys(keys))
    repeated = 1 < len(order) < len(runs)
    found = []
    for position, (run, label, key) in enumerate(zip(runs, labels, keys, strict=True)):
        family = order.index(key)
        color, dash = (family, keys[:position].count(key)) if repeated else (position, position // 8)
        found.append(Member(run, label, family, color, dash))
    return found


def _but_seed(recipe: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in recipe.items() if k not in ("seed", "run")}, sort_keys=True, default=str)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Settings by dotted name."""
    if not isinstance(value, dict) or not value:
        return {prefix: setting(value)}
    parts: dict[str, str] = {}
    for key, inner in value.items():
        parts |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return parts


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all recipes.

    Args:
        runs: the runs.

    Returns:
        Dotted name and the value in each run, a dash where a recipe lacks it. Where the runs are stored is no setting.
    """
    flat = [_flat(run.recipe) if run.recipe else {} for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
    ordered = sorted(names, key=lambda name: tops.index(name.partition(".")[0]))
    rows = [(name, [settings.get(name, ABSENT) for settings in flat]) for name in ordered]
    where = ("run.name", "run.directory")
    return [(name, values) for name, values in rows if len(set(values)) > 1 and name not in where]


def final_figures(group: list[Member]) -> tuple[list[Column], list[Family]]:
    """Where each run ended, and the mean and spread over runs that share a recipe up to the seed.

    Args:
        group: the members.

    Returns:
        Columns of figures in the order of the headline figures, and a family for each recipe with several runs.
    """
    found = [{headline.key: headline for headline in headlines(member.run)} for member in group]
    first = {key: headline for row in reversed(found) for key, headline in row.items()}
    columns = []
    for key in dict.fromkeys(key for row in found for key in row):
        values = [row[key].after if key in row else None for row in found]
        columns.append(Column(first[key].label, first[key].unit, first[key].style, values))
    families = []
    for family in dict.fromkeys(member.family for member in group):
        positions = [position for position, member in enumerate(group) if member.family == family]
        if len(positions) < 2:
            continue
        figures = [_spread([column.values[p] for p in positions], column.style) for column in columns]
        label = ", ".join(group[p].label for p in positions)
        families.append(Family(label, len(positions), figures))
    return columns, families


def _spread(values: list[float | None], style: Style) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return ABSENT
    mean = figure(statistics.fmean(present), style)
    if len(present) == 1:
        return f"{mean} (one run)"
    spread = statistics.stdev(present)
    return f"{mean} ± {f'{spread:.2g}' if style == 'plain' and spread < 100 else figure(spread, style)}"


def comparison_sections(group: list[Member]) -> list[Section]:
    """The runs' curves over each other, one chart a metric.

    Args:
        group: the members.

    Returns:
        Sections of charts, without ids; a metric that no run has is left out.
    """
    keys = list(dict.fromkeys(key for member in group for key in member.run.metric_names()))
    unit = step_unit(group[0].run)

    def overlay(key: str, title: str, **options: Any) -> Chart | None:
        style: LineStyle = "points" if key.startswith("eval/") else "line"
        lines = [
            line(run.run.series(key), run.label, style, key, POINTS, color=run.color, dash=run.dash, run=position)
            for position, run in enumerate(group)
        ]
        return chart(title, lines, **options)

    held_out = [
        overlay(key, f"{key.removeprefix(prefix)}, {mode}", unit="score")
        for mode, prefix in HELD_OUT.items()
        for key in keys
        if key.startswith(prefix)
    ]
    scores = [overlay("reward", "Reward", unit="weighted")] if "reward" in keys else []
    for key in keys:
        if key.startswith(("score/", "watch/")):
            scores.append(overlay(key, key.partition("/")[2], unit="score"))
    rest = []
    for spec in (*GROUPS, *POLICY, *UPDATE, *SPEED):
        for key, name, _ in spec.keys:
            if key in keys and any(any(member.run.series(key)[1]) for member in group):
                title = spec.title if len(spec.keys) == 1 else f"{spec.title}, {name}"
                options = {"unit": spec.unit.format(steps=unit), "share": spec.share, "zero": spec.zero}
                rest.append(overlay(key, title, **options))
    width = -(-max(len(member.run.metrics) for member in group) // POINTS)
    means = f"Each point is the mean of up to {width} steps." if width > 1 else ""
    named = [
        section("held-out", "Held-out prompts", "", held_out),
        section("training", "Training samples", means, scores),
        section("rest", "Policy, update and speed", means, rest),
    ]
    return [part for part in named if part is not None]
