"""Does every member of the DPO family lift the true quality of samples, from noisy preferences alone?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from guerdon import objectives
from guerdon.evidence.base import Budget, Evidence, Results, Settings, Unit, at_least, rate_plan
from guerdon.evidence.topics_task import topics_run

SLUG = "dpo-family"
TITLE = "The DPO family"
PAPER = (
    "Rafailov et al. 2023, Direct Preference Optimization, arXiv 2305.18290; arXiv 2310.12036 (IPO), 2305.10425 (SLiC), "
    "2402.01306 (KTO), 2403.07691 (ORPO), 2401.08417 (CPO)"
)
CLAIM = (
    "A policy learns from pairs by a classification loss, without a reward model and without sampling (DPO: as good as or "
    "better than PPO on summaries and dialogue). These are baselines: what is tested is that each of them learns."
)
LOSSES: dict[Budget, tuple[str, ...]] = {
    "smoke": ("dpo",),
    "full": ("dpo", "ipo", "slic", "kto", "orpo", "cpo", "simpo"),
}
SIZES: dict[Budget, Settings] = {
    "smoke": {"steps": 60, "batch_size": 32, "prompts": 200, "base_steps": 150},
    "full": {"steps": 150, "batch_size": 64, "prompts": 400, "base_steps": 300},
}
RATES = (3e-4, 1e-3)
GAIN: dict[Budget, float] = {"smoke": 0.08, "full": 0.15}


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Two learning rates for each loss on another seed; then each loss on every seed."""
    trials = 1 if budget == "full" else 0
    return rate_plan(LOSSES[budget], SIZES[budget], RATES, seeds, trials=trials, tuned=tuned, default=1e-3)


def tune(results: Results) -> dict[str, Settings]:
    """The rate with the best true quality."""
    return results.best("quality")


def measure(unit: Unit) -> dict[str, Any]:
    """Train one variant on the topics task."""
    options = {"ipo": {"beta": 0.5}, "simpo": {"gamma_beta_ratio": 0.5}}
    settings: dict[str, Any] = dict(unit.settings)
    return topics_run(unit.seed, partial(getattr(objectives, unit.arm), **options.get(unit.arm, {})), **settings)


def conclude(results: Results) -> Evidence:
    """Gains of every loss, and win rates against the supervised start."""
    budget = results.budget
    checks = []
    for name in LOSSES[budget]:
        gain, wins = (results.values(name, figure) for figure in ("quality_gain", "win_rate"))
        checks.append(at_least(f"{name} lifts true quality", gain, GAIN[budget], what="mean gain over the start"))
        checks.append(at_least(f"{name} wins against its start", wins, 0.6, what="mean win rate"))
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(results.arm(name, "method") for name in LOSSES[budget]),
        checks=tuple(checks),
        notes=(
            "Topics task: 0.1 M weights, four prompts, 3000 pairs labelled by sigmoid(6 x difference in quality); win rate "
            "and quality are measured with the true quality, which no loss sees.",
            "The losses are compared with the supervised policy they start from, not with one another: beta is not tuned.",
        ),
        shown=("quality", "quality_gain", "win_rate", "length", "accuracy"),
    )
