"""Evidence as a picture: curves with a band over seeds, or a point per seed."""

from __future__ import annotations

import io
import math
from typing import Any

from guerdon.errors import require
from guerdon.evidence.base import Arm, Evidence, mean, sd

# told apart by colour-blind readers too (Okabe and Ito); black is left for text
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")
_LINES = {"method": "-", "baseline": "--", "ablation": ":"}
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "guerdon",  # the same figures give the same file
}


def draw(evidence: Evidence) -> bytes:
    """An SVG with a panel per curve; without curves, a panel per figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "evidence")
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    curves = evidence.drawn
    panels = curves or evidence.table
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, name in zip(axes, panels, strict=False):
            (_curve_panel if curves else _point_panel)(axis, name, evidence.arms)
            axis.set_title(name.replace("_", " "), loc="left")
            axis.set_xlabel(evidence.x if curves else "")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        seen: dict[str, Any] = {}
        for axis in axes:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                seen.setdefault(label, handle)
        figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=min(len(seen), 2 * columns, 5))
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Title": f"{evidence.slug}: {evidence.verdict}"})
    return stream.getvalue()


def _curve_panel(axis: Any, name: str, arms: tuple[Arm, ...]) -> None:
    for colour, arm in _coloured(arms):
        seeds = [points for points in arm.curves.get(name, []) if points]
        if not seeds:
            continue
        style = {"color": colour, "linestyle": _LINES[arm.role], "linewidth": 1.8}
        if max(map(len, seeds)) == 1:
            style |= {"marker": "o"}  # a single point has no line
        grids = [[x for x, _ in points] for points in seeds]
        if any(grid != grids[0] for grid in grids):  # each seed measured at places of its own: nothing to average
            for i, points in enumerate(seeds):
                axis.plot(*zip(*points, strict=True), label=arm.name if i == 0 else None, alpha=0.6, **style)
            continue
        values = [[points[i][1] for points in seeds] for i in range(len(grids[0]))]
        middle = [mean(column) for column in values]
        axis.plot(grids[0], middle, label=arm.name, **style)
        if len(seeds) > 1:
            spread = [sd(column) for column in values]
            low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
            axis.fill_between(grids[0], low, high, color=colour, alpha=0.15, linewidth=0)


def _point_panel(axis: Any, name: str, arms: tuple[Arm, ...]) -> None:
    labels = []
    for colour, arm in _coloured(arms):
        values = [value for value in arm.figures.get(name, []) if math.isfinite(value)]
        if not values:
            continue
        position = len(labels)
        labels.append(arm.name)
        axis.plot([position] * len(values), values, "o", color=colour, alpha=0.6, label=arm.name)
        axis.plot([position - 0.25, position + 0.25], [mean(values)] * 2, color=colour, linewidth=2)
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axis.set_xlim(-0.6, max(len(labels), 1) - 0.4)


def _coloured(arms: tuple[Arm, ...]) -> list[tuple[str, Arm]]:
    return [(_COLOURS[i % len(_COLOURS)], arm) for i, arm in enumerate(arms)]
