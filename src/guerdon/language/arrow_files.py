"""Readers for parquet files and for folders saved by `datasets`. Rows stay in Arrow memory until they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from guerdon.errors import DataError, nearest, require
from guerdon.language.rows import Columns, Faults, Row, Rows, listed, prompt_fault

_CHUNK = 10_000  # rows turned into Python objects at a time while a file is checked


class TableRows(Rows):
    """Rows of an Arrow table in memory."""

    def __init__(self, name: str, table: Any, columns: Columns) -> None:
        super().__init__(name, columns.rows, columns.present, columns.complete)
        self.table = table

    def take(self, positions: Sequence[int]) -> list[Row]:
        """One slice a row: rows far apart cost no more than neighbours."""
        return [self.table.slice(position, 1).to_pylist()[0] for position in positions]


class SavedRows(Rows):
    """Rows of a `datasets.Dataset`, which decodes its own column types."""

    def __init__(self, name: str, dataset: Any, columns: Columns) -> None:
        super().__init__(name, columns.rows, columns.present, columns.complete)
        self.dataset = dataset

    def take(self, positions: Sequence[int]) -> list[Row]:
        """Row by row."""
        return [dict(self.dataset[position]) for position in positions]


def read_parquet(name: str, file: Path) -> Rows:
    """Rows of a parquet file.

    Raises:
        DataError: see `guerdon.language.data.read_rows`.
    """
    require("pyarrow", "language")
    import pyarrow
    import pyarrow.parquet

    _check_footer(name, file)
    try:
        with pyarrow.parquet.ParquetFile(file) as source:
            names = source.schema_arrow.names
            twice = [column for position, column in enumerate(names) if column in names[:position]]
            if twice:
                raise DataError(
                    f"{name}: column {listed(map(repr, twice))} is there twice. Give every column its own name."
                )
            table = source.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} is damaged: {_first_line(error)}. Copy or write it again.") from error
    if not table.num_rows:
        raise DataError(f"{name} holds no rows. Check how it was written.")
    return TableRows(name, table, _check(name, table.column_names, table.num_rows, table.to_batches(_CHUNK)))


def read_saved(name: str, folder: Path, split: str | None) -> Rows:
    """Rows of a folder written by `datasets.Dataset.save_to_disk`, or of one split of a saved `DatasetDict`.

    Raises:
        DataError: see `guerdon.language.data.read_rows`.
    """
    datasets = require("datasets", "language")
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(folder))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{name} is damaged or incomplete: {_first_line(error)}. Copy or save it again.") from error
    if isinstance(saved, datasets.DatasetDict):
        splits = sorted(saved)
        if split is None:
            raise DataError(
                f"{name} holds several splits. Name one, such as {folder}:{splits[0]}. There are: {listed(splits)}."
            )
        if split not in saved:
            raise DataError(
                f"{name}: there is no split {split!r}.{nearest(split, splits)} There are: {listed(splits)}."
            )
        saved = saved[split]
    elif split is not None:
        raise DataError(f"{name}: {folder} holds one dataset without splits. Drop ':{split}'.")
    if not len(saved):
        raise DataError(f"{name} holds no rows. Check how it was saved.")
    tables = saved.with_format("arrow").iter(batch_size=_CHUNK)
    columns = _check(name, saved.column_names, len(saved), (batch for table in tables for batch in table.to_batches()))
    return SavedRows(name, saved.with_format(None), columns)


def _check(name: str, names: Sequence[str], size: int, batches: Iterable[Any]) -> Columns:
    """Count nulls a column and check prompts, a chunk at a time."""
    columns, faults = Columns(), Faults(name)
    columns.rows = size
    columns.present = dict.fromkeys(names, size)
    columns.complete = dict.fromkeys(names, size)
    start = 0
    for batch in batches:
        for column, values in zip(batch.schema.names, batch.columns, strict=True):
            if values.null_count:
                if columns.present[column] == columns.complete[column] == size:
                    columns.complete[column] = start + values.is_null().to_pylist().index(True)
                columns.present[column] -= values.null_count
            if column == "prompt":
                for position, prompt in enumerate(values.to_pylist(), start):
                    problem = prompt_fault(prompt)
                    if problem is not None:
                        faults.add(f"row {position}", problem)
        start += batch.num_rows
    faults.check("A prompt is text, or a list of messages with role and content.")
    return columns


def _check_footer(name: str, file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(max(file.stat().st_size - 4, 0))
        end = stream.read(4)
    if start != b"PAR1":
        raise DataError(
            f"{name} is not a parquet file: it does not start with PAR1. Check its ending and how it was written."
        )
    if end != b"PAR1" or file.stat().st_size < 12:
        raise DataError(f"{name} is truncated: the footer of the parquet file is not there. Copy or write it again.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
