"""Data files: rows of JSON lines, JSON, CSV, parquet or a saved `datasets` folder, with errors that name the line.

A JSONL or CSV file is parsed once from end to end, which checks every row, and only the place of each row is kept (8
bytes a row); a row that is asked for is read from the file again. Parquet and saved folders stay in Arrow memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from guerdon.errors import DataError, nearest
from guerdon.language.rows import Rows, listed

__all__ = ["Rows", "read_rows", "require_columns"]

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(path: str | Path) -> Rows:
    """Open a data file as a sequence of rows.

    The whole file is checked when it is opened, so that a bad row shows before training and not in the middle of it.

    Args:
        path: a `.jsonl` file (an object a line), `.json` (the same, or one list of objects), `.csv` (a header, then
            rows; every value is text), `.parquet`, or a folder saved by `datasets.Dataset.save_to_disk`. A folder that
            holds several splits is written `folder:split`.

    Returns:
        Rows with random access; `rows.columns` names the columns. A row is a new dict each time.

    Raises:
        DataError: the file is missing, empty, truncated, not UTF-8, or has malformed rows: the first five are named
            with their lines, and all are counted. A `prompt` must be text or a list of messages with `role` and
            `content`.

    Edge cases:
        Blank lines are skipped. A JSON list is held in memory whole: write large data as JSONL. If the file changes
        after it was opened, the next row asked for raises DataError.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name) / "train.jsonl"
        >>> _ = file.write_text('{"prompt": "1+1=", "answer": "2"}' + chr(10))
        >>> read_rows(file)[0]["answer"]
        '2'
        >>> folder.cleanup()
    """
    name, file = str(path), Path(path)
    split = None
    if not file.exists() and ":" in name:
        before, _, after = name.rpartition(":")
        if Path(before).exists():
            file, split = Path(before), after
    try:
        if file.is_dir():
            return _read_folder(name, file, split)
        if not file.exists():
            raise DataError(_missing(name, file))
        if split is not None:
            raise DataError(f"{name}: {file} is a file, and only a saved datasets folder has splits. Drop ':{split}'.")
        if not file.is_file():
            raise DataError(f"{name} is not a regular file. Copy the data to a file first: rows are read by position.")
        return _read_file(name, file)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}.") from error


def require_columns(rows: Rows, names: Iterable[str]) -> None:
    """Check that every row has these columns, with values that are not null.

    Args:
        rows: what `read_rows` gave.
        names: the columns needed.

    Raises:
        DataError: naming the column, the first row that lacks it, how many do, the columns there are and the nearest
            name.
    """
    for name in names:
        count = rows.present.get(name, 0)
        if count == len(rows):
            continue
        there = f"There are: {listed(rows.columns)}."
        if name not in rows.present:
            raise DataError(f"{rows.name}: there is no column {name!r}.{nearest(name, rows.columns)} {there}")
        first = rows.complete[name]
        own = [column for column, value in rows[first].items() if value is not None]
        raise DataError(
            f"{rows.name}: {len(rows) - count:,} of {len(rows):,} rows lack the column {name!r} or have null there; "
            f"the first is {rows.where(first)}, which has {listed(own)}.{nearest(name, set(own) - {name})} "
            "Give every row a value, or remove the rows without one."
        )


def _read_file(name: str, file: Path) -> Rows:
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        squeezed = " Decompress it first." if ending in (".gz", ".zst", ".bz2", ".xz", ".zip") else ""
        raise DataError(f"{name}: the ending {ending!r} is not known.{squeezed} Known are: {', '.join(ENDINGS)}.")
    if file.stat().st_size == 0:
        raise DataError(f"{name} is empty (0 bytes). Check how it was written.")
    if ending == ".parquet":
        from guerdon.language.arrow_files import read_parquet

        return read_parquet(name, file)
    if ending == ".csv":
        from guerdon.language.csv_files import read_csv

        return read_csv(name, file)
    from guerdon.language.json_files import read_json

    return read_json(name, file)


def _read_folder(name: str, folder: Path, split: str | None) -> Rows:
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        from guerdon.language.arrow_files import read_saved

        return read_saved(name, folder, split)
    files = sorted(str(f) for f in folder.iterdir() if f.suffix.lower() in ENDINGS)
    inside = f"Name one of its files: {listed(files, 5)}." if files else "There is no data file in it."
    raise DataError(f"{name} is a directory, and not one saved by datasets.Dataset.save_to_disk. {inside}")


def _missing(name: str, file: Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return f"{name}: there is no such file, nor the folder {folder.absolute()}."
    close = nearest(file.name, (f.name for f in folder.iterdir()))
    return f"{name}: there is no such file in {folder.absolute()}.{close}"
