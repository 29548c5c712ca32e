"""Shaping: what one component's score becomes before it is weighed.

A member takes one component's `scores` [P, G] and gives the shaped `scores` [P, G].
"""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "backward_correction": "noise_correction",
    "forward_correction": "noise_correction",
    "sweet_spot": "sweet_spot",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
