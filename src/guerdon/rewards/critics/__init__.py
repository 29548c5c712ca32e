"""Critics: what is good and what is poor in one sample, in words and by its phrases.

A critic takes a list of responses and returns a remark on each (see `guerdon.rewards.critics.base`). Those here are named
in a recipe as the option `critic` of the reward `spans`; any callable of the same form will do.
"""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "chat": "chat",
    "classifier": "classifier",
    "local": "local",
    "program": "program",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
