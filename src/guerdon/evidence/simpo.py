"""SimPO's claim: without a reference and with a length-normalised reward, as good as DPO or better, and no exploited length."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from guerdon.evidence.base import Budget, Evidence, Results, Settings, Unit, compare, rate_plan
from guerdon.evidence.topics_task import topics_run
from guerdon.objectives.dpo import dpo
from guerdon.objectives.simpo import simpo

SLUG = "simpo"
TITLE = "SimPO"
PAPER = "SimPO: Simple Preference Optimization with a Reference-Free Reward, 2024, arXiv 2405.14734"
CLAIM = (
    "A length-normalised reward without a reference beats DPO by up to 6.4 points on AlpacaEval 2 (length-controlled) and 7.5 "
    "on Arena-Hard, without substantially longer answers."
)
ARMS = ("simpo", "dpo", "not-normalised")
SIZES: dict[Budget, Settings] = {
    "smoke": {"steps": 40, "batch_size": 32, "prompts": 200, "base_steps": 150},
    "full": {"steps": 200, "batch_size": 64, "prompts": 400, "base_steps": 300},
}
RATES = (5e-4, 1e-3)
LENGTH_BIAS = 0.15


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Two learning rates for each arm on another seed; then each arm on every seed."""
    trials = 1 if budget == "full" else 0
    return rate_plan(ARMS, SIZES[budget], RATES, seeds, trials=trials, tuned=tuned, default=1e-3)


def tune(results: Results) -> dict[str, Settings]:
    """The rate with the best true quality."""
    return results.best("quality")


def measure(unit: Unit) -> dict[str, Any]:
    """Train one arm on pairs whose labels favour longer answers."""
    objective = {
        "simpo": partial(simpo, beta=2.0, gamma_beta_ratio=0.5),
        "dpo": partial(dpo, beta=0.1),
        "not-normalised": partial(simpo, beta=0.1, gamma_beta_ratio=5.0, length_normalised=False),
    }[unit.arm]
    settings: dict[str, Any] = dict(unit.settings)
    return topics_run(unit.seed, objective, length_bias=LENGTH_BIAS, **settings)


def conclude(results: Results) -> Evidence:
    """Length exploitation and ranking are mechanisms; the win rate against DPO is the headline."""
    arms = {name: results.arm(name, role) for name, role in zip(ARMS, ("method", "baseline", "ablation"), strict=True)}

    def figures(name: str) -> list[list[float]]:
        return [arms[arm].figures[name] for arm in ARMS]

    correlation, accuracy = figures("length_correlation"), figures("likelihood_accuracy")
    gap = 0.1 if results.budget == "full" else 0.02
    checks = [
        compare(
            "longer is less likely than under DPO",
            correlation[0],
            correlation[1],
            margin=gap,
            better="low",
            kind="mechanism",
        ),
        compare(
            "without length normalisation it is more likely",
            correlation[1],
            correlation[2],
            margin=gap,
            better="low",
            kind="mechanism",
        ),
    ]
    if results.budget == "full":
        checks += [
            compare(
                "likelihood ranks pairs as well as DPO's", accuracy[0], accuracy[1], margin=-0.01, kind="mechanism"
            ),
            compare("and better than without normalisation", accuracy[0], accuracy[2], kind="mechanism"),
            compare("true quality against DPO", *figures("quality")[:2], margin=0.03),
            compare("win rate against the start, against DPO's", *figures("win_rate")[:2], errors=2.0),
        ]
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(arms.values()),
        checks=tuple(checks),
        notes=(
            "Topics task: 0.1 M weights, 3000 pairs labelled by sigmoid(6 x difference in quality + 0.15 x difference in "
            "length). length_correlation: over 1000 held-out pairs, of the difference in length with that in mean "
            "log-probability under the trained policy.",
            "not-normalised is SimPO on sums, beta 0.1 and gamma 0.5. Learning rates are tuned on another seed.",
        ),
        shown=("quality", "win_rate", "length", "length_correlation", "likelihood_accuracy", "seconds"),
    )
