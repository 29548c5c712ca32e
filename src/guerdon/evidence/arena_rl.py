"""ArenaRL's claim: where scores collapse, 2 (N - 1) comparisons in a tournament rank nearly as well as all pairs do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from guerdon.advantages import grpo
from guerdon.evidence.base import Budget, Check, Evidence, Results, Settings, Unit, at_least, compare, tuning_seeds
from guerdon.evidence.sort_task import sort_run
from guerdon.objectives.policy_gradient import policy_gradient
from guerdon.rewards.judges.base import Match
from guerdon.rewards.topologies import play
from guerdon.rewards.tournament import tournament
from guerdon.signal import Signal

SLUG = "arena-rl"
TITLE = "ArenaRL: tournament-based relative ranking"
PAPER = "ArenaRL: Scaling RL for Open-Ended Agents via Tournament-based Relative Ranking, 2026, arXiv 2601.06487"
CLAIM = (
    "Seeded single elimination with 2 (N - 1) comparisons is nearly as accurate as all N (N - 1) / 2, and training on "
    "it beats training on scores of a pointwise judge."
)

TRAINED = ("single_elimination", "round_robin", "pointwise")
ARMS = (*TRAINED, "anchor", "swiss", "double_elimination")
NOISE = (0.1, 0.25, 0.4, 0.7)  # of the judge that compares
SAMPLES, GROUPS = 16, 200
RATES = (1e-4, 3e-4)
SIZES: dict[str, Settings] = {
    "smoke": {"steps": 3, "prompts": 8, "group_size": 8, "eval_size": 50},
    "full": {"steps": 60, "prompts": 32, "group_size": 8, "eval_size": 400},
}
Choices = Callable[[Sequence[Match]], list[tuple[float, float]]]


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """The learning rate of each trained arm on two seeds of its own, then each arm on every seed."""
    sizes = SIZES[budget]
    trials = [
        Unit(arm, seed, {**sizes, "lr": rate}, "tune")
        for arm in TRAINED
        for rate in RATES
        for seed in (tuning_seeds(2) if budget == "full" else ())
    ]
    chosen = {arm: (tuned or {}).get(arm, {**sizes, "lr": RATES[-1]}) for arm in TRAINED}
    return trials + [Unit(arm, seed, chosen.get(arm, {})) for arm in ARMS for seed in range(seeds)]


def tune(results: Results) -> dict[str, Settings]:
    """The learning rate with the best sampled accuracy."""
    return results.best("sampled_after")


def measure(unit: Unit) -> dict[str, Any]:
    """How well an arm ranks groups whose order is known; and, where it has settings, what training on it gives."""
    ranked = ranking(unit.arm, unit.seed) if unit.role == "measure" else {"figures": {}, "curves": {}}
    if not unit.settings:
        return ranked
    signal = Signal(rewards={"judged": reward(unit.arm, unit.seed)}, advantage=partial(grpo, eps=1e-6))
    found = sort_run(
        unit.seed,
        signal=signal,
        objective=partial(policy_gradient, clip_high=0.28),
        eval_every=max(int(unit.settings["steps"]) // 3, 1),
        **unit.settings,  # pyright: ignore[reportArgumentType]
    )
    return {part: found[part] | ranked[part] for part in ("figures", "curves")}


# ---------------------------------------------------------------- ranking


def ranking(arm: str, seed: int) -> dict[str, Any]:
    """Spearman correlation of an arm's rewards with the true quality, and the true rank of its best, by noise."""
    generator = Generator().manual_seed(seed)
    quality = torch.randn(GROUPS, SAMPLES, generator=generator, dtype=torch.float64)
    figures: dict[str, float] = {}
    points = []
    for noise in NOISE:
        if arm == "pointwise":
            rewards = 5 + 0.1 * quality + 0.2 * torch.randn(quality.shape, generator=generator, dtype=torch.float64)
            comparisons = 0
        else:
            standings = [_held(arm, q, noise, generator) for q in quality]
            rewards = torch.tensor([standing.quantiles for standing in standings], dtype=torch.float64)
            comparisons = standings[0].comparisons
        found = spearman(rewards, quality).mean().item()
        best = rewards.argmax(-1, keepdim=True)
        figures |= {
            f"spearman_{noise:g}": found,
            f"champion_{noise:g}": (quality >= quality.gather(1, best)).sum(-1).double().mean().item(),
            "comparisons": float(comparisons),
        }
        points.append((noise, found))
    return {"figures": figures, "curves": {"spearman": points}}


