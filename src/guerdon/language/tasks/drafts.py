"""Drafts: the task `topics` for policies that also revise.

In every other demonstration the prompt holds a draft, an answer that is as good as the demonstration is, so that the start
knows the form of a revision and does not gain by one. All else is the same.
"""

from __future__ import annotations

from dataclasses import replace

from guerdon.language.revision import revision_prompt
from guerdon.language.tasks import Row, topics
from guerdon.language.tasks.stream import Stream

REVISION = "{prompt}{draft}{prompt}"  # the topic again, so that an answer follows its topic in either form


def demonstrations(seed: int) -> Stream:
    """Endless rows with `completion`; every other prompt holds a draft.

    Example:
        >>> [row["prompt"] for row in demonstrations(0)[:4]]
        ['C', 'BfcffhhgmmlbfB', 'C', 'BnclB']
    """
    plain = topics.demonstrations(seed)

    def make(i: int) -> Row:
        row = plain[i]
        if i % 2 == 0:
            return row
        draft = topics.answer(topics.generator("drafts", seed, i), row["topic"])
        return {**row, "prompt": revision_prompt(REVISION, row["prompt"], draft)}

    return Stream(make)


TASK = replace(
    topics.TASK,
    name="drafts",
    description="the task topics with demonstrations of revisions: half of the prompts hold a draft",
    demonstrations=demonstrations,
)
