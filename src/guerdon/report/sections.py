"""The sections of a report: each metric of a run in the place where a reader looks for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import Any

from guerdon.report.charts import (
    FRONT,
    GROUPS,
    KNOWN,
    PAIRS,
    POLICY,
    PREFIXES,
    SPEED,
    UPDATE,
    Chart,
    Curve,
    Section,
    Series,
    Spec,
    chart,
    line,
    section,
)
from guerdon.report.groups import LedgerView
from guerdon.report.headlines import HELD_OUT, step_unit
from guerdon.report.records import Run, finite
from guerdon.report.words import figure

_FRONT_NOTE = (
    "Held-out scores of all evaluations, more being better. Strong: those that no other evaluation beats in every component. "
    "The volume is what they dominate beyond the start, each score in units of what it was then."
)


def run_sections(run: Run, ledger: LedgerView) -> list[Section]:
    """The curves of a run, in the order of the page; what the run did not write is left out.

    Args:
        run: the run.
        ledger: its ledger, for the groups over time.

    Returns:
        Sections of charts, without ids.
    """
    groups = [*_specs(run, GROUPS), *_settled(ledger)]
    other = [
        chart(key, [line(run.series(key), key, key=key)])
        for key in run.metric_names()
        if key not in KNOWN and not key.startswith(PREFIXES)
    ]
    supervised = [
        _supervised(run, "loss", "Loss", "", zero=True),
        _supervised(run, "lr", "Learning rate", "", zero=True),
        _supervised(run, "tokens_per_s", "Speed", f"{step_unit(run)}/s", zero=True),
    ]
    named = [
        section("reward", "Reward", _reward_note(run), [*_reward(run), *_watched(run), _against(run)]),
        section("parts", "Components", _parts_note(run), _parts(run)),
        section("front", "Trade-offs", _FRONT_NOTE, [*_specs(run, FRONT), *_fronts(run)]),
        section("groups", "Groups", "A group whose samples all score the same teaches nothing.", groups),
        section("policy", "Policy", "", _specs(run, POLICY)),
        section("pairs", "Pairs", "What the loss takes samples to be worth.", _pairs(run)),
        section("update", "Update", "", _specs(run, UPDATE)),
        section("speed", "Time", "", [_time(run), *_specs(run, SPEED)]),
        section("other", "Other figures", "Metrics of this run's own stages.", other),
        section("supervised", "Supervised steps", "Before the loop; steps of their own.", supervised),
    ]
    return [part for part in named if part is not None]


def component_names(run: Run, prefix: str) -> list[str]:
    """Names under a prefix such as `score/`, in the order in which the run wrote them."""
    return [key.removeprefix(prefix) for key in run.metric_names() if key.startswith(prefix)]


def _held_out(run: Run, name: str) -> list[Series | None]:
    """The evaluation points of a component."""
    return [
        line(run.series(prefix + name), f"held-out, {mode}", "points", color=color)
        for color, (mode, prefix) in enumerate(HELD_OUT.items())
    ]


def _same(first: Curve, second: Curve) -> bool:
    """Whether two metrics hold the same numbers."""
    if first[0] != second[0]:
        return False
    pairs = zip(first[1], second[1], strict=True)
    return all(a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-5)) for a, b in pairs)


def _scored(run: Run, name: str, title: str, key: str, unit: str = "score") -> Chart | None:
    """Training faint below the held-out points, or plain if there are none."""
    points = [series for series in _held_out(run, name) if series is not None]
    return chart(title, [line(run.series(key), "training", "light" if points else "line"), *points], unit=unit)


def _reward(run: Run) -> list[Chart | None]:
    names = component_names(run, "score/")
    twin = [name for name in names if _same(run.series("reward"), run.series(f"score/{name}"))]
    charts = [] if twin else [_scored(run, "reward", "Reward", "reward", "weighted")]
    charts += [_scored(run, name, f"{name} (the reward)" if name in twin else name, f"score/{name}") for name in names]
    scored = {"reward", *names, *component_names(run, "watch/")}
    held_out = dict.fromkeys(name for prefix in HELD_OUT.values() for name in component_names(run, prefix))
    # the length of samples that all have the same number of steps, such as images, is not drawn
    told = [name for name in held_out if name not in scored and not (name == "length" and _never_changes(run, name))]
    return charts + [chart(name, _held_out(run, name)) for name in told]


def _never_changes(run: Run, name: str) -> bool:
    curves = [run.series(prefix + name)[1] for prefix in HELD_OUT.values()]
    return all(len({value for value in curve if value is not None}) <= 1 for curve in curves)


def _reward_note(run: Run) -> str:
    evaluated = any(component_names(run, prefix) for prefix in HELD_OUT.values())
    strong = " Faint: training samples. Strong: the held-out prompts." if evaluated else ""
    return "The raw score of each component, averaged over a step's samples." + strong


def _parts(run: Run) -> list[Chart | None]:
    shaped = [
        chart(f"{name}, shaped", [line(run.series(f"shaped/{name}"), name)], unit="mean over samples")
        for name in component_names(run, "shaped/")
        if not _same(run.series(f"shaped/{name}"), run.series(f"score/{name}"))
    ]
    shares = component_names(run, "share/")
    stacked = [
        line(run.series(f"share/{name}"), name, "area" if len(shares) > 1 else "line", color=color)
        for color, name in enumerate(shares)
    ]
    share = chart("Share of the advantage", stacked, unit="of its size", share=True, zero=True)
    varying = [
        line(run.series(f"weight/{name}"), name, color=color)
        for color, name in enumerate(component_names(run, "weight/"))
    ]
    weights = chart("Weights", varying, zero=True) if _varying(run) else None
    return [share if len(shares) > 1 else None, weights, *shaped]


def _weights(run: Run) -> dict[str, list[float]]:
    names = component_names(run, "weight/")
    return {name: [value for value in run.series(f"weight/{name}")[1] if value is not None] for name in names}


def _varying(run: Run) -> bool:
    return any(values and not math.isclose(min(values), max(values), rel_tol=1e-6) for values in _weights(run).values())


def _parts_note(run: Run) -> str:
    constant = {name: values[0] for name, values in _weights(run).items() if values}
    if not constant or _varying(run):
        return "What moves the policy: how much of the advantage each component accounts for."
    return "Weights are constant: " + ", ".join(f"{name} {figure(value)}" for name, value in constant.items()) + "."


def _fronts(run: Run) -> Iterable[Chart | None]:
    """For each pair of components the way of the run and, of its evaluations, those on the Pareto front of all components."""
    if "front/size" not in run.metric_names():
        return
    from guerdon.metrics.hypervolume import pareto_mask  # numpy, for runs with a front only

    names = component_names(run, "score/")
    prefix = next((p for p in reversed(HELD_OUT.values()) if p + names[0] in run.metric_names()), "") if names else ""
    rows = [[finite(record.get(prefix + name)) for name in names] for record in run.metrics]
    points = [[value for value in row if value is not None] for row in rows]
    points = [point for point in points if len(point) == len(names)]
    kept = [point for point, on_front in zip(points, pareto_mask(points), strict=True) if on_front]
    for a, b in combinations(range(min(len(names), 4)), 2):
        front = sorted((point[a], point[b]) for point in kept)
        way = Series("evaluations", [p[a] for p in points], [p[b] for p in points], style="light")
        best = Series("on the front", [x for x, _ in front], [y for _, y in front], style="points")
        title = f"{names[b]} against {names[a]}"
        yield chart(title, [way, best], unit=f"right: {names[a]}, up: {names[b]}", values=True)


def _watched(run: Run) -> list[Chart | None]:
    unit = "watched, not trained on"
    return [_scored(run, name, name, f"watch/{name}", unit) for name in component_names(run, "watch/")]


def _against(run: Run) -> Chart | None:
    """The reward against what is watched, each from its least to its largest value: where they part, look for a hack."""
    watched = component_names(run, "watch/")
    if not watched:
        return None
    curves = {"reward": run.series("reward"), **{name: run.series(f"watch/{name}") for name in watched}}
    lines = [line(_from_0_to_1(curve), name, color=color) for color, (name, curve) in enumerate(curves.items())]
    return chart("Reward against what is watched", lines, unit="each from its least to its largest", zero=True)


def _from_0_to_1(curve: Curve) -> Curve:
    steps, values = curve
    there = [value for value in values if value is not None]
    low, high = min(there, default=0.0), max(there, default=0.0)
    return steps, [None if v is None or high == low else (v - low) / (high - low) for v in values]


def _settled(ledger: LedgerView) -> Iterable[Chart | None]:
    """All-right and all-wrong groups of each component that has any."""
    for name, right in ledger.right.items():
        lines = [
            line((ledger.steps, list(map(float, right))), "all at the highest score"),
            line((ledger.steps, list(map(float, ledger.wrong[name]))), "all at the lowest", color=1),
        ]
        title = "All right, all wrong" if len(ledger.components) == 1 else f"All right, all wrong: {name}"
        yield chart(title, lines, unit="groups", zero=True)


def _specs(run: Run, specs: Iterable[Spec]) -> list[Chart | None]:
    keys, unit = set(run.metric_names()), step_unit(run)
    charts = []
    for spec in specs:
        lines, drawn = [], Counter[str]()
        for key, name, style in spec.keys:
            if key in keys and (key not in ("dropped", "kl") or any(run.series(key)[1])):
                # the same thing in training and held-out has one colour and two styles
                lines.append(line(run.series(key), name, style, key=key, color=drawn[style]))
                drawn[style] += 1
        title, label = spec.title, spec.unit.format(steps=unit)
        charts.append(chart(title, lines, unit=label, share=spec.share, zero=spec.zero))
    return charts


def _pairs(run: Run) -> list[Chart | None]:
    """Curves of a preference run, and histograms of its held-out pairs at the first and the last evaluation."""
    if not ({"accuracy", "margin"} & set(run.metric_names())):
        return []
    return [*_specs(run, PAIRS), *_histograms(run)]


def _histograms(run: Run) -> Iterable[Chart | None]:
    if not run.pairs:
        return
    first, last = run.pairs[0], run.pairs[-1]
    rewards = [
        _distribution(last, name, name.removeprefix("reward_"), color)
        for color, name in enumerate(("reward_chosen", "reward_rejected", "reward"))
    ]
    yield chart(f"Implicit reward, step {last['step']}", rewards, unit="held-out samples", zero=True, values=True)
    for name, title in (("margin", "Margins"), ("length_chosen", "Length of chosen")):
        found = [_distribution(record, name, f"step {record['step']}", c) for c, record in enumerate((first, last))]
        drawn = found[1:] if name != "margin" or first is last else found
        yield chart(title, drawn, unit="held-out pairs", zero=True, values=True)


def _distribution(record: dict[str, Any], name: str, label: str, color: int) -> Series | None:
    """A histogram as a line through the middles of its bins."""
    found = record.get(name)
    if not isinstance(found, dict) or not found.get("counts"):
        return None
    edges = found["edges"]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    return Series(label, middles, [float(count) for count in found["counts"]], color=color)


def _time(run: Run) -> Chart | None:
    names = component_names(run, "seconds/")
    parts = [line(run.series(f"seconds/{name}"), name, "area", color=color) for color, name in enumerate(names)]
    return chart("Time of a step", parts, unit="s", zero=True)


def _supervised(run: Run, key: str, title: str, unit: str, zero: bool) -> Chart | None:
    if not any(key in record for record in run.supervised):
        return None
    return chart(title, [line(run.series(key, "supervised"), title)], unit=unit, zero=zero)
