"""Objectives: the loss.

Every member gives a `Loss(total, count, metrics)`; the loop minimises the totals of all micro-batches and processes
over their counts.
"""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "copo_loss": "copo",
    "dapo": "policy_gradient",
    "dpok": "dpok",
    "dr_grpo": "policy_gradient",
    "gspo": "policy_gradient",
    "policy_gradient": "policy_gradient",
    "ppo": "ppo",
    "prdp": "reward_difference",
    "real": "real",
    "reward_weighted": "reward_weighted",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
