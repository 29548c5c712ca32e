"""The members of a stage, and how the batteries call them."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guerdon.stages import call, outputs, signature
from tests.contracts.fields import FIELDS, INPUTS, OPTIONS, VARIANTS, Sizes, make


@dataclass(frozen=True)
class Member:
    """One method of a stage with the options it is tried with."""

    stage: str
    name: str
    target: Any
    options: dict[str, Any] = field(default_factory=dict)
    plain: bool = True

    @property
    def key(self) -> str:
        return f"{self.stage}.{self.name}"

    def make(self, sizes: Sizes | None = None, seed: int = 0) -> dict[str, Any]:
        """Every known field, of the kind that this member takes."""
        return make(sizes, seed, INPUTS.get(self.key))

    def build(self) -> Any:
        """A fresh instance, or the function with its options."""
        if inspect.isclass(self.target):
            made = self.target(**self.options)
            if hasattr(made, "calibrate"):
                made.calibrate(torch.linspace(-1.0, 1.0, 8, dtype=torch.float64))
            return made
        return functools.partial(self.target, **self.options) if self.options else self.target

    def run(self, fields: dict[str, Any], stage: Any = None) -> dict[str, Any]:
        """Call it with the fields it names; its outputs by field name."""
        stage = self.build() if stage is None else stage
        for name in signature(stage).required:
            if name not in FIELDS:
                pytest.fail(f"{self.key} takes {name!r}: say in tests/contracts/fields.py how that field is made")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(G = 1|no live step).*", category=UserWarning)
            return outputs(call(stage, fields), SINGLE_OUTPUT.get(self.stage, "result"))

    def takes(self, name: str) -> bool:
        return name in signature(self.build()).fields


SINGLE_OUTPUT = {"advantages": "advantages", "weighting": "rewards", "shaping": "scores"}


def table(stage: str) -> dict[str, str]:
    """The MEMBERS of a stage's package."""
    return importlib.import_module(f"guerdon.{stage}").MEMBERS


def settings(stage: str) -> list[Any]:
    """A pytest parameter for every member of a stage and every setting it is tried with."""
    found = []
    for name in table(stage):
        needed = OPTIONS.get(f"{stage}.{name}", {})
        found.append(pytest.param(name, needed, True, id=name))
        for number, options in enumerate(VARIANTS.get(f"{stage}.{name}", [])):
            found.append(pytest.param(name, needed | options, False, id=f"{name}-{number + 1}"))
    return found


def resolve(stage: str, name: str, options: dict[str, Any], plain: bool = True) -> Member:
    """Import a member by its public name."""
    return Member(stage, name, getattr(importlib.import_module(f"guerdon.{stage}"), name), options, plain)


def same(first: Any, second: Any, exact: bool = True) -> bool:
    """Whether two results agree; NaN agrees with NaN."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if exact:
            return first.shape == second.shape and bool(
                ((first == second) | (first != first) & (second != second)).all()
            )
        return first.shape == second.shape and torch.allclose(first, second, rtol=1e-9, atol=1e-11, equal_nan=True)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key], exact) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b, exact) for a, b in zip(first, second, strict=True))
    return first == second


def state(module: nn.Module) -> dict[str, Any]:
    """A copy of a module's state."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in module.state_dict().items()}
