"""Checking values that people wrote (recipes, options) against Python annotations, with errors that name the place.

One function, `convert`, covers what a recipe and a stage's options use: the plain types, `Literal`, unions, lists,
tuples, mappings, and dataclasses whose fields all have defaults. Nothing here imports torch.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from guerdon.errors import RecipeError, nearest

_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
}
_LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The evaluated annotations of a dataclass."""
    return typing.get_type_hints(kind)


def describe(wanted: Any) -> str:
    """An annotation in words, such as `a number or null`."""
    origin, args = get_origin(wanted), get_args(wanted)
    if wanted in _PLAIN:
        return _PLAIN[wanted]
    if wanted is None:
        return "null"
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(arg) for arg in args)
    if origin in (Union, types.UnionType):
        tags = _kinds(args)
        return f"a mapping with kind: {', '.join(tags)}" if tags else " or ".join(describe(arg) for arg in args)
    if origin is tuple and args[-1:] != (Ellipsis,):
        return f"a list of {len(args)} ({', '.join(describe(arg) for arg in args)})"
    if origin in (*_LISTS, tuple):
        return f"a list, each {describe(args[0])}"
    if origin in _MAPS:
        return f"a mapping, each value {describe(args[1])}"
    if dataclasses.is_dataclass(wanted):
        return f"a mapping with {', '.join(f.name for f in dataclasses.fields(wanted))}"
    if wanted in (*_LISTS, tuple):
        return "a list"
    return "a mapping" if wanted in _MAPS else str(getattr(wanted, "__name__", wanted))


def convert(value: Any, wanted: Any, path: str) -> Any:
    """Check a value against an annotation, and bring it to that type where nothing is lost.

    A whole number is accepted for a `float`, a float without fraction (1e3) for an `int`, a list for a tuple. An
    annotation that says nothing checkable (a tensor, a callable) accepts every value.

    Args:
        value: what was given.
        wanted: the annotation, evaluated.
        path: dotted place of the value; it opens the error.

    Returns:
        The value, or a new one of the wanted type.

    Raises:
        RecipeError: naming the path, what was given, what is allowed and the nearest names.

    Example:
        >>> convert(3, float, "optim.lr"), convert([1, 2], tuple[float, float], "optim.betas")
        (3.0, (1.0, 2.0))
        >>> convert("gruop", Literal["group", "batch"], "scale")
        Traceback (most recent call last):
        guerdon.errors.RecipeError: scale: must be one of 'group', 'batch'; got 'gruop'. Did you mean 'group'?
    """
    origin, args = get_origin(wanted), get_args(wanted)
    if wanted in _PLAIN or wanted is None:
        return _plain(value, wanted, path)
    if origin is Literal:
        for arg in args:
            if value == arg and type(value) is type(arg):
                return value
        raise _wrong(value, wanted, path, nearest(str(value), map(str, args)))
    if origin in (Union, types.UnionType):
        return _union(value, wanted, args, path)
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return _dataclass(value, wanted, path)
    if origin is tuple and args[-1:] != (Ellipsis,):
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise _wrong(value, wanted, path)
        pairs = zip(value, args, strict=True)
        return tuple(convert(entry, arg, f"{path}[{i}]") for i, (entry, arg) in enumerate(pairs))
    if origin in (*_LISTS, tuple) or wanted in (*_LISTS, tuple):
        if not isinstance(value, (list, tuple)):
            raise _wrong(value, wanted, path)
        entries = [convert(entry, args[0] if args else Any, f"{path}[{i}]") for i, entry in enumerate(value)]
        return tuple(entries) if tuple in (origin, wanted) else entries
    if origin in _MAPS or wanted in _MAPS:
        if not isinstance(value, Mapping):
            raise _wrong(value, wanted, path)
        key_type, value_type = args or (Any, Any)
        return {convert(k, key_type, path): convert(v, value_type, f"{path}.{k}") for k, v in value.items()}
    return value


