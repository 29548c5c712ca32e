"""REAL's claim: bounded weights keep a policy gradient stable without a clip, and do better than DAPO's clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

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
    tuning_seeds,
)
from guerdon.evidence.sort_task import sort_run
from guerdon.objectives.loss import Loss
from guerdon.objectives.policy_gradient import dapo, policy_gradient
from guerdon.objectives.real import real, relative_scores
from guerdon.rewards import exact_answer
from guerdon.signal import Signal

SLUG = "real"
TITLE = "REAL: rewards as labels"
PAPER = "Zhai et al. 2026, Rewards as Labels: Revisiting RLVR from a Classification Perspective, arXiv 2602.05630"
CLAIM = (
    "A classification loss with bounded weights, in place of advantages and a clipped ratio, is stable and beats DAPO "
    "by 6.7 points (1.5B) and 6.2 points (7B) on average over six sets of mathematics problems."
)

# many updates per rollout at a rate that is too high for them: what holds the policy back?
STRESSED = ("real-stress", "dapo-stress", "unclipped-stress")
ARMS = ("real", "dapo", *STRESSED)
SIZES: dict[str, dict[str, Settings]] = {
    "smoke": {
        "stress": {"steps": 3, "passes": 4, "mini_batches": 4, "lr": 3e-4, "eval_size": 50},
        "plain": {"steps": 12, "passes": 1, "mini_batches": 4, "lr": 1e-4, "eval_size": 100},
    },
    "full": {
        "stress": {"steps": 40, "passes": 4, "mini_batches": 4, "lr": 3e-4, "eval_size": 400},
        "plain": {"steps": 80, "passes": 1, "mini_batches": 4, "eval_size": 400},
    },
}
GRIDS: dict[str, list[Settings]] = {
    "real": [{"lr": lr, "tau": tau} for lr in (1e-4, 3e-4) for tau in (0.1, 0.5)],
    "dapo": [{"lr": lr, "clip_high": clip} for lr in (1e-4, 3e-4) for clip in (0.2, 0.28)],
    "real-stress": [{"tau": tau} for tau in (0.03, 0.1, 0.2, 0.5)],
    "dapo-stress": [{"clip_high": clip} for clip in (0.1, 0.2, 0.28, 0.4)],
}
DEFAULTS: dict[str, Settings] = {
    "real": {"lr": 1e-4, "tau": 0.1},
    "dapo": {"lr": 1e-4, "clip_high": 0.28},
    "real-stress": {"tau": 0.03},
    "dapo-stress": {"clip_high": 0.28},
    "unclipped-stress": {},
}


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Four settings for each tuned arm, in half as many steps on another seed; then each arm on every seed."""
    sizes = {arm: SIZES[budget]["stress" if arm in STRESSED else "plain"] for arm in ARMS}
    trials = [
        Unit(arm, seed, {**sizes[arm], **settings, "steps": int(sizes[arm]["steps"]) // 2}, "tune")
        for arm, grid in GRIDS.items()
        for settings in grid
        for seed in (tuning_seeds(1) if budget == "full" else ())
    ]
    chosen = {arm: {**sizes[arm], **(tuned or {}).get(arm, DEFAULTS[arm])} for arm in ARMS}
    return trials + [Unit(arm, seed, chosen[arm]) for arm in ARMS for seed in range(seeds)]


def tune(results: Results) -> dict[str, Settings]:
    """The settings with the best sampled accuracy."""
    best = results.best("sampled_after")
    return {arm: {name: value for name, value in best[arm].items() if name in DEFAULTS[arm]} for arm in best}


def measure(unit: Unit) -> dict[str, Any]:
    """One training run, with what each update pulled at; and the weights of a group as one of its scores moves."""
    settings: dict[str, Any] = dict(unit.settings)
    objective: Callable[..., Loss]
    if unit.arm.startswith("real"):
        objective = partial(real, tau=settings.pop("tau"))
    elif unit.arm.startswith("dapo"):
        objective = partial(dapo, clip_high=settings.pop("clip_high"))
    else:
        objective = partial(policy_gradient, clip_low=None, clip_high=None)
    probe = Probe(objective, every=int(settings["mini_batches"]))
    found = sort_run(
        unit.seed,
        signal=Signal(rewards={"correct": exact_answer}, advantage=grpo),
        objective=probe,
        on_step=lambda _: probe.read(),
        eval_every=int(settings["steps"]) // 4,
        **settings,
    )
    curves = weight_curves(objective)
    found["curves"] |= curves
    found["figures"] |= {
        "pull_most": probe.pull_most,
        "weight_most": max(y for points in curves.values() for _, y in points),
    }
    return found


class Probe:
    """An objective that keeps how far scores and pulls went, looking before the last update of every pass.

    A group's pull on a side is the sum over its right (or wrong) samples of |d total / d score|.
    """

    def __init__(self, objective: Callable[..., Loss], every: int) -> None:
        self.objective, self.every, self.updates = objective, every, 0
        self.takes_rewards = getattr(objective, "func", objective) is real
        self.pull_most = 0.0
        self.step: dict[str, float] = {}

    def __call__(self, logp: Tensor, logp_old: Tensor, rewards: Tensor, advantages: Tensor, mask: Tensor) -> Loss:
        """The objective's loss."""
        signal = rewards if self.takes_rewards else advantages
        self.updates += torch.is_grad_enabled()
        if torch.is_grad_enabled() and self.updates % self.every == 0:
            self._look(logp.detach(), logp_old, rewards, signal, mask)
        return self.objective(logp, logp_old, signal, mask)

    def _look(self, logp: Tensor, logp_old: Tensor, rewards: Tensor, signal: Tensor, mask: Tensor) -> None:
        pulls = self._pulls(logp, logp_old, signal, mask)
        right, wrong = (pulls.where(rewards == label, 0.0).sum(-1) for label in (1, 0))
        old_wrong = self._pulls(logp_old, logp_old, signal, mask).where(rewards == 0, 0.0).sum(-1)
        growth = (wrong / old_wrong).where(old_wrong > 0, 0.0)
        self.pull_most = max(self.pull_most, right.max().item(), wrong.max().item())
        scores = relative_scores(logp, logp_old, mask).abs()
        for name, value in {"score_most": scores.max().item(), "wrong_pull_growth": growth.max().item()}.items():
            self.step[name] = max(self.step.get(name, 0.0), value)

    def _pulls(self, logp: Tensor, logp_old: Tensor, signal: Tensor, mask: Tensor) -> Tensor:
        leaf = logp.clone().requires_grad_()
        (grad,) = torch.autograd.grad(self.objective(leaf, logp_old, signal, mask).total, leaf)
        return grad.sum(-1).abs()

    def read(self) -> dict[str, float]:
        """What the updates since the last reading did."""
        found, self.step = self.step, {}
        return found


def weight_curves(objective: Callable[..., Loss]) -> dict[str, Points]:
    """|d total / d score| of one sample of a group of four right and four wrong, the other seven at score 0."""
    rewards = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.float64)
    signal = rewards if getattr(objective, "func", objective) is real else grpo(rewards)
    curves: dict[str, Points] = {}
    for name, position in (("weight_right", 0), ("weight_wrong", 4)):
        points = []
        for score in torch.linspace(-3, 3, 25).tolist():
            logp = torch.zeros(1, 8, 1, dtype=torch.float64)
            logp[0, position] = score
            logp.requires_grad_()
            loss = objective(logp, torch.zeros_like(logp).detach(), signal, torch.ones_like(logp).bool())
            (grad,) = torch.autograd.grad(loss.total, logp)
            points.append((score, grad[0, position, 0].abs().item()))
        curves[name] = points
    return curves


def conclude(results: Results) -> Evidence:
    """Compare the arms."""
    roles = {"real": "method", "dapo": "baseline", "real-stress": "method", "dapo-stress": "baseline"}
    arms: dict[str, Arm] = {name: results.arm(name, roles.get(name, "ablation")) for name in ARMS}  # pyright: ignore[reportArgumentType]
    free, clipped = arms["unclipped-stress"], arms["dapo-stress"]
    checks = [_bounded(arms["real-stress"], arms["real"]), _monotone(arms["real-stress"], free)]
    if results.budget == "full":
        stressed = [arm.figures["sampled_after"] for arm in (arms["real-stress"], clipped, free)]
        better = compare(
            "stress: above the same without weights", stressed[0], stressed[2], margin=0.15, kind="mechanism"
        )
        each = all(m > b for m, b in zip(stressed[0], stressed[2], strict=True))
        checks += [
            Check(
                better.name,
                f"{better.condition}, and every seed > 0",
                better.holds and each,
                "mechanism",
                better.figures,
            ),
            compare("stress: not far below DAPO", stressed[0], stressed[1], margin=-0.1, kind="mechanism"),
            _against("one pass: accuracy, sampled", arms, "sampled_after"),
            _against("one pass: accuracy, greedy", arms, "greedy_after"),
        ]
    plots = ("sampled", "weight_right", "weight_wrong", "score_most")
    return Evidence(SLUG, TITLE, CLAIM, PAPER, tuple(arms.values()), tuple(checks), NOTES, plots)


def _against(name: str, arms: Mapping[str, Arm], figure: str) -> Check:
    return compare(name, arms["real"].figures[figure], arms["dapo"].figures[figure], errors=2.0)


def _bounded(*arms: Arm) -> Check:
    """The largest pull times tau; 1 up to rounding."""
    most = [value * float(arm.settings["tau"]) for arm in arms for value in arm.figures["pull_most"]]
    return Check(
        "the pull of a side of a group is bounded",
        "largest pull before the last update of any pass * tau <= 1 (+ 1e-5 for rounding)",
        all(0 < value <= 1 + 1e-5 for value in most),
        figures={"method": max(most)},
    )


def _monotone(method: Arm, free: Arm) -> Check:
    """Weights as one score moves: REAL's fall for right and rise for wrong samples, the free ratio's rise for both."""
    bound = 1 / float(method.settings["tau"])
    right, wrong = (_heights(method, name) for name in ("weight_right", "weight_wrong"))
    others = [_heights(free, name) for name in ("weight_right", "weight_wrong")]
    holds = (
        _ascends(right[::-1])
        and _ascends(wrong)
        and max(right + wrong) <= bound * (1 + 1e-9)
        and all(_ascends(heights) and heights[-1] > 10 * heights[len(heights) // 2] for heights in others)
    )
    return Check(
        "weights are bounded and largest where most is left to learn",
        "over scores of -3 to 3: REAL's fall for right and rise for wrong samples and stay <= 1 / tau; those of an "
        "unclipped ratio rise for both, more than tenfold from 0 to 3",
        bool(holds),
        figures={"method": max(right + wrong) / bound, "baseline": max(others[1]) / others[1][len(others[1]) // 2]},
    )


def _heights(arm: Arm, curve: str) -> list[float]:
    return [height for _, height in arm.curves[curve][0]]


def _ascends(values: Sequence[float]) -> bool:
    steps = [b - a for a, b in pairwise(values)]
    return min(steps) >= 0 and max(steps) > 0


NOTES = (
    "Sort task, 0.1 M weights, 32 prompts with 8 samples a rollout, 4 mini-batches a pass. real and dapo: one pass "
    "over each of 80 rollouts; the learning rate and tau (REAL) or the upper clip (DAPO) tuned on one other seed, four "
    "settings each.",
    "The arms named stress make 4 passes (16 updates) over each of 40 rollouts at a learning rate of 3e-4, on purpose "
    "too high for that; tau and clip tuned in the same way. unclipped is the ratio times GRPO's advantage, held by "
    "nothing.",
    "The mechanism is that REAL's weights do the work of a clip where the same gradient without them collapses. What "
    "is bounded is the pull of a side of a group, not the share of one sample.",
)
