"""Do the group-relative losses learn at all, does clipping hold the policy, does dynamic sampling fill the batch?"""

from __future__ import annotations

from functools import partial
from typing import Any

from guerdon import advantages, objectives
from guerdon.evidence.base import Budget, Evidence, Results, Settings, Unit, at_least, compare
from guerdon.evidence.sort_task import MAX_NEW_TOKENS, sort_run
from guerdon.rewards import exact_answer
from guerdon.sampling.dynamic import Dynamic
from guerdon.signal import Signal

SLUG = "grpo-family"
TITLE = "Group-relative policy gradients"
PAPER = (
    "Shao et al. 2024, DeepSeekMath (GRPO), arXiv 2402.03300; Ahmadian et al. 2024, Back to Basics (RLOO), "
    "arXiv 2402.14740; "
    "Liu et al. 2025, Understanding R1-Zero-Like Training (Dr. GRPO), arXiv 2503.20783; "
    "Yu et al. 2025, DAPO, arXiv 2503.14476; "
    "Zheng et al. 2025, Group Sequence Policy Optimization, arXiv 2507.18071"
)
CLAIM = (
    "The mean of a group replaces the critic, clipped ratios allow several passes over the same samples, and dynamic "
    "sampling leaves no group without a signal (DAPO: 50 on AIME 2024 in half of the steps in which an earlier recipe "
    "reached 47)."
)
SEEDS = {"smoke": 1, "full": 3}

LOSSES: dict[Budget, tuple[str, ...]] = {"smoke": ("dapo",), "full": ("grpo", "rloo", "dr_grpo", "dapo", "gspo")}
STEPS: dict[Budget, int] = {"smoke": 40, "full": 200}
FIGURES = ("sampled_before", "sampled_after", "greedy_before", "greedy_after")
CURVES = ("sampled", "greedy", "entropy", "mixed_groups", "ratio_max", "reward")
GAIN: dict[Budget, float] = {"smoke": 0.08, "full": 0.25}
EARLY: dict[Budget, int] = {"smoke": 4, "full": 40}  # the step at which several passes are compared with one


def plan(budget: Budget, seeds: int, tuned: dict[str, Settings] | None = None) -> list[Unit]:
    """Every loss; four passes clipped and not clipped; dynamic sampling."""
    early = EARLY[budget]
    arms: dict[str, Settings] = {name: {"steps": STEPS[budget], "eval_every": 40} for name in LOSSES[budget]}
    if "gspo" in arms:
        arms["gspo"]["mini_batches"] = 2
    arms |= {name: {"steps": early, "passes": 4} for name in ("clipped", "unclipped")}
    arms["dynamic"] = {"steps": early}
    return [
        Unit(name, seed, {**settings, "early": early, "lr": 3e-4})
        for name, settings in arms.items()
        for seed in range(seeds)
    ]


def measure(unit: Unit) -> dict[str, Any]:
    """Train one variant on the sort task."""
    variants = {
        "grpo": (advantages.grpo, objectives.policy_gradient),
        "rloo": (advantages.rloo, objectives.policy_gradient),
        "dr_grpo": (advantages.dr_grpo, partial(objectives.dr_grpo, max_length=MAX_NEW_TOKENS)),
        "gspo": (advantages.grpo, objectives.gspo),
        "unclipped": (
            advantages.grpo,
            partial(objectives.policy_gradient, clip_low=None, clip_high=None, denominator="per_token"),
        ),
    }
    advantage, objective = variants.get(unit.arm, (advantages.grpo, objectives.dapo))
    settings: dict[str, Any] = dict(unit.settings)
    found = sort_run(
        unit.seed,
        signal=Signal(rewards={"correct": exact_answer}, advantage=advantage),
        objective=objective,
        sampler=Dynamic() if unit.arm == "dynamic" else None,
        eval_at=(settings.pop("early"),),
        **settings,
    )
    # the points at which one pass and four can be compared
    found["figures"] |= {f"sampled_at_{step:g}": share for step, share in found["curves"]["sampled"]}
    return found


def conclude(results: Results) -> Evidence:
    """Gains of every loss; several passes against one; share of mixed groups."""
    budget = results.budget
    early = f"sampled_at_{EARLY[budget]}"
    gains = [
        at_least(
            f"{name} learns", results.values(name, "sampled_gain"), GAIN[budget], what="mean gain in sampled accuracy"
        )
        for name in LOSSES[budget]
    ]
    within = compare(
        f"four clipped passes are no worse than one, sampled accuracy after {EARLY[budget]} steps",
        results.values("clipped", early),
        results.values("dapo", early),
        margin=-0.1,
        kind="mechanism",
    )
    ratios = compare(
        "the largest ratio of a step grows without the clip",
        results.values("unclipped", "ratio_max"),
        results.values("clipped", "ratio_max"),
        kind="mechanism",
    )
    filled = at_least(
        "dynamic sampling trains on mixed groups only",
        results.values("dynamic", "mixed_groups"),
        1.0,
        what="share of mixed groups",
    )
    filled.figures["baseline"] = results.arm("dapo", "baseline").mean("mixed_groups")
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=(
            *(results.arm(name, "method") for name in LOSSES[budget]),
            results.arm("clipped", "method"),
            results.arm("unclipped", "baseline"),
            results.arm("dynamic", "method"),
        ),
        checks=(*gains, within, ratios, filled),
        notes=(
            "Every arm has the same learning rate, 3e-4: the losses are compared with the policy they start from, not "
            "with one another.",
            "One update per rollout, but for GSPO, which has two: with one, its gradient is exactly that of GRPO.",
            "clipped and unclipped are the loss of dapo with four passes over each rollout. They run as long as the "
            "comparison needs, and so does dynamic.",
            "That GSPO is stable on mixture-of-experts models, and DAPO's score on AIME, need models that are not "
            "tested here.",
        ),
        shown=(*FIGURES, *CURVES),
    )
