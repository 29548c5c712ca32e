"""Readers for JSON and CSV by the standard library, which keep the line numbers that other readers lose."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from guerdon.errors import DataError
from guerdon.language.rows import Columns, Faults, Row, Rows, kind, listed, prompt_fault

_MARK = b"\xef\xbb\xbf"  # an editor's sign for UTF-8 at the start of a file


class LineRows(Rows):
    """Rows that are read from the file when they are asked for; in memory is where each one starts."""

    def __init__(
        self, name: str, file: Path, starts: array[int], parse: Callable[[bytes], Row], columns: Columns, state: Any
    ) -> None:
        super().__init__(name, columns.rows, columns.present, columns.complete)
        self.file, self.starts, self.parse, self.state = file.absolute(), starts, parse, state

    def take(self, positions: Sequence[int]) -> list[Row]:
        """Open, read and close: no handle is kept that threads or worker processes could share by accident."""
        try:
            with self.file.open("rb") as stream:
                if _state(stream) != self.state:
                    raise DataError(f"{self.name} has changed since it was opened. Start again to read the new rows.")
                return [self.parse(self._bytes(stream, position)) for position in positions]
        except OSError as error:
            raise DataError(f"{self.name} can no longer be read: {error.strerror or error}.") from error

    def _bytes(self, stream: Any, position: int) -> bytes:
        start, end = self.starts[position], self.starts[position + 1]
        stream.seek(start)
        return stream.read(end - start)

    def where(self, position: int) -> str:
        """The row's position and its line in the file."""
        with self.file.open("rb") as stream:
            line = stream.read(self.starts[position]).count(b"\n") + 1
        return f"row {position} (line {line:,})"


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
        _check_start(name, stream.read(4096))
        stream.seek(0)
        first = next((line for line in stream if line.strip()), b"").removeprefix(_MARK).strip()
    if first.startswith(b"["):
        return _read_list(name, file)
    return _read_lines(name, file)


def _read_lines(name: str, file: Path) -> Rows:
    columns, faults = Columns(), Faults(name)
    starts = array("q")
    cut = False
    with file.open("rb") as stream:
        state = _state(stream)
        for number, start, line in _lines(stream):
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
        raise DataError(f"{name}: {_not_utf8(error)} Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        cut = "truncated: the list is never closed" if error.pos >= len(error.doc.rstrip()) else error.msg
        raise DataError(
            f"{name}: line {error.lineno:,}, column {error.colno:,}: {cut}. "
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
        raise _NotJsonError(_not_utf8(error)) from None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise _NotJsonError(f"{error.msg} at column {error.colno:,}: {_short(text)}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object; got {kind(row)}: {_short(text)}")
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


class _CsvRow:
    """Parses one record of a CSV file with a known header."""

    def __init__(self, header: list[str]) -> None:
        self.header = header

    def __call__(self, record: bytes) -> Row:
        with _long_fields():
            values = next(csv.reader(io.StringIO(record.decode(), newline="\n"), strict=True))
        return dict(zip(self.header, values, strict=True))


def read_csv(name: str, file: Path) -> Rows:
    """Rows of a CSV file with a header. Every value is text.

    Raises:
        DataError: see `guerdon.language.data.read_rows`.
    """
    with file.open("rb") as stream, _long_fields():
        _check_start(name, stream.read(4096))
        stream.seek(0)
        state = _state(stream)
        source = _CsvSource(stream)
        reader = csv.reader(source, strict=True)
        header = _header(name, reader)
        columns, faults = Columns(), Faults(name)
        starts = array("q")
        cut = False
        while True:
            start, number = source.end, source.number + 1
            try:
                values = next(reader)
            except StopIteration:
                break
            except UnicodeDecodeError as error:
                faults.add(f"line {source.number:,}", _not_utf8(error))
                continue
            except csv.Error as error:
                open_ended = "unexpected end of data" in str(error)
                cut = cut or open_ended
                faults.add(
                    f"line {number:,}", "truncated: a quote is opened and never closed" if open_ended else str(error)
                )
                continue
            if not values:
                continue
            row = dict(zip(header, values, strict=False))
            problem = prompt_fault(row.get("prompt"))
            if len(values) != len(header):
                problem = f"{len(values)} values for {len(header)} columns: {_short(','.join(values))}"
                if len(values) < len(header) and not source.ended:
                    cut = True
                    problem = f"truncated, the line has no end: {problem}"
            if problem is not None:
                faults.add(f"line {number:,}", problem)
                continue
            columns.add(row)
            starts.append(start)
        starts.append(source.end)
    faults.check(
        "The file looks truncated: copy or write it again."
        if cut
        else "Put values that hold a comma, a quote or a line break in double quotes; write a quote inside as two."
    )
    if not columns.rows:
        raise DataError(f"{name} has a header and no rows. Check how it was written.")
    return LineRows(name, file, starts, _CsvRow(header), columns, state)


class _CsvSource:
    """Lines for `csv.reader`, keeping count of how far it has read."""

    def __init__(self, stream: Any) -> None:
        self.lines = _lines(stream)
        self.end = 0
        self.number = 0
        self.ended = True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, start, line = next(self.lines)
        self.end, self.ended = start + len(line), line.endswith(b"\n")
        return line.decode()


def _header(name: str, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next((fields for fields in reader if fields), [])
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: line 1: {_not_utf8(error)} Save it as UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{name}: the header cannot be read: {error}.") from error
    if not header:
        raise DataError(f"{name} holds no header, only blank lines. Check how it was written.")
    twice = [field for position, field in enumerate(header) if field in header[:position]]
    if twice:
        raise DataError(f"{name}: the header names {listed(map(repr, twice))} twice. Give every column its own name.")
    if "" in header:
        raise DataError(f"{name}: column {header.index('') + 1} has no name. The first line must name every column.")
    return header


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Allow fields beyond the csv module's limit of 128 KiB, which a long prompt exceeds."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _lines(stream: Any) -> Iterator[tuple[int, int, bytes]]:
    """(line number, position, line) of every line; the mark of UTF-8 at the start is passed over."""
    start = len(_MARK) if stream.read(len(_MARK)) == _MARK else 0
    stream.seek(start)
    for number, line in enumerate(stream, 1):
        yield number, start, line
        start += len(line)


def _state(stream: Any) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _check_start(name: str, start: bytes) -> None:
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04", b"(\xb5/\xfd")):
        raise DataError(f"{name} is compressed. Decompress it first.")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:4]:
        raise DataError(f"{name} looks like UTF-16 and must be UTF-8. Save it as UTF-8.")
    if start.startswith(b"PAR1"):
        raise DataError(f"{name} is a parquet file. Give it the ending .parquet.")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at byte {error.start + 1:,})."


def _short(text: str, limit: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= limit else f"{text[:limit]}..."
