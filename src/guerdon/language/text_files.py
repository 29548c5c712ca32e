"""What the readers of text files share: rows found by their place in the file, and checks of its bytes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from guerdon.errors import DataError
from guerdon.language.rows import Columns, Row, Rows

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
                if state_of(stream) != self.state:
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


def lines(stream: Any) -> Iterator[tuple[int, int, bytes]]:
    """(line number, position, line) of every line; the mark of UTF-8 at the start is passed over."""
    start = len(_MARK) if stream.read(len(_MARK)) == _MARK else 0
    stream.seek(start)
    for number, line in enumerate(stream, 1):
        yield number, start, line
        start += len(line)


def state_of(stream: Any) -> tuple[int, int]:
    """What shows that a file has changed: its size and the time of the last write."""
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def check_start(name: str, start: bytes) -> None:
    """Tell files that are no UTF-8 text by their first bytes.

    Raises:
        DataError: naming what the file seems to be.
    """
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04", b"(\xb5/\xfd")):
        raise DataError(f"{name} is compressed. Decompress it first.")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:4]:
        raise DataError(f"{name} looks like UTF-16 and must be UTF-8. Save it as UTF-8.")
    if start.startswith(b"PAR1"):
        raise DataError(f"{name} is a parquet file. Give it the ending .parquet.")


def not_utf8(error: UnicodeDecodeError) -> str:
    """The byte that is not UTF-8, in words."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at byte {error.start + 1:,})."


def short(text: str, limit: int = 60) -> str:
    """The start of a text, for an error."""
    text = text.strip()
    return text if len(text) <= limit else f"{text[:limit]}..."
