"""Components: checked from source, built with their options."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from guerdon.components import build, normalise
from guerdon.errors import RecipeError, UnknownNameError
from guerdon.members import STAGES, facts, members

OWN = """
from __future__ import annotations
import torch
from typing import Literal


def plain(samples, answer): return [[1.0 for _ in group] for group in samples]


def tuned(samples, *, scale: float = 1.0, mode: Literal["a", "b"] = "a", must: int): return scale, mode, must


def unknowable(samples, *, thing: NoSuchType = None): return thing


class Stateful(torch.nn.Module):
    def __init__(self, *, decay: float = 0.9):
        super().__init__()
        self.decay = decay

    def forward(self, scores): return scores * self.decay


class Open:
    def __init__(self, **options): self.options = options
    def __call__(self, samples): return self.options


ready = Stateful(decay=0.5)
number = 3
half = __import__("functools").partial(tuned, must=1)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_parts.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    return "own_parts"


def test_normal_forms() -> None:
    assert normalise("advantages", "grpo", "advantage") == "grpo"
    assert normalise("advantages", {"grpo": {}}, "advantage") == "grpo"
    assert normalise("advantages", {"grpo": {"eps": 1}}, "advantage") == {"grpo": {"eps": 1.0}}
    assert normalise("advantages", {"a.b:c": {"x": 1}}, "advantage") == {"a.b:c": {"x": 1}}


@pytest.mark.parametrize("spec", [3, None, [], {}, {"grpo": {}, "rloo": {}}, {"grpo": 3}, {3: {}}], ids=str)
def test_what_is_no_component(spec: Any) -> None:
    with pytest.raises(RecipeError, match=r"^advantage"):
        normalise("advantages", spec, "advantage")


def test_a_function_is_built_as_it_is_or_with_its_options_bound() -> None:
    from guerdon.advantages import grpo

    assert build("advantages", "grpo") is grpo
    bound = build("advantages", {"grpo": {"eps": 1}})
    assert isinstance(bound, functools.partial)
    assert bound.func is grpo
    assert bound.keywords == {"eps": 1.0}


def test_a_class_is_built_as_an_instance() -> None:
    sampler = build("sampling", "uniform")
    assert isinstance(sampler, torch.nn.Module)


def test_options_are_converted_and_checked_where_they_are_built() -> None:
    with pytest.raises(RecipeError, match=r"objective.policy_gradient.denominator: must be one of .*; got 'token'"):
        build("objectives", {"policy_gradient": {"denominator": "token"}}, "objective")
    with pytest.raises(UnknownNameError, match=r"advantages has nothing called 'grpoo'"):
        build("advantages", "grpoo")


def test_ones_own_function(own: str) -> None:
    assert build("rewards", f"{own}:plain")([["x", "y"]], ["x"]) == [[1.0, 1.0]]
    tuned = build("rewards", {f"{own}:tuned": {"scale": 2, "must": 3}})
    assert tuned([]) == (2.0, "a", 3)
    assert build("rewards", f"{own}:half")([]) == (1.0, "a", 1)
    assert build("rewards", {f"{own}:unknowable": {"thing": [1]}})([]) == [1]


def test_ones_own_class_and_object(own: str) -> None:
    stage = build("shaping", {f"{own}:Stateful": {"decay": 1}})
    assert stage(torch.ones(2)).tolist() == [1.0, 1.0]
    assert build("shaping", f"{own}:ready")(torch.ones(1)).item() == 0.5
    assert build("shaping", {f"{own}:Open": {"any": 1}})([]) == {"any": 1}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"own_parts:tuned": {"must": 1, "scal": 2}}, "tuned.scal: there is no such option (given: 2). Did you mean"),
        ({"own_parts:tuned": {"must": 1, "mode": "c"}}, "own_parts:tuned.mode: must be one of 'a', 'b'; got 'c'."),
        ({"own_parts:tuned": {"must": 1, "samples": 2}}, "this is a field that the pipeline fills, not an option."),
        ("own_parts:tuned", "own_parts:tuned: the option must must be given."),
        ({"own_parts:plain": {"x": 1}}, "own_parts:plain.x: there is no such option (given: 1). It has no options."),
        ({"own_parts:ready": {"x": 1}}, "own_parts:ready: it is already an object, so it takes no options; got x."),
        ("own_parts:number", "own_parts:number is a int, which cannot be called."),
        ("own_parts:plian", "own_parts has no 'plian'. Did you mean 'plain'?"),
        ("own_part:plain", "the module 'own_part' of 'own_part:plain' cannot be found."),
        ("own_parts:", "your own component is named module:attribute; got 'own_parts:'."),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_faults_of_ones_own(own: str, spec: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        build("rewards", spec, "rewards.mine")


def test_an_import_that_fails_inside_ones_own_module_is_not_disguised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken.py").write_text("import no_such_package_anywhere", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
        build("rewards", "own_broken:x")


@pytest.mark.parametrize(("stage", "name"), [(s, n) for s in STAGES for n in members(s)])
def test_what_the_source_says_is_what_the_member_takes(stage: str, name: str) -> None:
    import importlib
    import inspect

    from guerdon.stages import signature

    member = getattr(importlib.import_module(f"guerdon.{stage}"), name)
    options = [p.name for p in inspect.signature(member).parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = facts(stage, name)
    assert known.options is not None
    assert list(known.options) == options
    if not inspect.isclass(member):
        assert known.fields == signature(member).fields
