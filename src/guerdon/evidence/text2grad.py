"""Text2Grad's claim: feedback that points at phrases teaches more when each token is paid for its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guerdon.advantages.gae import gae
from guerdon.advantages.group import grpo
from guerdon.evidence.base import (
    Budget,
    Evidence,
    Points,
    Results,
    Role,
    Settings,
    Unit,
    at_least,
    compare,
    first_reach,
    mean,
    rate_plan,
)
from guerdon.evidence.reports_task import (
    LENGTH,
    LONGEST_RUN,
    MOST_GOOD,
    MOST_POOR,
    PROMPTS,
    RECORDS,
    TOKENS,
    hidden,
    learned,
    places,
    program,
    words,
)
from guerdon.evidence.sort_task import sort_run
from guerdon.evidence.writers import Writers
from guerdon.language.tasks import sort
from guerdon.objectives.ppo import ppo
from guerdon.rewards.critics.classifier import ClassifierCritic
from guerdon.rewards.critics.program import ProgramCritic
from guerdon.rewards.spans import Spans
from guerdon.rollout import Rollout
from guerdon.signal import Signal

SLUG = "text2grad"
TITLE = "Text2Grad"
PAPER = "Text2Grad: Reinforcement Learning from Natural Language Feedback, 2025, arXiv 2505.22338"
CLAIM = (
    "Critiques aligned to spans and paid token by token beat rewards of whole samples under PPO: ROUGE-L +3.3 on SLF5K, pass@1 "
    "+3.6 to +5.8 on KodCode, and the best performance after 75 % of the training steps against 97 %."
)


class Arm(NamedTuple):
    """Who criticises, whether each token is paid for its own, and what a sample is compared with."""

    role: Role
    critic: str = "program"
    steps: bool = True
    advantage: Any = gae
    task: str = "reports"


ARMS = {
    "spans": Arm("method"),
    "summed": Arm("baseline", steps=False),
    "summed-group": Arm("baseline", steps=False, advantage=grpo),
    "learned": Arm("method", critic="learned"),
    "learned-summed": Arm("baseline", critic="learned", steps=False),
    "terse": Arm("ablation", critic="terse"),
    "sort-spans": Arm("method", task="sort"),
    "sort-summed": Arm("baseline", steps=False, task="sort"),
}
SMOKE = ("spans", "summed")
STEPS: dict[Budget, int] = {"smoke": 160, "full": 220}
RATES, DEFAULT_RATE = (0.02, 0.05, 0.1), 0.05
SORT: Settings = {"steps": 50, "passes": 2}
SORT_RATES = (1e-4, 3e-4, 6e-4)
TRIALS: dict[Budget, int] = {"smoke": 0, "full": 2}

GROUP, TESTED, EVERY = 8, 32, 10
VALUE_RATE = 0.2


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Every arm at its own learning rate, tuned on other seeds; those with a learned critic at the usual one."""
    names = SMOKE if budget == "smoke" else tuple(ARMS)
    units = []
    for name in names:
        arm, trials = ARMS[name], TRIALS[budget] if ARMS[name].critic != "learned" else 0
        settings: Settings = SORT if arm.task == "sort" else {"steps": STEPS[budget]}
        rates, default = (SORT_RATES, SORT_RATES[1]) if arm.task == "sort" else (RATES, DEFAULT_RATE)
        units += rate_plan([name], settings, rates, seeds, trials=trials, tuned=tuned, default=default)
    return units


def tune(results: Results) -> dict[str, Settings]:
    """The rate with the largest share of right words, or of right answers, at the end."""
    return results.best("right")


def measure(unit: Unit) -> dict[str, Any]:
    """Train one policy: of tables, or a language model that sorts."""
    arm = ARMS[unit.arm]
    return sorting(unit, arm) if arm.task == "sort" else reporting(unit, arm)


def sorting(unit: Unit, arm: Arm) -> dict[str, Any]:
    """PPO as the recipe has it, from a supervised start; a program marks the digits."""
    reward = Spans(critic=ProgramCritic(function=sort.critique), steps=arm.steps)
    settings: dict[str, Any] = dict(unit.settings)
    found = sort_run(
        unit.seed,
        signal=Signal(rewards={"feedback": reward}, advantage=arm.advantage),
        objective=partial(ppo, value_coefficient=0.1),
        **settings,
    )
    names = {"right": "sampled_after", "greedy": "greedy_after", "right_before": "sampled_before", "seconds": "seconds"}
    figures = {name: found["figures"][of] for name, of in names.items()}
    return {"figures": figures, "curves": {"digits": found["curves"]["reward"]}}


