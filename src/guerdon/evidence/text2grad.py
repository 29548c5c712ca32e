"""Text2Grad's claim: feedback that points at phrases teaches more when each token is paid for its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guerdon.advantages import gae, grpo
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
from guerdon.evidence.sort_task import sort_run
from guerdon.evidence.writers import Writers
from guerdon.language.tasks import sort
from guerdon.objectives import ppo
from guerdon.rewards.critics.base import Response
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

ROLES: dict[str, Role] = {
    "spans": "method",
    "summed": "baseline",
    "summed-group": "baseline",
    "terse-critic": "ablation",
    "sort-spans": "method",
    "sort-summed": "baseline",
}
SMOKE = ("spans", "summed")
STEPS: dict[Budget, int] = {"smoke": 160, "full": 220}
RATES, DEFAULT_RATE = (0.02, 0.05, 0.1), 0.05
SORT: Settings = {"steps": 50, "passes": 2}
SORT_RATES = (1e-4, 3e-4, 6e-4)

PROMPTS, GROUP, LENGTH, TOKENS = 6, 8, 16, 20
TESTED, EVERY = 32, 10
VALUE_RATE = 0.2
MOST_GOOD, MOST_POOR, LONGEST_RUN = 4, 3, 3  # of the critic that does not say all


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Every arm at its own learning rate, tuned on other seeds."""
    arms = SMOKE if budget == "smoke" else tuple(ROLES)
    trials = 0 if budget == "smoke" else 2
    groups = (
        ([arm for arm in arms if not arm.startswith("sort")], {"steps": STEPS[budget]}, RATES, DEFAULT_RATE),
        ([arm for arm in arms if arm.startswith("sort")], SORT, SORT_RATES, SORT_RATES[1]),
    )
    return [
        unit
        for own, settings, rates, default in groups
        for unit in rate_plan(own, settings, rates, seeds, trials=trials, tuned=tuned, default=default)
    ]


def tune(results: Results) -> dict[str, Settings]:
    """The rate with the largest share of right words, or of right answers, at the end."""
    return results.best("right")


def words(text: Sequence[int]) -> str:
    """A report as a text."""
    return " ".join(f"w{token:02d}" for token in text)


def critique(response: Response) -> str:
    """What a critic writes: every run of right and of wrong words, quoted; the row says how many it may name and how long."""
    said, target = response.text.split(" "), response.columns["target"].split(" ")
    runs: dict[bool, list[str]] = {True: [], False: []}
    for right, run in itertools.groupby(range(len(said)), lambda t: said[t] == target[t]):
        runs[right].append(" ".join(said[t] for t in run))
    if response.columns["terse"]:
        runs = {
            right: [" ".join(run.split(" ")[:LONGEST_RUN]) for run in runs[right][:most]]
            for right, most in ((True, MOST_GOOD), (False, MOST_POOR))
        }
    told = "; ".join(
        f"{name}: {', '.join(map(repr, runs[right]))}"
        for name, right in (("keeps", True), ("fails", False))
        if runs[right]
    )
    return json.dumps({"textual_feedback": told, "good_spans": runs[True], "poor_spans": runs[False]})


def signal_of(arm: str) -> Signal:
    """The same critic for every arm; what differs is when a sample is paid, and what it is compared with."""
    reward = Spans(critic=lambda responses: [critique(one) for one in responses], steps=not arm.startswith("summed"))
    return Signal(rewards={"feedback": reward}, advantage=grpo if arm == "summed-group" else gae)


def measure(unit: Unit) -> dict[str, Any]:
    """Train one policy: of tables, or a language model that sorts."""
    return sorting(unit) if unit.arm.startswith("sort") else writing(unit)


def sorting(unit: Unit) -> dict[str, Any]:
    """PPO as the recipe has it, from a supervised start; a program marks the digits."""
    reward = Spans(critic=ProgramCritic(function=sort.critique), steps=unit.arm == "sort-spans")
    settings: dict[str, Any] = dict(unit.settings)
    found = sort_run(
        unit.seed,
        signal=Signal(rewards={"feedback": reward}, advantage=gae),
        objective=partial(ppo, value_coefficient=0.1),
        **settings,
    )
    names = {"right": "sampled_after", "greedy": "greedy_after", "right_before": "sampled_before", "seconds": "seconds"}
    figures = {name: found["figures"][of] for name, of in names.items()}
    return {"figures": figures, "curves": {"digits": found["curves"]["reward"]}}


