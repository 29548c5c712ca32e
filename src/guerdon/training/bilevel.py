"""Learning what to reward: a policy writes reward expressions, and is rewarded by how well others do that train with them.

The outer loop is the online loop. Its prompt is an instruction, a sample is an expression over the primitives of an inner
task, and the score of a sample is the performance of an inner policy that was trained with it. So the update of the outer
policy is REINFORCE through a black box: grad J = E[(v - baseline) grad log pi(expression)].
Differentiable Evolutionary Reinforcement Learning, 2025, arXiv 2512.13399.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from guerdon.components import build
from guerdon.errors import RecipeError, ScoreError
from guerdon.rewards.expression import RewardExpression
from guerdon.signal import Signal
from guerdon.training.online import Online
from guerdon.training.optimisation import Optim

INVALID = 0.0
"""What an expression is worth that cannot be read, or whose inner run failed."""


class Trained(NamedTuple):
    """What came of training with one reward.

    Attributes:
        performance: by the true metric, on data that was not trained on; not finite if there is none.
        checkpoint: what a later inner run can start from, such as a folder; None if nothing was kept.
        fault: why the run failed; empty if it did not.
    """

    performance: float
    checkpoint: str | None = None
    fault: str = ""

    @property
    def worth(self) -> float:
        """The performance; 0 if the run failed."""
        return self.performance if not self.fault and math.isfinite(self.performance) else INVALID


@runtime_checkable
class Inner(Protocol):
    """Trains policies with given rewards; see `guerdon.training.inner_runs` for one that runs recipes."""

    def train(self, rewards: Sequence[RewardExpression], start: str | None, iteration: int) -> Sequence[Trained]:
        """Train one policy with each reward and measure it. The same reward from the same start gives the same.

        Args:
            rewards: all different.
            start: the checkpoint that all start from; None = the base model.
            iteration: of the outer loop, counted from 0.
        """
        ...


class Performance(nn.Module):
    """The reward of the outer loop: how well a policy does that was trained with the expression in a sample.

    Only the first line of a sample counts. What is no valid expression over the primitives is worth 0, and so is one whose
    inner run failed. Equal expressions of a group are trained with once.

    Args:
        inner: trains the policies.
        primitives: K, or the K names.
        population: inner runs start from the best checkpoint of the iteration before, in place of the base model.

    Edge cases:
        If no inner run of an iteration ended well the next one has the same start. A sample that was cut off at its longest
        is no expression unless a line ended in it.

    Source:
        arXiv 2512.13399, section 3. An invalid expression keeps its place in the group with worth 0, as the paper has it;
        the published code puts a copy of another in its place.
    """

    def __init__(self, inner: Inner, primitives: int | Sequence[str], *, population: bool = False) -> None:
        super().__init__()
        self.inner, self.population = inner, population
        self.primitives = primitives if isinstance(primitives, int) else tuple(primitives)
        self.iteration = 0
        self.start: str | None = None
        self.best: dict[str, Any] | None = None
        self.records: list[dict[str, Any]] = []
        self._trained: dict[RewardExpression, Trained] = {}

    def forward(
        self, samples: Sequence[Sequence[str]], truncated: Bool[Tensor, "P G"] | None = None
    ) -> list[list[float]]:
        """Train with the expressions of all groups; state changes with `observe` alone.

        Args:
            samples: [P][G] texts.
            truncated: [P, G], True where a sample was cut off at its longest.

        Returns:
            [P][G] performances.

        Raises:
            ScoreError: the inner side gave another number of results.
        """
        read = [[self._read(*pair)[0] for pair in group] for group in _pairs(samples, truncated)]
        wanted = dict.fromkeys(e for group in read for e in group if e is not None and e not in self._trained)
        if wanted:
            found = list(self.inner.train(list(wanted), self.start, self.iteration))
            if len(found) != len(wanted):
                raise ScoreError(f"bilevel: {len(wanted)} rewards were to be trained with; got {len(found)} results.")
            self._trained |= dict(zip(wanted, found, strict=True))
        return [[INVALID if e is None else self._trained[e].worth for e in group] for group in read]

    def observe(self, samples: Sequence[Sequence[str]], truncated: Bool[Tensor, "P G"] | None = None) -> None:
        """End an iteration: keep its best expression and, with a population, the checkpoint to start from.

        Args:
            samples: [P][G] texts, as they were scored.
            truncated: [P, G].
        """
        self.records = []
        well: list[Trained] = []
        for text, cut in (pair for group in _pairs(samples, truncated) for pair in group):
            expression, why = self._read(text, cut)
            trained = None if expression is None else self._trained[expression]
            worth = INVALID if trained is None else trained.worth
            record = {"iteration": self.iteration, "expression": first_line(text), "performance": worth}
            if trained is not None and not trained.fault:
                well.append(trained)
                if self.best is None or worth > self.best["performance"]:
                    self.best = record
            fault = why or ("" if trained is None else trained.fault)
            self.records.append({**record, "valid": expression is not None, "fault": fault})
        if self.population and well:
            self.start = max(well, key=lambda trained: trained.worth).checkpoint or self.start
        self.iteration += 1
        self._trained = {}

    def metrics(self) -> dict[str, float]:
        """Of the last iteration: the share of valid expressions, how many differ, failed runs; and the best worth so far."""
        valid = [record["expression"] for record in self.records if record["valid"]]
        return {
            "best": INVALID if self.best is None else self.best["performance"],
            "valid": len(valid) / max(len(self.records), 1),
            "distinct": float(len(set(valid))),
            "failed": float(sum(record["valid"] and bool(record["fault"]) for record in self.records)),
        }

    def _read(self, text: str, cut: bool) -> tuple[RewardExpression | None, str]:
        """The expression of a sample, or why there is none."""
        if cut and "\n" not in text:
            return None, "it was cut off at its longest"
        return _parse(first_line(text), self.primitives)

    def get_extra_state(self) -> Tensor:
        """What an iteration leaves to the next, as bytes: checkpoints hold tensors."""
        state = {"iteration": self.iteration, "start": self.start, "best": self.best}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Put back what `get_extra_state` gave."""
        found = json.loads(bytes(state.tolist()))
        self.iteration, self.start, self.best = found["iteration"], found["start"], found["best"]
        self.records, self._trained = [], {}


