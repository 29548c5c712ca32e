"""Objectives: the loss.

Every member gives a `Loss(total, count, metrics)`; the loop minimises the totals of all micro-batches and processes
over their counts.
"""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "copo_loss": "copo",
    "dapo": "policy_gradient",
    "dr_grpo": "policy_gradient",
    "gspo": "policy_gradient",
    "policy_gradient": "policy_gradient",
    "ppo": "ppo",
    "real": "real",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