def reporting(unit: Unit, arm: Arm) -> dict[str, Any]:
    """A policy of tables with a table of values, on samples that a critic sees as texts."""
    writers = Writers([unit.seed], prompts=PROMPTS, length=LENGTH, tokens=TOKENS)
    targets, figures = hidden(unit.seed), dict[str, float]()
    critic: Any = program
    if arm.critic == "learned":
        model, figures["critic"] = learned(unit.seed, targets)
        critic = ClassifierCritic(model=model)
    signal = Signal(rewards={"feedback": Spans(critic=critic, steps=arm.steps)}, advantage=arm.advantage)
    columns = {"target": [words(row) for row in targets[:, 0].tolist()], "terse": [arm.critic == "terse"] * PROMPTS}
    values, rates = torch.zeros(PROMPTS, 1, LENGTH), torch.tensor([float(unit.settings["lr"])])
    curve: Points = []
    placed: list[float] = []

    def test(step: int) -> None:
        curve.append((float(step), (writers.write(TESTED)[0] == targets).float().mean().item()))

    steps = int(unit.settings["steps"])
    for step in range(steps):
        if step % EVERY == 0:
            test(step)
        texts = writers.write(GROUP)
        rollout = signal(as_rollout(texts[0], values.expand(-1, GROUP, -1), columns))
        assert rollout.advantages is not None
        if "returns" in rollout.extras:
            values = values + VALUE_RATE * (rollout.extras["returns"].mean(1, keepdim=True) - values)
        if "step_scores" in rollout.extras:
            wanted = torch.where(texts[0] == targets, 1.0, -1.0)
            placed.append((rollout.extras["step_scores"][..., 0] == wanted).float().mean().item())
        writers.step(writers.gradients(texts, [rollout.advantages.unsqueeze(0)])[0], rates)
    test(steps)
    shares = [share for _, share in curve]
    figures["right"] = mean(shares[-3:])  # of three tests, as a single one scatters
    figures["right_half"] = shares[len(shares) // 2]
    figures["steps_to_90"] = first_reach(0.9, curve)
    if placed:
        figures["placed"] = mean(placed)
    return {"figures": figures, "curves": {"right": curve}}


def as_rollout(texts: Tensor, values: Tensor, columns: dict[str, list[Any]]) -> Rollout:
    """Texts [P, G, T] with the values of their steps and the columns of their prompts."""
    return Rollout(
        prompts=[f"p{n}" for n in range(len(texts))],
        samples=[[words(text) for text in group] for group in texts.tolist()],
        mask=torch.ones_like(texts, dtype=torch.bool),
        logp_old=torch.zeros(texts.shape),
        values=values,
        columns=columns,
        extras={"offsets": places(texts.shape)},
    )


def conclude(results: Results) -> Evidence:
    """Spans teach, and one sum of the same feedback teaches later or never; so it is with a learned critic, and on sorting."""
    names = SMOKE if results.budget == "smoke" else tuple(ARMS)
    own = results.values

    def later(summed: str, spans: str) -> list[float]:
        return [a / b for a, b in zip(own(summed, "steps_to_90"), own(spans, "steps_to_90"), strict=True)]

    checks = [
        at_least("quoted phrases lead back to their words", own("spans", "placed"), 0.9, what="mean share"),
        at_least("the policy learns the reports", own("spans", "right"), 0.95, what="mean share of right words"),
        at_least("steps to 0.9, summed over spans", later("summed", "spans"), 1.3, kind="headline", what="mean ratio"),
    ]
    if results.budget == "full":
        of_group, of_learned = later("summed-group", "spans"), later("learned-summed", "learned")
        checks += [
            at_least("steps to 0.9, GRPO on the sum over spans", of_group, 1.3, kind="headline", what="mean ratio"),
            at_least("the learned critic knows held-out words", own("learned", "critic"), 0.95, what="mean share"),
            at_least("and teaches the reports", own("learned", "right"), 0.9, what="mean share of right words"),
            at_least("steps to 0.9, its sum over its spans", of_learned, 1.3, kind="headline", what="mean ratio"),
            compare(
                "sorting: more right answers than by the sum",
                own("sort-spans", "right"),
                own("sort-summed", "right"),
                margin=0.05,
                errors=2.0,
            ),
        ]
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(results.arm(name, ARMS[name].role) for name in names),
        checks=tuple(checks),
        notes=(
            f"{PROMPTS} prompts, each with a hidden report of {LENGTH} of {TOKENS} words. A program writes the critique: it "
            "quotes every run of right and of wrong words, and the quotes are looked for in the text as a model's would be.",
            f"The policy is autoregressive, {GROUP} samples a prompt; a table of values, GAE (1, 0.95) with whitening, Adam at "
            f"the best of {', '.join(map(str, RATES))} on two other seeds. summed: the same feedback as one reward at the end.",
            f"learned: the critic is a transformer with a head for tokens, trained on {RECORDS} records of the program's "
            f"feedback on reports of every quality; Adam at {DEFAULT_RATE}, not tuned.",
            f"terse: at most {MOST_GOOD} good and {MOST_POOR} poor phrases of at most {LONGEST_RUN} words; its sum is not "
            "largest for the right report. No condition is on it.",
            "sort: a transformer of 0.1 M weights learns to sort digits from marks of right and wrong ones by the recipe's "
            f"PPO, {SORT['steps']} steps of 256 samples, {SORT['passes']} passes; right is the share of faultless answers.",
        ),
        shown=("right", "right_half", "steps_to_90", "placed", "critic", "greedy", "right_before"),
    )
