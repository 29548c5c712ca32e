"""Shaping: what one component's score becomes before it is weighed.

A member takes one component's `scores` [P, G] and gives the shaped `scores` [P, G].
"""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "backward_correction": "noise_correction",
    "centred": "par",
    "ceil": "bounded",
    "clip": "running",
    "distance": "distance",
    "forward_correction": "noise_correction",
    "length_penalty": "bounded",
    "log_sigmoid_centred": "par",
    "mean_std": "running",
    "min_max": "running",
    "par": "par",
    "poly": "bounded",
    "poly_centred": "par",
    "reference_frozen": "reference_frozen",
    "reference_frozen_per_prompt": "reference_frozen",
    "saturated": "bounded",
    "sgfc": "par",
    "sigmoid": "bounded",
    "sweet_spot": "sweet_spot",
    "tanh": "bounded",
    "tanh_centred": "par",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
