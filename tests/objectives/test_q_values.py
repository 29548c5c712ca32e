"""Logits as Q-values: the identities of soft values, and what a shift of the logits does."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import RecipeError, ShapeError
from guerdon.objectives.q_values import QValues, q_values, read_logits

BETA = 0.7


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS, REFERENCE, SHIFT = drawn(3, 4, 5), drawn(3, 4, 5, seed=1), drawn(3, 4, seed=2)
ACTIONS = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(3))
LIVE = torch.ones(3, 4).bool()


def values(logits: torch.Tensor, actions: torch.Tensor = ACTIONS, mask: torch.Tensor = LIVE) -> QValues:
    return q_values(*read_logits(logits, actions), read_logits(REFERENCE, actions).logp, mask, beta=BETA)


def test_rewards_add_up_to_the_value_of_the_start_and_the_log_probability():
    found = values(LOGITS)
    whole = BETA * LOGITS.log_softmax(-1).gather(-1, ACTIONS[..., None]).sum((1, 2))
    torch.testing.assert_close(found.reward.sum(-1) - found.value[:, 0], whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.q, BETA * LOGITS.gather(-1, ACTIONS[..., None])[..., 0])
    torch.testing.assert_close(found.value, BETA * LOGITS.logsumexp(-1))


def test_advantages_are_log_probabilities():
    every = torch.stack([values(LOGITS, torch.full_like(ACTIONS, a)).advantage for a in range(5)])
    torch.testing.assert_close((every / BETA).exp().sum(0), torch.ones(3, 4, dtype=torch.float64))


def test_a_shift_moves_values_and_nothing_else():
    found, moved = values(LOGITS), values(LOGITS + SHIFT[..., None])
    torch.testing.assert_close(moved.value - found.value, BETA * SHIFT)
    torch.testing.assert_close(moved.q - found.q, BETA * SHIFT)
    torch.testing.assert_close(moved.advantage, found.advantage)
    torch.testing.assert_close(moved.reward_kl, found.reward_kl)


def test_the_value_after_the_last_live_token_is_zero():
    """A sample in a longer batch has the values it has alone, whatever the padding holds."""
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    padded = values(LOGITS.masked_fill(~mask[..., None], torch.nan), mask=mask)
    for row, length in enumerate((4, 2, 3)):
        alone = q_values(
            *(part[row, :length] for part in read_logits(LOGITS, ACTIONS)),
            read_logits(REFERENCE, ACTIONS).logp[row, :length],
            LIVE[row, :length],
            beta=BETA,
        )
        for name, value in padded._asdict().items():
            torch.testing.assert_close(value[row, :length], getattr(alone, name))
            assert (value[row, length:] == 0).all()


def test_half_precision_is_read_in_single():
    found = read_logits(LOGITS.bfloat16(), ACTIONS)
    assert found.logp.dtype == found.normaliser.dtype == torch.float32


def test_what_is_refused(friendly_errors):
    with pytest.raises(RecipeError, match="beta must be above 0"):
        q_values(SHIFT, SHIFT, SHIFT, LIVE, beta=0.0)
    with pytest.raises(ShapeError, match=r"logp_ref \[3, 3\]"):
        q_values(SHIFT, SHIFT, SHIFT[:, 1:], LIVE)
