"""Curves as plain data: which metrics share a chart, in which section, and how each line is drawn.

The page's script turns these into plotly figures, so that colours follow the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from guerdon.report.thinning import bin_curve

POINTS = 600

LineStyle = Literal["line", "light", "points", "area"]
Curve = tuple[list[int], list[float | None]]


@dataclass
class Series:
    """One line of a chart: `light` is drawn faint, `points` strong with markers, `area` is stacked on those before."""

    name: str
    x: list[int] | list[float]
    y: list[float | None]
    color: int = 0
    style: LineStyle = "line"
    dash: int = 0
    run: int | None = None


@dataclass
class Chart:
    """One small chart; `share` writes y as a percentage, `zero` starts y at 0, `values`: x is a quantity, not a step."""

    title: str
    series: list[Series]
    unit: str = ""
    share: bool = False
    zero: bool = False
    values: bool = False
    id: str = ""

    def spec(self) -> dict[str, Any]:
        """The chart as the page's script reads it."""
        lines = [
            {
                "name": line.name,
                "x": line.x,
                "y": [None if value is None else float(f"{value:.6g}") for value in line.y],
                "color": line.color,
                "style": line.style,
                "dash": line.dash,
                "run": line.run,
            }
            for line in self.series
        ]
        return {"id": self.id, "share": self.share, "zero": self.zero, "values": self.values, "lines": lines}


@dataclass
class Section:
    """A titled grid of charts with a sentence on how to read them."""

    id: str
    title: str
    note: str
    charts: list[Chart] = field(default_factory=list)


@dataclass(frozen=True)
class Spec:
    """A chart of a metric of its own: title, unit and the metrics it shows."""

    title: str
    keys: tuple[tuple[str, str, LineStyle], ...]  # metric, name in the legend, style
    unit: str = ""
    share: bool = False
    zero: bool = False

    @staticmethod
    def of(key: str, title: str, unit: str = "", share: bool = False, zero: bool = False) -> Spec:
        """A chart of a single metric."""
        return Spec(title, ((key, title, "line"),), unit, share, zero)


GROUPS = (
    Spec.of("constant_groups", "Constant groups", "share of groups", share=True, zero=True),
    Spec.of("reward_std", "Reward spread", "standard deviation", zero=True),
    Spec.of("dropped", "Dropped samples", "samples", zero=True),
    Spec.of("draws", "Draws", "a step", zero=True),
)
POLICY = (
    Spec.of("entropy", "Entropy", "nats", zero=True),
    Spec.of("kl", "KL to the reference", "nats"),
    Spec("Length", (("length", "mean", "line"), ("length_max", "longest", "light")), "{steps}", zero=True),
    Spec.of("truncated", "Truncated samples", "share of samples", share=True, zero=True),
)
PAIRS = (
    Spec(
        "Ranked right",
        (
            ("accuracy", "training", "light"),
            ("eval/accuracy", "held-out", "points"),
            ("eval/likelihood_accuracy", "held-out, by mean likelihood", "points"),
        ),
        "share of pairs",
        share=True,
    ),
    Spec("Margin", (("margin", "training", "light"), ("eval/margin", "held-out", "points")), "of implicit rewards"),
    Spec("Rewards", (("reward_chosen", "chosen", "line"), ("reward_rejected", "rejected", "line")), "implicit"),
    Spec("Likelihood", (("logp_chosen", "chosen", "line"), ("logp_rejected", "rejected", "line")), "nats a sample"),
    Spec.of("eval/length_correlation", "Longer is likelier", "correlation over held-out pairs"),
    Spec("Loss, held-out", (("eval/loss", "held-out", "points"),)),
)
UPDATE = (
    Spec.of("loss", "Loss"),
    Spec.of("grad_norm", "Gradient norm", zero=True),
    Spec.of("lr", "Learning rate", zero=True),
    Spec.of("clip_share", "Clipped", "share of {steps}", share=True, zero=True),
    Spec.of("ratio_max", "Largest probability ratio"),
    Spec.of("logp_gap", "Sampler to trainer gap", "nats", zero=True),
)
SPEED = (
    Spec.of("tokens_per_s", "Speed", "{steps}/s", zero=True),
    Spec.of("tokens", "Trained on", "{steps} a step", zero=True),
)
FRONT = (
    Spec("Hypervolume", (("front/hypervolume", "Hypervolume", "points"),), "of the start", zero=True),
    Spec("Points on the front", (("front/size", "Points on the front", "points"),), "evaluations", zero=True),
)
PREFIXES = ("score/", "shaped/", "weight/", "share/", "watch/", "seconds/", "eval/", "front/")
NOT_DRAWN = {"step", "elapsed", "reward"}
KNOWN = NOT_DRAWN | {key for spec in (*GROUPS, *POLICY, *PAIRS, *UPDATE, *SPEED, *FRONT) for key, _, _ in spec.keys}


def line(
    curve: Curve, name: str, style: LineStyle = "line", key: str = "", points: int = POINTS, **drawn: Any
) -> Series | None:
    """A curve as a line of at most `points` points; None if it has no value."""
    steps, values = curve
    if all(value is None for value in values):
        return None
    if style != "area" and 2 * sum(value is not None for value in values) < len(values):
        pairs = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        steps, values = [step for step, _ in pairs], [value for _, value in pairs]
        style = "points" if style == "line" else style
    if style == "line" and len(values) == 1:
        style = "points"
    x, y = bin_curve(steps, values, points, largest=key.endswith("_max"))
    return Series(name, x, y, style=style, **drawn)


def chart(title: str, lines: Iterable[Series | None], **options: Any) -> Chart | None:
    """A chart of the lines there are; None if there is none."""
    present = [series for series in lines if series is not None]
    return Chart(title, present, **options) if present else None


def section(id: str, title: str, note: str, charts: Iterable[Chart | None]) -> Section | None:
    """A section of the charts there are; None if there is none."""
    present = [drawn for drawn in charts if drawn is not None]
    return Section(id, title, note, present) if present else None


def number(sections: list[Section]) -> dict[str, Any]:
    """Give every chart an id of its own and return all of them for the page's script."""
    charts = [drawn for part in sections for drawn in part.charts]
    for position, drawn in enumerate(charts):
        drawn.id = f"chart-{position}"
    return {"charts": [drawn.spec() for drawn in charts]}
