"""`guerdon methods`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from guerdon.catalogue import PACKAGES, Method, select
from guerdon.cli.parser import Parser
from guerdon.members import STAGES, facts, members


def run(words: Sequence[str]) -> int:
    """List the methods, and for a stage also the names that a recipe can use there, with their options."""
    parser = Parser("methods", "List the methods: slug, state, parts, source and what each does.")
    parser.add_argument("--stage", metavar="S", help=f"only those with a part in S: {', '.join(PACKAGES)}")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(list(words))
    methods = select(args.stage)
    names = components(args.stage) if args.stage in STAGES else []
    if args.json:
        import json

        listing: dict[str, object] = {"methods": [method.as_dict() for method in methods]}
        if args.stage in STAGES:
            listing["components"] = names
        print(json.dumps(listing, indent=2, ensure_ascii=False))
        return 0
    print(table(methods))
    if names:
        print(f"\nNames for a recipe ({args.stage}):")
        for entry in names:
            options = ", ".join(
                name if default is None else f"{name}={default}" for name, default in entry["options"].items()
            )
            print(f"  {entry['name']}" + (f"  ({options})" if options else "") + f"\n      {entry['summary']}")
    return 0


def table(methods: Sequence[Method]) -> str:
    """The methods as aligned text; on a terminal, cut to its width."""
    width = os.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    rows = [("slug", "state", "source", "what it does"), *((m.slug, m.state, _source(m), m.line) for m in methods)]
    sizes = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join((*(cell.ljust(size) for cell, size in zip(row, sizes, strict=False)), row[3])) for row in rows]
    states = [m.state for m in methods]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("built", "partly", "planned"))
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in lines) + f"\n\n{counts}"


def _source(method: Method) -> str:
    first, *more = (
        method.source.removeprefix("arXiv ").split(" ") if method.source.startswith("arXiv") else [method.source]
    )
    return f"{first} ..." if more else first


def components(stage: str) -> list[dict[str, Any]]:
    """Names, summaries and options (name -> default as source text, None if it must be given) of a stage's members."""
    found = []
    for name in members(stage):
        known = facts(stage, name)
        options = {option: details.default for option, details in (known.options or {}).items()}
        found.append({"name": name, "summary": known.summary, "fields": list(known.fields), "options": options})
    return found
