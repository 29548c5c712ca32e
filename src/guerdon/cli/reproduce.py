"""`guerdon reproduce SLUG...`."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guerdon.cli.parser import Parser
from guerdon.errors import GuerdonError, UnknownNameError, nearest
from guerdon.evidence import MEMBERS

_DESCRIPTION = """\
Test claims of papers at small scale, each method against its own baseline; without arguments, list them.

  guerdon reproduce grpo-family
  guerdon reproduce --all --budget full

A claim that does not show is no error: it is printed with its figures. Results of single training runs are kept in
$GUERDON_CACHE (~/.cache/guerdon), so a test that was stopped goes on where it was.
"""


def run(words: Sequence[str]) -> int:
    """Run claim tests, print their tables and write the evidence folder."""
    parser = Parser("reproduce", _DESCRIPTION)
    parser.add_argument("slugs", metavar="SLUG", nargs="*", help="methods, as in: guerdon methods")
    parser.add_argument("--all", action="store_true", help="every method that has a test")
    parser.add_argument(
        "--budget", choices=("smoke", "full"), default="smoke", help="about 20 CPU seconds a method, or 10 minutes"
    )
    parser.add_argument(
        "--seeds", type=_count, metavar="N", help="seeds to measure; by default 1 for smoke, 3 to 5 for full"
    )
    parser.add_argument("--jobs", type=_count, metavar="N", help="processes; by default one per core")
    parser.add_argument("--fresh", action="store_true", help="measure again what was kept")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/evidence"),
        metavar="DIR",
        help="folder for records and plots [docs/evidence]",
    )
    args = parser.parse_args(list(words))
    if not args.slugs and not args.all:
        print(listing(args.out))
        return 0
    for slug in args.slugs:
        if slug not in MEMBERS:
            raise UnknownNameError(
                f"reproduce: there is no claim test {slug!r}.{nearest(slug, MEMBERS)} There are: {', '.join(MEMBERS)}."
            )
    return _reproduce(list(MEMBERS) if args.all else list(dict.fromkeys(args.slugs)), args)


def _reproduce(slugs: list[str], args: Any) -> int:
    from guerdon.errors import require

    require("matplotlib", "evidence")  # before hours of work, not after
    from guerdon.evidence import find
    from guerdon.evidence.pages import save, write_page
    from guerdon.evidence.runner import cores, run
    from guerdon.evidence.table import show
    from guerdon.evidence.workers import Workers

    failed = []
    with Workers(args.jobs or cores()) as workers:
        for slug in slugs:
            try:
                evidence = run(find(slug), args.budget, args.seeds, fresh=args.fresh, workers=workers)
                show(evidence)
                if not save(evidence, args.out):
                    print(f"{args.out / slug}.json is kept: it holds a full run.")
            except GuerdonError as error:
                if len(slugs) == 1 or os.environ.get("GUERDON_TRACEBACK", "") not in ("", "0"):
                    raise
                failed.append(slug)
                print(f"guerdon: {error}", file=sys.stderr)
    if len(failed) < len(slugs):
        print(write_page(args.out))
    if failed:
        print(f"guerdon: {len(failed)} of {len(slugs)} tests failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def listing(folder: Path) -> str:
    """The claim tests there are, each with its claim and the result in a folder, if there is one."""
    from guerdon.evidence.pages import load

    lines = []
    for slug in MEMBERS:
        texts = constants(slug)
        record = folder / f"{slug}.json"
        found = load(record) if record.is_file() else None
        result = f"{found.verdict} ({found.budget})" if found else "not run"
        lines.append(f"{slug}: {texts['TITLE']}\n  {texts['CLAIM']}\n  {result}")
    return "\n".join(lines)


def constants(slug: str) -> dict[str, str]:
    """The literal texts of a claim test, read without importing it: that would import torch."""
    found = importlib.util.find_spec(f"guerdon.evidence.{MEMBERS[slug]}")
    assert found is not None
    assert found.origin is not None
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    return {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("SLUG", "TITLE", "PAPER", "CLAIM")
    }


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value
