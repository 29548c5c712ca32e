"""JSON lines and JSON lists, read by the standard library: it keeps the line numbers that other readers lose."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path

from guerdon.errors import DataError
from guerdon.language.rows import Columns, Faults, Row, Rows, kind, listed, prompt_fault
from guerdon.language.text_files import LineRows, check_start, lines, not_utf8, short, state_of


class HeldRows(Rows):
    """Rows held in memory: a JSON list."""

    def __init__(self, name: str, rows: list[Row], columns: Columns) -> None:
        super().__init__(name, columns.rows, columns.present, columns.complete)
        self.rows = rows

    def take(self, positions: Sequence[int]) -> list[Row]:
        """Copies, so that the rows stay as they were read."""
        return [dict(self.rows[position]) for position in positions]


def read_json(name: str, file: Path) -> Rows:
    """Rows of a file with one JSON object a line, or one JSON list of objects.

    Raises:
        DataError: see `guerdon.language.data.read_rows`.
    """
    with file.open("rb") as stream:
        check_start(name, stream.read(4096))
        stream.seek(0)
        first = next((line for line in stream if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
    if first.startswith(b"["):
        return _read_list(name, file)
    return _read_lines(name, file)


def _read_lines(name: str, file: Path) -> Rows:
    columns, faults = Columns(), Faults(name)
    starts = array("q")
    cut = False
    with file.open("rb") as stream:
        state = state_of(stream)
        for number, start, line in lines(stream):
            if not line.strip(b" \t\r\n"):
                continue
            row: Row = {}
            try:
                row = _object(line)
                problem = prompt_fault(row.get("prompt"))
            except _NotJsonError as error:
                cut = not line.endswith(b"\n")
                problem = f"truncated, the line has no end: {error}" if cut else str(error)
            except ValueError as error:
                problem = str(error)
            if problem is not None:
                faults.add(f"line {number:,}", problem)
                continue
            columns.add(row)
            starts.append(start)
        starts.append(stream.tell())
    if faults.count and not columns.rows:
        _check_single(name, file)
    faults.check(
        "The file looks truncated: copy or write it again."
        if cut
        else "Write one JSON object a line; see the lines above."
    )
    if not columns.rows:
        raise DataError(f"{name} holds no rows, only blank lines. Check how it was written.")
    return LineRows(name, file, starts, _object, columns, state)


def _read_list(name: str, file: Path) -> Rows:
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {not_utf8(error)} Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        open_ended = error.msg != "Extra data" and not error.doc.rstrip().endswith("]")
        problem = f"truncated, the list is never closed: {error.msg}" if open_ended else error.msg
        raise DataError(
            f"{name}: line {error.lineno:,}, column {error.colno:,}: {problem}. "
            "A file that starts with [ must be one JSON list of objects; otherwise write one object a line."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: {error}.") from error
    columns, faults = Columns(), Faults(name)
    for position, row in enumerate(rows):
        problem = prompt_fault(row.get("prompt")) if isinstance(row, dict) else f"must be an object; got {kind(row)}"
        if problem is not None:
            faults.add(f"row {position}", problem)
        else:
            columns.add(row)
    faults.check("Write a list of JSON objects.")
    if not rows:
        raise DataError(f"{name} holds an empty list. Check how it was written.")
    return HeldRows(name, rows, columns)


class _NotJsonError(ValueError):
    """Bytes that are not UTF-8, or text that is not JSON: what the end of a cut file looks like."""


def _object(line: bytes) -> Row:
    """The object on a line; ValueError says what is wrong with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _NotJsonError(not_utf8(error)) from None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise _NotJsonError(f"{error.msg} at column {error.colno:,}: {short(text)}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object; got {kind(row)}: {short(text)}")
    return row


def _check_single(name: str, file: Path) -> None:
    """Tell a file that is one object over many lines, which would otherwise be many malformed lines."""
    try:
        whole = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return
    if isinstance(whole, dict):
        raise DataError(
            f"{name} is a single JSON object over several lines, with the keys {listed(whole)}. "
            "Write a list of objects, or one object a line."
        )
