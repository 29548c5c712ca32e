"""Any reward as a judge: of two samples, the one with the higher score is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guerdon.errors import RecipeError
from guerdon.rewards.judges.base import Match, Verdict, resolve


class PointwiseJudge:
    """Scores both samples of a match with a reward and compares the scores.

    Args:
        reward: a reward function, or as in a recipe: a name, {name: {option: value}} or `module:attribute`. Data
            columns that it names are handed to it.
        margin: scores that differ by no more than this are a draw, both get their mean; in the unit of the reward.

    Raises:
        RecipeError: the margin is negative, or there is no such reward.

    Edge cases:
        A sample that the reward does not score (None, NaN, an error) has no verdict, and neither has its match.

    Example:
        >>> def length(samples): return [[float(len(s)) for s in group] for group in samples]
        >>> PointwiseJudge(reward=length, margin=1.0)([Match("p", "aaa", "b"), Match("p", "aa", "b")])[1]
        Verdict(first=1.5, second=1.5, calls=1, malformed=0, why='')

    Source:
        The judge of Pref-GRPO, arXiv 2508.20751, with the margin as our reading.
    """

    def __init__(self, *, reward: Any, margin: float = 0.0) -> None:
        if not margin >= 0:
            raise RecipeError(f"judges.pointwise.margin: must be 0 or more; got {margin}.")
        self.reward = resolve(reward, "judges.pointwise.reward", "rewards")
        self.margin = margin

    def __call__(self, matches: Sequence[Match]) -> list[Verdict]:
        """Judge every match.

        Args:
            matches: any number of them; their samples are scored in one call.

        Returns:
            One verdict per match.
        """
        import torch

        from guerdon.rewards.scoring import score
        from guerdon.rollout import Rollout

        if not matches:
            return []
        names = set(matches[0].columns).intersection(*(match.columns for match in matches))
        rollout = Rollout(
            prompts=[match.prompt for match in matches],
            samples=[[match.first, match.second] for match in matches],
            mask=torch.ones(len(matches), 2, 1, dtype=torch.bool),
            logp_old=torch.zeros(len(matches), 2, 1),
            columns={name: [match.columns[name] for match in matches] for name in names},
        )
        found = score({"judge": self.reward}, rollout, on_bad_score="drop").scores[..., 0]
        return [self._verdict(*pair) for pair in found.tolist()]

    def _verdict(self, first: float, second: float) -> Verdict:
        if abs(first - second) <= self.margin:
            first = second = (first + second) / 2
        verdict = Verdict(first, second)
        return verdict._replace(why="the reward gave no score") if verdict.failed else verdict


pointwise = PointwiseJudge
