"""The image models that claims are tested on: what the bundled bases draw, with and without guidance and noise on the way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from guerdon.evidence.base import Budget, Evidence, Results, Settings, Unit, at_least, at_most, compare

SLUG = "diffusion-base"
TITLE = "Bundled image models"
PAPER = "arXiv 2305.13301 (denoising as decisions), 2505.05470 (a flow's ODE as an SDE), 2207.12598 (guidance)"
CLAIM = (
    "A denoising step with noise is a Gaussian step with an exact log-probability, and the SDE of a flow has the marginals of "
    "its ODE. Here on models that train in two minutes: what is tested is what they draw."
)

BASES = {"shapes/full": "method", "shapes/short": "ablation", "digits/full": "method"}
SMOKE = ("digits/full",)
EACH = {"shapes": 10, "digits": 12}  # pictures of each class: 120 in all
WAYS = {  # steps, guidance, noise on the way
    "plain": (10, 1.0, False),
    "guided": (10, 2.0, False),
    "ode": (40, 1.0, False),
    "sde": (40, 1.0, True),
}


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Every base on every seed; nothing is tuned."""
    return [Unit(arm, seed) for arm in (SMOKE if budget == "smoke" else BASES) for seed in range(seeds)]


def measure(unit: Unit) -> dict[str, Any]:
    """Train a base, or read it from the cache, and have a classifier that it never met judge its pictures."""
    from guerdon.diffusion.bases import base, kept
    from guerdon.diffusion.oracle import quality
    from guerdon.diffusion.tasks import find

    task = unit.arm.partition("/")[0]
    figures, known, start = {}, kept(unit.arm, seed=unit.seed), time.process_time()
    for way, (steps, guidance, noisy) in WAYS.items():
        policy = base(unit.arm, seed=unit.seed, steps=steps, eval_steps=steps, guidance=guidance)
        if way == "plain" and not known:
            figures["train_s"] = time.process_time() - start
        captions = list(find(task).captions)
        places = range(len(captions))
        rollout = policy.sample(captions, EACH[task], [1000 * unit.seed + k for k in places], greedy=not noisy)
        images = torch.stack([image for group in rollout.samples for image in group])
        labels = torch.tensor([k for k in places for _ in range(EACH[task])])
        found = quality(task, images, labels)
        figures |= {f"accuracy_{way}": found.accuracy, f"distance_{way}": found.distance}
    return {"figures": figures, "curves": {}}


def conclude(results: Results) -> Evidence:
    """What a base draws; what guidance buys and costs; what noise on the way changes."""
    full = results.budget == "full"
    checks = []
    for arm in SMOKE if not full else ("shapes/full", "digits/full"):
        plain = results.values(arm, "accuracy_plain")
        checks.append(at_least(f"{arm} draws what it is asked for", plain, 0.9, what="mean accuracy"))
        checks.append(
            compare(
                f"{arm}: the SDE is as right as the ODE",
                results.values(arm, "accuracy_sde"),
                results.values(arm, "accuracy_ode"),
                margin=-0.05,
                kind="mechanism",
            )
        )
    if full:
        own = {
            name: results.values("shapes/full", name)
            for name in ("accuracy_plain", "accuracy_guided", "distance_plain")
        }
        guided = results.values("shapes/full", "distance_guided")
        checks += [
            at_most("shapes/full is near real pictures", own["distance_plain"], 30.0, what="mean Frechet distance"),
            compare(
                "guidance draws more of what is asked", own["accuracy_guided"], own["accuracy_plain"], kind="mechanism"
            ),
            compare("and goes away from real pictures", guided, own["distance_plain"], margin=10.0, kind="mechanism"),
            at_most(
                "shapes/short leaves room", results.values("shapes/short", "accuracy_plain"), 0.8, what="mean accuracy"
            ),
        ]
    roles: Any = BASES
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(results.arm(arm, roles[arm]) for arm in (BASES if full else SMOKE)),
        checks=tuple(checks),
        notes=(
            "120 pictures a base and way, the same number of each class, judged by a classifier of seed 1. Distance: Frechet, "
            "in that classifier's 64 features, from as many real pictures. plain: 10 steps without noise; guided: guidance 2; "
            "ode and sde: 40 steps without noise, and with (0.7 for flows, eta 1 for DDIM).",
            "train_s is CPU seconds of training where the base was not in the cache.",
        ),
        shown=(
            "accuracy_plain",
            "distance_plain",
            "accuracy_guided",
            "distance_guided",
            "accuracy_ode",
            "accuracy_sde",
            "train_s",
        ),
    )
