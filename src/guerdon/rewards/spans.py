"""Written feedback on spans of a sample, as a reward for each of its tokens.

A critic says which phrases of a sample are good and which are poor. They are found in the text, and tokens are paid by the
characters that they wrote, so that the same characters are rewarded whatever the tokenizer.
Text2Grad: Reinforcement Learning from Natural Language Feedback, 2025, arXiv 2505.22338.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guerdon.errors import DataError, RecipeError, ScoreError, check_shapes
from guerdon.rewards.critics.base import Response, ask, resolve
from guerdon.rewards.critics.feedback import Feedback


class SpanOutput(NamedTuple):
    """What critics said of P groups.

    Attributes:
        scores: [P][G], the sum of the sample's token rewards; None where there is no feedback to learn from.
        step_scores: [P, G, T], the reward of each token; None where they are paid together.
        unmatched: int64 [P], phrases that were not found in their sample.
        no_feedback: int64 [P], samples of which nothing was said, or nothing that was found.
        critic_failures: int64 [P], samples of which the critic gave no feedback that could be read.
        critic_calls: int64 [P], calls of a model, tries that failed included.
    """

    scores: list[list[float | None]]
    step_scores: Float[Tensor, "P G T"] | None
    unmatched: Int[Tensor, " P"]
    no_feedback: Int[Tensor, " P"]
    critic_failures: Int[Tensor, " P"]
    critic_calls: Int[Tensor, " P"]


class Spans:
    """Have a critic point at good and poor phrases, and pay each token 1 for a good one, -1 for a poor one.

    The score of a sample is the sum over its tokens. An advantage that reads rewards per step, `gae`, is given each token's
    own; with `steps: false` the same feedback becomes one reward at the end of the sample.

    Args:
        critic: a critic (see `guerdon.rewards.critics`), or as in a recipe: a name, {name: {option: value}} or
            `module:attribute`. Data columns are handed to it.
        steps: pay every token where it stands; false = the sum at the end.
        no_feedback: what becomes of a sample of which nothing was said or found: `keep` gives it 0, `drop` leaves it out.
        failures_max: the largest share of a batch's samples without readable feedback. Those are left out of training.
        suggested: fade rewards beyond a suggested length: a number of tokens, or the data column that holds it; None = no.
            See `length_weight`.
        alpha: how fast they fade, per token.
        continuous: take labels between -1 and 1 as well, such as a learned critic's; other numbers are held within.

    Raises:
        RecipeError: an option is out of its range, or there is no such critic.

    Edge cases:
        A phrase that does not stand in the sample is counted as `unmatched`. A character in a good and in a poor phrase is
        poor. A token has the lowest label among its letters and digits; one of punctuation or space alone has 0, and so has
        the end token. Equal samples of a prompt are criticised once.

    Example:
        >>> def critic(responses): return [{"good_spans": ["fox"], "poor_spans": ["very"]} for _ in responses]
        >>> offsets = torch.tensor([[[[0, 1], [1, 6], [6, 10]]]])
        >>> found = Spans(critic=critic)(["p"], [["a very fox"]], offsets, torch.ones(1, 1, 3).bool())
        >>> found.step_scores.tolist(), found.scores
        ([[[0.0, -1.0, 1.0]]], [[0.0]])

    Source:
        Text2Grad, 2025, arXiv 2505.22338: equation 2, and its authors' code for the fading. How phrases are aligned is our
        reading; see `align_spans`.
    """

    def __init__(
        self,
        *,
        critic: Any,
        steps: bool = True,
        no_feedback: Literal["keep", "drop"] = "keep",
        failures_max: float = 0.5,
        suggested: int | str | None = None,
        alpha: float = 1.0,
        continuous: bool = False,
    ) -> None:
        where = "rewards.spans"
        if no_feedback not in ("keep", "drop"):
            raise RecipeError(f"{where}.no_feedback: must be keep or drop; got {no_feedback!r}.")
        if not 0 <= failures_max <= 1:
            raise RecipeError(f"{where}.failures_max: must be from 0 to 1; got {failures_max}.")
        if not alpha > 0:
            raise RecipeError(f"{where}.alpha: must be above 0; got {alpha}.")
        self.critic = resolve(critic, f"{where}.critic")
        self.steps, self.drops, self.failures_max = steps, no_feedback == "drop", failures_max
        self.suggested, self.alpha, self.continuous = suggested, alpha, continuous

    def __call__(
        self,
        prompts: Sequence[Any],
        samples: Sequence[Sequence[str]],
        offsets: Int[Tensor, "P G T 2"],
        mask: Bool[Tensor, "P G T"],
        **columns: Any,
    ) -> SpanOutput:
        """Criticise every sample.

        Args:
            prompts: [P].
            samples: [P][G] texts.
            offsets: [P, G, T, 2], the characters (from, to) that each token wrote.
            mask: [P, G, T], True = a token of the sample.
            **columns: lists of P: what else the data carries, which the critic may read.

        Returns:
            `scores`, `step_scores` and what was counted.

        Raises:
            ScoreError: the critic's remarks are not of the form of a critic's, too many of them failed, or a label is not
                finite.
            DataError: a label is none of -1, 0 and 1, or there is no column `suggested`.
        """
        where = "rewards.spans"
        check_shapes(where, mask=(mask, "P G T"), offsets=(offsets, "P G T 2"))
        rows = _rows(columns, len(prompts))
        feedback = self._ask(prompts, samples, rows)
        rewards = torch.zeros(mask.shape, dtype=torch.get_default_dtype())
        counts = torch.zeros(4, len(prompts), dtype=torch.int64)
        empty = [[False] * len(group) for group in samples]
        places, live = offsets.tolist(), mask.cpu()
        for p, group in enumerate(samples):
            for g, text in enumerate(group):
                found = feedback[p][g]
                of_tokens, unmatched = token_rewards(text, places[p][g], found, continuous=self.continuous)
                rewards[p, g] = torch.tensor(of_tokens, dtype=rewards.dtype)
                empty[p][g] = not found.failed and not any(of_tokens)
                counts[:, p] += torch.tensor([len(unmatched), empty[p][g], found.failed, found.calls])
        self._check(feedback)
        rewards = rewards.masked_fill(~live, 0.0)
        if self.suggested is not None:
            lengths = torch.tensor([self._suggested(row) for row in rows]).repeat_interleave(mask.shape[1])
            flat = rewards.flatten(0, 1)
            rewards = (flat * length_weight(flat, lengths, alpha=self.alpha)).view_as(rewards)
        scores: list[list[float | None]] = [
            [
                None if found.failed or (self.drops and empty[p][g]) else total
                for g, (found, total) in enumerate(zip(feedback[p], totals, strict=True))
            ]
            for p, totals in enumerate(rewards.sum(-1).tolist())
        ]
        return SpanOutput(scores, rewards if self.steps else None, *counts)

    def _ask(
        self, prompts: Sequence[Any], samples: Sequence[Sequence[str]], rows: list[dict[str, Any]]
    ) -> list[list[Feedback]]:
        """Feedback [P][G], equal samples of a prompt asked about once."""
        places: dict[tuple[int, str], int] = {}
        for p, group in enumerate(samples):
            for text in group:
                places.setdefault((p, text), len(places))
        responses = [Response(prompts[p], text, rows[p]) for p, text in places]
        found = ask(self.critic, responses, "rewards.spans")
        once: set[int] = set()
        feedback: list[list[Feedback]] = []
        for p, group in enumerate(samples):
            feedback.append([])
            for text in group:
                k = places[p, text]
                feedback[p].append(found[k]._replace(calls=0) if k in once else found[k])
                once.add(k)
        return feedback

    def _check(self, feedback: list[list[Feedback]]) -> None:
        all_of_them = [found for group in feedback for found in group]
        failed = [found for found in all_of_them if found.failed]
        if len(failed) > self.failures_max * len(all_of_them):
            raise ScoreError(
                f"rewards.spans: {len(failed)} of {len(all_of_them)} samples have no feedback that can be read, more than "
                f"failures_max = {self.failures_max:g} of them. The first: {failed[0].why}."
            )

    def _suggested(self, row: dict[str, Any]) -> int:
        if isinstance(self.suggested, int):
            return self.suggested
        value = row.get(str(self.suggested))
        if isinstance(value, bool) or not isinstance(value, int):
            raise DataError(
                f"rewards.spans.suggested: the column {self.suggested!r} must hold a number of tokens; got {value!r:.40}. "
                f"There are: {', '.join(sorted(row)) or 'none'}."
            )
        return value


def _rows(columns: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The data columns of each prompt."""
    lists = {name: c for name, c in columns.items() if isinstance(c, list) and len(c) == count}
    return [{name: column[p] for name, column in lists.items()} for p in range(count)]


