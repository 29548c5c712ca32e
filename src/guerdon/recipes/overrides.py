"""Dotted overrides of a recipe, such as `optim.lr=1e-4` or `objective.policy_gradient.clip_high=0.28`.

They are applied to the mapping as it was written, before it is checked, so a wrong one gives the same error as a wrong
line in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from guerdon.errors import RecipeError


def parse(words: Iterable[str]) -> dict[str, Any]:
    """Read command-line words `--a.b value`, `--a.b=value` or `a.b=value` into {"a.b": value}.

    An option without a value means `true`. Values are YAML 1.2 scalars or collections.

    Raises:
        RecipeError: a word is neither an option nor the value of one.

    Example:
        >>> parse(["--optim.lr", "1e-4", "--rewards.correct=exact_answer", "--policy.gradient_checkpointing"])
        {'optim.lr': 0.0001, 'rewards.correct': 'exact_answer', 'policy.gradient_checkpointing': True}
    """
    from guerdon.recipes.yaml12 import scalar  # YAML is not needed to show help

    found: dict[str, Any] = {}
    waiting: str | None = None
    for word in words:
        if word.startswith("--"):
            waiting, equals, text = word[2:].partition("=")
            found[waiting] = scalar(text) if equals else True
            waiting = None if equals else waiting
        elif waiting is not None:
            found[waiting], waiting = scalar(word), None
        elif "=" in word and not word.startswith("-"):
            key, _, text = word.partition("=")
            found[key] = scalar(text)
        else:
            raise RecipeError(f"{word!r} is no setting. Write --name value, such as --optim.lr 1e-4.")
    if "" in found:
        raise RecipeError("'--' names no setting. Write --name value, such as --optim.lr 1e-4.")
    return found


def apply(
    raw: dict[str, Any], overrides: Mapping[str, Any], components: Mapping[str, str], tables: Mapping[str, str]
) -> dict[str, Any]:
    """A copy of a recipe mapping with overrides set.

    Args:
        raw: the recipe as written.
        overrides: dotted path -> value. A mapping given for a section is merged into it, one given for an option of a
            component takes its place; null given for a named reward, shaping or watch entry removes it.
        components: settings that hold one component.
        tables: settings that hold named components.
    """
    result = dict(raw)
    for path, value in overrides.items():
        key, _, rest = path.partition(".")
        if not rest:
            current = result.get(key)
            if isinstance(current, Mapping) and isinstance(value, Mapping) and key not in {*components, *tables}:
                value = {**current, **value}
            result[key] = value
        elif key in components:
            result[key] = _component(result.get(key), rest, value)
        elif key in tables:
            result[key] = _entry(result.get(key), rest, value, path)
        else:
            result[key] = _nested(result.get(key), rest.split("."), value, path)
    return result


def _nested(current: Any, keys: list[str], value: Any, path: str, *, whole: bool = False) -> Any:
    """Settings with one of them set; a mapping is merged into the one that is there, or `whole` takes its place."""
    if current is not None and not isinstance(current, Mapping):
        raise RecipeError(
            f"{path}: {path.removesuffix('.' + '.'.join(keys))} is {current!r:.60}, which has no settings."
        )
    branch = dict(current or {})
    if len(keys) > 1:
        branch[keys[0]] = _nested(branch.get(keys[0]), keys[1:], value, path, whole=whole)
    elif isinstance(branch.get(keys[0]), Mapping) and isinstance(value, Mapping) and not whole:
        branch[keys[0]] = {**branch[keys[0]], **value}
    else:
        branch[keys[0]] = value
    return branch


def _component(current: Any, rest: str, value: Any) -> Any:
    """Set `name.option`; a component of another name is replaced."""
    if ":" in rest:  # mypkg.mymodule:attribute.option
        before, _, after = rest.partition(":")
        attribute, _, option = after.rpartition(".")
        name, keys = (f"{before}:{attribute}", [option]) if attribute else (rest, [])
    else:
        name, *keys = rest.split(".")
    if not keys:
        return {name: value}
    existing = current.get(name) if isinstance(current, Mapping) else None
    # an option is what was given for it: merged, one critic in the place of another would be two
    return {name: _nested(existing, keys, value, rest, whole=True)}


def _entry(current: Any, rest: str, value: Any, path: str) -> dict[str, Any]:
    """Set an entry of named components, or an option of the component in it."""
    entries = named(current, path.partition(".")[0])
    name, _, inner = rest.partition(".")
    if inner and isinstance(entries.get(name), list):
        component = inner.partition(".")[0]
        places = [i for i, one in enumerate(entries[name]) if component in ([one] if isinstance(one, str) else one)]
        if len(places) != 1:
            raise RecipeError(f"{path}: {len(places)} components of {entries[name]!r:.80} are called {component!r}.")
        changed = list(entries[name])
        changed[places[0]] = _component(changed[places[0]], inner, value)
        return {**entries, name: changed}
    if inner:
        return {**entries, name: _component(entries.get(name), inner, value)}
    if value is None:
        return {other: component for other, component in entries.items() if other != name}
    return {**entries, name: value}


def named(value: Any, path: str) -> dict[str, Any]:
    """Components by name: a mapping as it is, a list or a single component under the component's own name."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise RecipeError(f"{path}: must be a mapping name -> component, or a list of components; got {value!r:.80}.")
    result: dict[str, Any] = {}
    for entry in entries:
        if not (isinstance(entry, str) or (isinstance(entry, Mapping) and len(entry) == 1)):
            raise RecipeError(f"{path}: each entry must be a name or {{name: {{option: value}}}}; got {entry!r:.80}.")
        component = entry if isinstance(entry, str) else next(iter(entry))
        name = str(component).rpartition(":")[2].rpartition(".")[2]
        if name in result:
            raise RecipeError(f"{path}: {name!r} stands twice; give each a name: {{first: {name}, second: {name}}}.")
        result[name] = entry
    return result
