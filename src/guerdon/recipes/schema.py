"""Reading a recipe: file or bundled name, overrides, checks, defaults.

Nothing here imports torch, so a recipe can be checked anywhere in a blink.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from guerdon.components import normalise
from guerdon.errors import RecipeError, UnknownNameError, nearest
from guerdon.recipes import overrides as _overrides
from guerdon.recipes.settings import (
    Bilevel,
    Diffusion,
    Evaluation,
    Flow,
    Lora,
    Optim,
    Pathwise,
    Policy,
    Recipe,
    Run,
    WarmStart,
)
from guerdon.typed import convert

__all__ = [
    "Bilevel",
    "Diffusion",
    "Evaluation",
    "Flow",
    "Lora",
    "Optim",
    "Pathwise",
    "Policy",
    "Recipe",
    "Run",
    "WarmStart",
    "bundled",
    "dump",
    "load_recipe",
    "resolve",
]

_FOLDER = Path(__file__).parent


def bundled() -> dict[str, Path]:
    """The recipes that come with the library, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def load_recipe(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Iterable[str] = (), *, complete: bool = True
) -> Recipe:
    """Read a recipe, apply overrides, check it and fill the defaults.

    Args:
        source: a bundled name, the path of a YAML file, or the settings themselves.
        overrides: {"optim.lr": 1e-4}, or words as on the command line: ["--optim.lr", "1e-4"] or ["optim.lr=1e-4"].
        complete: also demand what a run cannot do without (model, data, rewards).

    Returns:
        The recipe, complete and checked; components are not imported. A section `trial` holds settings that are put over
        the others where neither `data` nor `policy.model` is given.

    Raises:
        UnknownNameError: there is no such recipe or component.
        RecipeError: an unknown key, a wrong type or settings that contradict each other.

    Example:
        >>> recipe = load_recipe("sort", ["--optim.lr", "1e-4", "--advantage=rloo"])
        >>> recipe.optim.lr, recipe.advantage, recipe.policy.model
        (0.0001, 'rloo', 'sort')
    """
    raw, origin = (dict(source), "") if isinstance(source, Mapping) else _read(source)
    given = dict(overrides) if isinstance(overrides, Mapping) else _overrides.parse(overrides)
    trial = raw.pop("trial", None)
    if trial is not None and not {"data", "policy.model", "policy"} & set(given):
        raw = _merge(raw, trial)  # nothing of one's own was given: the recipe as it can be tried
    one = {f.name: f.metadata["component"] for f in fields(Recipe) if "component" in f.metadata}
    many = {f.name: f.metadata["components"] for f in fields(Recipe) if "components" in f.metadata}
    try:
        return resolve(_overrides.apply(raw, given, one, many), complete=complete)
    except RecipeError as error:
        prefix = "" if str(error).startswith(tuple(given)) else origin  # the file is not to blame for an override
        raise type(error)(f"{prefix}{error}") from None


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    from yaml import YAMLError

    from guerdon.recipes.yaml12 import loads

    known = bundled()
    if str(source) in known:
        path = known[str(source)]
    elif (path := Path(source)).suffix not in (".yaml", ".yml") and not path.is_file():
        raise UnknownNameError(
            f"there is no recipe {str(source)!r}.{nearest(str(source), known)} Bundled: {', '.join(known)}. "
            "Your own is given by its path, ending in .yaml."
        )
    try:
        raw = loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnknownNameError(f"there is no recipe file {str(path)!r}. Bundled: {', '.join(known)}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except YAMLError as error:
        raise RecipeError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{path}: a recipe is a mapping of settings; got {raw!r:.60}.")
    return dict(raw), f"{path.name}: "


def _merge(raw: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others put over them, section by section."""
    found = dict(raw)
    for name, value in more.items():
        section = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merge(found[name], value) if section else value
    return found


def resolve(raw: Mapping[str, Any], *, complete: bool = True) -> Recipe:
    """Check the settings of a recipe and fill the defaults; components become `name` or `{name: {option: value}}`.

    Raises:
        UnknownNameError, RecipeError: as `load_recipe`.
    """
    raw = dict(raw)
    left_out = ["weighting", "advantage"]
    if raw.get("loop") == "supervised":  # which has a loss of its own, for any policy
        left_out.append("objective")
        raw.setdefault("objective", None)
    for setting in fields(Recipe):
        name, metadata = setting.name, setting.metadata
        if name in raw and raw[name] is None and setting.default_factory is not MISSING:
            del raw[name]  # an empty section is a section of defaults
        if name not in raw:
            continue
        if "component" in metadata and not (raw[name] is None and name in left_out):
            raw[name] = normalise(metadata["component"], raw[name], name)
        if "components" in metadata:
            raw[name] = _components(metadata["components"], raw[name], name)
    recipe: Recipe = convert(raw, Recipe, "")
    _cross_check(recipe, complete)
    return recipe


def _components(stage: str, value: Any, path: str) -> dict[str, Any]:
    if path == "shaping" and value and not isinstance(value, Mapping):
        raise RecipeError(f"shaping: must be a mapping reward name -> components; got {value!r:.80}.")
    result: dict[str, Any] = {}
    for name, component in _overrides.named(value, path).items():
        here = f"{path}.{name}"
        if name != "*" and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", str(name)):
            raise RecipeError(f"{here}: a name is made of letters, digits, - and _; got {name!r}.")
        if path == "shaping":
            chain = component if isinstance(component, list) else [component]
            result[name] = [
                normalise(stage, one, f"{here}[{i}]" if len(chain) > 1 else here) for i, one in enumerate(chain)
            ]
        else:
            result[name] = normalise(stage, component, here)
    return result


def _cross_check(recipe: Recipe, complete: bool) -> None:
    """What no single setting can tell."""
    for name in recipe.shaping:
        if name != "*" and name not in recipe.rewards:
            there = ", ".join(recipe.rewards) or "none"
            raise RecipeError(
                f"shaping.{name}: there is no reward of that name.{nearest(name, recipe.rewards)} There are: {there}."
            )
    if both := [name for name in recipe.watch if name in recipe.rewards]:
        raise RecipeError(
            f"watch.{both[0]}: a reward has that name; what is watched is not trained on. Rename or remove one."
        )
    if recipe.loop == "pathwise" and recipe.policy.kind == "language":
        raise RecipeError(
            "loop: pathwise needs a policy of images (kind: diffusion or flow): tokens are drawn, and no gradient passes a "
            "draw. Use loop: online."
        )
    if recipe.policy.kind == "spans" and recipe.loop != "supervised":
        raise RecipeError(
            f"loop: a model of feedback (kind: spans) learns from records, loop: supervised; got {recipe.loop}."
        )
    if recipe.prompts_per_step % recipe.mini_batches:
        raise RecipeError(
            f"mini_batches: prompts_per_step = {recipe.prompts_per_step} is not a multiple of mini_batches = "
            f"{recipe.mini_batches}; every mini-batch holds whole groups."
        )
    if recipe.evaluation.revisions and (recipe.policy.kind != "language" or not recipe.evaluation.samples):
        raise RecipeError(
            "evaluation.revisions: revises the samples of a language policy; it needs kind: language and evaluation.samples "
            "of 1 or more. Set it to 0."
        )
    if recipe.loop == "supervised" and recipe.objective is not None and recipe.policy.kind != "language":
        raise RecipeError(
            f"objective: of loop: supervised it needs a language policy, which has log-probabilities of given samples; got "
            f"kind: {recipe.policy.kind}. Set it to null: images have their denoising loss."
        )
    if recipe.stop is not None and not recipe.stop.metric:
        raise RecipeError("stop.metric: must be given, such as eval/sampled/NAME of a reward or of what is watched.")
    if not complete:
        return
    if recipe.policy.model is None:
        raise RecipeError(
            "policy.model: must be given: a folder, or a name on the Hugging Face hub. --policy.model NAME"
        )
    if recipe.loop == "bilevel":
        _check_bilevel(recipe)
        return
    if recipe.data is None:
        raise RecipeError("data: must be given: a bundled task, or a path to .jsonl, .csv or .parquet. --data PATH")
    if recipe.loop not in ("supervised", "preference") and not recipe.rewards:
        raise RecipeError("rewards: at least one is needed to learn from. --rewards.correct exact_answer")


def _check_bilevel(recipe: Recipe) -> None:
    if recipe.policy.kind != "language":
        raise RecipeError("loop: bilevel needs a language policy, which writes expressions.")
    if recipe.bilevel.inner is None:
        raise RecipeError("bilevel.inner: must be given: a bundled recipe, or the path of one. --bilevel.inner PATH")
    if recipe.rewards or recipe.shaping or recipe.weighting not in (None, "linear"):
        raise RecipeError(
            "loop: bilevel takes its reward from inner runs: leave out rewards, shaping and weighting, or put them into the "
            "inner recipe (bilevel.settings)."
        )
    if recipe.group_size < 2:
        raise RecipeError(
            f"group_size: an expression is compared with others of its group; got {recipe.group_size}, at least 2 are needed."
        )


def dump(recipe: Recipe) -> str:
    """A recipe as YAML; reading it back gives the same recipe."""
    from guerdon.recipes.yaml12 import dumps

    return dumps(asdict(recipe))
