"""AlignProp's claim: a reward's gradient through the sampler earns more from fewer samples than a policy gradient."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from guerdon.evidence.base import (
    Budget,
    Evidence,
    Results,
    Settings,
    Unit,
    at_least,
    compare,
    tuning_seeds,
)

SLUG = "alignprop"
TITLE = "AlignProp"
PAPER = "AlignProp: Aligning Text-to-Image Diffusion Models with Reward Backpropagation, arXiv 2310.03739"
CLAIM = (
    "Higher rewards in fewer steps and samples than policy gradients (DDPO) and ReFL; a random cut avoids the collapse of "
    "the full gradient."
)

STEPS = 8
ARMS = ("random", "last", "full", "policy-gradient")
CUTS = {"random": "uniform", "last": "last", "full": "full"}
RATES = {"random": (1e-3, 2e-3), "policy-gradient": (3e-4, 1e-3)}
UPDATES: dict[Budget, int] = {"smoke": 4, "full": 20}  # the policy gradient makes twice as many in full
PROMPTS, GROUP = 2, 8
TARGETS = ["conv1", "conv2", "time_emb_proj", "conv_shortcut", "linear_1", "linear_2"]
LORA = {"rank": 8, "alpha": 8, "target_modules": TARGETS}
AREA, STIFFNESS = 0.6, 20.0


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """In full a learning rate for each kind of gradient on one other seed; then each arm on every seed."""

    def updates(arm: str) -> int:
        return UPDATES[budget] * (2 if arm == "policy-gradient" and budget == "full" else 1)

    trials = [
        Unit(arm, seed, {"updates": updates(arm), "lr": rate}, "tune")
        for arm, rates in RATES.items()
        for rate in rates
        for seed in (tuning_seeds(1) if budget == "full" else ())
    ]
    chosen = tuned or {}
    # all cuts take the rate found for the random one: nothing is tuned for an ablation alone
    rates = {arm: chosen.get(arm if arm in RATES else "random", {"lr": RATES["random"][1]})["lr"] for arm in ARMS}
    return trials + [
        Unit(arm, seed, {"updates": updates(arm), "lr": rates[arm]}) for arm in ARMS for seed in range(seeds)
    ]


def tune(results: Results) -> dict[str, Settings]:
    """The learning rate with the best reward at the end."""
    return results.best("reward_after")


def coloured(images: Tensor) -> Tensor:
    """Share of a picture's area that has a colour: the mean spread of its channels, [N]."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def worth(images: Tensor, label: Any) -> Tensor:
    """A bounded reward, [N]: is it what was asked for, and as large as it should be?"""
    from guerdon.diffusion.oracle import oracle_likeness

    likely = oracle_likeness(task="shapes", seed=0)(images, label)
    return likely - STIFFNESS * (coloured(images) - AREA).square()


def measure(unit: Unit) -> dict[str, Any]:
    """Train the shapes base from rewards, by gradient or by policy gradient."""
    from guerdon.advantages import grpo
    from guerdon.diffusion.bases import base
    from guerdon.diffusion.tasks import find
    from guerdon.objectives.policy_gradient import policy_gradient
    from guerdon.signal import Signal
    from guerdon.training import Online, Optim, Pathwise, Truncation

    policy = base("shapes/full", kind="flow", steps=STEPS, noise_level=0.7)
    policy.add_adapters(**LORA)
    updates, rows = int(unit.settings["updates"]), find("shapes").prompt_rows()
    options: dict[str, Any] = {
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "optim": Optim(lr=float(unit.settings["lr"])),
        "steps": updates,
        "seed": unit.seed,
    }
    before = _judged(policy, rows, unit.seed)
    if unit.arm == "policy-gradient":

        def objective(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor) -> Any:
            return policy_gradient(logp, logp_old, advantages, mask, clip_low=1e-4, clip_high=1e-4)

        loop: Any = Online(policy, rows, Signal(rewards={"worth": worth}, advantage=grpo), objective, **options)
    else:
        cut = Truncation(cast(Literal["full", "last", "uniform"], CUTS[unit.arm]))
        signal = Signal(rewards={"worth": worth})
        loop = Pathwise(policy, rows, signal, truncation=cut, deterministic=True, checkpointing=False, **options)
    start = time.process_time()
    curve = [(float(step), loop.step().metrics["reward"]) for step in range(1, updates + 1)]
    seconds = time.process_time() - start
    after = _judged(policy, rows, unit.seed)
    figures = {
        "reward_before": before["reward"],
        "reward_after": after["reward"],
        "gain": after["reward"] - before["reward"],
        "judge_before": before["judge"],
        "judge_after": after["judge"],
        "area_after": after["area"],
        "cpu_s": seconds,
    }
    return {"figures": figures, "curves": {"reward": curve}}


@torch.no_grad()
def _judged(policy: Any, rows: list[dict[str, Any]], seed: int) -> dict[str, float]:
    """120 pictures of the deterministic sampler, ten a class."""
    from guerdon.diffusion.oracle import quality

    seeds = [1_000_000 + 1000 * seed + k for k in range(10 * len(rows))]
    prompts, labels = [r["prompt"] for r in rows] * 10, torch.tensor([r["label"] for r in rows] * 10)
    images = torch.stack([group[0] for group in policy.sample(prompts, 1, seeds, greedy=True).samples])
    return {
        "reward": worth(images, labels.tolist()).mean().item(),
        "area": coloured(images).mean().item(),
        "judge": quality("shapes", images, labels, seed=1).accuracy,
    }


def conclude(results: Results) -> Evidence:
    """The random cut against the policy gradient, which sees twice as many samples in full."""
    roles: dict[str, Any] = {"random": "method", "policy-gradient": "baseline"}
    arms = tuple(results.arm(arm, roles.get(arm, "ablation")) for arm in ARMS)
    gains = [at_least(f"{arm} cut: the reward rises", results.values(arm, "gain"), 0.1) for arm in CUTS]
    checks = [*gains]
    if results.budget == "full":
        checks += [
            compare(
                "reward from half the samples",
                results.values("random", "reward_after"),
                results.values("policy-gradient", "reward_after"),
                errors=2.0,
            ),
            compare(
                "less computation",
                results.values("random", "cpu_s"),
                results.values("policy-gradient", "cpu_s"),
                better="low",
            ),
            at_least("held-out judge", results.values("random", "judge_after"), 0.85, kind="headline"),
            compare(
                "judge, random cut against the full gradient",
                results.values("random", "judge_after"),
                results.values("full", "judge_after"),
            ),
        ]
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms,
        tuple(checks),
        notes=NOTES,
        shown=("reward", "reward_before", "reward_after", "judge_after", "area_after", "cpu_s"),
        x="update",
    )


NOTES = (
    "The shapes base (8 steps, no guidance), adapters of rank 8, 16 samples an update; in full the policy "
    "gradient makes 40 updates and the others 20. The reward is a classifier's "
    f"log-probability of the class less {STIFFNESS:g} times the squared distance of the coloured area from {AREA:g}; "
    "another classifier, trained on other pictures, judges.",
    "Pathwise arms sample without noise, the policy gradient by the flow's SDE (0.7) with groups of 8, as it must. Both "
    "are judged on 120 pictures of the deterministic sampler.",
    "One learning rate for the pathwise arms, tuned with the random cut, and one for the policy gradient, on another seed.",
)
