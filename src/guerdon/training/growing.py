"""A file of lines that grows batch by batch, beside a record of how far it has got: what was stopped goes on where it was.

While it is written the file has .part after its name; beside it, with .json after it, stands the record, which vouches for
so many bytes. What was written beyond them when a process died is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guerdon import cache
from guerdon.errors import DataError, RecipeError

_FORMAT = 1


class GrowingFile:
    """A file and its record.

    Args:
        out: the file when it is whole.
        settings: what its lines depend on; a record of other settings is not gone on with.
        items: how much there is to do.
        unit: what the items are called in the record.
        counts: names of what is counted.

    Raises:
        RecipeError: the file is there without a record, or was begun with other settings.
        DataError: it is not what was written before.

    Attributes:
        done: how many items are done.
        counts: name -> number.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], items: int, *, unit: str, counts: Sequence[str]) -> None:
        self.out, self.part = out, out.with_name(f"{out.name}.part")
        self.record = out.with_name(f"{out.name}.json")
        self.settings = json.loads(json.dumps(settings, default=str))
        self.items, self.unit, self.done, self.size = items, unit, 0, 0
        self.counts: dict[str, int] = dict.fromkeys(counts, 0)
        if self.record.exists():
            self._read()
        elif out.exists() or self.part.exists():
            there = out if out.exists() else self.part
            raise RecipeError(
                f"annotate: {there} is there already, without a record of its making. Choose another --out."
            )

    def kept(self) -> dict[str, Any]:
        """What else stands in the record; nothing by default."""
        return {}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take back what `kept` gave."""

    def _read(self) -> None:
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            before = record["settings"]
            done, size, counts = int(record["done"]), int(record["bytes"]), dict(record["counts"])
            known = record["format"] == _FORMAT
            self.restore(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"annotate: {self.record} is no record of an annotation: {error}. Choose another --out."
            ) from error
        old, new = _flat(before), _flat(self.settings)
        changed = [name for name in old | new if name not in old or name not in new or old[name] != new[name]]
        if changed or not known:
            name = (changed or ["format"])[0]
            was, now = (f"{found[name]!r:.80}" if name in found else "not given" for found in (old, new))
            more = f" ({len(changed) - 1} more differ)" if len(changed) > 1 else ""
            raise RecipeError(
                f"annotate: {self.out} was begun with other settings: {name} was {was} and is {now} now{more}. Give the "
                "settings of then to go on, or choose another --out."
            )
        file = self.part if self.part.exists() else self.out
        if not file.exists() or file.stat().st_size < size:
            raise DataError(
                f"annotate: {file} is not what was written before. Remove {self.record} and it, and start again."
            )
        self.done, self.size, self.counts = done, size, counts

    @property
    def finished(self) -> bool:
        """Whether the file is whole."""
        return self.done == self.items and not self.part.exists()

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """The file, cut to what its record vouches for; whole at the end under its own name."""
        if self.done == self.items and self.out.exists():
            yield None
            return
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with self.part.open("ab") as file:
            _alone(file, self.part)
            file.truncate(self.size)
            yield file
        os.replace(self.part, self.out)

    def tell(self, counts: Mapping[str, int]) -> None:
        """Add to the counts."""
        for name, value in counts.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def add(self, file: Any, lines: Sequence[bytes], items: int) -> None:
        """Write the lines of so many items, and then the record that vouches for them."""
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())
        self.size, self.done = self.size + sum(map(len, lines)), self.done + items
        record = {
            "format": _FORMAT,
            "settings": self.settings,
            self.unit: self.items,
            "done": self.done,
            "bytes": self.size,
            "counts": self.counts,
            **self.kept(),
        }
        cache.replace(self.record, json.dumps(record, indent=1).encode() + b"\n")


def line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half of a character that takes two, which JSON can say in letters
        return json.dumps(row, default=str).encode() + b"\n"


def _flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Settings by dotted path."""
    if not isinstance(settings, Mapping):
        return {path: settings}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{path}.{name}" if path else str(name))
    return found


def _alone(file: Any, path: Path) -> None:
    """Hold the file for this process, where the system can."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RecipeError(
            f"annotate: another process is writing {path}. Wait for it, or choose another --out."
        ) from None