def token_rewards(
    text: str, offsets: Sequence[Sequence[int]], feedback: Feedback, *, continuous: bool = False
) -> tuple[list[float], list[str]]:
    """The reward of each token by a critic's feedback, and the phrases that were not found.

    Args:
        text: the sample.
        offsets: (start, end) of each token in the text.
        feedback: phrases to be found, or marks of characters; one that has failed pays nothing.
        continuous: take labels between -1 and 1.

    Raises:
        DataError, ScoreError: as `align_spans`.
    """
    marks, unmatched = feedback_marks(text, feedback, continuous=continuous)
    return token_labels(text, marks, offsets), unmatched


def feedback_marks(text: str, feedback: Feedback, *, continuous: bool = False) -> tuple[list[float], list[str]]:
    """The label of each character by a critic's feedback, and the phrases that were not found; see `token_rewards`."""
    if feedback.failed:
        return [0.0] * len(text), []
    if feedback.marks is None:
        return find_spans(text, feedback.spans, in_order=feedback.in_order, continuous=continuous)
    return [_label(label, f"character {i}", continuous) for i, label in enumerate(feedback.marks)], []


def align_spans(
    text: str, offsets: Sequence[Sequence[int]], spans: Sequence[Sequence[Any]], *, continuous: bool = False
) -> tuple[list[float], list[str]]:
    """The reward of each token: -1 if it touches a poor span, else 1 if it touches a good one, else 0.

    See `find_spans` for how phrases are found and `token_labels` for what a token gets.

    Args:
        text: the sample.
        offsets: (start, end) of each token in the text, in characters, as fast tokenizers give them.
        spans: (phrase, label) with label 1, 0 or -1; 0 marks nothing.
        continuous: take labels between -1 and 1 as well, and hold other numbers within.

    Returns:
        One reward a token, and the phrases that were not found.

    Raises:
        DataError: a label is none of the three.
        ScoreError: a label is not finite.

    Example:
        >>> align_spans("the red fox.", [(0, 3), (3, 7), (7, 11), (11, 12)], [("Red fox", 1), ("blue", -1)])
        ([0.0, 1.0, 1.0, 0.0], ['blue'])

    Source:
        Follows from arXiv 2505.22338; the search and its rules are our reading.
    """
    marks, unmatched = find_spans(text, spans, continuous=continuous)
    return token_labels(text, marks, offsets), unmatched


