"""Advantages: what a sample is worth against its group, or a step against its future.

Every member takes `rewards` (or `scores`) and gives `advantages`, [P, G] or [P, G, T], without gradient.
"""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "adaptive_gae": "adaptive_gae",
    "copo": "copo",
    "dr_grpo": "group",
    "gae": "gae",
    "gae_by_component": "gae_by_component",
    "group_advantages": "group",
    "grpo": "group",
    "normalise_then_sum": "group",
    "prompt_tracker": "prompt_tracker",
    "reinforce": "group",
    "rloo": "group",
    "running_scale": "running",
    "value_anchored": "value_anchored",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
