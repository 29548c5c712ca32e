"""The library's own claim: a method written once trains both language and image models, from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from guerdon.evidence.base import Budget, Evidence, Results, Unit, compare
from guerdon.evidence.recipe_run import overrides, recipe_run

SLUG = "cross-domain"
TITLE = "One road, two domains"
PAPER = "A claim of this library's own, of no paper"
CLAIM = (
    "Stages written for language models (REAL, COPO, PAR, noise correction, VADE) train a flow model of images, and stages "
    "written for image models (VGPO's advantage, Pref-GRPO's win rate) train a language model, by settings alone."
)

ORACLE = '{"guerdon.diffusion.oracle:oracle_score": {task: digits, seed: 0, says: %s}}'
RIGHT = ORACLE % "right"
CLIPS = "clip_low: 1.0e-4, clip_high: 1.0e-4"


class Job(NamedTuple):
    """A recipe with the overrides that make it small, and the figure that its samples are judged by.

    Attributes:
        recipe: a bundled one.
        settings: as on the command line.
        judged: the metric.
        steps: of a run, by budget.
    """

    recipe: str
    settings: Mapping[str, str]
    judged: str
    steps: Mapping[Budget, int]


# an untrained digit model, after 30 supervised steps: right seven times in ten; and the sort task as it is
JOBS = {
    "images": Job(
        "flow-grpo",
        {
            "policy.model": "digits",
            "policy.steps": "5",
            "warm_start": "{steps: 30, batch_size: 64, optim: {lr: 2.0e-3, betas: [0.9, 0.99], weight_decay: 0.0, "
            "schedule: cosine, final_lr: 0.05, warmup_steps: 10}}",
            "rewards.likeness": RIGHT,
            "watch.diversity": "null",
            "objective": f"{{policy_gradient: {{{CLIPS}, advantage_clip: 5.0}}}}",
            "optim.lr": "2.0e-4",
            "optim.betas": "[0.9, 0.99]",
            "optim.warmup_steps": "3",
            "optim.ema": "null",
            "evaluation.size": "50",
        },
        "eval/sampled/judge",
        {"smoke": 1, "full": 20},
    ),
    "language": Job("sort", {"evaluation.size": "400"}, "eval/sampled/correct", {"smoke": 2, "full": 60}),
}


class Method(NamedTuple):
    """A method in the domain that it was not written for (or the baseline in its own): its settings, and how many times as
    long it trains.
    """

    title: str
    domain: str
    settings: Mapping[str, str]
    role: Any = "method"
    longer: int = 1


METHODS = {
    "images-grpo": Method("Flow-GRPO", "images", {}, "baseline"),
    "images-real": Method("REAL", "images", {"advantage": "null", "objective": "real"}),
    # six pictures of a prompt disagree by 0.9 bits in the median: at the method's rho of 1.5 one gate in eight would open
    "images-copo": Method(
        "COPO",
        "images",
        {"advantage": "{copo: {rho: 0.5}}", "objective": f"{{copo_loss: {{{CLIPS}}}}}"},
        longer=3,
    ),
    "images-noise": Method(
        "noise correction",
        "images",
        {
            "rewards.likeness": f"{{noisy: {{reward: {RIGHT}, false_positive_rate: 0.1, false_negative_rate: 0.2}}}}",
            "shaping.likeness": "[{backward_correction: {false_positive_rate: 0.1, false_negative_rate: 0.2}}]",
            "advantage": "rloo",
        },
    ),
    "images-vade": Method("VADE", "images", {"sampling": "vade", "prompts_per_step": "5", "group_size": "12"}),
    "images-par": Method(
        "PAR",
        "images",
        {"rewards.likeness": ORACLE % "log_probability", "shaping.likeness": "[par]", "advantage": "grpo"},
    ),
    "language-grpo": Method("GRPO", "language", {}, "baseline"),
    "language-vgpo": Method("VGPO", "language", {"advantage": "{value_anchored: {use_step_weights: false}}"}),
    "language-wins": Method(
        "Pref-GRPO's win rate",
        "language",
        {
            "rewards.correct": "null",
            "rewards.wins": "{win_rate: {judge: {pointwise: {reward: exact_answer}}}}",
            "watch.correct": "exact_answer",
            "advantage": "{grpo: {eps: 1.0e-8}}",
        },
    ),
}
SEEDS = {"smoke": 1, "full": 5}
MARGIN, ERRORS = 0.03, 2.0


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Any] | None = None) -> list[Unit]:
    """Every method on every seed; nothing is tuned."""
    return [
        Unit(name, seed, {"steps": JOBS[method.domain].steps[budget] * (method.longer if budget == "full" else 1)})
        for name, method in METHODS.items()
        for seed in range(seeds)
    ]


def words(name: str, *, common: bool = True) -> list[str]:
    """The overrides of a method, as on the command line.

    Args:
        name: of `METHODS`.
        common: with those of its domain's job.
    """
    return overrides(_settings(name) if common else METHODS[name].settings)


def _settings(name: str) -> dict[str, str]:
    method = METHODS[name]
    return {**JOBS[method.domain].settings, **method.settings}


def measure(unit: Unit) -> dict[str, Any]:
    """A run from the recipe, as `guerdon train` makes it, and what its records say."""
    job = JOBS[METHODS[unit.arm].domain]
    samples = 4 if job.recipe == "flow-grpo" else 1
    steps = int(unit.settings["steps"])
    return recipe_run(job.recipe, _settings(unit.arm), [job.judged], seed=unit.seed, steps=steps, samples=samples)


def conclude(results: Results) -> Evidence:
    """Every method must end above where it began."""
    arms = [results.arm(name, method.role) for name, method in METHODS.items()]
    checks = [
        compare(
            f"{method.title} trains {'an image' if method.domain == 'images' else 'a language'} model",
            results.values(name, "after"),
            results.values(name, "before"),
            # one step of a smoke run shows that it runs
            margin=MARGIN if results.budget == "full" else -1.0,
            errors=ERRORS if results.budget == "full" else 0.0,
            kind="mechanism",
        )
        for name, method in METHODS.items()
    ]
    return Evidence(
        SLUG, TITLE, CLAIM, PAPER, tuple(arms), tuple(checks), notes=NOTES, shown=("judged", "before", "after", "gain")
    )


NOTES = (
    "images: a flow model of 8 x 8 digits after 30 supervised steps, 20 online steps of 60 pictures at learning rate 2e-4, "
    "judged by a classifier that training never sees (4 samples of each of 50 held-out prompts). The reward is another "
    "classifier's verdict, its captions are the answers that COPO compares.",
    "language: the sort task after 70 supervised steps, 60 online steps of 256 texts at learning rate 3e-4, judged by "
    "exact answers to 400 held-out prompts.",
    "Learning rates are those of the domain's job for every method; none was tuned. COPO's rho is 0.5 bits on images, where "
    "the answers to a prompt differ by 0.9 bits in the median, and it has three times the steps: after as many as the others "
    "it had gained 0.04 on average (seeds: 0.16, 0.02, 0.01, -0.01, 0.03). Figures of different methods do not rank "
    "them: the check is that each one learns. In the noisy run one right picture in five is rejected and one wrong picture in "
    "ten accepted.",
    "Without rewards per step VGPO pays the one reward of a text at its end. The judge of the win rate compares exact "
    "answers, so most of its matches are ties.",
)
