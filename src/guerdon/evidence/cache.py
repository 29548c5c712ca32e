"""Where results are kept, so that a killed test goes on where it stopped. Nothing here imports torch."""

from __future__ import annotations

import ast
import inspect
import json
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from guerdon import __version__
from guerdon.cache import cache_folder, replace
from guerdon.evidence.base import Result, Unit, plain

__all__ = ["cache_folder", "context", "read", "replace", "result_of", "write"]

_MACHINERY = {"base", "cache", "pages", "plot", "runner", "table", "workers"}


def context(module: ModuleType) -> str:
    """Stands for the code behind a result: the module's source, that of the harness it imports, and the version.

    Changes elsewhere in the library are not seen; they call for `--fresh`.
    """
    source = inspect.getsource(module)
    digest = blake2b(f"{__version__}\n{source}".encode(), digest_size=16)
    for name in sorted(_imports(source) - _MACHINERY):
        path = Path(__file__).with_name(f"{name}.py")
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _imports(source: str) -> set[str]:
    """Names of the modules of this package that a source imports, at the top or within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "guerdon.evidence":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("guerdon.evidence."):
            found.add((node.module or "").split(".")[2])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[2] for a in node.names if a.name.startswith("guerdon.evidence.")}
    return found


def read(folder: Path, unit: Unit, code: str) -> Result | None:
    """The kept result of a unit; None if there is none, or if the file is damaged."""
    try:
        record = json.loads((folder / f"{unit.key(code)}.json").read_text(encoding="utf-8"))
        return result_of(unit, record, record["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # measured again


def write(folder: Path, result: Result, code: str) -> None:
    """Keep a result, in one move."""
    unit = result.unit
    record = {"unit": vars(unit), "figures": result.figures, "curves": result.curves, "seconds": result.seconds}
    replace(folder / f"{unit.key(code)}.json", json.dumps(plain(record), allow_nan=False).encode())


def result_of(unit: Unit, measured: dict, seconds: float) -> Result:
    """A result from plain records, where None stands for a number that is not finite.

    Raises:
        TypeError: something in it is no number.
    """
    figures = {str(name): _number(value) for name, value in measured["figures"].items()}
    curves = {
        str(name): [(_number(x), _number(y)) for x, y in points] for name, points in measured.get("curves", {}).items()
    }
    return Result(unit, figures, curves, float(seconds))


def _number(value: Any) -> float:
    if value is None:
        return float("nan")
    if isinstance(value, str):
        raise TypeError(f"{value!r} is text, not a number")
    return float(value)
