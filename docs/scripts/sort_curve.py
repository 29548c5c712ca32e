"""Draw docs/assets/sort.svg from runs of `guerdon train sort`, and print the figures that the text quotes.

for s in 0 1 2; do guerdon train sort --seed $s --run.name sort-seed-$s; done
python docs/scripts/sort_curve.py runs/sort-seed-*
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

_OUT = Path(__file__).parents[1] / "assets" / "sort.svg"
_INK = "#7d858d"  # readable on white and on black
_MODES = {"greedy": "#12897a", "sampled": "#d9692b"}


def read(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw(runs: Sequence[Path], out: Path) -> None:
    """Write the picture: each seed faint, their mean strong."""
    mpl.rcParams |= {"svg.hashsalt": "guerdon", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    for mode, colour in _MODES.items():
        curves = []
        for run in runs:
            steps, values = read(run, f"eval/{mode}/correct")
            axes.plot(steps, values, color=colour, alpha=0.35, linewidth=1)
            curves.append(values)
        mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
        axes.plot(steps, mean, color=colour, linewidth=2.4, marker="o", markersize=4)
        axes.annotate(mode, (steps[-1], mean[-1]), (6, -3), textcoords="offset points", color=colour, weight="bold")
        print(f"{mode}: mean {mean[0]:.3f} -> {mean[-1]:.3f};", *(f"{c[0]:.3f} -> {c[-1]:.3f}" for c in curves))
    axes.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1), xlim=(0, steps[-1] * 1.12))
    axes.spines[["top", "right"]].set_visible(False)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(_INK)
    axes.tick_params(colors=_INK)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.grid(axis="y", color=_INK, alpha=0.2, linewidth=0.6)
    figure.tight_layout()
    figure.savefig(out, transparent=True, metadata={"Date": None})
    out.write_text(
        "\n".join(line.rstrip() for line in out.read_text(encoding="utf-8").splitlines()) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    draw([Path(word) for word in sys.argv[1:]], _OUT)
