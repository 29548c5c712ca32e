"""Weighting: how the scores of many components become one reward.

Every member takes `scores` [P, G, K] and gives `rewards` [P, G] with the `weights` it used.
"""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "expression": "expression",
    "gradient_alignment": "gradient_alignment",
    "hypervolume": "hypervolume",
    "lagrangian": "lagrangian",
    "linear": "linear",
    "proxy_point_search": "proxy_points",
    "tri_factor": "tri_factor",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
