"""Thompson sampling: the shortcut must have the distribution of drawing for every prompt."""

from __future__ import annotations

import math

import numpy as np
import pytest

from guerdon.sampling.thompson import beta_density, density_ceiling, draw_all, draw_near, largest
from guerdon.sampling.vade import information_gain

N, B = 60, 6
# hopeless, trivial, unknown and promising prompts
ALPHA = np.array([1.0] * 15 + [20.0] * 15 + [1.0] * 15 + [4.0] * 15)
BETA = np.array([20.0] * 15 + [1.0] * 15 + [1.0] * 15 + [8.0] * 15)


def posterior(at):
    return ALPHA[at], BETA[at]


def test_largest():
    gains = np.array([0.1, 0.4, 0.2, 0.4, 0.3, 0.2])
    assert largest(gains, 4).tolist() == [1, 3, 4, 2]
    assert largest(gains, 6).tolist() == [1, 3, 4, 2, 5, 0]
    assert largest(gains, 0).tolist() == []
    assert largest(np.zeros(5), 2).tolist() == [0, 1]


def test_largest_agrees_with_sorting():
    random = np.random.default_rng(0)
    for _ in range(50):
        gains = random.integers(8, size=20) / 8
        assert largest(gains, 7).tolist() == np.argsort(-gains, kind="stable")[:7].tolist()


def test_permuting_prompts_permutes_the_selection():
    random = np.random.default_rng(0)
    gains, order = random.random(20), random.permutation(20)
    assert order[largest(gains[order], 5)].tolist() == largest(gains, 5).tolist()


def test_density():
    # Beta(2, 3) has density 12 p (1 - p)^2
    found = beta_density(np.array([0.25, 0.5]), np.array([2.0, 2.0]), np.array([3.0, 3.0]))
    np.testing.assert_allclose(found, [1.6875, 1.5], rtol=1e-12)


@pytest.mark.parametrize(("alpha0", "beta0"), [(1.0, 1.0), (0.2, 0.5), (6.0, 1.0), (30.0, 40.0)])
@pytest.mark.parametrize("evidence", [0.0, 0.5, 8.0, 40.0, 3000.0])
def test_no_density_exceeds_the_ceiling(alpha0, beta0, evidence):
    low, high = 0.3, 0.36
    ceiling = density_ceiling(alpha0, beta0, evidence, low, high)
    total, share, point = np.meshgrid(
        np.linspace(0, evidence, 30), np.linspace(0, 1, 301), np.linspace(low, high, 7), indexing="ij"
    )
    most = beta_density(point, alpha0 + total * share, beta0 + total * (1 - share)).max()
    assert most <= ceiling <= 1.4 * most


@pytest.mark.parametrize("width", [0.02, 0.08, 0.12])
def test_near_selects_as_all_does(width):
    # 0.02 is nearly always too narrow, so that the others must be drawn too; 0.12 nearly never
    ceiling = density_ceiling(1.0, 1.0, 20.0, 1 / 3 - width / 2, 1 / 3 + width / 2)
    rounds = 1200
    counts = np.zeros((2, N))
    first = np.zeros((2, N))
    for seed in range(rounds):
        random = np.random.default_rng([seed, 1])
        near = draw_near(posterior, N, B, information_gain, 1 / 3, width, ceiling, random).positions
        every = draw_all(posterior, B, information_gain, 1 / 3, np.random.default_rng([seed, 2])).positions
        for row, found in enumerate((near, every)):
            assert len(set(found.tolist())) == B
            counts[row, found] += 1
            first[row, found[0]] += 1
    for table in (counts, first):
        kinds = table.reshape(2, 4, 15).sum(-1) / rounds
        # of the prompts of a kind, and of each prompt: within 5 standard errors
        error = np.sqrt(kinds.mean(0).clip(0.001) * 2 / rounds)
        assert (np.abs(kinds[0] - kinds[1]) < 5 * error).all(), kinds
        shares = table / rounds
        assert (np.abs(shares[0] - shares[1]) < 5 * np.sqrt(shares.mean(0).clip(0.001) * 2 / rounds)).all()


def test_near_measures_how_dense_draws_are_at_the_peak():
    size, width = 20_000, 0.02
    one = np.ones(size)
    ceiling = density_ceiling(1.0, 1.0, 0.0, 0.32, 0.34)
    found = draw_near(
        lambda at: (one[at], one[at]), size, 10, information_gain, 1 / 3, width, ceiling, np.random.default_rng(0)
    )
    assert math.isclose(found.density, 1.0, abs_tol=0.25)  # 400 of a uniform distribution, within 5 deviations
    assert math.isclose(
        draw_all(lambda at: (one[at], one[at]), 1, information_gain, 1 / 3, np.random.default_rng(0)).density,
        1.0,
        abs_tol=0.2,
    )
