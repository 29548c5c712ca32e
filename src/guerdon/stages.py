"""How a stage of the road is named, found and called.

A stage is a plain function of tensors. Its positional parameters are names of fields (of the rollout, of its data
columns, of what earlier stages produced); the pipeline hands those fields over by name. Its keyword-only parameters are
options. A stage with state is an `nn.Module` whose `forward` follows the same rule. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from guerdon.errors import BindingError, nearest


class _StagePackage(types.ModuleType):
    """A package whose exported members win over its submodules of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system binds a submodule to its package; `advantages.copo` must stay the function
        if isinstance(value, types.ModuleType) and name in self.__dict__.get("MEMBERS", ()):
            return
        super().__setattr__(name, value)


def lazy(package: str, members: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` for a stage package that imports a member when it is first asked for.

    Args:
        package: the package's `__name__`.
        members: exported name -> module of the package that defines it.

    Returns:
        The two functions, to be assigned in the package.
    """
    sys.modules[package].__class__ = _StagePackage

    def getter(name: str) -> Any:
        if name not in members:
            raise AttributeError(f"module {package!r} has no attribute {name!r}.{nearest(name, members)}")
        value = getattr(importlib.import_module(f"{package}.{members[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted(members)

    return getter, names


@dataclass(frozen=True)
class Signature:
    """What a stage takes and gives.

    Attributes:
        required: fields it must be given.
        optional: fields it takes when they are there.
        columns: whether it takes every remaining data column as keyword arguments.
        outputs: fields it produces when it returns a NamedTuple; empty for a single value.
        options: its option values (bound or default), as far as they are known.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    columns: bool
    outputs: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field it can take."""
        return self.required + self.optional


def _unwrap(stage: Any) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {}
    while isinstance(stage, functools.partial):
        options = {**stage.keywords, **options}
        stage = stage.func
    return stage, options


def label(stage: Any) -> str:
    """The name by which a stage is spoken of in errors and tables."""
    inner, _ = _unwrap(stage)
    name = getattr(inner, "__name__", None) or type(inner).__name__
    module = getattr(inner, "__module__", None) or type(inner).__module__
    parts = module.split(".")
    return f"{parts[1]}.{name}" if parts[0] == "guerdon" and len(parts) > 2 else name


@functools.lru_cache(maxsize=512)
def _read(function: Any) -> tuple[tuple[str, ...], tuple[str, ...], bool, tuple[str, ...], tuple[tuple[str, Any], ...]]:
    required, optional, defaults = [], [], []
    columns = False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            columns = True
        elif parameter.kind is parameter.KEYWORD_ONLY:
            defaults.append((name, parameter.default))
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            (required if parameter.default is parameter.empty else optional).append(name)
    plain = inspect.unwrap(function)
    try:
        returns = get_type_hints(plain).get("return")
    except (NameError, TypeError, AttributeError):
        returns = None  # a user's annotation that cannot be evaluated only hides what a NamedTuple would have told
    outputs = tuple(getattr(returns, "_fields", ()))
    return tuple(required), tuple(optional), columns, outputs, tuple(defaults)


def signature(stage: Any, method: str | None = None) -> Signature:
    """Read what a stage takes: a function, a partial of one, or an object with `forward` (or the named `method`)."""
    inner, options = _unwrap(stage)
    if inspect.isroutine(inner) or inspect.isclass(inner):
        target = inner
    else:
        target = getattr(type(inner), method or ("forward" if hasattr(inner, "forward") else "__call__"))
    required, optional, columns, outputs, defaults = _read(target)
    if target is not inner:  # an unbound method: drop `self`
        required = required[1:]
    known = {name: value for name, value in defaults if value is not inspect.Parameter.empty}
    return Signature(
        tuple(n for n in required if n not in options),
        tuple(n for n in optional if n not in options),
        columns,
        outputs,
        {**known, **options},
    )


def wants(stage: Any, field: str) -> bool:
    """Whether a stage makes use of an optional, costly field such as `logp_ref`.

    A required parameter is wanted. An optional one is wanted when the stage's option `beta` is positive, which is the
    convention by which a stage says that its divergence term is switched on. An option `kl_estimator` says which fields
    the term reads: `kl` (or `kl_old`, that of the sampling policy) if it is `exact`, `logp_ref` otherwise.
    """
    read = signature(stage)
    if field in read.required:
        return True
    inner = _unwrap(stage)[0]
    estimator = read.options.get("kl_estimator", getattr(inner, "kl_estimator", None))
    if estimator is not None and field in (("logp_ref",) if estimator == "exact" else ("kl", "kl_old")):
        return False
    beta = read.options.get("beta", getattr(inner, "beta", None))
    return field in read.optional and bool(beta)


def check(stage: Any, available: Iterable[str], where: str | None = None, method: str | None = None) -> Signature:
    """Check that every field a stage needs will be there.

    Args:
        stage: the function or module.
        available: names of the fields that will be there when it is called.
        where: the place to name in the error; by default the stage's own name.

    Returns:
        The stage's signature.

    Raises:
        BindingError: naming the stage, the field and the fields there are.
    """
    read = signature(stage, method)
    there = set(available)
    for name in read.required:
        if name not in there:
            raise BindingError(
                f"{where or label(stage)} needs the field {name!r}, which nothing before it provides."
                f"{nearest(name, there)} There are: {', '.join(sorted(there))}."
            )
    return read


def call(stage: Any, fields: Mapping[str, Any], where: str | None = None, method: str | None = None) -> Any:
    """Call a stage with the fields that its parameters name.

    Raises:
        BindingError: a field it needs is missing.
    """
    read = check(stage, fields, where, method)
    chosen = {name: fields[name] for name in read.required}
    chosen |= {name: fields[name] for name in read.optional if name in fields}
    if read.columns:
        chosen |= {name: value for name, value in fields.items() if name not in chosen and name not in read.options}
    return (stage if method is None else getattr(stage, method))(**chosen)


def outputs(result: Any, name: str) -> dict[str, Any]:
    """What a stage produced, by field name: a NamedTuple's own names, or `name` for a single value."""
    return result._asdict() if hasattr(result, "_fields") else {name: result}
