"""CSV files, read by the standard library. Every value is text, and a record may go over several lines."""

from __future__ import annotations

import contextlib
import csv
import io
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guerdon.errors import DataError
from guerdon.language.rows import Columns, Faults, Row, Rows, listed, prompt_fault
from guerdon.language.text_files import LineRows, check_start, lines, not_utf8, short, state_of


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
        check_start(name, stream.read(4096))
        stream.seek(0)
        state = state_of(stream)
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
                faults.add(f"line {source.number:,}", not_utf8(error))
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
                problem = f"{len(values)} values for {len(header)} columns: {short(','.join(values))}"
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
        self.lines = lines(stream)
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
        raise DataError(f"{name}: line 1: {not_utf8(error)} Save it as UTF-8.") from error
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
