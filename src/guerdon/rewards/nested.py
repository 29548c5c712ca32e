"""Rewards that call another reward: the inner one is scored as the loop would score it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal

import torch

from guerdon.rewards.scoring import Scores, score
from guerdon.rollout import Rollout


def columns_of(fields: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    """The data columns among the fields a reward was given: lists with one entry per prompt."""
    return {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == count}


def score_one(
    name: str,
    reward: Callable[..., Any],
    prompts: Sequence[Any],
    samples: Sequence[Sequence[Any]],
    columns: Mapping[str, list[Any]],
    *,
    on_bad_score: Literal["stop", "drop"] = "stop",
    indices: Sequence[int] = (),
) -> Scores:
    """Score samples [P][G] with one reward, a coroutine or one in TRL's form included.

    Args:
        name: what errors call it.
        reward: the inner reward.
        prompts: [P].
        samples: [P][G], G the same for all.
        columns: name -> list of P.
        on_bad_score: as for `guerdon.rewards.scoring.score`.
        indices: [P] positions of the prompts in the data, for errors.

    Raises:
        ScoreError: it failed, or returned something that is no score.
    """
    shape = (len(prompts), len(samples[0]) if samples else 0, 1)
    rollout = Rollout(
        prompts=list(prompts),
        samples=[list(group) for group in samples],
        mask=torch.ones(shape, dtype=torch.bool),
        logp_old=torch.zeros(shape),
        columns=dict(columns),
        indices=list(indices),
    )
    return score({name: reward}, rollout, on_bad_score=on_bad_score)


def draw(*key: object) -> float:
    """A number in [0, 1) that the key decides, the same on every machine and process."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big") / 2**64
