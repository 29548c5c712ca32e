"""From the scores of a group to a pair: the best completion, and one of those that it beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from guerdon.errors import RecipeError, ShapeError

Rejected = Literal["random", "worst"]


class Picked(NamedTuple):
    """Positions of the two completions of a pair; None and why where a group makes none."""

    chosen: int | None
    rejected: int | None
    why: str = ""


def pick_pair(
    scores: Sequence[float | None],
    completions: Sequence[str],
    *,
    rejected: Rejected = "random",
    exclude_longest: bool = False,
    uniform: float = 0.0,
) -> Picked:
    """Choose the best-scored completion, and reject another.

    Args:
        scores: G; None or NaN where a completion was not scored.
        completions: G texts.
        rejected: `random`: one of those that score lower, each as likely; `worst`: the lowest score. Ties go to the first.
        exclude_longest: leave the longest completion out, so that no pair teaches length by it; the first of the longest.
        uniform: a number in [0, 1) that decides which one is rejected.

    Returns:
        Positions in the group. No pair, and why: `unscored` with fewer than two scored completions that have text;
        `constant` where all scores are the same; `equal` where both texts are.

    Raises:
        ShapeError: there are not as many scores as completions, or fewer than two.
        RecipeError: `rejected` is unknown.

    Example:
        >>> pick_pair([0.1, 0.9, 0.5, 0.9], ["a", "b", "c", "d"], uniform=0.99)
        Picked(chosen=1, rejected=2, why='')
        >>> pick_pair([1.0, 1.0], ["a", "b"])
        Picked(chosen=None, rejected=None, why='constant')

    Source:
        CDR, 2024, arXiv 2411.02481, and the authors' code, which draws from all the others: the same where no two scores are
        equal. `worst` and leaving out empty texts are ours; which completions the filter by length leaves out is our reading.
    """
    if rejected not in ("random", "worst"):
        raise RecipeError(f"pairing: rejected must be random or worst; got {rejected!r}.")
    if len(scores) != len(completions) or len(scores) < 2:
        raise ShapeError(
            f"pairing: a group needs a score for each of two or more completions; got {len(scores)} scores for "
            f"{len(completions)} completions."
        )
    longest = max(range(len(completions)), key=lambda g: len(completions[g])) if exclude_longest else None
    known = {
        g: score
        for g, score in enumerate(scores)
        if score is not None and not math.isnan(score) and completions[g] and g != longest
    }
    if len(known) < 2:
        return Picked(None, None, "unscored")
    best = max(known, key=lambda g: known[g])  # the first of equals
    lower = [g for g in known if known[g] < known[best]]
    if not lower:
        return Picked(None, None, "constant")
    drawn = lower[min(int(uniform * len(lower)), len(lower) - 1)]
    other = drawn if rejected == "random" else min(lower, key=lambda g: known[g])
    if completions[other] == completions[best]:
        return Picked(None, None, "equal")
    return Picked(best, other)