def _plain(value: Any, wanted: Any, path: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is float and number and not math.isnan(value):
        return float(value)
    if wanted is int and number and math.isfinite(value) and value == int(value):
        return int(value)
    if wanted is Path and isinstance(value, (str, Path)):
        return Path(value)
    if (wanted is bool and isinstance(value, bool)) or (wanted is str and isinstance(value, str)):
        return value
    if wanted in (None, type(None)) and value is None:
        return None
    raise _wrong(value, wanted, path, f" Quote it if text is meant: \"'{value}'\"." if wanted is str and number else "")


def _union(value: Any, wanted: Any, args: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in args:
        return None
    if kinds := _kinds(args):
        return _tagged(value, kinds, wanted, path)
    real = [arg for arg in args if arg is not type(None)]
    if (
        len(real) == 1
        and (dataclasses.is_dataclass(real[0]) or get_origin(real[0]) is not None)
        and _fits(value, real[0])
    ):
        return convert(value, real[0], path)  # so that the error names the inner setting
    for exact in (True, False):  # 1 stays an int for `float | int`
        for arg in real:
            if exact and not (isinstance(arg, type) and type(value) is arg):
                continue
            try:
                return convert(value, arg, path)
            except RecipeError:
                continue
    raise _wrong(value, wanted, path)


def _kinds(args: tuple[Any, ...]) -> dict[str, Any]:
    """For a union of dataclasses that a field `kind` tells apart: kind -> dataclass; empty for other unions."""
    if not all(dataclasses.is_dataclass(arg) and get_origin(hints(arg).get("kind")) is Literal for arg in args):
        return {}
    return {get_args(hints(arg)["kind"])[0]: arg for arg in args}


def _tagged(value: Any, kinds: dict[str, Any], wanted: Any, path: str) -> Any:
    """A dataclass of the kind that the value names; the first where it names none."""
    if isinstance(value, tuple(kinds.values())):
        return value
    if not isinstance(value, Mapping):
        raise _wrong(value, wanted, path)
    kind = value.get("kind", next(iter(kinds)))
    if kind not in kinds:
        raise RecipeError(
            f"{path}.kind: must be one of {', '.join(map(repr, kinds))}; got {kind!r:.60}.{nearest(str(kind), kinds)}"
        )
    own = {field.name for field in dataclasses.fields(kinds[kind])}
    for key in value:
        others = [name for name, other in kinds.items() if key in {field.name for field in dataclasses.fields(other)}]
        if key not in own and others:
            raise RecipeError(
                f"{path}.{key}: this is a setting of kind {' and '.join(map(repr, others))}; the {path} here is of kind "
                f"{kind!r}{'' if 'kind' in value else ' (the default)'}. Settings of that kind: "
                f"{', '.join(field.name for field in dataclasses.fields(kinds[kind]))}."
            )
    return _dataclass(value, kinds[kind], path)


def _fits(value: Any, wanted: Any) -> bool:
    if dataclasses.is_dataclass(wanted) or get_origin(wanted) in _MAPS:
        return isinstance(value, Mapping)
    return isinstance(value, (list, tuple)) and get_origin(wanted) in (*_LISTS, tuple)


def _dataclass(value: Any, kind: Any, path: str, base: Any = None) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise _wrong(value, kind, path)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise unknown_key(str(key), value[key], kind, path)
    converted = {}
    for key, given in value.items():
        here = f"{path}.{key}" if path else key
        wanted = hints(kind)[key]
        factory = fields[key].default_factory
        if dataclasses.is_dataclass(wanted) and factory is not dataclasses.MISSING:
            # a section's defaults are those of the field that holds it, which may differ from those of its type
            converted[key] = _dataclass(given, wanted, here, factory())
        else:
            converted[key] = convert(given, wanted, here)
        _in_range(converted[key], fields[key].metadata, here)
    return kind(**converted) if base is None else dataclasses.replace(base, **converted)


def _in_range(value: Any, limits: Mapping[str, Any], path: str) -> None:
    for part in limits.get("contains", ()):
        if part not in value:
            raise RecipeError(f"{path}: must contain {part}; got {value!r:.80}.")
    low, high, above = limits.get("at_least"), limits.get("at_most"), limits.get("above")
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, (int, float)):
            continue
        if low is not None and number < low:
            raise RecipeError(f"{path}: must be at least {low}; got {number!r}.")
        if high is not None and number > high:
            raise RecipeError(f"{path}: must be at most {high}; got {number!r}.")
        if above is not None and number <= above:
            raise RecipeError(f"{path}: must be greater than {above}; got {number!r}.")


def dotted(kind: Any, prefix: str = "", base: Any = None) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every setting of a dataclass and of the dataclasses in it, as (dotted path, field, default).

    Where a field `kind` chooses between several, a setting that they share comes once.
    """
    base = base if isinstance(base, kind) else kind()
    seen: set[str] = set()
    for field in dataclasses.fields(kind):
        default = getattr(base, field.name)
        yield f"{prefix}{field.name}", field, default
        wanted = hints(kind)[field.name]
        for inner in (wanted, *get_args(wanted)):
            if dataclasses.is_dataclass(inner):
                for found in dotted(inner, f"{prefix}{field.name}.", default):
                    if found[0] not in seen:
                        seen.add(found[0])
                        yield found


def unknown_key(key: str, given: Any, kind: Any, path: str) -> RecipeError:
    """The error for a key that a dataclass does not have, with the nearest names there or elsewhere below it."""
    names = [field.name for field in dataclasses.fields(kind)]
    hint = nearest(key, names)
    if not hint:
        places = [place for place, *_ in dotted(kind) if place.rsplit(".", 1)[-1] == key]
        hint = f" Did you mean {' or '.join(repr(place) for place in places)}?" if places else ""
    where = f"{path}.{key}" if path else key
    return RecipeError(
        f"{where}: there is no such setting (given: {given!r:.60}).{hint} "
        f"{f'Settings of {path}' if path else 'Settings'}: {', '.join(names)}."
    )


def _wrong(value: Any, wanted: Any, path: str, hint: str = "") -> RecipeError:
    return RecipeError(f"{path or 'recipe'}: must be {describe(wanted)}; got {value!r:.80}.{hint}")
