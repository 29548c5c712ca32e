"""Draw the prompts that promise most to a group-relative method, before any sample is made.

A Beta posterior for each prompt's probability of a right sample, Thompson sampling by the information gain p (1 - p)^2,
and a decay on two scales, since the policy moves. No rollout is spent on finding out.
VADE: Variance-Aware Dynamic Sampling via Online Sample-Level Difficulty Estimation for Multimodal RL, 2025,
arXiv 2511.18902.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import DataError, RecipeError, ShapeError, check_shapes, nearest
from guerdon.sampling.base import Sampler
from guerdon.sampling.thompson import Drawn, density_ceiling, draw_all, draw_near

GainName = Literal["information", "variance", "mixed"]
Numbers = TypeVar("Numbers", Tensor, np.ndarray, float)

_WHERE = "sampling.vade"
_FEW = 2048  # prompts for which drawing for all is fast enough
_SMALLEST = 1e-6  # of the common factor of all evidence


def information_gain(probability: Numbers) -> Numbers:
    """I(p) = p (1 - p)^2: the variance of a group's rewards times the rate of failure; at most 4/27, at p = 1/3.

    Example:
        >>> round(information_gain(1 / 3) * 27, 6)
        4.0
    """
    return probability * (1 - probability) ** 2


def mixed_probability(probability: Numbers, group_size: int) -> Numbers:
    """The probability 1 - p^G - (1 - p)^G that G samples are neither all right nor all wrong.

    Example:
        >>> mixed_probability(0.5, 2)
        0.5
    """
    return 1 - probability**group_size - (1 - probability) ** group_size


def _variance(probability: Numbers) -> Numbers:
    return probability * (1 - probability)


# mixed_probability falls with |p - 1/2| as the variance does, for every G: the two order prompts alike
_GAINS: Mapping[str, tuple[Any, float]] = {
    "information": (information_gain, 1 / 3),
    "variance": (_variance, 1 / 2),
    "mixed": (_variance, 1 / 2),
}


def _rounded_up(value: float) -> float:
    """To a power of 1.1; 0 stays."""
    return 1.1 ** math.ceil(math.log(value, 1.1)) if value > 0 else 0.0


class Vade(Sampler):
    """Draw the prompts whose posterior promises the largest gain, by Thompson sampling.

    p_i ~ Beta(alpha_i, beta_i), one draw for every prompt; the B prompts of largest I(p_i) are rolled out. Of the G
    samples of a selected prompt k are right. Then, for all prompts and then for the selected ones,

    (alpha, beta) = prior + decay_global * ((alpha, beta) - prior),
    (alpha, beta) = prior + decay_selected * ((alpha, beta) - prior) + (k, G - k).

    The first lets what is known of a prompt fade until it is tried again, the second replaces old evidence by new. With
    both at 1 this is the plain Beta-Bernoulli bandit.

    Args:
        alpha0: prior count of right samples.
        beta0: prior count of wrong ones.
        decay_global: share of its evidence that a prompt keeps in a step.
        decay_selected: further share that a selected prompt keeps before its new samples are counted.
        gain: `information` p (1 - p)^2; `variance` p (1 - p); `mixed` 1 - p^G - (1 - p)^G, which orders prompts as
            `variance` does.
        threshold: a score of at least this is right.
        fractional: count scores themselves, clipped to [0, 1], in place of right or wrong.
        component: name of the component that is read (the accuracy, not a bonus), as it was scored; None = the first.
        pool: draw from the first `pool` prompts of the data only; endless data needs it, since there is a posterior
            for each prompt. None = all.

    Attributes:
        alpha: [N], of the posteriors.
        beta: [N].
        mean: [N], alpha / (alpha + beta).
        evidence: [N], counts beyond the prior.

    Raises:
        RecipeError: an option is out of range.

    Edge cases:
        Samples that were not scored are not counted; a prompt without a scored sample counts as not selected. A state
        of fewer prompts than there are now is taken up, and the new ones start at the prior. Counts are kept in
        float64, 16 bytes a prompt.

    Example:
        >>> sampler = Vade()
        >>> sampler.prepare(size=3, seed=0)
        >>> sampler.observe([2, 0], torch.tensor([[[1.0], [1.0]], [[0.0], [1.0]]]))
        >>> sampler.alpha.tolist(), sampler.beta.tolist()
        ([2.0, 1.0, 3.0], [2.0, 1.0, 1.0])
        >>> sorted(sampler.draw(3))
        [0, 1, 2]

    Source:
        VADE, 2025, arXiv 2511.18902. The two-scale decay, the choice of the B largest and the start values are our
        reading; the abstract gives their names and purpose only.
    """

    counts: Tensor
    scale: Tensor
    most: Tensor
    density: Tensor
    rounds: Tensor

    def __init__(
        self,
        *,
        alpha0: float = 1.0,
        beta0: float = 1.0,
        decay_global: float = 0.998,
        decay_selected: float = 0.8,
        gain: Literal["information", "variance", "mixed"] = "information",
        threshold: float = 0.5,
        fractional: bool = False,
        component: str | None = None,
        pool: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"alpha0": alpha0, "beta0": beta0}.items():
            if not 0.0 < value < float("inf"):
                raise RecipeError(f"{_WHERE}: {name} must be above 0; got {value}.")
        for name, value in {"decay_global": decay_global, "decay_selected": decay_selected}.items():
            if not 0.0 <= value <= 1.0:
                raise RecipeError(f"{_WHERE}: {name} must be in [0, 1]; got {value}.")
        if gain not in _GAINS:
            known = get_args(GainName)
            raise RecipeError(f"{_WHERE}: gain must be one of {', '.join(known)}; got {gain!r}.{nearest(gain, known)}")
        if pool is not None and pool < 1:
            raise RecipeError(f"{_WHERE}: pool must be at least 1; got {pool}.")
        self.alpha0, self.beta0 = alpha0, beta0
        self.decay_global, self.decay_selected = decay_global, decay_selected
        self.gain, self.peak = _GAINS[gain]
        self.threshold, self.fractional, self.component, self.pool = threshold, fractional, component, pool
        # evidence is scale * counts [N, 2], right and wrong: decaying a million prompts is then one multiplication
        self.register_buffer("counts", torch.zeros(0, 2, dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        # what bounds and tunes the search: most evidence of any prompt, draws per unit of probability at the peak
        self.register_buffer("most", torch.zeros((), dtype=torch.float64))
        self.register_buffer("density", torch.ones((), dtype=torch.float64))
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int64))
        self._seen: dict[str, float] = {}

    @property
    def alpha(self) -> Float[Tensor, " N"]:
        """Counts of right samples, the prior's included."""
        return self.alpha0 + self.scale * self.counts[:, 0]

    @property
    def beta(self) -> Float[Tensor, " N"]:
        """Counts of wrong samples, the prior's included."""
        return self.beta0 + self.scale * self.counts[:, 1]

    @property
    def mean(self) -> Float[Tensor, " N"]:
        """The expected probability of a right sample."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def evidence(self) -> Float[Tensor, " N"]:
        """Counts beyond the prior."""
        return self.scale * self.counts.sum(-1)

    def prepare(self, size: int | None, seed: int) -> None:
        """Tell the sampler about the data; posteriors that are there stay.

        Args:
            size: number of prompts; None for endless data.
            seed: of its draws.

        Raises:
            DataError: there are no prompts; they are endless and there is no pool; the state is of more prompts.
        """
        super().prepare(size, seed)
        if size is None and self.pool is None:
            raise DataError(
                f"{_WHERE}: the data is endless, and vade keeps a posterior for each prompt. Say how many prompts to "
                "draw from: sampling: {vade: {pool: 1024}}, or --sampling.vade.pool 1024."
            )
        self.size = min(known) if (known := [n for n in (size, self.pool) if n is not None]) else None
        assert self.size is not None
        if len(self.counts) > self.size:
            raise DataError(
                f"{_WHERE}: the state is of {len(self.counts)} prompts, and the data has {self.size}. Prompts are known "
                "by their position: go on with the same data, or with more of it at the end."
            )
        self._grow(self.size)

    def draw(self, count: int) -> list[int]:
        """The positions of the `count` prompts that promise most, most first; none twice.

        Raises:
            DataError: there are fewer prompts than that.
        """
        size = len(self.counts)
        if count > size:
            raise DataError(
                f"{_WHERE}: {count} prompts are wanted and there are {size}; each can be drawn once a step. Lower "
                "prompts_per_step, or give more data."
            )
        random = np.random.default_rng([self.seed % 2**63, int(self.rounds)])
        self.rounds.add_(1)
        found = self._search(size, count, random)
        # where nobody fell into the band this halves, so that the next one is wider
        self.density.fill_((found.density + float(self.density)) / 2)
        return found.positions.tolist()

    def observe(self, indices: Sequence[int], scores: Float[Tensor, "P G K"], score_names: Sequence[str] = ()) -> None:
        """Let all evidence fade, and count the samples of the selected prompts.

        Args:
            indices: positions of the P prompts.
            scores: [P, G, K], as they were scored, NaN = not scored.
            score_names: the K names; needed when `component` is set.

        Raises:
            ShapeError: the sizes do not fit.
            DataError: a position is not in the data, or twice.
            RecipeError: there is no component of that name.
        """
        where, right, total = self._count(indices, scores, score_names)
        counts = self.counts.numpy()
        known = counts[where] * float(self.scale)
        self._fade()
        self._seen.clear()
        self._seen["effective_groups"] = float(np.count_nonzero((right > 0) & (right < total))) / max(len(scores), 1)
        if not len(where):
            return
        mean = (self.alpha0 + known[:, 0]) / (self.alpha0 + self.beta0 + known.sum(-1))
        now = self.decay_global * self.decay_selected * known + np.stack([right, total - right], -1)
        counts[where] = now / float(self.scale)
        evidence = now.sum(-1)
        self._seen["calibration_error"] = float(np.abs(mean - right / total).sum()) / len(where)
        self._seen["evidence"] = float(evidence.sum()) / len(where)
        self.most.fill_(max(float(self.most), float(evidence.max())))

    def metrics(self) -> dict[str, float]:
        """Of the last step: share of mixed groups, |posterior mean - share of right samples|, evidence."""
        return dict(self._seen)

    def _search(self, size: int, count: int, random: np.random.Generator) -> Drawn:
        # a band into which about five deviations more draws should fall than are wanted; its width and the most evidence are
        # rounded up, so that the ceiling is mostly at hand
        aimed = count + 5 * math.sqrt(count) + 10
        width = _rounded_up(aimed / (size * max(float(self.density), 1e-9)))
        if size > _FEW and width < 0.2:
            low, high = self.peak - width / 2, self.peak + width / 2
            ceiling = density_ceiling(self.alpha0, self.beta0, _rounded_up(float(self.most)), low, high)
            if ceiling * width < 0.5:
                return draw_near(self._posterior, size, count, self.gain, self.peak, width, ceiling, random)
        return draw_all(self._posterior, count, self.gain, self.peak, random)

    def _posterior(self, at: Any) -> tuple[np.ndarray, np.ndarray]:
        known = self.counts.numpy()[at] * float(self.scale)
        return self.alpha0 + known[:, 0], self.beta0 + known[:, 1]

    def _fade(self) -> None:
        self.scale.mul_(self.decay_global)
        self.most.mul_(self.decay_global)
        if float(self.scale) < _SMALLEST:
            self.counts.mul_(self.scale)
            self.scale.fill_(1.0)

    def _count(
        self, indices: Sequence[int], scores: Tensor, score_names: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the prompts with a scored sample: position, number of right samples, number of scored ones."""
        check_shapes(_WHERE, scores=(scores, "P G K"))
        if len(indices) != len(scores):
            raise ShapeError(f"{_WHERE}: indices must have P = {len(scores)} entries; got {len(indices)}.")
        if self.component is not None and self.component not in score_names:
            raise RecipeError(
                f"{_WHERE}: there is no component {self.component!r}.{nearest(self.component, score_names)} "
                f"There are: {', '.join(score_names)}."
            )
        where = np.asarray(indices, dtype=np.int64)
        size = self.counts.shape[0]
        if len(where) and not 0 <= where.min() <= where.max() < size:
            outside = where[(where < 0) | (where >= size)][0]
            raise DataError(f"{_WHERE}: there is no prompt {outside}; there are {size}.")
        if len(set(indices)) < len(where):
            twice = next(index for place, index in enumerate(indices) if index in indices[:place])
            raise DataError(f"{_WHERE}: prompt {twice} was observed twice in a step; give each prompt one group.")
        chosen = 0 if self.component is None else list(score_names).index(self.component)
        column = scores[..., chosen].detach().to("cpu", torch.float64).numpy()
        scored = ~np.isnan(column)
        right = np.clip(column, 0, 1) if self.fractional else (column >= self.threshold).astype(np.float64)
        total = scored.sum(-1)
        measured = total > 0
        return where[measured], np.where(scored, right, 0.0).sum(-1)[measured], total[measured]

    def _grow(self, size: int) -> None:
        self.counts = torch.cat([self.counts, self.counts.new_zeros(max(size - len(self.counts), 0), 2)])

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take up a state of as many prompts as the data has or fewer; it may be loaded before the data is known."""
        saved, size = state_dict.get(f"{prefix}counts"), self.size
        if saved is not None and size is not None and len(saved) > size:
            error_msgs.append(f"{_WHERE}: the state is of {len(saved)} prompts, and the data has {size}.")
            return
        if saved is not None:
            self.counts = self.counts.new_zeros(len(saved), 2)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if size is not None:
            self._grow(size)


vade = Vade
