"""Numbers, durations and recipe values as short text."""

from __future__ import annotations

import json
from typing import Any, Literal

Style = Literal["plain", "share", "signed"]
Number = float | int | None  # JSON writes 1.0 as it likes


def figure(value: Number, style: Style = "plain") -> str:
    """A number with three significant digits, or a share as a percentage; a dash for nothing."""
    if value is None:
        return "–"
    if style == "share":
        return f"{100 * value:.1f}".removesuffix(".0") + "\u00a0%"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        text = f"{value:.0f}"
    elif value == 0 or abs(value) >= 0.001:
        text = f"{value:.3g}"
    else:
        text = f"{value:.1e}"
    text = "0" if text in ("-0", "0") else text
    return ("+" + text if style == "signed" and value > 0 else text).replace("-", "−", 1)


def change(before: Number, after: Number, style: Style = "plain") -> str:
    """The difference in words: percentage points for shares, a signed number otherwise; empty if there is none."""
    if before is None or after is None:
        return ""
    if style == "share":
        points = f"{100 * (after - before):+.1f}".removesuffix(".0")
        return ("0" if points in ("+0", "-0") else points.replace("-", "−")) + " points"
    return figure(after - before, "signed")


def duration(seconds: Number) -> str:
    """Seconds as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def setting(value: Any) -> str:
    """A recipe's value in one line."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and len(value) == 1 and next(iter(value.values())) in ({}, None):
        return str(next(iter(value)))
    return json.dumps(value, ensure_ascii=False, default=str).replace('"', "")


def cut(value: Any, limit: int) -> str:
    """The value as text of at most `limit` characters, saying how many are left out."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    left = len(text) - limit
    return text if left <= 0 else f"{text[:limit]} … ({left:,} more characters)"
