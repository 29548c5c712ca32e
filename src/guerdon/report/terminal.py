"""A run in the terminal: its state and the figures before and after."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from guerdon.report.headlines import headlines
from guerdon.report.records import Run, read_run
from guerdon.report.samples import read_samples
from guerdon.report.thinning import bin_curve
from guerdon.report.words import duration, setting

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 24) -> str:
    """A curve in one line of block characters, from the lowest value to the highest.

    Example:
        >>> sparkline([0.0, 1.0, 2.0, 3.0, 7.0])
        '▁▂▃▄█'
    """
    points = [value for value in bin_curve(list(range(len(values))), list(values), width)[1] if value is not None]
    if not points:
        return ""
    low, high = min(points), max(points)
    if high == low:
        return BARS[0] * len(points)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in points)


def state_line(run: Run) -> str:
    """State, step, duration and task of a run in one line."""
    parts = [str(run.status.get("state", "unknown state")), f"step {run.progress}"]
    if run.elapsed is not None:
        parts.append(duration(run.elapsed))
    if "data" in run.recipe:
        parts.append(f"task {setting(run.recipe['data'])}")
    return " · ".join(parts)


def summary_table(run: Run | Path | str) -> Table:
    """The headline figures of a run as a rich table.

    Args:
        run: the run or its directory.

    Returns:
        A table with a row a figure: before, after, change, and its curve over the run.

    Raises:
        DataError: the directory holds no run, or a file is malformed.
    """
    run = run if isinstance(run, Run) else read_run(run)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column("")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right")
    table.add_column("over the run", no_wrap=True)
    for headline in headlines(run):
        before, after, difference = headline.texts()
        label = Text(headline.label + (f", {headline.unit}" if headline.unit else ""))
        table.add_row(
            label, Text(before), Text(after, "bold"), Text(difference), Text(sparkline(headline.curve), "cyan")
        )
    return table


def print_summary(run: Run | Path | str, console: Console | None = None) -> None:
    """Print a run's state, its reason if it failed, its headline figures and notes about its files.

    Args:
        run: the run or its directory.
        console: where to; standard output by default.

    Raises:
        DataError: the directory holds no run, or a file is malformed.
    """
    run = run if isinstance(run, Run) else read_run(run)
    console = console or Console()
    console.print(Text.assemble((run.name, "bold"), "  ", (state_line(run), "dim")))
    if run.status.get("reason"):
        console.print(Text(str(run.status["reason"]), "red" if run.status.get("state") == "failed" else ""))
    table = summary_table(run)
    if table.row_count:
        console.print(table)
    else:
        console.print(Text("No step has been written yet.", "dim"))
    for note in run.notes:
        console.print(Text(note, "yellow"))


def print_samples(run: Path | str, console: Console | None = None, most: int = 3) -> None:
    """Print a few held-out samples, as they were before training and after it.

    Args:
        run: the run directory.
        console: where to; standard output by default.
        most: samples per way the reward went (rose, fell).

    Raises:
        DataError: the samples file is malformed.
    """
    console = console or Console()
    samples = read_samples(Path(run) / "samples.jsonl", [])
    for group in samples.sets:
        if group.title == "Reward unchanged":
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
        table.add_column(f"{group.title} ({group.count})", max_width=48)
        table.add_column("before", max_width=40)
        table.add_column("after", max_width=40)
        for pair in group.pairs[:most]:
            table.add_row(Text(pair.prompt), Text(pair.before.text, "dim"), Text(pair.after.text))
        console.print(table)
