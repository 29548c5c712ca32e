"""What a sample is worth: verifiers of answers, and terms that depend on length or on a reference."""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "appeal": "appeal",
    "block_closeness": "closeness",
    "box_closeness": "closeness",
    "box_hit": "closeness",
    "composition": "composition",
    "density_ratio": "density_ratio",
    "instant": "instant",
    "noisy": "noise",
    "exact_answer": "verifiers",
    "recorded": "recorded",
    "regex": "verifiers",
    "math_verify": "verifiers",
    "overlong": "overlong",
    "kl_penalty": "kl_penalty",
    "spans": "spans",
    "tournament": "tournament",
    "win_rate": "win_rate",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
