"""VADE's claim: posteriors of difficulty find groups that teach, and no rollout is spent on finding them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from guerdon.advantages.group import grpo
from guerdon.evidence.base import (
    Arm,
    Budget,
    Check,
    Evidence,
    Points,
    Results,
    Settings,
    Unit,
    compare,
    first_reach,
    mean,
    sd,
    tuning_seeds,
)
from guerdon.evidence.sort_task import sort_run
from guerdon.language.tasks import sort
from guerdon.objectives.policy_gradient import dapo
from guerdon.rewards import exact_answer
from guerdon.sampling.base import Sampler
from guerdon.sampling.dynamic import Dynamic
from guerdon.sampling.uniform import Uniform
from guerdon.sampling.vade import Vade
from guerdon.signal import Signal
from guerdon.training.online import StepResult

SLUG = "vade"
TITLE = "VADE: variance-aware dynamic sampling"
PAPER = (
    "VADE: Variance-Aware Dynamic Sampling via Online Sample-Level Difficulty Estimation for Multimodal RL, 2025, "
    "arXiv 2511.18902"
)
CLAIM = (
    "Choosing prompts by an online estimate of their difficulty, before the rollout, beats GRPO and GSPO and filtering "
    "after the rollout, in final score and in samples, without extra rollouts (the abstract gives no figure)."
)

# simulated prompts of known difficulty: 30 % hopeless, 30 % trivial; what is measured are its last steps
BANDITS: dict[str, Settings] = {
    "bandit-vade": {"decay_global": 0.998, "decay_selected": 0.8},
    "bandit-fast": {"decay_global": 0.995, "decay_selected": 0.5},
    "bandit-undecayed": {"decay_global": 1.0, "decay_selected": 1.0},
    "bandit-uniform": {},
}
WORLD: Settings = {"steps": 80, "last": 40}
SEEDS = {"smoke": 3, "full": 5}
PROMPTS, BATCH, GROUP = 512, 32, 8
DRIFT = 0.03  # logit a step

# the sort task from a weak start, a fixed pool of prompts
TRAINED = ("vade", "uniform", "filtering")
POOL = 1000
SHORT: Settings = {"steps": 250}
FILTERED: Settings = {"steps": 60}  # of several rollouts each
RATES = (1e-4, 3e-4, 6e-4)
TARGET = 0.15  # sampled accuracy that rollouts are counted to
ROLES = {
    "vade": "method",
    "uniform": "baseline",
    "filtering": "baseline",
    "bandit-vade": "method",
    "bandit-uniform": "baseline",
}


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """The bandit; in full also training, its learning rates tuned in half as many steps on another seed."""
    units = [Unit(arm, seed, {**WORLD, **settings}) for arm, settings in BANDITS.items() for seed in range(seeds)]
    if budget == "smoke":
        return units
    length = {arm: int((FILTERED if arm == "filtering" else SHORT)["steps"]) for arm in TRAINED}
    for arm in TRAINED:
        for lr in RATES:
            units += [Unit(arm, s, {"steps": length[arm] // 2, "lr": lr}, "tune") for s in tuning_seeds(1)]
        rate = (tuned or {}).get(arm, {"lr": 3e-4})["lr"]
        units += [Unit(arm, seed, {"steps": length[arm], "lr": rate}) for seed in range(seeds)]
    return units


def tune(results: Results) -> dict[str, Settings]:
    """The learning rate with the best sampled accuracy."""
    return results.best("sampled_after", keep=("lr",))


def measure(unit: Unit) -> dict[str, Any]:
    """Play a bandit in a world that stands still and in one that moves, or train."""
    if unit.arm in BANDITS:
        found: dict[str, Any] = {"figures": {}, "curves": {}}
        for world, drift in (("still", 0.0), ("moving", DRIFT)):
            for kind, values in bandit(unit, drift).items():
                found[kind] |= {f"{name}_{world}": value for name, value in values.items()}
        return found
    return trained(unit)


def bandit(unit: Unit, drift: float) -> dict[str, Any]:
    """Share of mixed groups, and how far the posterior means of the selected prompts are off."""
    steps, last = int(unit.settings["steps"]), int(unit.settings["last"])
    random = np.random.default_rng([unit.seed, 1])
    kind = random.permutation(PROMPTS) / PROMPTS
    logits = random.normal(0.0, 1.5, PROMPTS)
    sampler: Sampler = Uniform()
    if unit.arm != "bandit-uniform":
        fade, forget = (float(unit.settings[name]) for name in ("decay_global", "decay_selected"))
        sampler = Vade(decay_global=fade, decay_selected=forget)
    sampler.prepare(PROMPTS, unit.seed)
    mixed, errors = [], []
    for step in range(steps):
        truth = 1 / (1 + np.exp(-(logits + drift * step)))
        truth = np.where(kind < 0.3, 0.0, np.where(kind < 0.6, 1.0, truth))
        chosen = sampler.draw(BATCH)
        right = random.binomial(GROUP, truth[chosen])
        mixed.append(float(np.mean((right > 0) & (right < GROUP))))
        if isinstance(sampler, Vade):
            errors.append(float(np.mean(np.abs(sampler.mean.numpy()[chosen] - truth[chosen]))))
            scores = (torch.arange(GROUP) < torch.from_numpy(right)[:, None]).float().unsqueeze(-1)
            sampler.observe(chosen, scores)
    curves: dict[str, Points] = {"mixed": _thin(mixed)}
    figures = {"mixed": mean(mixed), "mixed_last": mean(mixed[-last:])}
    if errors:
        figures["error_last"] = mean(errors[-last:])
        curves["error"] = _thin(errors)
    return {"figures": figures, "curves": curves}


def trained(unit: Unit) -> dict[str, Any]:
    """Train on the sort task; accuracy over rollouts as well as over steps."""
    steps = int(unit.settings["steps"])
    samplers: dict[str, Sampler] = {
        "vade": Vade(),
        "uniform": Uniform(),
        "filtering": Dynamic(max_draws=20, on_shortage="train"),
    }
    spent = [0.0]

    def count(result: StepResult) -> None:
        spent.append(spent[-1] + result.metrics["draws"] * BATCH * GROUP)

    found = sort_run(
        unit.seed,
        signal=Signal(rewards={"correct": exact_answer}, advantage=grpo),
        objective=dapo,
        sampler=samplers[unit.arm],
        rows=sort.train_rows(unit.seed)[:POOL],
        warm_steps=50,
        steps=steps,
        prompts=BATCH,
        group_size=GROUP,
        lr=float(unit.settings["lr"]),
        eval_every=max(steps // 12, 1),
        eval_samples=4,
        on_step=count,
    )
    by_rollouts = [(spent[int(step)], share) for step, share in found["curves"]["sampled"]]
    found["curves"]["sampled_by_rollouts"] = by_rollouts
    found["figures"]["rollouts_needed"] = first_reach(TARGET, by_rollouts)
    return found


def conclude(results: Results) -> Evidence:
    """Compare the arms."""
    names = [*BANDITS, *(TRAINED if results.budget == "full" else ())]
    arms: dict[str, Arm] = {name: results.arm(name, ROLES.get(name, "ablation")) for name in names}  # pyright: ignore[reportArgumentType]
    ours, plain = arms["bandit-vade"], arms["bandit-undecayed"]
    checks = [
        _ratio("bandit: more mixed groups", ours, arms["bandit-uniform"], "mixed_last_still", 1.8),
        _ratio(
            "bandit that moves: decay keeps the estimate near", ours, plain, "error_last_moving", 0.75, better="low"
        ),
    ]
    if results.budget == "full":
        vade, uniform, filtering = (arms[name] for name in TRAINED)
        checks += [
            _ratio("training: more mixed groups", vade, uniform, "mixed_groups", 1.5),
            compare(
                "sampled accuracy after as many rollouts",
                vade.figures["sampled_after"],
                uniform.figures["sampled_after"],
                margin=0.03,
            ),
            _needed(vade, filtering),
        ]
    plots = ("mixed_still", "mixed_moving", "error_still", "error_moving")
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        tuple(arms.values()),
        tuple(checks),
        NOTES,
        plots + (("sampled_by_rollouts", "mixed_groups") if results.budget == "full" else ()),
    )


def _ratio(name: str, method: Arm, baseline: Arm, figure: str, bound: float, better: str = "high") -> Check:
    ours, theirs = method.mean(figure), baseline.mean(figure)
    high = better == "high"
    return Check(
        name,
        f"mean {'>=' if high else '<='} {bound:g} x {baseline.name}'s",
        bool(ours >= bound * theirs if high else ours <= bound * theirs),
        "mechanism",
        {"method": ours, "baseline": theirs, "spread": sd(method.figures[figure])},
    )


def _needed(vade: Arm, filtering: Arm) -> Check:
    """A run of filtering that ends below the target needs at least what it has used."""
    ours = vade.figures["rollouts_needed"]
    theirs = [
        needed if math.isfinite(needed) else used
        for needed, used in zip(filtering.figures["rollouts_needed"], filtering.figures["rollouts"], strict=True)
    ]
    return Check(
        f"samples to a sampled accuracy of {TARGET:g}",
        "mean <= 0.5 x filtering's (a run that does not get there counts with all its samples)",
        mean(ours) <= 0.5 * mean(theirs),
        "headline",
        {
            "method": mean(ours),
            "baseline": mean(theirs),
            "spread": sd(ours),
        },
    )


def _thin(values: list[float], window: int = 4) -> Points:
    return [(i + window / 2, mean(values[i : i + window])) for i in range(0, len(values), window)]


NOTES = (
    f"Bandit: {PROMPTS} prompts, 30 % with no chance, 30 % that are always right, the rest logit-normal (0, 1.5); "
    f"{BATCH} of them a step with {GROUP} samples each. In the world that moves every logit rises by {DRIFT} a step. "
    "The error is |posterior mean - truth| of the selected prompts; figures are of the second half of the steps.",
    f"Training (full only): sort task, 0.1 M weights, from a weak start (50 supervised steps), a fixed pool of {POOL} "
    f"prompts; uniform and VADE {SHORT['steps']} steps, filtering (draw until 32 groups are mixed, at most 20 times) "
    f"{FILTERED['steps']} steps of several rollouts each. Learning rates tuned on one other seed in half as many "
    "steps.",
    "The paper's models see images; its two-scale decay is known by name and purpose only, so the formula is ours.",
)
