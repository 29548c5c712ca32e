"""Dotted overrides."""

from __future__ import annotations

from typing import Any

import pytest

from guerdon.errors import RecipeError
from guerdon.recipes.overrides import apply, named, parse

COMPONENTS = {"advantage": "advantages", "objective": "objectives"}
TABLES = {"rewards": "rewards", "shaping": "shaping"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--optim.lr", "1e-4"], {"optim.lr": 1e-4}),
        (["--optim.lr=1e-4"], {"optim.lr": 1e-4}),
        (["optim.lr=1e-4"], {"optim.lr": 1e-4}),
        (["--rewards.correct=exact_answer"], {"rewards.correct": "exact_answer"}),
        (["--steps", "3", "--seed", "-1"], {"steps": 3, "seed": -1}),
        (["--evaluation.greedy"], {"evaluation.greedy": True}),
        (["--run.name="], {"run.name": None}),
        (["--a", "1", "--a", "2"], {"a": 2}),
        (["--data", "x=y.jsonl"], {"data": "x=y.jsonl"}),
        ([], {}),
    ],
    ids=str,
)
def test_words(words: list[str], found: dict[str, Any]) -> None:
    assert parse(words) == found
    assert all(type(value) is type(parse(words)[key]) for key, value in found.items())


@pytest.mark.parametrize("words", [["lr"], ["--steps", "3", "4"], ["--"], ["-x=1"]], ids=str)
def test_words_that_are_no_settings(words: list[str]) -> None:
    with pytest.raises(RecipeError, match="no setting"):
        parse(words)


@pytest.mark.parametrize(
    ("raw", "overrides", "result"),
    [
        ({"optim": {"lr": 1, "eps": 2}}, {"optim.lr": 3}, {"optim": {"lr": 3, "eps": 2}}),
        ({}, {"warm_start.optim.lr": 3}, {"warm_start": {"optim": {"lr": 3}}}),
        ({"optim": {"lr": 1, "eps": 2}}, {"optim": {"lr": 3}}, {"optim": {"lr": 3, "eps": 2}}),
        ({"optim": {"lr": 1}}, {"optim": None}, {"optim": None}),
        ({"advantage": "grpo"}, {"advantage.grpo.eps": 3}, {"advantage": {"grpo": {"eps": 3}}}),
        (
            {"advantage": {"grpo": {"eps": 1, "x": 2}}},
            {"advantage.grpo.eps": 3},
            {"advantage": {"grpo": {"eps": 3, "x": 2}}},
        ),
        ({"advantage": {"grpo": {"eps": 1}}}, {"advantage.rloo.x": 3}, {"advantage": {"rloo": {"x": 3}}}),
        ({"advantage": {"grpo": {"eps": 1}}}, {"advantage": "rloo"}, {"advantage": "rloo"}),
        ({"advantage": {"grpo": {"eps": 1}}}, {"advantage": {"rloo": {}}}, {"advantage": {"rloo": {}}}),
        ({}, {"advantage.my.mod:fn.beta": 1}, {"advantage": {"my.mod:fn": {"beta": 1}}}),
        ({}, {"objective.o.table.key": 1}, {"objective": {"o": {"table": {"key": 1}}}}),
        ({"rewards": ["a"]}, {"rewards.b": "c"}, {"rewards": {"a": "a", "b": "c"}}),
        ({"rewards": {"a": "x", "b": "y"}}, {"rewards.a": None}, {"rewards": {"b": "y"}}),
        ({"rewards": {"a": "x"}}, {"rewards.a.x.k": 1}, {"rewards": {"a": {"x": {"k": 1}}}}),
        (
            {"rewards": {"a": {"x": {"of": {"one": {"k": 1}}, "n": 1}}}},
            {"rewards.a.x.of": {"other": {"m": 2}}},
            {"rewards": {"a": {"x": {"of": {"other": {"m": 2}}, "n": 1}}}},
        ),
        ({"rewards": {"a": "x"}}, {"rewards": ["y"]}, {"rewards": ["y"]}),
        ({"shaping": {"a": ["x", "y"]}}, {"shaping.a.y.k": 1}, {"shaping": {"a": ["x", {"y": {"k": 1}}]}}),
    ],
    ids=str,
)
def test_apply(raw: dict[str, Any], overrides: dict[str, Any], result: dict[str, Any]) -> None:
    before = repr(raw)
    assert apply(raw, overrides, COMPONENTS, TABLES) == result
    assert repr(raw) == before, "what was given is not changed"


def test_a_setting_below_a_value_is_an_error() -> None:
    with pytest.raises(RecipeError, match="steps is 3, which has no settings"):
        apply({"steps": 3}, {"steps.x": 1}, COMPONENTS, TABLES)
    with pytest.raises(RecipeError, match=r"0 components of .* are called 'z'"):
        apply({"shaping": {"a": ["x"]}}, {"shaping.a.z.k": 1}, COMPONENTS, TABLES)


def test_components_are_named_by_themselves() -> None:
    assert named(["a", {"b": {"k": 1}}, "mypkg.mod:fn"], "rewards") == {
        "a": "a",
        "b": {"b": {"k": 1}},
        "fn": "mypkg.mod:fn",
    }
    assert named("a", "rewards") == {"a": "a"}
    with pytest.raises(RecipeError, match="rewards: 'a' stands twice; give each a name"):
        named(["a", {"a": {}}], "rewards")
    with pytest.raises(RecipeError, match="rewards: must be a mapping"):
        named(3, "rewards")
    with pytest.raises(RecipeError, match="rewards: each entry"):
        named([{"a": {}, "b": {}}], "rewards")
