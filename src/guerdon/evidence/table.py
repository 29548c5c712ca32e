"""Evidence as text: tables for a terminal, and the same for a page. Nothing here imports torch."""

from __future__ import annotations

import math

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from guerdon.evidence.base import Arm, Check, Evidence

COLUMNS = ("check", "condition", "method", "baseline", "spread", "result")


def number(value: float) -> str:
    """Three significant digits; a dash for what is not there."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def cells(check: Check) -> tuple[str, ...]:
    """A check as a row under `COLUMNS`."""
    columns = (number(check.figures.get(name, math.nan)) for name in ("method", "baseline", "spread"))
    name = check.name if check.kind == "mechanism" else f"{check.name} (headline)"
    return (name, check.condition, *columns, check.verdict)


def arm_cells(arm: Arm, metrics: list[str]) -> tuple[str, ...]:
    """An arm as a row: name, role, then mean and standard deviation of each metric."""
    shown = []
    for name in metrics:
        if name not in arm.figures:
            shown.append("–")
        else:
            spread = arm.sd(name)
            shown.append(number(arm.mean(name)) + ("" if math.isnan(spread) else f" ± {number(spread)}"))
    return (arm.name, arm.role, *shown)


def facts(evidence: Evidence) -> str:
    """Budget, seeds and cost in a line."""
    seeds = f"{len(evidence.seeds)} seed{'' if len(evidence.seeds) == 1 else 's'}"
    return f"{evidence.budget} budget, {seeds}, {evidence.seconds:.0f} CPU seconds"


def render(evidence: Evidence) -> RenderableType:
    """One claim test for a terminal."""
    checks = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        numeric = column in ("method", "baseline", "spread")
        checks.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    for check in evidence.checks:
        colour = "green" if check.holds else "red" if check.kind == "mechanism" else "yellow"
        *row, verdict = cells(check)
        checks.add_row(*map(Text, row), Text(verdict, colour))
    arms = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("arm", "role", *evidence.table):
        arms.add_column(column.replace("_", " "), justify="left" if column in ("arm", "role") else "right")
    for arm in evidence.arms:
        arms.add_row(*map(Text, arm_cells(arm, evidence.table)))
    colour = "green" if evidence.holds else "red"
    title = Text.assemble((evidence.slug, "bold"), f"  {evidence.title}: ", (evidence.verdict, colour))
    parts: list[RenderableType] = [title, Text(evidence.claim), Text(), checks, Text(), arms, Text()]
    parts += [Text(f"Note: {note}") for note in evidence.notes]
    return Group(*parts, Text(facts(evidence), "dim"))


def show(evidence: Evidence, console: Console | None = None) -> None:
    """Print one claim test; where the output is no terminal, in lines of 140 characters."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print(render(evidence))
    console.print()


def markdown(header: list[str], rows: list[tuple[str, ...]]) -> str:
    """A table of a page."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
