"""Docstrings as they stand in the code, made ready for the pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

_PLAIN = ("Gradient", "Edge cases", "Source")  # sections of our own, shown as paragraphs
# shapes such as [P][G] and [P, G] are no links
_BRACKET = re.compile(r"(?<!`)\[(?=[A-Z*.\d])([^\]`]*)\]")


class Docstrings(griffe.Extension):
    """Reads `Example:` as a section of examples, and keeps shapes in brackets from being taken for links."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = prepare(obj.docstring.value)


def prepare(text: str) -> str:
    """A docstring for the pages; its examples and code are left alone."""
    lines, section = [], ""
    for line in text.split("\n"):
        heading = re.fullmatch(r"([A-Z][A-Za-z ]*):", line)
        if heading:
            section = heading[1]
            if section in _PLAIN:
                lines += [f"**{section}:**", ""]
            else:
                lines.append("Examples:" if section == "Example" else line)
        elif section == "Example":
            lines.append(line)
        else:
            lines.append(_escape(line.removeprefix("    ") if section in _PLAIN else line))
    return "\n".join(lines)


def _escape(line: str) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else _BRACKET.sub(r"\\[\1\\]", part) for part in parts)
