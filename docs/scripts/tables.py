"""Tables of the documentation, made from the code so that they cannot go stale.

`python docs/scripts/tables.py` writes the table of methods into README.md; mkdocs calls the rest (see hooks.py).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path

from guerdon.catalogue import METHODS, Method
from guerdon.cli.main import COMMANDS, main, usage
from guerdon.cli.methods import components as stage_components
from guerdon.members import STAGES, members
from guerdon.recipes.schema import Recipe, bundled
from guerdon.typed import describe, dotted, hints

_ROOT = Path(__file__).parents[2]
_README = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)


def settings() -> str:
    """Every setting of a recipe by section: type, default and meaning."""
    sections: dict[str, list[str]] = {}
    for path, setting, default in dotted(Recipe):
        section, _, name = path.rpartition(".")
        if is_dataclass(default) and not section:
            continue  # it has a section of its own
        kind = _kind(path)
        sections.setdefault(section, []).append(
            f"| `{name}` | {_cell(kind)} | {'' if is_dataclass(default) else f'`{_shown(default)}`'} "
            f"| {_cell(setting.metadata['help'])} |"
        )
    text = []
    for section, rows in sections.items():
        title = f"### `{section}`" if section else "### At the top"
        text += [title, "", "| setting | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(text)


def _kind(path: str) -> str:
    owners: list[type] = [Recipe]
    *parents, name = path.split(".")
    for parent in parents:
        wanted = [hints(owner)[parent] for owner in owners if parent in hints(owner)]
        owners = [kind for w in wanted for kind in (w, *getattr(w, "__args__", ())) if is_dataclass(kind)]
    # where `kind` chooses between several sections, the first that has the setting
    owner = next(owner for owner in owners if name in owner.__dataclass_fields__)
    metadata = owner.__dataclass_fields__[name].metadata
    if "component" in metadata:
        return f"a component of [{metadata['component']}](#{metadata['component']})"
    if "components" in metadata:
        return f"components of [{metadata['components']}](#{metadata['components']}) by name"
    return describe(hints(owner)[name])


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _cell(text: str) -> str:
    return text.replace("->", "→").replace("|", "\\|").replace("{", "&#123;").replace("*", "&#42;")


def components() -> str:
    """Every name that a recipe may use, by stage, with its options."""
    text = []
    for stage in STAGES:
        entries = stage_components(stage)
        if not entries:
            text += [f"### {stage}", "", "None yet.", ""]
            continue
        text += [f"### {stage}", "", "| name | options | what it does |", "|---|---|---|"]
        for entry in entries:
            options = ", ".join(
                f"`{name}`" if default is None else f"`{name}={default}`" for name, default in entry["options"].items()
            )
            text.append(f"| `{entry['name']}` | {options} | {_cell(entry['summary'])} |")
        text.append("")
    return "\n".join(text)


def recipes() -> str:
    """The bundled recipes as they stand in their files."""
    return "\n".join(
        f"### {name}\n\n```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```\n" for name, path in bundled().items()
    )


def commands() -> str:
    """The help of every command."""
    text = ["```text", usage(), "```", ""]
    for name in COMMANDS:
        found = io.StringIO()
        with contextlib.redirect_stdout(found):
            main([name, "--help"])
        shown = found.getvalue().split("\nsettings:\n")[0].rstrip()
        text += [f"## guerdon {name}", "", "```text", shown, "```", ""]
    return "\n".join(text)


def reference(package: str) -> str:
    """All modules of a stage package that define something a recipe can name."""
    importlib.import_module(f"guerdon.{package}")
    names = sorted(set(members(package).values()))
    return "\n\n".join(f"::: guerdon.{package}.{name}" for name in names)


def methods(prefix: str = "") -> str:
    """The methods that are there, each with a link to its page if it has one."""
    rows = ["| method | what it does | where it lives | source |", "|---|---|---|---|"]
    for method in METHODS:
        if method.built:
            homes = ", ".join(f"`{home}`" for home in method.homes)
            rows.append(f"| {_link(method, prefix)} | {method.line} | {homes} | {_sources(method)} |")
    return "\n".join(rows)


def planned() -> str:
    """The methods that are not there yet, in one list."""
    return "\n".join(f"- {m.title}: {m.line} ({_sources(m)})" for m in METHODS if not m.built)


def _link(method: Method, prefix: str) -> str:
    page = f"{method.slug}.md"
    return f"[{method.title}]({prefix}{page})" if (_ROOT / "docs" / "methods" / page).is_file() else method.title


def _sources(method: Method) -> str:
    identifiers = re.findall(r"\d{4}\.\d{5}", method.source)
    return ", ".join(f"[{i}](https://arxiv.org/abs/{i})" for i in identifiers) or method.source


def update(readme: str) -> str:
    """The README with its table of methods made anew."""
    return _README.sub(lambda match: f"{match[1]}\n{methods('docs/methods/')}\n\n{match[2]}", readme)


TABLES: dict[str, Callable[..., str]] = {
    "settings": settings,
    "components": components,
    "recipes": recipes,
    "commands": commands,
    "reference": reference,
    "methods": methods,
    "planned": planned,
}

if __name__ == "__main__":
    path = _ROOT / "README.md"
    path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")
