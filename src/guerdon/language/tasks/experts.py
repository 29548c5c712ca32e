"""Experts: a few good demonstrations for a model that has seen any number of poor ones.

The topics and letters are those of the task `topics`. The model learns the language first from answers with 45 % good letters
(a warm start), then from only 96 demonstrations with 75 %, few enough to be learnt by heart: what supervised training does to
a model beside what it is meant to teach can be seen. Held-out answers are the experts' too; preferences are those of `topics`.
"""

from __future__ import annotations

from collections.abc import Sequence

from guerdon.language.tasks import Row, Task, topics

POOR_SHARE, GOOD_SHARE = 0.45, 0.75
COUNT = 96


def pretraining(seed: int) -> Sequence[Row]:
    """Endless poor answers."""
    return topics.answered(POOR_SHARE, "poor", seed)


def demonstrations(seed: int) -> Sequence[Row]:
    """The 96 demonstrations."""
    return topics.answered(GOOD_SHARE, "experts", seed, count=COUNT)


def held_out_rows(count: int) -> list[Row]:
    """Fixed answers of experts, the four topics in turn."""
    return topics.held_out_rows(count, good_share=GOOD_SHARE)


TASK = Task(
    name="experts",
    description="learn from 96 good answers after any number of poor ones; a hidden quality to measure by",
    tokenizer=topics.tokenizer,
    model=topics.model,
    train_rows=topics.train_rows,
    held_out_rows=held_out_rows,
    demonstrations=demonstrations,
    pretraining=pretraining,
    pairs=topics.pairs,
    held_out_pairs=topics.held_out_pairs,
)
