"""Metrics: comparing rewards, policies and sets of samples."""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "PromptSuite": "prompt_suite",
    "SuiteReport": "prompt_suite",
    "frechet_distance": "frechet",
    "judge_suite": "prompt_suite",
    "vendi_score": "diversity",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
