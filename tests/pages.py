"""The code blocks of a Markdown page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r'^```([\w-]*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file it is said to be (or none), its text and its line on the page."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], m[2] or "", m[3], text.count("\n", 0, m.start()) + 2) for m in _FENCE.finditer(text)]


@dataclass(frozen=True)
class Command:
    """A `guerdon ...` line; `answer` is the line below it where the page shows a session (`$ guerdon ...`)."""

    line: str
    answer: str = ""


def commands(page: Path) -> list[Command]:
    """The `guerdon ...` lines of a page's blocks, without comments and launchers."""
    found = []
    for block in blocks(page):
        if block.language in ("", "console", "bash"):
            lines = block.text.splitlines()
            for line, following in zip(lines, [*lines[1:], ""], strict=True):
                match = re.match(r"(\$ )?(?:accelerate launch .*?-m )?(guerdon .*)", line.partition("  #")[0].strip())
                if match and not line.startswith("guerdon: "):
                    found.append(Command(match[2], following if match[1] else ""))
    return found


def own_pages() -> list[Path]:
    """The pages whose Python blocks are complete programs; the ones of single methods show excerpts."""
    docs = ROOT / "docs"
    named = ["index.md", "quickstart.md", "methods/grpo-family.md", "methods/index.md", "recipes.md", "evidence.md"]
    folders = [*docs.glob("concepts/*.md"), *docs.glob("guides/*.md"), *docs.glob("howto/*.md")]
    return [ROOT / "README.md", *(docs / name for name in named), *sorted(folders)]
