"""Written feedback on spans of a sample, as a reward for each of its tokens.

Phrases are found in the text and tokens by their character offsets, so that the same characters are rewarded whatever the
tokenizer. Text2Grad: Reinforcement Learning from Natural Language Feedback, 2025, arXiv 2505.22338.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guerdon.errors import DataError, RecipeError, check_shapes


def align_spans(
    text: str, offsets: Sequence[Sequence[int]], spans: Sequence[tuple[str, int] | list[str | int]]
) -> tuple[list[float], list[str]]:
    """The reward of each token: -1 if it touches a poor span, else 1 if it touches a good one, else 0.

    Text and phrases are compared in lower case with runs of white space as one. A phrase is looked for from the end of
    its own last match, and only where it begins and ends with whole words. Only letters and digits count: a token of
    punctuation or space has 0.

    Args:
        text: the sample.
        offsets: (start, end) of each token in the text, in characters, as fast tokenizers give them.
        spans: (phrase, label) with label 1, 0 or -1; 0 marks nothing.

    Returns:
        One reward a token, and the phrases that were not found.

    Raises:
        DataError: a label is none of the three.

    Example:
        >>> align_spans("the red fox.", [(0, 3), (3, 7), (7, 11), (11, 12)], [("Red fox", 1), ("blue", -1)])
        ([0.0, 1.0, 1.0, 0.0], ['blue'])

    Source:
        Follows from arXiv 2505.22338; the search and its rules are our reading.
    """
    plain, places = _collapsed(text)
    marks = [0] * len(text)
    ends: dict[str, int] = {}
    unmatched: list[str] = []
    for phrase, label in spans:
        if isinstance(label, bool) or label not in (-1, 0, 1):
            raise DataError(f"rewards.spans: a label must be -1, 0 or 1; got {label!r} for {phrase!r:.80}.")
        wanted = _collapsed(str(phrase))[0].strip()
        start = _find(plain, wanted, ends.get(wanted, 0))
        if start < 0:
            unmatched.append(str(phrase))
            continue
        ends[wanted] = start + len(wanted)
        if label:
            for place in places[start : ends[wanted]]:
                marks[place] = min(label, marks[place]) if marks[place] else int(label)
    rewards = []
    for start, end in offsets:
        labels = [marks[i] for i in range(start, min(end, len(text))) if marks[i] and text[i].isalnum()]
        rewards.append(float(min(labels, default=0)))
    return rewards, unmatched


def _collapsed(text: str) -> tuple[str, list[int]]:
    """Lower case with white space collapsed, and for each of its characters the place that it came from."""
    letters: list[str] = []
    places: list[int] = []
    for place, letter in enumerate(text):
        if letter.isspace():
            if not letters or letters[-1] != " ":
                letters.append(" ")
                places.append(place)
            continue
        for small in letter.lower():
            letters.append(small)
            places.append(place)
    return "".join(letters), places


def _find(text: str, phrase: str, start: int) -> int:
    """Where a phrase of whole words begins, from `start` on; -1 if nowhere."""
    while phrase:
        start = text.find(phrase, start)
        if start < 0:
            return -1
        end = start + len(phrase)
        cut_before = phrase[0].isalnum() and start > 0 and text[start - 1].isalnum()
        cut_after = phrase[-1].isalnum() and end < len(text) and text[end].isalnum()
        if not (cut_before or cut_after):
            return start
        start += 1
    return -1


def length_weight(
    scores: Float[Tensor, "B T"], suggested: Int[Tensor, " B"], *, alpha: float = 1.0
) -> Float[Tensor, "B T"]:
    """Factors that fade the rewards of tokens beyond a suggested number of them.

    From the first score that is not 0 on, with n = 1, 2, ...: 1 / (1 + exp(clip(alpha (n - n0) - 6, -10, 6))). It is
    1/2 at n = n0 + 6 / alpha; 1 before the first such score, and in rows without any.

    Args:
        scores: [B, T], of tokens.
        suggested: [B], n0.
        alpha: how fast they fade, per token.

    Returns:
        Factors [B, T]; multiply the scores by them.

    Raises:
        ShapeError: an argument has another shape.
        RecipeError: alpha is not above 0.

    Example:
        >>> length_weight(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([-5])).round(decimals=3)
        tensor([[1.0000, 0.5000, 0.2690]])

    Source:
        The authors' code of arXiv 2505.22338.
    """
    check_shapes("rewards.length_weight", scores=(scores, "B T"), suggested=(suggested, "B"))
    if not alpha > 0:
        raise RecipeError(f"rewards.length_weight: alpha must be above 0; got {alpha}.")
    begun = (scores != 0).cumsum(-1) > 0
    n = begun.cumsum(-1)
    excess = (alpha * (n - suggested.unsqueeze(-1)) - 6).clamp(-10, 6).to(scores.dtype)
    return torch.sigmoid(-excess).where(begun, 1.0)
