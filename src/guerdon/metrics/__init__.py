"""Metrics: comparing rewards, policies and sets of samples."""

from __future__ import annotations

from guerdon.stages import lazy

MEMBERS = {
    "PromptSuite": "prompt_suite",
    "SuiteReport": "prompt_suite",
    "frechet_distance": "frechet",
    "hypervolume": "hypervolume",
    "hypervolume_contribution": "hypervolume",
    "judge_suite": "prompt_suite",
    "pareto_mask": "hypervolume",
    "vendi_score": "diversity",
}
__getattr__, __dir__ = lazy(__name__, MEMBERS)
__all__ = list(MEMBERS)
