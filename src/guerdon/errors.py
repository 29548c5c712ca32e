"""The errors guerdon raises, and the checks that raise them.

Every error says what is wrong, where, and what to do. Each kind is also one of Python's own, so a caller can catch what
they expect. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any


class GuerdonError(Exception):
    """Base of every error that guerdon raises on purpose."""


class RecipeError(GuerdonError, ValueError):
    """A recipe has an unknown key, a wrong type or settings that contradict each other."""


class UnknownNameError(RecipeError, LookupError):
    """A name (of a method, a recipe, a task) is not known."""


class ShapeError(GuerdonError, ValueError):
    """A tensor does not have the shape its name promises."""


class BindingError(GuerdonError, TypeError):
    """A stage asks for a field that nothing on the road before it provides."""


class DataError(GuerdonError, ValueError):
    """A data file is missing, malformed or lacks a column."""


class ScoreError(GuerdonError, ValueError):
    """A reward raised, or returned something that is not a score."""


class CheckpointError(GuerdonError, RuntimeError):
    """A checkpoint could not be written, or cannot be read back."""


class NumericsError(GuerdonError, ArithmeticError):
    """A loss or gradient is not finite."""


class MissingExtraError(GuerdonError, ImportError):
    """An optional package is needed and not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the known names closest to `name`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of guerdon installs it.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(f"{module} is not installed. Install it with: pip install 'guerdon[{extra}]'") from None


def check_shapes(where: str, **named: tuple[Any, str]) -> dict[str, int]:
    """Check tensors against shapes written as letters, the same letter being the same size everywhere.

    Args:
        where: the place that asks, such as `advantages.copo`; it opens the error.
        **named: argument name -> (tensor, letters), such as `mask=(mask, "P G T")`. A number stands for itself and
            `...` for any leading dimensions.

    Returns:
        The size found for each letter.

    Raises:
        ShapeError: naming the argument, its letters, the size found and the likely cause.
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    for name, (tensor, letters) in named.items():
        wanted = letters.split()
        found = list(tensor.shape)
        shown = f"[{', '.join(wanted)}]"
        open_ended = wanted[:1] == ["..."]
        if open_ended:
            wanted = wanted[1:]
            found = found[max(len(found) - len(wanted), 0) :]
        if len(wanted) != len(found):
            raise ShapeError(f"{where}: {name} must be {shown}; got {list(tensor.shape)}.{_cause(wanted, found)}")
        for letter, size in zip(wanted, found, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            origin.setdefault(letter, name)
            if size != expected:
                because = "" if letter.isdigit() else f" where {origin[letter]} has {letter} = {expected}"
                raise ShapeError(
                    f"{where}: {name} must be {shown} with {letter} = {expected}; got {list(tensor.shape)}{because}."
                )
    return sizes


def _cause(wanted: list[str], found: list[int]) -> str:
    if wanted[:2] == ["P", "G"] and len(found) == len(wanted) - 1:
        return " The samples look flat: reshape them to whole groups, rewards.reshape(P, G)."
    if wanted == ["P", "G"] and len(found) == 3:
        return " A value per step was given where one per sample is needed: sum it over the live steps."
    return ""


def missing_names(needed: Iterable[str], there: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """The names of `needed` that are not in `there`, in order."""
    available = set(there)
    return [name for name in needed if name not in available]