def find_spans(
    text: str, spans: Sequence[Sequence[Any]], *, in_order: bool = False, continuous: bool = False
) -> tuple[list[float], list[str]]:
    """The label of each character of a text by phrases in it, and the phrases that were not found.

    Text and phrases are compared in lower case with runs of white space as one. A phrase is looked for from the end of
    its own last match, and only where it begins and ends with whole words. A character of several phrases has the lowest
    label but 0.

    Args:
        text: the sample.
        spans: (phrase, label); the label 0 marks nothing.
        in_order: the phrases are in the order of the text, as a list of all its words: each is looked for behind the one
            before.
        continuous: take labels between -1 and 1, and hold other numbers within.

    Raises:
        DataError, ScoreError: as `align_spans`.
    """
    plain, places = _collapsed(text)
    marks = [0.0] * len(text)
    ends: dict[str, int] = {}
    unmatched: list[str] = []
    for phrase, given in spans:
        label = _label(given, repr(phrase)[:80], continuous)
        wanted = _collapsed(str(phrase))[0].strip()
        key = "" if in_order else wanted
        start = _find(plain, wanted, ends.get(key, 0))
        if start < 0:
            unmatched.append(str(phrase))
            continue
        end = ends[key] = start + len(wanted)
        if label:
            for place in places[start:end]:
                marks[place] = min(label, marks[place]) if marks[place] else label
    return marks, unmatched


def token_labels(text: str, marks: Sequence[float], offsets: Sequence[Sequence[int]]) -> list[float]:
    """The lowest label that is not 0 among the letters and digits of each token; 0 without any.

    Args:
        text: the sample.
        marks: a label for each of its characters.
        offsets: (start, end) of each token.
    """
    counted = [label if letter.isalnum() else 0.0 for letter, label in zip(text, marks, strict=True)]
    return [min((label for label in counted[start:end] if label), default=0.0) for start, end in offsets]


def _label(value: Any, of: str, continuous: bool) -> float:
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if number and not math.isfinite(value):
        raise ScoreError(f"rewards.spans: a label must be finite; got {value!r} for {of}.")
    if number and continuous:
        return max(-1.0, min(1.0, float(value)))
    if not number or value not in (-1, 0, 1):
        raise DataError(f"rewards.spans: a label must be -1, 0 or 1; got {value!r:.40} for {of}.")
    return float(value)


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


spans = Spans
