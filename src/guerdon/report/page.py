"""Writing the pages: one HTML file each that opens offline and asks nothing of any network.

Samples are untrusted text. Everything is escaped by the template engine, data for the script travels as JSON that
cannot end its element, and a content policy in the page lets only its own scripts run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from guerdon.report.charts import number
from guerdon.report.compare import comparison_sections, differences, final_figures, members
from guerdon.report.groups import read_ledger
from guerdon.report.headlines import headlines
from guerdon.report.records import Run, read_run
from guerdon.report.samples import read_samples
from guerdon.report.sections import run_sections
from guerdon.report.terminal import print_summary, summary_table
from guerdon.report.words import cut, duration, figure, setting

__all__ = ["print_summary", "summary_table", "write_comparison", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"
DESCRIBED = {"started", "device", "platform", "processes"}


def write_report(run: Path | str) -> Path:
    """Write `report.html` into a run directory: curves, ledger, samples before and after, recipe and machine.

    Args:
        run: the run directory, finished or not.

    Returns:
        The page. It is replaced in one move, so a reader never sees half of it.

    Raises:
        DataError: the directory holds no run, or a file is malformed (other than a last line cut off).
    """
    read = read_run(run)
    samples = read_samples(read.path / "samples.jsonl", read.notes)
    ledger = read_ledger(read.path / "ledger.jsonl", set(samples.texts), read.notes)
    sections = run_sections(read, ledger)
    html = _render(
        "report.html.jinja",
        number(sections),
        run=read,
        facts=_facts(read),
        headlines=headlines(read),
        sections=sections,
        ledger=ledger,
        samples=samples,
        machine=_machine(read),
        picture=partial(_picture, read.path),
    )
    return _replace(read.path / "report.html", html)


def write_comparison(runs: list[Path] | list[str], out: Path | str) -> Path:
    """Write one page that overlays the curves of several runs and lists what their recipes differ in.

    Args:
        runs: at least two run directories.
        out: the page to write; its directory must exist.

    Returns:
        The page.

    Raises:
        DataError: fewer than two runs, a run given twice, or a run that cannot be read.
    """
    group = members([read_run(run) for run in runs])
    columns, families = final_figures(group)
    sections = comparison_sections(group)
    html = _render(
        "comparison.html.jinja",
        number(sections),
        members=group,
        differences=differences([member.run for member in group]),
        columns=columns,
        families=families,
        sections=sections,
    )
    return _replace(Path(out), html)


def _picture(run: Path, name: str) -> str:
    """A picture of a run as a `data:` address, so that the page stays one file; empty if it is gone."""
    path = run / name
    small = path.with_suffix(".small.png")
    try:
        content = (small if small.is_file() else path).read_bytes()
    except OSError:
        return ""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _facts(run: Run) -> list[tuple[str, str]]:
    """What stands below the title of a report."""
    facts = [
        ("task", setting(run.recipe["data"]) if "data" in run.recipe else ""),
        ("steps", run.progress),
        ("duration", "" if run.elapsed is None else duration(run.elapsed)),
        ("device", _device(run)),
        ("started", _started(run.environment.get("started"))),
    ]
    return [(name, value) for name, value in facts if value]


def _device(run: Run) -> str:
    device, processes = run.environment.get("device"), run.environment.get("processes", 1)
    return "" if device is None else str(device) + (f" × {processes}" if processes not in (1, None) else "")


def _started(value: Any) -> str:
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return "" if value is None else str(value).replace("T", " ", 1).partition(".")[0]


def _machine(run: Run) -> list[tuple[str, str]]:
    known = [(key, setting(value)) for key, value in run.environment.items() if key in DESCRIBED]
    return known + [(key, setting(value)) for key, value in run.environment.items() if key not in DESCRIBED]


def _render(template: str, charts: dict[str, Any], **context: Any) -> str:
    """Fill a template; the policy in the page names its scripts by their hashes."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    # a missing value is a fault of the template, not an empty place on the page
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure, cut=cut, duration=duration)
    scripts = {"plotly": get_plotlyjs() if charts["charts"] else "", "page": (TEMPLATES / "page.js").read_text("utf-8")}
    return environment.get_template(template).render(
        **context,
        style=Markup((TEMPLATES / "page.css").read_text("utf-8")),
        scripts={name: Markup(text) for name, text in scripts.items()},
        hashes=[_hash(text) for text in scripts.values() if text],
        data=Markup(_json(charts)),
    )


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that is safe inside a script element: no text in it can close the element or open another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _replace(path: Path, text: str) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return path
