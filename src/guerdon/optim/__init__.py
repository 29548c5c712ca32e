"""Optim: how the gradient of a loss is estimated and applied."""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS: dict[str, str] = {}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