def writing(unit: Unit) -> dict[str, Any]:
    """A policy of tables with a table of values."""
    writers = Writers([unit.seed], prompts=PROMPTS, length=LENGTH, tokens=TOKENS)
    targets = torch.randint(TOKENS, (PROMPTS, 1, LENGTH), generator=writers.draws[0])
    values = torch.zeros(PROMPTS, 1, LENGTH)
    signal, rates = signal_of(unit.arm), torch.tensor([float(unit.settings["lr"])])
    columns = {
        "target": [words(row) for row in targets[:, 0].tolist()],
        "terse": [unit.arm == "terse-critic"] * PROMPTS,
    }
    curve: Points = []
    placed: list[float] = []

    def test(step: int) -> None:
        curve.append((float(step), (writers.write(TESTED)[0] == targets).float().mean().item()))

    steps = int(unit.settings["steps"])
    for step in range(steps):
        if step % EVERY == 0:
            test(step)
        texts = writers.write(GROUP)
        rollout = signal(reports(texts[0], values.expand(-1, GROUP, -1), columns))
        assert rollout.advantages is not None
        if "returns" in rollout.extras:
            values = values + VALUE_RATE * (rollout.extras["returns"].mean(1, keepdim=True) - values)
        if "step_scores" in rollout.extras:
            wanted = torch.where(texts[0] == targets, 1.0, -1.0)
            placed.append((rollout.extras["step_scores"][..., 0] == wanted).float().mean().item())
        writers.step(writers.gradients(texts, [rollout.advantages.unsqueeze(0)])[0], rates)
    test(steps)
    shares = [share for _, share in curve]
    figures = {
        "right": mean(shares[-3:]),  # of three tests, as a single one scatters
        "right_half": shares[len(shares) // 2],
        "steps_to_90": first_reach(0.9, curve),
    }
    if placed:
        figures["placed"] = mean(placed)
    return {"figures": figures, "curves": {"right": curve}}


def reports(texts: Tensor, values: Tensor, columns: dict[str, list[Any]]) -> Rollout:
    """Texts [P, G, T] as a rollout; a word has three characters, and a space behind it."""
    starts = 4 * torch.arange(LENGTH)
    offsets = torch.stack([starts, starts + 3], -1).expand(*texts.shape, 2)
    return Rollout(
        prompts=list(range(len(texts))),
        samples=[[words(text) for text in group] for group in texts.tolist()],
        mask=torch.ones_like(texts, dtype=torch.bool),
        logp_old=torch.zeros(texts.shape),
        values=values,
        columns=columns,
        extras={"offsets": offsets},
    )


def conclude(results: Results) -> Evidence:
    """Spans teach, and one sum of the same feedback teaches later or never."""
    arms = SMOKE if results.budget == "smoke" else tuple(ROLES)
    own = results.values("spans", "steps_to_90")

    def ratio(arm: str) -> list[float]:
        return [other / mine for mine, other in zip(own, results.values(arm, "steps_to_90"), strict=True)]

    checks = [
        at_least("quoted phrases lead back to their words", results.values("spans", "placed"), 0.9, what="mean share"),
        at_least(
            "the policy learns the reports", results.values("spans", "right"), 0.95, what="mean share of right words"
        ),
        *(
            at_least(f"steps to 0.9, {arm} over spans", ratio(arm), 1.3, kind="headline", what="mean ratio")
            for arm in arms
            if arm.startswith("summed")
        ),
    ]
    if "sort-spans" in arms:
        checks.append(
            compare(
                "sorting: more right answers than summed",
                results.values("sort-spans", "right"),
                results.values("sort-summed", "right"),
                margin=0.05,
                errors=2.0,
            )
        )
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(results.arm(arm, ROLES[arm]) for arm in arms),
        checks=tuple(checks),
        notes=(
            f"{PROMPTS} prompts, each with a hidden report of {LENGTH} of {TOKENS} words. A program writes the critique: it "
            "quotes every run of right and of wrong words, and the quotes are looked for in the text as a model's would be.",
            f"The policy is autoregressive with a table of values, {GROUP} samples a prompt, GAE (1, 0.95) with whitening, Adam "
            f"at the best of {', '.join(map(str, RATES))} on two other seeds. summed: the same feedback as one reward at the "
            "end; summed-group: as one advantage against the group (GRPO).",
            f"terse-critic: at most {MOST_GOOD} good and {MOST_POOR} poor phrases of at most {LONGEST_RUN} words; its sum is not "
            "largest for the right report. No condition is on it.",
            "sort: a transformer of 0.1 M weights learns to sort digits from marks of right and wrong ones, by PPO on tokens, "
            f"{SORT['steps']} steps of 256 samples, {SORT['passes']} passes; right is the share of right answers, of which the "
            "marks do not speak.",
        ),
        shown=("right", "right_half", "steps_to_90", "placed", "greedy", "right_before"),
    )
