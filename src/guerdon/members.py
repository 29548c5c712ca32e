"""What the stage packages offer, read from their tables and sources: nothing is imported but the tables."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import importlib.util
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("sampling", "rewards", "shaping", "weighting", "advantages", "objectives", "optim")


@dataclass(frozen=True)
class Option:
    """An option of a member: its annotation (evaluated; `Any` if it could not be), and its default as source text."""

    kind: Any
    annotation: str
    default: str | None


@dataclass(frozen=True)
class Facts:
    """What the source of a member says about it.

    Attributes:
        fields: names of its positional parameters, which the pipeline fills.
        options: name -> option; None where the source does not tell (the check is then left to `build`).
        summary: first line of the docstring.
    """

    fields: tuple[str, ...]
    options: Mapping[str, Option] | None
    summary: str


def members(stage: str) -> Mapping[str, str]:
    """The table of a stage: exported name -> module; empty for a stage that has no package yet."""
    if importlib.util.find_spec(f"guerdon.{stage}") is None:
        return {}
    return importlib.import_module(f"guerdon.{stage}").MEMBERS


@functools.cache
def facts(stage: str, name: str) -> Facts:
    """Read a member's fields, options and summary from its source, without importing it."""
    spec = importlib.util.find_spec(f"guerdon.{stage}")
    if spec is None or not spec.submodule_search_locations:
        return Facts((), None, "")
    relative = members(stage)[name].replace(".", "/")
    base = Path(spec.submodule_search_locations[0], relative)
    source = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    definition = _definition(tree, name)
    if definition is None:
        return Facts((), None, "")
    summary = (ast.get_docstring(definition) or "").split("\n")[0]
    if not isinstance(definition, ast.ClassDef):
        arguments = definition.args
        positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        return Facts(tuple(positional), _options(tree, arguments), summary)
    forward = _method(tree, definition, "forward") or _method(tree, definition, "__call__")
    fields = tuple(a.arg for a in forward.args.args[1:]) if forward else ()
    constructor = _method(tree, definition, "__init__")
    return Facts(fields, _options(tree, constructor.args) if constructor else None, summary)


def _definition(tree: ast.Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | None:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and _target(node) == name:
            return _definition(tree, node.value.id)  # running_scale = RunningScale
    return None


def _target(node: ast.Assign) -> str | None:
    return node.targets[0].id if isinstance(node.targets[0], ast.Name) else None


def _method(tree: ast.Module, owner: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    for base in owner.bases:
        parent = _definition(tree, base.id) if isinstance(base, ast.Name) else None
        found = _method(tree, parent, name) if isinstance(parent, ast.ClassDef) else None
        if found:
            return found
    return None


def _options(tree: ast.Module, arguments: ast.arguments) -> dict[str, Option]:
    return {
        argument.arg: Option(
            _evaluate(tree, argument.annotation),
            ast.unparse(argument.annotation) if argument.annotation else "Any",
            None if default is None else ast.unparse(default),
        )
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    }


def _evaluate(tree: ast.Module, annotation: ast.expr | None) -> Any:
    """The type an annotation names, if plain types and `typing` are enough to tell; else `Any`."""
    if annotation is None:
        return Any
    known = {**vars(builtins), **vars(typing), "Path": Path}
    for node in tree.body:  # `Scale = Literal["group", "batch"]` at the top of the module
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Subscript)
            and isinstance(node.targets[0], ast.Name)
        ):
            known[node.targets[0].id] = _value(node.value, known)
    return _value(annotation, known)


def _value(expression: ast.expr, known: dict[str, Any]) -> Any:
    """The type that an annotation's expression stands for: names, `a | b`, `a[b, c]` and plain values; else `Any`."""
    try:
        return _walk(expression, known)
    except (KeyError, AttributeError, TypeError):  # a tensor or a module's own type: left to the real signature
        return Any


def _walk(node: ast.expr, known: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _walk(node.left, known) | _walk(node.right, known)
    if isinstance(node, ast.Subscript):
        return _walk(node.value, known)[_walk(node.slice, known)]
    if isinstance(node, (ast.Tuple, ast.List)):
        parts = [_walk(part, known) for part in node.elts]
        return tuple(parts) if isinstance(node, ast.Tuple) else parts
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_walk(node.operand, known)
    raise TypeError(f"not a plain annotation: {ast.unparse(node)}")
