"""Components of a recipe: names of stage members, with options.

`normalise` checks a component without importing torch: its name against the stage package's table, its options against
the member's source. `build` imports the member and binds the options, checked against the real signature.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from guerdon.errors import RecipeError, UnknownNameError, nearest
from guerdon.members import facts, members
from guerdon.typed import convert

Component = str | dict[str, dict[str, Any]]


def normalise(stage: str, spec: Any, path: str) -> Component:
    """Bring a component to `name` or `{name: {option: value}}`, and check names and options without importing it.

    Args:
        stage: the package it comes from, such as `advantages`.
        spec: `name`, `{name: {option: value}}`, or `module:attribute` in place of a name.
        path: dotted place in the recipe; it opens the error.

    Raises:
        UnknownNameError: the stage has no such member.
        RecipeError: an option does not exist, is missing or has a wrong type.

    Example:
        >>> normalise("rewards", {"exact_answer": None}, "rewards.correct")
        'exact_answer'
    """
    if isinstance(spec, str):
        name, options = spec, {}
    elif isinstance(spec, Mapping) and len(spec) == 1:
        name, options = next(iter(spec.items()))
        options = {} if options is None else options
    else:
        raise RecipeError(
            f"{path}: must be a name, or one name with its options {{name: {{option: value}}}}; got {spec!r:.80}."
        )
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise RecipeError(f"{path}.{name}: the options must be a mapping {{option: value}}; got {options!r:.80}.")
    if ":" in name:
        return {name: dict(options)} if options else name
    table = members(stage)
    if name not in table:
        raise UnknownNameError(
            f"{path}: {stage} has nothing called {name!r}.{nearest(name, table)} "
            f"There are: {', '.join(sorted(table)) or 'none yet'}. Your own is named module:attribute."
        )
    known = facts(stage, name)
    if known.options is None:
        return {name: dict(options)} if options else name
    kinds = {option: (details.kind, details.default is None) for option, details in known.options.items()}
    options = _checked(options, kinds, known.fields, f"{path}.{name}")
    return {name: options} if options else name


def _checked(
    options: Mapping[str, Any], kinds: Mapping[str, tuple[Any, bool]], fields: tuple[str, ...], path: str
) -> dict[str, Any]:
    """Options converted to the types of `kinds` (name -> (annotation, required))."""
    for option, value in options.items():
        if option in kinds:
            continue
        if option in fields:
            raise RecipeError(f"{path}.{option}: this is a field that the pipeline fills, not an option.")
        there = f"Options: {', '.join(kinds)}." if kinds else "It has no options."
        raise RecipeError(
            f"{path}.{option}: there is no such option (given: {value!r:.60}).{nearest(option, kinds)} {there}"
        )
    missing = [option for option, (_, required) in kinds.items() if required and option not in options]
    if missing:
        raise RecipeError(f"{path}: the option{'s' if len(missing) > 1 else ''} {', '.join(missing)} must be given.")
    return {option: convert(value, kinds[option][0], f"{path}.{option}") for option, value in options.items()}


def build(stage: str, spec: Component, path: str | None = None) -> Callable[..., Any]:
    """Import a component and bind its options.

    Args:
        stage: the package it comes from, such as `advantages`.
        spec: as in the recipe.
        path: dotted place in the recipe, for errors; by default the stage.

    Returns:
        The function (with options bound by `functools.partial`), or an instance of the class.

    Raises:
        UnknownNameError: there is no such member, module or attribute.
        RecipeError: an option does not exist, is missing or has a wrong type.

    Example:
        >>> build("rewards", {"exact_answer": {"ignore_case": True}})([["Ab", "c"]], ["ab"])
        [[(1.0, 'ab'), (0.0, 'c')]]
    """
    path = path or stage
    spec = normalise(stage, spec, path)
    name, options = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()))
    users = ":" in name
    member: Any = imported(name, path) if users else getattr(importlib.import_module(f"guerdon.{stage}"), name)
    if not callable(member):
        raise RecipeError(f"{path}: {name} is a {type(member).__name__}, which cannot be called.")
    path = f"{path}.{name}"
    is_class = inspect.isclass(member)
    if not (is_class or isinstance(member, (types.FunctionType, functools.partial)) or inspect.isroutine(member)):
        if options:
            raise RecipeError(f"{path}: it is already an object, so it takes no options; got {', '.join(options)}.")
        return member
    kinds, fields, anything = _signature(member, is_class)
    if not anything:
        options = _checked(options, kinds, fields, path)
    if is_class:
        instance: Any = member(**options)
        return instance
    return functools.partial(member, **options) if options else member


def _signature(member: Callable[..., Any], is_class: bool) -> tuple[dict[str, tuple[Any, bool]], tuple[str, ...], bool]:
    """Options (name -> (annotation, required)), fields, and whether a constructor takes any option."""
    try:
        parameters = inspect.signature(member).parameters.values()
    except ValueError:  # a builtin without a signature has no options to check
        return {}, (), True
    target: Any = inspect.unwrap(member.__init__ if is_class else member)
    try:
        hints = typing.get_type_hints(target)
    except (NameError, TypeError, AttributeError):  # an annotation that cannot be evaluated is not checked
        hints = {}
    named = (inspect.Parameter.KEYWORD_ONLY, *((inspect.Parameter.POSITIONAL_OR_KEYWORD,) if is_class else ()))
    kinds = {
        p.name: (hints.get(p.name, Any), p.default is inspect.Parameter.empty) for p in parameters if p.kind in named
    }
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    fields = tuple(p.name for p in parameters if p.name not in kinds and p.kind not in variable)
    return kinds, fields, is_class and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def imported(name: str, path: str) -> Any:
    """What `module:attribute` names.

    Args:
        name: as in a recipe.
        path: opens the errors.

    Raises:
        RecipeError: the name has another form.
        UnknownNameError: there is no such module or attribute.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise RecipeError(f"{path}: your own component is named module:attribute; got {name!r}.")
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UnknownNameError(
            f"{path}: the module {error.name!r} of {name!r} cannot be found. "
            "Run from the folder that holds it, or install it."
        ) from None
    for part in attribute.split("."):
        if not hasattr(value, part):
            there = [known for known in dir(value) if not known.startswith("_")]
            raise UnknownNameError(f"{path}: {module_name} has no {attribute!r}.{nearest(part, there)}")
        value = getattr(value, part)
    return value
