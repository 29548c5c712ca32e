"""The picture of the page on noisy verifiers, from the runs that the page names.

`python docs/scripts/noisy_curve.py RUNS` reads RUNS/NAME-SEED and writes docs/howto/noisy-verifier.svg.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import matplotlib.pyplot as plt

_OUT = Path(__file__).parents[1] / "howto" / "noisy-verifier.svg"
_INK = "#808080"
_COLOURS = {
    "right": "#444444",
    "uncorrected": "#c1121f",
    "uncorrected-rloo": "#e59a1a",
    "backward": "#00796b",
    "forward": "#3b5bdb",
}


def read(run: Path) -> dict[int, float]:
    """Sampled accuracy by the true verifier at every evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["eval/sampled/clean"] for line in lines if "eval/sampled/clean" in line}


def draw(folder: Path, out: Path) -> None:
    """One line per arm, each seed faint."""
    mpl.rcParams |= {"svg.hashsalt": "guerdon", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for name, colour in _COLOURS.items():
        seeds = [read(folder / f"{name}-{seed}") for seed in range(3)]
        for found in seeds:
            axes.plot(list(found), list(found.values()), color=colour, alpha=0.25, linewidth=1)
        steps = list(seeds[0])
        axes.plot(steps, [fmean(s[x] for s in seeds) for x in steps], color=colour, linewidth=2.2, label=name)
    axes.set(xlabel="step", ylabel="sampled accuracy", ylim=(0.1, 0.6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.grid(axis="y", color=_INK, alpha=0.2, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=_INK)
    figure.tight_layout()
    figure.savefig(out, transparent=True, metadata={"Date": None})
    text = out.read_text(encoding="utf-8")
    out.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), _OUT)
