"""From raw completions to pairs: score what several answers to each prompt are worth, and write the better one and another.

The file of pairs grows prompt by prompt (see `guerdon.training.growing`), so that an annotation that was stopped goes on where
it was and ends in the same file. In memory is one batch of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from guerdon.language.completions import Group, Groups
from guerdon.language.data import require_columns
from guerdon.rewards.nested import draw, score_one
from guerdon.rewards.pairing import Picked, Rejected, pick_pair
from guerdon.stages import check, label
from guerdon.training.growing import GrowingFile, line

# what a reward can be given here: there is no policy, so nothing that one says
FIELDS = {"prompts", "samples", "completions"}
_WRITTEN = {"prompt", "chosen", "rejected", "scores", "score_chosen", "score_rejected", "completions", "completion"}
WHY = {
    "constant": "all scores are the same",
    "unscored": "fewer than two scored completions with text",
    "equal": "the two completions are the same text",
}
BadScore = Literal["stop", "drop"]


class Agreement:
    """Counts how often scores order the completions of a prompt as their labels do, over all pairs with different labels.

    Attributes:
        counts: `right`, `wrong` and `tied` (equal scores) of all pairs; `picked_right`, `picked_wrong` of those written.
    """

    NAMES = ("right", "wrong", "tied", "picked_right", "picked_wrong")

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self.counts = {name: int((counts or {}).get(name, 0)) for name in self.NAMES}

    def add(
        self, scores: Sequence[float | None], labels: Sequence[float | None], picked: tuple[int, int] | None
    ) -> None:
        """Count a group, and the pair that was picked from it."""
        known = [(s, v) for s, v in zip(scores, labels, strict=True) if s is not None and v is not None]
        known = [(s, v) for s, v in known if not math.isnan(s)]
        for i, (score, value) in enumerate(known):
            for other, worth in known[:i]:
                if value != worth:
                    better = (score - other) * (1 if value > worth else -1)
                    self.counts["right" if better > 0 else "wrong" if better < 0 else "tied"] += 1
        if picked is not None:
            first, second = labels[picked[0]], labels[picked[1]]
            if first is not None and second is not None and first != second:
                self.counts["picked_right" if first > second else "picked_wrong"] += 1

    @property
    def pairs(self) -> int:
        """Pairs that were compared."""
        return sum(self.counts[name] for name in ("right", "wrong", "tied"))

    @property
    def accuracy(self) -> float:
        """Share of pairs ordered as the labels do, a tie being wrong; NaN without pairs."""
        return self.counts["right"] / self.pairs if self.pairs else math.nan

    @property
    def picked(self) -> float:
        """Share of the written pairs with different labels whose chosen one has the better label; NaN without any."""
        count = self.counts["picked_right"] + self.counts["picked_wrong"]
        return self.counts["picked_right"] / count if count else math.nan


class Annotation(NamedTuple):
    """What has been annotated.

    Attributes:
        prompts: how many there are.
        done: how many of them are annotated.
        counts: `pairs` written, `completions` scored, `dropped` scores, prompts without a pair by why (`constant`,
            `unscored`, `equal`), and whatever the reward counts for each prompt.
        agreement: with labels, over all prompts under the empty name, and by domain where the reward tells domains.
        pairs: the file; None while it is not finished.
    """

    prompts: int
    done: int
    counts: dict[str, int]
    agreement: dict[str, Agreement]
    pairs: Path | None


def annotate(
    groups: Groups,
    reward: Callable[..., Any],
    out: str | Path,
    *,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    rejected: Rejected = "random",
    exclude_longest: bool = False,
    seed: int = 0,
    batch: int = 32,
    on_bad_score: BadScore = "stop",
    show: Callable[[Annotation], None] | None = None,
) -> Annotation:
    """Score every completion, and write a pair for each prompt that makes one.

    Args:
        groups: prompts with their completions.
        reward: any reward, tournament or win rate: it names `samples` or `completions`, and may name `prompts` and columns
            of the data.
        out: JSON lines with `prompt`, `chosen`, `rejected`, `scores` (of all completions, in their order; null = not scored),
            `score_chosen`, `score_rejected`, `domain` where the reward tells it, and the other columns of the data. While it
            is being written it is called `out` with .part after it; beside it, with .json after it, stands the record.
        name: what errors call the reward; by default its own.
        settings: what the pairs depend on beside the arguments below; a record of other settings is not gone on with.
        rejected: see `pick_pair`.
        exclude_longest: likewise.
        seed: of which completion is rejected; a prompt's draw depends on nothing but the seed and the prompt's place.
        batch: prompts scored at a time; bounds memory.
        on_bad_score: `stop`, or `drop`: a completion whose score is no number counts as not scored.
        show: called after every batch.

    Returns:
        The counts. If the file is there already and was made with these settings, they are read from its record.

    Raises:
        RecipeError: the file is there and was made otherwise, or another process is writing it.
        BindingError: the reward names a field that there is not.
        ScoreError: the reward failed.
        DataError: what was written before has been changed.
    """
    own = {"rejected": rejected, "exclude_longest": exclude_longest, "seed": seed, "on_bad_score": on_bad_score}
    name = name or label(reward)
    named = check(reward, {*FIELDS, *groups.columns}, f"annotate: the reward {name}")
    require_columns(groups.rows, [field for field in named.required if field in groups.columns])
    output = _Output(Path(out), {**own, **(settings or {})}, len(groups))
    with output.writing() as file:
        for start in range(output.done, len(groups), batch):
            places = range(start, min(start + batch, len(groups)))
            lines = []
            scored = _score(name, reward, groups, places, on_bad_score, output)
            for place, (group, (scores, domain)) in zip(places, scored, strict=True):
                picked = pick_pair(
                    scores,
                    group.completions,
                    rejected=rejected,
                    exclude_longest=exclude_longest,
                    uniform=draw(seed, "rejected", place),
                )
                output.count(group, scores, domain, picked)
                if picked.chosen is not None and picked.rejected is not None:
                    lines.append(_line(group, scores, domain, picked.chosen, picked.rejected))
            output.add(file, lines, len(places))
            if show is not None:
                show(output.annotation())
    return output.annotation()


class _Scored(NamedTuple):
    """What a reward said of a group."""

    scores: list[float | None]
    domain: str


def _score(
    name: str, reward: Callable[..., Any], groups: Groups, places: range, on_bad_score: BadScore, output: _Output
) -> list[tuple[Group, _Scored]]:
    """The groups at some places with their scores; those of the same size are scored in one call."""
    part = [groups[place] for place in places]
    found: dict[int, _Scored] = {}
    for size in sorted({len(group.completions) for group in part}):
        chosen = [i for i, group in enumerate(part) if len(group.completions) == size]
        scored = score_one(
            name,
            reward,
            [part[i].prompt for i in chosen],
            [part[i].completions for i in chosen],
            {column: [part[i].columns[column] for i in chosen] for column in groups.columns},
            on_bad_score=on_bad_score,
            indices=[groups.row(places[i]) for i in chosen],
        )
        output.tell({"dropped": len(scored.dropped)})
        for counted, value in scored.extras.items():
            if isinstance(value, torch.Tensor) and value.shape == (len(chosen),) and not value.is_floating_point():
                output.tell({counted: int(value.sum())})
        domains = scored.extras.get("domain", [""] * len(chosen))
        for i, row, domain in zip(chosen, scored.scores[..., 0].tolist(), domains, strict=True):
            found[i] = _Scored([None if math.isnan(value) else float(f"{value:.7g}") for value in row], str(domain))
    return [(group, found[i]) for i, group in enumerate(part)]


def _line(group: Group, scores: Sequence[float | None], domain: str, chosen: int, rejected: int) -> bytes:
    row = {
        "prompt": group.prompt,
        "chosen": group.completions[chosen],
        "rejected": group.completions[rejected],
        "scores": list(scores),
        "score_chosen": scores[chosen],
        "score_rejected": scores[rejected],
        **({"domain": domain} if domain else {}),
        **{name: value for name, value in group.columns.items() if name not in _WRITTEN},
    }
    return line(row)


class _Output(GrowingFile):
    """The file of pairs and its record."""

    def __init__(self, out: Path, settings: Mapping[str, Any], prompts: int) -> None:
        self.agreement: dict[str, Agreement] = {}
        super().__init__(out, settings, prompts, unit="prompts", counts=("pairs", "completions", "dropped", *WHY))

    def kept(self) -> dict[str, Any]:
        return {"agreement": {name: found.counts for name, found in self.agreement.items()}}

    def restore(self, record: Mapping[str, Any]) -> None:
        self.agreement = {name: Agreement(found) for name, found in record["agreement"].items()}

    def count(self, group: Group, scores: Sequence[float | None], domain: str, picked: Picked) -> None:
        """Take note of a group and of what was picked from it."""
        self.tell({"completions": len(group.completions), picked.why or "pairs": 1})
        if group.labels is not None:
            pair = None if picked.chosen is None or picked.rejected is None else (picked.chosen, picked.rejected)
            for name in dict.fromkeys(("", domain)):
                self.agreement.setdefault(name, Agreement()).add(scores, group.labels, pair)

    def annotation(self) -> Annotation:
        """What has been done so far."""
        pairs = self.out if self.finished else None
        return Annotation(self.items, self.done, dict(self.counts), dict(self.agreement), pairs)
