"""Reading a run directory: what is there, in the form it was written, with what is wrong with it said aloud."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guerdon.errors import DataError


@dataclass
class Run:
    """A run directory without its ledger and samples, which are streamed when a page needs them.

    Attributes:
        path: the directory.
        recipe: the resolved recipe; empty if `recipe.yaml` is missing.
        recipe_text: the recipe as it was written.
        environment: versions, device and start.
        status: state, step and reason.
        metrics: one record a step, ordered by step; a step that was written twice keeps its later record.
        supervised: the same for the supervised steps.
        pairs: histograms of held-out pairs, one record an evaluation.
        notes: what a reader has to know about the files, one sentence each.
    """

    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    supervised: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @property
    def elapsed(self) -> float | None:
        """Seconds of training up to the last record that says so."""
        return next((finite(record["elapsed"]) for record in reversed(self.metrics) if "elapsed" in record), None)

    @property
    def progress(self) -> str:
        """The step the run has reached, and how many it was to make if that is known: `12 of 200`."""
        step = self.status.get("step", self.metrics[-1]["step"] if self.metrics else 0)
        steps = self.status.get("steps", self.recipe.get("steps"))
        return f"{step}" if steps is None else f"{step} of {steps}"

    def metric_names(self) -> list[str]:
        """Names of all metrics, in the order in which the run first wrote them."""
        return list(dict.fromkeys(key for record in self.metrics for key in record))

    def series(self, key: str, table: str = "metrics") -> tuple[list[int], list[float | None]]:
        """Steps and values of one metric, where it was written.

        Args:
            key: the metric's name.
            table: `metrics` or `supervised`.

        Returns:
            The steps, and a value a step; None where the record holds null or a number that is not finite.
        """
        records = self.supervised if table == "supervised" else self.metrics
        written = [(record["step"], record[key]) for record in records if key in record]
        return [step for step, _ in written], [finite(value) for _, value in written]


def finite(value: Any) -> float | None:
    """The value as a float, or None if it is not a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read_run(path: Path | str) -> Run:
    """Read a run directory; files that a run has not (yet) written are left empty.

    Args:
        path: the run directory.

    Returns:
        The run, with a note for each thing that a reader should know (a line cut off by a kill, a value that is NaN).

    Raises:
        DataError: there is no such directory, it holds no run, or a file is malformed (other than a last line cut off).
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"report: there is no directory {path}. Give the directory of a run, such as runs/<name>.")
    if not (path / "recipe.yaml").exists() and not (path / "metrics.jsonl").exists():
        raise DataError(f"report: {path} is not a run directory: it has neither recipe.yaml nor metrics.jsonl.")
    run = Run(path)
    run.recipe, run.recipe_text = _read_recipe(path / "recipe.yaml")
    run.environment = _read_json(path / "environment.json")
    run.status = _read_json(path / "status.json")
    run.metrics = _by_step(path / "metrics.jsonl", run.notes)
    run.supervised = _by_step(path / "supervised.jsonl", run.notes)
    run.pairs = _by_step(path / "pairs.jsonl", run.notes)
    run.notes += _not_finite(run.metrics, "metrics.jsonl") + _not_finite(run.supervised, "supervised.jsonl")
    return run


def read_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream a JSONL file of records that each have a `step`.

    Args:
        path: the file; a missing file has no records.
        notes: gets a sentence if the last line is cut off, which is what a killed run leaves; that line is dropped.

    Yields:
        The line number (from 1) and the record.

    Raises:
        DataError: any other line that is not a JSON object with an integer `step`.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise DataError(f"{path}, line {number}: not a JSON object ({error}).") from error
                notes.append(
                    f"{path.name}: line {number}, the last, is cut off. The run was stopped while writing it, "
                    "or is writing it now; the line is left out."
                )
                return
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise DataError(f"{path}, line {number}: not a JSON object with an integer 'step'.")
            yield number, record


def _by_step(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Records ordered by step; a resumed run may have written some steps twice."""
    records: dict[int, dict[str, Any]] = {}
    repeated = 0
    for _, record in read_lines(path, notes):
        repeated += record["step"] in records
        records[record["step"]] = record
    if repeated:
        notes.append(f"{path.name}: {repeated} steps were written more than once; the later record is shown.")
    return [records[step] for step in sorted(records)]


def _not_finite(records: list[dict[str, Any]], name: str) -> list[str]:
    """One sentence for each metric that is NaN or infinite somewhere."""
    steps: dict[str, list[int]] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                steps.setdefault(key, []).append(record["step"])
    return [
        f"{name}: {key} is not a finite number at {len(at)} step{'s' * (len(at) > 1)}, first at step {at[0]}."
        for key, at in steps.items()
    ]


def _read_recipe(path: Path) -> tuple[dict[str, Any], str]:
    if not path.exists():
        return {}, ""
    import yaml

    text = _text(path)
    try:
        recipe = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise DataError(f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error}).") from error
    if recipe is not None and not isinstance(recipe, dict):
        raise DataError(f"{path}, line 1: a recipe is a mapping of settings; got {type(recipe).__name__}.")
    return recipe or {}, text


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}, line 1: not a JSON object.")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}).") from error
