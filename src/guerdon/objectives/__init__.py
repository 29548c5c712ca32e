"""Objectives: the loss.

Every member gives a `Loss(total, count, metrics)`; the loop minimises the totals of all micro-batches and processes
over their counts.
"""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "aot": "aot",
    "copg": "copg",
    "copo_loss": "copo",
    "cpo": "cpo",
    "dapo": "policy_gradient",
    "demonstration": "demonstration",
    "demonstration_value": "demonstration_value",
    "diffusion_dpo": "diffusion_dpo",
    "dpo": "dpo",
    "dpok": "dpok",
    "dr_grpo": "policy_gradient",
    "exo": "exo",
    "gspo": "policy_gradient",
    "ipo": "ipo",
    "kto": "kto",
    "nca": "nca",
    "orpo": "orpo",
    "policy_gradient": "policy_gradient",
    "ppo": "ppo",
    "prdp": "reward_difference",
    "real": "real",
    "reward_weighted": "reward_weighted",
    "simpo": "simpo",
    "slic": "slic",
    "sppo": "sppo",
    "srpo": "srpo",
    "tgdpo": "tgdpo",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
