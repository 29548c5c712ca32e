"""Inference: spending reward at sampling time, without training a weight."""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "best_of_n": "noise",
    "mix_adapters": "adapters",
    "norm_penalty": "noise",
    "optimise_noise": "noise",
    "revise": "revision",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
