"""Judges of pairs: which of two samples for the same prompt is better, and by how much.

A judge takes a list of matches and returns a verdict for each (see `guerdon.rewards.judges.base`). Those here are named
in a recipe as the option `judge` of a reward; any callable of the same form will do.
"""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "chat": "chat",
    "local": "local",
    "pairwise": "pairwise",
    "pointwise": "pointwise",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