@lru_cache(maxsize=4096)
def _parse(text: str, primitives: int | tuple[str, ...]) -> tuple[RewardExpression | None, str]:
    try:
        return RewardExpression.parse(text, primitives), ""
    except RecipeError as error:
        return None, str(error)


def first_line(text: str) -> str:
    """The part of a sample that counts."""
    return text.split("\n", 1)[0].strip()


def _pairs(samples: Sequence[Sequence[str]], truncated: Tensor | None) -> list[list[tuple[str, bool]]]:
    cut = [[False] * len(group) for group in samples] if truncated is None else truncated.tolist()
    return [list(zip(*rows, strict=True)) for rows in zip(samples, cut, strict=True)]


def outer_loop(
    policy: Any,
    performance: Performance,
    rows: Sequence[Mapping[str, Any]],
    *,
    n: int = 8,
    passes: int = 4,
    lr: float = 1e-6,
    beta: float = 0.001,
    steps: int = 8,
    seed: int = 0,
) -> Online:
    """The outer loop with the paper's settings, for a policy and an inner side of one's own.

    A step samples n expressions, trains an inner policy with each and makes `passes` GRPO updates:
    A = (v - mean v) / (std v + 1e-6), a clip of 0.2, and a KL divergence (k3) from where the policy started.

    Args:
        policy: writes expressions; keep it to their characters with `restrict`.
        performance: what they are worth.
        rows: with the instruction as `prompt`; one is enough.
        n: expressions of a step, at least 2.
        passes: updates of a step.
        lr: of AdamW.
        beta: weight of the divergence; 0 = none.
        steps: of the whole run.
        seed: of what is sampled.

    Raises:
        RecipeError: n is below 2.

    Source:
        arXiv 2512.13399, section 3 and the authors' script.
    """
    if n < 2:
        raise RecipeError(
            f"bilevel: an expression is compared with others of its group: n must be at least 2; got {n}."
        )
    if beta:
        policy.keep_reference()
    advantage = build("advantages", {"grpo": {"eps": 1e-6}})
    return Online(
        policy,
        rows,
        Signal(rewards={"performance": performance}, advantage=advantage),
        build("objectives", {"policy_gradient": {"beta": beta}}),
        prompts_per_step=1,
        group_size=n,
        passes=passes,
        optim=Optim(lr=lr),
        steps=steps,
        seed=seed,
    )
