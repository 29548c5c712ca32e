"""Shaping by the statistics of all scores so far: mean and std, the range, or a clip around the mean.

They are what `par` is compared with, and common in trainers. Reward Shaping to Mitigate Reward Hacking in RLHF, 2025,
arXiv 2502.18770.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guerdon.errors import RecipeError, check_shapes
from guerdon.shaping.bounded import check_scores


class Moments(NamedTuple):
    """Number, mean, sum of squared deviations, least and largest of the scores seen, all float64."""

    n: Tensor
    mean: Tensor
    m2: Tensor
    low: Tensor
    high: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation without Bessel's correction; 0 until there are two scores."""
        return torch.where(self.n > 1, (self.m2 / self.n.clamp(min=1)).sqrt(), 0.0)


class RunningShaper(nn.Module):
    """What shapings by running statistics share: the statistics.

    `forward` uses the statistics as they are with the batch at hand taken in, and changes no state; `observe` takes the
    batch in for good. Batches are merged by Chan's formula, so how scores are split into batches makes no difference:
    with d = mean_B - mean and n' = n + B, mean += d B / n' and M2 += M2_B + d^2 n B / n'.
    """

    where = "shaping.running"

    def __init__(self) -> None:
        super().__init__()
        self.moments: Tensor
        # as one row (n, mean, M2, least, largest), in double precision: a long run sums up many scores
        start = [0.0, 0.0, 0.0, torch.inf, -torch.inf]
        self.register_buffer("moments", torch.tensor(start, dtype=torch.float64))

    def merged(self, scores: Float[Tensor, "P G"]) -> Moments:
        """The statistics with a batch taken in; NaN scores are left out.

        Raises:
            ShapeError: scores is not [P, G].
            ScoreError: a score is infinite, which would spoil the statistics for ever.
        """
        check_shapes(self.where, scores=(scores, "P G"))
        check_scores(self.where, scores)
        n, mean, m2, low, high = self.moments.unbind()
        batch = scores.detach()[~scores.isnan()].double()
        if not len(batch):
            return Moments(n, mean, m2, low, high)
        total = n + len(batch)
        shift = batch.mean() - mean
        return Moments(
            total,
            mean + shift * len(batch) / total,
            m2 + batch.var(unbiased=False) * len(batch) + shift.square() * n * len(batch) / total,
            torch.minimum(low, batch.min()),
            torch.maximum(high, batch.max()),
        )

    @torch.no_grad()
    def observe(self, scores: Float[Tensor, "P G"]) -> None:
        """Take the scores of a finished step in.

        Args:
            scores: [P, G], as `forward` got them; NaN = not scored.
        """
        self.moments.copy_(torch.stack(self.merged(scores)))

    def metrics(self) -> dict[str, float]:
        """Mean and standard deviation of all scores so far."""
        found = Moments(*self.moments.unbind())
        return {"mean": found.mean.item(), "std": found.std.item()} if found.n > 0 else {}


class MeanStd(RunningShaper):
    """s = (r - mean) / std over all scores so far, the batch at hand included.

    Raises:
        ShapeError: scores is not [P, G].
        ScoreError: a score is infinite.

    Edge cases:
        NaN stays NaN and is not counted. While all scores are equal the divisor is 1.

    Example:
        >>> MeanStd()(torch.tensor([[0.0, 2.0]]))
        tensor([[-1.,  1.]])

    Source:
        arXiv 2502.18770, authors' code (Meanstd).
    """

    where = "shaping.mean_std"

    def forward(self, scores: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        """Shape one component's scores; changes no state.

        Args:
            scores: [P, G], raw scores; NaN = not scored.

        Returns:
            Shaped scores [P, G], without unit.
        """
        found = self.merged(scores)
        divisor = torch.where(found.std > 0, found.std, 1.0)
        return (scores - found.mean.to(scores)) / divisor.to(scores)


class Clip(RunningShaper):
    """s = r held within `width` standard deviations of the mean of all scores so far, the batch at hand included.

    Args:
        width: in standard deviations, at least 0.

    Raises:
        RecipeError: width is negative.
        ShapeError: scores is not [P, G].
        ScoreError: a score is infinite.

    Edge cases:
        NaN stays NaN and is not counted.

    Example:
        >>> Clip()(torch.tensor([[0.0, 0.0, 0.0, 4.0]])).round(decimals=2)
        tensor([[0.0000, 0.0000, 0.0000, 2.7300]])

    Source:
        arXiv 2502.18770, authors' code (Clip), width 1.
    """

    where = "shaping.clip"

    def __init__(self, *, width: float = 1.0) -> None:
        super().__init__()
        if not width >= 0:
            raise RecipeError(f"{self.where}.width: must be at least 0; got {width}.")
        self.width = width

    def forward(self, scores: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        """Shape one component's scores; changes no state.

        Args:
            scores: [P, G], raw scores; NaN = not scored.

        Returns:
            Shaped scores [P, G], in their own unit.
        """
        found = self.merged(scores)
        low, high = found.mean - self.width * found.std, found.mean + self.width * found.std
        return torch.minimum(torch.maximum(scores, low.to(scores)), high.to(scores))


class MinMax(RunningShaper):
    """s = (r - min) / (max - min) over all scores so far, the batch at hand included: from 0 to 1.

    Raises:
        ShapeError: scores is not [P, G].
        ScoreError: a score is infinite.

    Edge cases:
        NaN stays NaN and is not counted. While all scores are equal, 0.5 (the authors' code divides 0 by 0).

    Example:
        >>> MinMax()(torch.tensor([[-1.0, 0.0, 3.0]]))
        tensor([[0.0000, 0.2500, 1.0000]])

    Source:
        arXiv 2502.18770, authors' code (Minmax).
    """

    where = "shaping.min_max"

    def forward(self, scores: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        """Shape one component's scores; changes no state.

        Args:
            scores: [P, G], raw scores; NaN = not scored.

        Returns:
            Shaped scores [P, G].
        """
        found = self.merged(scores)
        if not found.low < found.high:
            return torch.where(scores.isnan(), scores, 0.5)
        low, high = found.low.to(scores), found.high.to(scores)
        return (scores - low) / (high - low)


mean_std = MeanStd
clip = Clip
min_max = MinMax
