"""Reading recipes: defaults, overrides, errors that name the place."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from guerdon.errors import RecipeError, UnknownNameError
from guerdon.recipes import Recipe, bundled, dump, load_recipe, resolve
from guerdon.recipes.schema import Optim, WarmStart
from guerdon.recipes.yaml12 import loads
from guerdon.typed import dotted

MINIMAL = {"policy": {"model": "m"}, "data": "d.jsonl", "rewards": ["exact_answer"]}


def test_the_bundled_recipes_are_complete_or_say_what_they_need() -> None:
    assert {"sort", "sft", "rlvr", "dpo", "flow-grpo", "alignprop"} <= set(bundled())
    for name in set(bundled()) - {"rlvr", "sft"}:
        recipe = load_recipe(name)
        assert recipe.policy.model is not None, name
        assert recipe.data is not None, name
    for name in ("rlvr", "sft"):
        with pytest.raises(RecipeError, match=rf"{name}.yaml: policy.model: must be given"):
            load_recipe(name)
        with pytest.raises(RecipeError, match=r"data: must be given"):
            load_recipe(name, {"policy.model": "m"})
        assert load_recipe(name, {"policy.model": "m", "data": "d.jsonl"}).data == "d.jsonl"


def test_sort_is_the_tried_setting() -> None:
    recipe = load_recipe("sort")
    assert (recipe.prompts_per_step, recipe.group_size, recipe.steps) == (32, 8, 200)
    assert recipe.optim == Optim(lr=3e-4, betas=(0.9, 0.99))
    assert recipe.warm_start == WarmStart(70, 128, Optim(lr=2e-3, warmup_steps=50, weight_decay=0.01))
    assert recipe.objective == {"policy_gradient": {"clip_low": 0.2, "clip_high": 0.28, "denominator": "per_token"}}
    assert recipe.rewards == {"correct": "exact_answer"}


@pytest.mark.parametrize("path", bundled().values(), ids=bundled())
def test_the_commands_in_a_header_are_valid(path: Path) -> None:
    commands = re.findall(r"^#\s+(?:accelerate launch -m )?guerdon train (.+)$", path.read_text(encoding="utf-8"), re.M)
    assert commands
    for command in commands:
        name, *words = shlex.split(command)
        assert name == path.stem
        assert isinstance(load_recipe(name, words), Recipe)


@pytest.mark.parametrize("name", bundled())
def test_what_is_written_reads_back(name: str) -> None:
    recipe = load_recipe(name, complete=False)
    assert resolve(loads(dump(recipe)), complete=False) == recipe
    assert loads(dump(recipe)).keys() == asdict(recipe).keys()


def test_every_setting_has_help_and_a_valid_default() -> None:
    for path, setting, _ in dotted(Recipe):
        assert setting.metadata["help"], path
    assert resolve({}, complete=False) == Recipe()
    assert resolve(asdict(Recipe()), complete=False) == Recipe()


def test_a_list_of_rewards_is_shorthand() -> None:
    recipe = load_recipe({**MINIMAL, "rewards": ["exact_answer", {"regex": {"pattern": "x"}}]})
    assert recipe.rewards == {"exact_answer": "exact_answer", "regex": {"regex": {"pattern": "x"}}}
    assert load_recipe({**MINIMAL, "rewards": "exact_answer"}).rewards == {"exact_answer": "exact_answer"}


def test_components_come_out_in_one_form() -> None:
    recipe = load_recipe({**MINIMAL, "advantage": {"grpo": None}, "objective": {"policy_gradient": {"beta": 1}}})
    assert recipe.advantage == "grpo"
    assert recipe.objective == {"policy_gradient": {"beta": 1.0}}
    assert load_recipe({**MINIMAL, "advantage": None, "weighting": None}).weighting is None
    assert load_recipe({**MINIMAL, "advantage": "mine.mod:fn"}).advantage == "mine.mod:fn"


def test_sections_keep_the_defaults_of_what_is_not_given() -> None:
    recipe = load_recipe({**MINIMAL, "warm_start": {"optim": {"lr": 1e-3}}, "optim": None})
    assert recipe.warm_start == WarmStart(optim=Optim(lr=1e-3, warmup_steps=50, weight_decay=0.01))
    assert recipe.optim == Optim()
    assert load_recipe(MINIMAL, ["--policy.lora", "{}"]).policy.lora is not None
    assert load_recipe(MINIMAL, ["--policy.lora.rank", "4"]).policy.lora.rank == 4  # type: ignore[union-attr]


def test_overrides_of_every_kind() -> None:
    recipe = load_recipe(
        "sort",
        [
            *("--optim.lr", "1e-5"),
            "--optim.betas=[0.8, 0.9]",
            *("--objective.policy_gradient.clip_high", "0.3"),
            *("--data", "problems.jsonl"),
            *("--stop_at.eval/greedy/correct", "0.8"),
            *("--micro_batch", "null"),
            *("--steps", "1e3"),
            *("--run.mixed_precision", "no"),
            *("--watch.format.regex.pattern", "^[0-9]+$"),
        ],
    )
    assert (recipe.optim.lr, recipe.optim.betas) == (1e-5, (0.8, 0.9))
    assert recipe.objective["policy_gradient"]["clip_high"] == 0.3  # type: ignore[index,call-overload]
    assert recipe.objective["policy_gradient"]["clip_low"] == 0.2  # type: ignore[index,call-overload]
    assert (recipe.data, recipe.stop_at, recipe.micro_batch) == ("problems.jsonl", {"eval/greedy/correct": 0.8}, None)
    assert recipe.steps == 1000
    assert type(recipe.steps) is int
    assert recipe.run.mixed_precision == "no"
    assert recipe.watch == {"format": {"regex": {"pattern": "^[0-9]+$"}}}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"optim.lrr": 1},
            "optim.lrr: there is no such setting (given: 1). Did you mean 'lr'? Settings of optim: name, lr",
        ),
        ({"lr": 1}, "Did you mean 'warm_start.optim.lr' or 'optim.lr'?"),
        ({"group-size": 1}, "group-size: there is no such setting (given: 1). Did you mean 'group_size'?"),
        ({"optim.lr": "high"}, "optim.lr: must be a number; got 'high'."),
        ({"optim.lr": True}, "optim.lr: must be a number; got True."),
        ({"optim.lr": -1.0}, "optim.lr: must be at least 0; got -1.0."),
        ({"policy.temperature": 0}, "policy.temperature: must be greater than 0; got 0.0."),
        ({"policy.top_p": 1.5}, "policy.top_p: must be at most 1; got 1.5."),
        ({"optim.betas": [0.9]}, "optim.betas: must be a list of 2 (a number, a number); got [0.9]."),
        ({"optim.betas": [0.9, 2]}, "optim.betas: must be at most 1; got 2.0."),
        (
            {"optim.schedule": "cosin"},
            "must be one of 'constant', 'linear', 'cosine'; got 'cosin'. Did you mean 'cosine'?",
        ),
        ({"steps": 2.5}, "steps: must be a whole number; got 2.5."),
        ({"optim": 3}, "optim: must be a mapping with name, lr"),
        ({"run.name": 7}, "run.name: must be text or null; got 7."),
        ({"run.directory": 7}, "run.directory: must be text; got 7. Quote it if text is meant: \"'7'\"."),
        ({"warm_start.steps": "x"}, "warm_start.steps: must be a whole number; got 'x'."),
        ({"policy.lora.rnk": 1}, "policy.lora.rnk: there is no such setting (given: 1). Did you mean 'rank'?"),
        ({"advantage": "grpoo"}, "advantage: advantages has nothing called 'grpoo'. Did you mean 'grpo'"),
        ({"advantage": ["grpo"]}, "advantage: must be a name, or one name with its options"),
        ({"advantage.grpo.epss": 1}, "advantage.grpo.epss: there is no such option (given: 1). Did you mean 'eps'?"),
        ({"advantage.grpo.eps": "x"}, "advantage.grpo.eps: must be a number; got 'x'."),
        (
            {"advantage.grpo.rewards": 1},
            "advantage.grpo.rewards: this is a field that the pipeline fills, not an option.",
        ),
        ({"rewards.a": {"regex": {}}}, "rewards.a.regex: the option pattern must be given."),
        ({"rewards.a": "regexx"}, "rewards.a: rewards has nothing called 'regexx'. Did you mean 'regex'?"),
        ({"rewards": {"a/b": "regex"}}, "rewards.a/b: a name is made of letters, digits, - and _"),
        ({"shaping": {"nope": ["x"]}}, "shaping.nope: shaping has nothing called 'x'."),
        ({"shaping": {"nope": []}}, "shaping.nope: there is no reward of that name. There are: correct."),
        ({"shaping": ["x"]}, "shaping: must be a mapping reward name -> components"),
        ({"watch.correct": "exact_answer"}, "watch.correct: a reward has that name"),
        ({"mini_batches": 5}, "mini_batches: prompts_per_step = 32 is not a multiple of mini_batches = 5"),
        ({"rewards": None}, "rewards: at least one is needed"),
        ({"stop_at": {"x": "y"}}, "stop_at.x: must be a number; got 'y'."),
        ({"stop": {"patience": 3}}, "stop.metric: must be given, such as eval/sampled/NAME"),
        ({"stop.patience": 0, "stop.metric": "reward"}, "stop.patience: must be at least 1; got 0."),
        ({"objective": None}, "objective: must be a name"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_errors_name_place_value_and_what_is_allowed(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe("sort", overrides)


def test_a_fault_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lrr: 1}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^mine.yaml: optim.lrr: there is no such setting"):
        load_recipe(path)
    path.write_text("optim: {lr: 1", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine.yaml: is not valid YAML"):
        load_recipe(path)
    path.write_text("- a", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine.yaml: a recipe is a mapping of settings; got \['a'\]"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"mine.yaml: cannot be read"):
        load_recipe(path)
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(RecipeError, match=r"cannot be read"):
        load_recipe(folder)


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(UnknownNameError, match=r"no recipe 'srt'. Did you mean 'sort'.*Bundled: .*rlvr.*sft.*sort"):
        load_recipe("srt")
    with pytest.raises(UnknownNameError, match=r"no recipe file 'mine.yaml'"):
        load_recipe("mine.yaml")