def _held(topology: str, quality: Tensor, noise: float, generator: Generator) -> Any:
    """A tournament under a judge that gives x = 5 + (q_a - q_b) / 2 + noise, and the other its mirror image."""
    true = quality.tolist()

    def judged(pairs: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
        errors = (noise * torch.randn(len(pairs), 2, generator=generator)).tolist()
        halves = [(true[i] - true[j]) / 2 for i, j in pairs]
        return [(5 + half + a, 5 - half + b) for half, (a, b) in zip(halves, errors, strict=True)]

    return play(topology, len(true), judged)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of the ranks in each row; ties have their mean rank."""
    a, b = (_ranks(values) for values in (first, second))
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def _ranks(values: Tensor) -> Tensor:
    own, others = values[..., :, None], values[..., None, :]
    return ((others < own).double() + 0.5 * (others == own).double()).sum(-1)


# ---------------------------------------------------------------- training


def worth(sample: str, answer: str) -> float:
    """What the policy never sees: the share of right positions, and 1 more for the whole answer."""
    hits = sum(a == b for a, b in zip(sample, answer, strict=False))
    return hits / max(len(sample), len(answer), 1) + float(sample == answer)


def reward(arm: str, seed: int) -> Any:
    """A judge of the same worth: scores that lie close together, or noisy comparisons in a tournament."""
    generator = Generator().manual_seed(1_000_003 * seed + 1)

    def scored(samples: Sequence[Sequence[str]], answer: Sequence[str]) -> list[list[float]]:
        true = torch.tensor([[worth(s, gold) for s in group] for group, gold in zip(samples, answer, strict=True)])
        return (5 + 0.1 * true + 0.1 * torch.randn(true.shape, generator=generator)).tolist()

    def compared(matches: Sequence[Match]) -> list[tuple[float, float]]:
        gaps = [worth(m.first, m.columns["answer"]) - worth(m.second, m.columns["answer"]) for m in matches]
        noisy = torch.tensor(gaps) + 0.3 * torch.randn(len(gaps), generator=generator)
        return [(5 + gap / 2, 5 - gap / 2) for gap in noisy.tolist()]

    # this judge sees no places, so one order is enough
    return scored if arm == "pointwise" else tournament(judge=compared, topology=arm, both_orders=False)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- conclusions


def conclude(results: Results) -> Evidence:
    """Compare the arms."""
    method, scores = results.arm("single_elimination", "method"), results.arm("pointwise", "baseline")
    whole = results.arm("round_robin", "ablation")
    others = tuple(results.arm(name, "ablation", {}) for name in ("anchor", "swiss", "double_elimination"))
    checks = [
        Check(
            "cost, in comparisons of 16 samples",
            "single elimination 30, round robin 120, anchor 15, double elimination 30",
            [arm.figures["comparisons"][0] for arm in (method, whole, others[0], others[2])] == [30, 120, 15, 30],
            figures={"method": method.mean("comparisons"), "baseline": whole.mean("comparisons")},
        )
    ]
    for noise in (0.1, 0.25):
        name = f"spearman_{noise:g}"
        margins = [m - 0.9 * w for m, w in zip(method.figures[name], whole.figures[name], strict=True)]
        checks += [
            at_least(
                f"ranks nearly as well as all pairs, noise {noise:g}",
                margins,
                0.0,
                what="mean Spearman - 0.9 x that of round robin",
            ),
            compare(
                f"ranks better than scores, noise {noise:g}",
                method.figures[name],
                scores.figures[name],
                margin=0.3,
                kind="mechanism",
            ),
        ]
    if results.budget == "full":
        checks += [
            compare(
                "accuracy against pointwise, sampled",
                method.figures["sampled_after"],
                scores.figures["sampled_after"],
                margin=0.05,
            ),
            compare(
                "accuracy against all pairs, sampled",
                method.figures["sampled_after"],
                whole.figures["sampled_after"],
                margin=-0.05,
            ),
            *(
                compare(
                    f"ranks better than {arm.name}, noise 0.25",
                    method.figures["spearman_0.25"],
                    arm.figures["spearman_0.25"],
                    errors=2.0,
                )
                for arm in others
            ),
        ]
    return Evidence(
        SLUG, TITLE, CLAIM, PAPER, (method, scores, whole, *others), tuple(checks), NOTES, ("spearman", "sampled")
    )


NOTES = (
    "Ranking: 200 groups of 16 a seed, quality N(0, 1). The comparing judge has noise of 0.1 to 0.7 on points that "
    "differ by the difference in quality; the pointwise judge gives 5 + 0.1 q with noise 0.2. That comparing is the "
    "less noisy of the two is put in, not shown: it is what the paper says of language models that judge.",
    "Training: the sort task, 32 prompts of 8 samples a step, a hidden worth (share of right positions, and 1 more for "
    "the answer) seen through either judge. Learning rates tuned per arm on two other seeds.",
    "The anchor ranks by the points of each sample against one and the same, and that one by its mean, as the authors' "
    "code does; these two kinds of points are on different scales, which costs it accuracy.",
)
