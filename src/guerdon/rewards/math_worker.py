"""The program of the child process in `math_process`: requests and replies are lines of JSON. It imports no guerdon."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from typing import Any


def boxed_part(text: str) -> str:
    r"""The last `\boxed{...}` of a text with its braces balanced, or an empty string."""
    start = text.rfind(r"\boxed{")
    depth = 0
    for position in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start : position + 1]
    return ""


def shown(expression: Any) -> str | None:
    """An expression as text, 0.60 as 0.6; None for a number with more digits than Python writes."""
    from sympy import sstr

    try:
        return sstr(expression, full_prec=False)
    except ValueError:
        return None


def main() -> None:
    """Answer requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a parser prints must not be taken for a reply

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    try:
        from math_verify import parse, verify
    except Exception as error:  # told to the parent, which raises it
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    logging.disable()

    @functools.lru_cache(maxsize=4096)
    def gold_of(text: str) -> list[Any]:
        return parse(text, fallback_mode="no_fallback", parsing_timeout=0)

    reply({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        gold = gold_of(request["gold"])
        text = boxed_part(request["sample"]) if request["boxed"] else request["sample"]
        found = parse(text, fallback_mode="no_fallback", parsing_timeout=0) if gold and text else []
        right = bool(found) and verify(gold, found, timeout_seconds=None)
        reply(
            {
                "gold": bool(gold),
                "score": float(right),
                "answer": shown(gold[0] if right else found[0]) if found else None,
            }
        )


if __name__ == "__main__":
    main()
