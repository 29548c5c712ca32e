"""One reward composed of others by an expression, to stand beside the other rewards of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from guerdon.errors import RecipeError
from guerdon.rewards.expression import RewardExpression
from guerdon.rewards.judges.base import resolve
from guerdon.rewards.nested import columns_of, score_one


class Composition:
    """Score samples with several rewards and compose the scores by arithmetic: `right + 0.5 * (short / 2)`.

    To compose all rewards of a recipe use `weighting: expression`, which leaves them in the ledger one by one.

    Args:
        formula: numbers, names of the rewards in `of` (or g1, g2, ... for their places), + - * / and parentheses.
        of: name -> reward, each as in a recipe: a name, {name: {option: value}} or `module:attribute`; or a callable.

    Raises:
        RecipeError: the formula is no expression of these rewards, there is no such reward, or an option is wrong.

    Edge cases:
        A sample for which something is divided by zero, or whose value is not finite, gets 0. What a reward did not score
        counts as 0; a sample that none of the rewards scored which the formula names is not scored.

    Example:
        >>> stage = Composition(formula="2 * same + loose", of={"same": "exact_answer", "loose": {"regex": {"pattern": "a"}}})
        >>> stage(["p"], [["a", "ba", "c"]], answer=["a"])
        [[3.0, 1.0, 0.0]]

    Source:
        Differentiable Evolutionary Reinforcement Learning, arXiv 2512.13399, section 3 (the language of rewards).
    """

    def __init__(self, *, formula: str, of: dict[str, Any]) -> None:
        where = "rewards.composition"
        if not of:
            raise RecipeError(f"{where}.of: must name at least one reward.")
        self.expression = RewardExpression.parse(formula, tuple(of))
        self.rewards: Mapping[str, Any] = {
            name: resolve(reward, f"{where}.of.{name}", "rewards") for name, reward in of.items()
        }

    def __call__(
        self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]], **columns: Any
    ) -> list[list[float | None]]:
        """Score and compose.

        Args:
            prompts: [P].
            samples: [P][G].
            **columns: lists of P, which the rewards may read.

        Returns:
            [P][G]; None where none of the rewards scored that the formula names.

        Raises:
            ScoreError: a reward failed.
        """
        lists = columns_of(columns, len(prompts))
        found = [
            score_one(f"{name} of composition", reward, prompts, samples, lists).scores[..., 0]
            for name, reward in self.rewards.items()
        ]
        scores = torch.stack(found, -1).double()
        unscored = scores[..., list(self.expression.used)].isnan().all(-1)
        values = self.expression(scores.nan_to_num(nan=0.0))
        return [
            [None if missing else value for value, missing in zip(*rows, strict=True)]
            for rows in zip(values.tolist(), unscored.tolist(), strict=True)
        ]


composition = Composition
