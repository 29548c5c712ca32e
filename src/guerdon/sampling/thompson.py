"""Thompson sampling of Beta posteriors: one draw for each prompt, and the prompts whose draws gain most.

Drawing a million times for a few dozen prompts is waste: the largest gains all lie in a narrow band around the best
probability. `draw_near` finds who falls into the band by thinning, without drawing for the others, and has exactly the
distribution of `draw_all`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator

Posterior = Callable[[Any], tuple[np.ndarray, np.ndarray]]  # positions or a slice -> their alpha and beta
Gain = Callable[[Any], Any]

_MARGIN = 1.1  # on a maximum that is looked up on a grid
_SPLITS = np.linspace(-1, 1, 21)  # of that grid, in square roots of the evidence


class Drawn(NamedTuple):
    """What a round of draws gave.

    Attributes:
        positions: of the largest gains, largest first.
        density: how many of all draws fell near the peak, per prompt and unit of probability.
    """

    positions: np.ndarray
    density: float


def largest(gains: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` largest gains, largest first; of equal ones the first in order.

    Example:
        >>> largest(np.array([0.1, 0.3, 0.2, 0.3]), 3).tolist()
        [1, 3, 2]
    """
    if count < len(gains):
        bound = np.partition(gains, len(gains) - count)[len(gains) - count] if count else np.inf
        above = np.flatnonzero(gains > bound)
        at = np.flatnonzero(gains == bound)[: count - len(above)]
        chosen = np.sort(np.concatenate([above, at]))
    else:
        chosen = np.arange(len(gains))
    return chosen[np.argsort(-gains[chosen], kind="stable")]


def draw_all(posterior: Posterior, count: int, gain: Gain, peak: float, random: Generator) -> Drawn:
    """Draw once for every prompt.

    Args:
        posterior: gives alpha and beta.
        count: how many prompts are wanted.
        gain: of a probability.
        peak: where it is largest.
        random: the generator.
    """
    values = random.beta(*posterior(slice(None)))
    width = 0.05
    density = float(np.mean(np.abs(values - peak) < width / 2)) / width
    return Drawn(largest(gain(values), count), density)


def draw_near(
    posterior: Posterior,
    size: int,
    count: int,
    gain: Gain,
    peak: float,
    width: float,
    ceiling: float,
    random: Generator,
) -> Drawn:
    """Draw for those prompts only whose draws fall within `width / 2` of the peak.

    A prompt's draw falls into the band at p with density f(p). So each prompt is tried with probability ceiling * width
    (a binomial number of them, at random), given a uniform p in the band, and accepted with f(p) / ceiling. If more
    than `count` gains exceed what is possible outside the band, they are the largest of all. If not, which is rare, all
    other prompts are drawn too, given that they are outside the band.

    Args:
        posterior: gives alpha and beta.
        size: number of prompts.
        count: how many are wanted.
        gain: of a probability; rising before the peak and falling after it.
        peak: where it is largest.
        width: of the band, which lies within (0, 1).
        ceiling: no density in the band may exceed it, and ceiling * width not 1; see `density_ceiling`.
        random: the generator.
    """
    low, high = peak - width / 2, peak + width / 2
    tried = _distinct(size, int(random.binomial(size, ceiling * width)), random)
    points = random.uniform(low, high, len(tried))
    inside = random.random(len(tried)) * ceiling < beta_density(points, *posterior(tried))
    positions, gains = tried[inside], gain(points[inside])
    density = len(positions) / (size * width)
    if np.count_nonzero(gains > max(gain(low), gain(high))) >= count:
        return Drawn(positions[largest(gains, count)], density)
    others = np.ones(size, dtype=bool)
    others[positions] = False
    rest = np.flatnonzero(others)
    alpha, beta = posterior(rest)
    values = random.beta(alpha, beta)
    while len(again := np.flatnonzero((values > low) & (values < high))):
        values[again] = random.beta(alpha[again], beta[again])
    positions, gains = np.concatenate([positions, rest]), np.concatenate([gains, gain(values)])
    return Drawn(positions[largest(gains, count)], density)


def beta_density(points: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Density of Beta(alpha, beta) at points within (0, 1)."""
    total, first, second = torch.from_numpy(np.stack([alpha + beta, alpha, beta])).lgamma_().numpy()
    return np.exp(total - first - second + (alpha - 1) * np.log(points) + (beta - 1) * np.log1p(-points))


@functools.lru_cache(maxsize=64)
def density_ceiling(alpha0: float, beta0: float, evidence: float, low: float, high: float) -> float:
    """More than any density within [low, high] of a posterior with at most `evidence` beyond its prior.

    At a given p the density never falls when evidence is added in the proportion p : 1 - p, so its maximum has all of
    the evidence; and its logarithm is concave in how that is split, with a maximum near p * (all counts - 1) + 1/2.
    """
    points = np.array([[low], [(low + high) / 2], [high]])
    centre = points * (alpha0 + beta0 + evidence - 1) + 0.5 - alpha0
    right = np.clip(centre + np.sqrt(evidence) * _SPLITS, 0, evidence)
    return _MARGIN * float(beta_density(points, alpha0 + right, beta0 + evidence - right).max())


def _distinct(size: int, count: int, random: Generator) -> np.ndarray:
    """`count` different positions, every set of them equally likely."""
    if count > size // 2:
        return random.permutation(size)[:count]
    found = _unique(random.integers(size, size=count))
    while len(found) < count:
        found = _unique(np.concatenate([found, random.integers(size, size=count - len(found))]))
    return found


def _unique(positions: np.ndarray) -> np.ndarray:
    """Sorted, without repetitions; for short arrays much faster than numpy's own."""
    ordered = np.sort(positions)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered
