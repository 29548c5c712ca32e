"""`guerdon train RECIPE`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from guerdon.cli.parser import Parser
from guerdon.errors import nearest

_DESCRIPTION = """\
Train from a recipe: a bundled name or the path of a YAML file.
Every setting can be given on the command line by its dotted path:

  guerdon train sort --optim.lr 1e-4 --rewards.correct=exact_answer --objective.policy_gradient.clip_high 0.28
"""


def run(words: Sequence[str]) -> int:
    """Read the recipe with its overrides, print it or train from it."""
    parser = Parser("train", _DESCRIPTION)
    parser.add_argument("recipe", metavar="RECIPE", help="a bundled recipe, or a path ending in .yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the complete recipe and stop")
    own, settings = split(words, parser.options())
    _check_roots(settings, parser)
    if "--help" in own or "-h" in own:
        parser.epilog = _settings()
    args = parser.parse_args(own)

    from guerdon.recipes.schema import dump, load_recipe

    recipe = load_recipe(args.recipe, settings)
    if args.dry_run:
        print(dump(recipe), end="")
        return 0
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # so that a recipe can name module:attribute of a file beside it
    from guerdon.training.run import train

    finish(train(recipe, Path(args.recipe).stem))
    return 0


def finish(folder: Path) -> None:
    """At the end of a run: its figures, a few samples, and its page; once, whatever the number of processes."""
    if os.environ.get("RANK", "0") != "0":
        return
    from guerdon.report import print_samples, print_summary, write_report

    print_summary(folder)
    print_samples(folder)
    _print_expression(folder)
    print(f"{write_report(folder)}")


def _print_expression(folder: Path) -> None:
    """What a bilevel run has found to be worth rewarding."""
    path = folder / "expression.json"
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    metric, best = found["metric"], found["best"]
    print(f"{metric} of the base: {found['base']:.4g}")
    if best is None:
        print("no expression was valid")
        return
    named = ", ".join(f"g{k + 1} = {name}" for k, name in enumerate(found["primitives"]))
    print(f"best expression: {best['expression']} ({named}), {best['performance']:.4g} where it was tried")
    for run in found["last_runs"]:
        print(f"on all training data: {run[metric]:.4g}  {run['run']}")


def _check_roots(settings: Sequence[str], parser: Parser) -> None:
    """A mistyped option of the command looks like a setting: say so before it takes a value or a file is missed."""
    from dataclasses import fields

    from guerdon.recipes.schema import Recipe

    known = [field.name for field in fields(Recipe)]
    for word in settings:
        root = word.removeprefix("--").partition("=")[0].partition(".")[0]
        if word.startswith("--") and root not in known and not nearest(root, known) and parser.near(root):
            parser.unknown(f"--{root}")


def split(words: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell the command's own words from settings `--dotted.path value`, in whatever order they come."""
    own: list[str] = []
    settings: list[str] = []
    value_may_follow = False
    for word in words:
        if word.startswith("--") and word not in known:
            settings.append(word)
            value_may_follow = "=" not in word
        elif value_may_follow and not word.startswith("--"):
            settings.append(word)
            value_may_follow = False
        else:
            own.append(word)
            value_may_follow = False
    return own, settings


def _settings() -> str:
    """Every setting with its default and a line of help."""
    from dataclasses import is_dataclass

    from guerdon.recipes.schema import Recipe, bundled
    from guerdon.typed import dotted

    lines = []
    for path, setting, default in dotted(Recipe):
        shown = "" if is_dataclass(default) else f" [{_shown(default)}]"
        lines.append(f"  --{path:<33} {setting.metadata['help']}{shown}")
    return f"bundled recipes: {', '.join(bundled())}\n\nsettings:\n" + "\n".join(lines)


def _shown(default: object) -> str:
    if isinstance(default, bool) or default is None:
        return "null" if default is None else str(default).lower()
    return str(list(default)) if isinstance(default, tuple) else str(default)
