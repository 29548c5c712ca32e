"""ReNO's claim: with as many pictures drawn, optimised noise beats the best of random noises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guerdon.evidence.base import Budget, Evidence, Results, Settings, Unit, at_least, at_most, compare, mean

SLUG = "reno"
TITLE = "ReNO"
PAPER = "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization, arXiv 2406.04312"
CLAIM = (
    "50 iterations on the noise lift one-step models above all open models of the time on T2I-CompBench and GenEval, by "
    "over 20 % in compositional categories."
)

ARMS = ("reno", "reno-free-norm", "best-of-n", "reno-two-steps", "best-of-n-two-steps")
SIZE: dict[Budget, tuple[int, int]] = {"smoke": (8, 10), "full": (24, 50)}  # prompts, iterations


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Each arm on every seed, with the paper's settings; nothing is tuned."""
    prompts, iterations = SIZE[budget]
    settings: Settings = {"prompts": prompts, "iterations": iterations}
    return [Unit(arm, seed, settings) for arm in ARMS for seed in range(seeds)]


def centre(images: Tensor) -> Tensor:
    """Where the coloured part of each picture [N, 3, H, W] lies: column and row [N, 2], in pixels."""
    colour = images.amax(1) - images.amin(1)
    mass = colour.sum((1, 2)) + 1e-6
    place = torch.arange(images.shape[-1], dtype=images.dtype)
    return torch.stack([(colour.sum(1) * place).sum(1) / mass, (colour.sum(2) * place).sum(1) / mass], 1)


def measure(unit: Unit) -> dict[str, Any]:
    """Search the noise of the shapes base for two rewards: what is asked for, and where."""
    from guerdon.diffusion.bases import base
    from guerdon.diffusion.oracle import oracle_likeness, quality
    from guerdon.diffusion.pathwise import first_noise, generator_of
    from guerdon.diffusion.tasks import find
    from guerdon.inference import best_of_n, optimise_noise

    count, iterations = int(unit.settings["prompts"]), int(unit.settings["iterations"])
    steps = 2 if unit.arm.endswith("two-steps") else 1
    policy = base("shapes/full", kind="flow", steps=steps).requires_grad_(False)
    rows = find("shapes").held_out_rows(count)
    labels = [row["label"] for row in rows]
    generate = generator_of(policy, [row["prompt"] for row in rows], steps=steps, checkpointing=False)
    drawn = torch.Generator().manual_seed(100 + unit.seed)
    wanted = 6 + 3 * torch.rand(count, 2, generator=drawn)
    likely = oracle_likeness(task="shapes", seed=0)
    rewards = {
        "likeness": lambda images: likely(images, labels),
        "place": lambda images: -(centre(images) - wanted).square().sum(1),
    }
    noise = first_noise(policy, [1000 * unit.seed + k for k in range(count)])
    if unit.arm.startswith("best"):
        others = torch.randn(iterations - 1, *noise.shape, generator=drawn)
        found = best_of_n(generate, torch.cat([noise[None], others]), rewards)
    else:
        weight = 0.0 if unit.arm == "reno-free-norm" else 0.01
        found = optimise_noise(generate, noise, rewards, iterations=iterations, norm_weight=weight)
    least = found.loss.cummin(0).values.mean(1)
    before, after = (quality("shapes", x, torch.tensor(labels), seed=1) for x in (found.initial, found.images))
    distance = (found.noise.flatten(1).norm(dim=1) - math.sqrt(noise[0].numel() - 1)).abs()
    figures = {
        "loss_before": least[0].item(),
        "loss_after": least[-1].item(),
        "judge_before": before.accuracy,
        "judge_after": after.accuracy,
        "judge_change": after.accuracy - before.accuracy,
        "frechet_before": before.distance,
        "frechet_after": after.distance,
        "norm_distance": distance.mean().item(),
    }
    return {"figures": figures, "curves": {"loss": [(float(i), v) for i, v in enumerate(least.tolist())]}}


def conclude(results: Results) -> Evidence:
    """The loss against the best of as many random noises, the judge, and the norm with and without its penalty."""
    methods = ("reno", "reno-two-steps")
    arms = tuple(
        results.arm(arm, "method" if arm in methods else "baseline" if arm.startswith("best") else "ablation")
        for arm in ARMS
    )
    halved = {
        arm: [
            after / before
            for before, after in zip(results.values(arm, "loss_before"), results.values(arm, "loss_after"), strict=True)
        ]
        for arm in methods
    }
    checks = [
        at_most("the loss falls, one step", halved["reno"], 0.5, what="mean of loss after / before"),
        at_most("the loss falls, two steps", halved["reno-two-steps"], 0.5, what="mean of loss after / before"),
    ]
    if results.budget == "full":
        loose = results.values("reno-free-norm", "norm_distance")
        checks += [
            # a short search leaves the norm where it was drawn
            at_most("the penalty holds the norm", results.values("reno", "norm_distance"), 0.5),
            at_least("without it the norm leaves", loose, 1.0),
            at_least("held-out judge, one step", results.values("reno", "judge_change"), -0.02, kind="headline"),
            *(
                compare(
                    f"a quarter of the loss of the best of n, {name}",
                    results.values(method, "loss_after"),
                    [value / 4 for value in results.values(other, "loss_after")],
                    better="low",
                )
                for name, method, other in (
                    ("one step", "reno", "best-of-n"),
                    ("two steps", "reno-two-steps", "best-of-n-two-steps"),
                )
            ),
        ]
    quality = mean(results.values("reno", "frechet_after")) - mean(results.values("reno", "frechet_before"))
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms,
        tuple(checks),
        notes=(*NOTES, f"Frechet distance changes by {quality:+.1f} at one step (a small sample: no threshold)."),
        shown=("loss", "loss_before", "loss_after", "judge_before", "judge_after", "frechet_after", "norm_distance"),
        x="pictures drawn",
    )


NOTES = (
    "The shapes base as a one-step generator, x = noise - velocity, and with two steps; no guidance. Two rewards of weight "
    "1: a classifier's log-probability of the class, and minus the squared distance, in pixels, of the coloured part's "
    "centre from a random place. Another classifier judges.",
    "Best of n draws as many pictures from random noises and keeps the one with the least loss.",
)
