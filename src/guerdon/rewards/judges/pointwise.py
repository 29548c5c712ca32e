"""Any reward as a judge: of two samples, the one with the higher score is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from guerdon.errors import RecipeError
from guerdon.rewards.judges.base import Match, Verdict, resolve


class PointwiseJudge:
    """Scores both samples of a match with a reward and compares the scores.

    Args:
        reward: a reward function, or as in a recipe: a name, {name: {option: value}} or `module:attribute`. Data
            columns that it names are handed to it.
        margin: scores that differ by no more than this are a draw, both get their mean; in the unit of the reward.
        temperature: the first wins (1 point to 0) with probability sigmoid((s_1 - s_2) / temperature), the model of
            Bradley and Terry; in the unit of the reward. None = the higher score wins. It takes no margin.
        seed: of those draws. The same match is always decided the same way, whatever else is judged.

    Raises:
        RecipeError: the margin is negative, the temperature not above 0, or there is no such reward.

    Edge cases:
        A sample that the reward does not score (None, NaN, an error) has no verdict, and neither has its match.

    Example:
        >>> def length(samples): return [[float(len(s)) for s in group] for group in samples]
        >>> PointwiseJudge(reward=length, margin=1.0)([Match("p", "aaa", "b"), Match("p", "aa", "b")])[1][:2]
        (1.5, 1.5)

    Source:
        The judge of Pref-GRPO, arXiv 2508.20751, with the margin as our reading.
    """

    def __init__(self, *, reward: Any, margin: float = 0.0, temperature: float | None = None, seed: int = 0) -> None:
        if not margin >= 0:
            raise RecipeError(f"judges.pointwise.margin: must be 0 or more; got {margin}.")
        if temperature is not None and not temperature > 0:
            raise RecipeError(f"judges.pointwise.temperature: must be above 0, or null; got {temperature}.")
        if temperature is not None and margin:
            raise RecipeError("judges.pointwise: margin and temperature are two ways to decide; give one of them.")
        self.reward = resolve(reward, "judges.pointwise.reward", "rewards")
        self.margin, self.temperature, self.seed = margin, temperature, seed

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
        return [self._verdict(match, *pair) for match, pair in zip(matches, found.tolist(), strict=True)]

    def _verdict(self, match: Match, first: float, second: float) -> Verdict:
        if self.temperature is not None and math.isfinite(first - second):
            gap = max(-700.0, min(700.0, (first - second) / self.temperature))
            won = _uniform(self.seed, match) < 1 / (1 + math.exp(-gap))
            return Verdict(float(won), float(not won))
        if abs(first - second) <= self.margin:
            first = second = (first + second) / 2
        verdict = Verdict(first, second)
        return verdict._replace(why="the reward gave no score") if verdict.failed else verdict


def _uniform(seed: int, match: Match) -> float:
    """A number in [0, 1) that the match decides: drawn afresh for each, and again the same when a run is resumed."""
    digest = blake2b(str(seed).encode(), digest_size=8)
    for part in (match.prompt, match.first, match.second):
        # what a tensor prints is not all of it
        whole = part.detach().cpu().numpy().tobytes() if hasattr(part, "detach") else repr(part).encode()
        digest.update(len(whole).to_bytes(8) + whole)
    return int.from_bytes(digest.digest()) / 2**64


pointwise = PointwiseJudge
