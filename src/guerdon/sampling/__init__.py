"""Sampling: which prompts are worth samples.

A sampler draws positions of the data, and may refuse groups after they were scored. Its buffers are its whole state.
"""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {"dynamic": "dynamic", "uniform": "uniform", "vade": "vade"}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
