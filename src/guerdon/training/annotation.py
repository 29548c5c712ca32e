"""From raw completions to pairs: score what several answers to each prompt are worth, and write the better one and another.

The file of pairs grows prompt by prompt under a name of its own, beside a record of how far it has got, so that an
annotation that was stopped goes on where it was and ends in the same file. In memory is one batch of prompts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from guerdon import cache
from guerdon.errors import DataError, RecipeError
from guerdon.language.completions import Group, Groups
from guerdon.language.data import require_columns
from guerdon.rewards.nested import draw, score_one
from guerdon.rewards.pairing import Picked, Rejected, pick_pair
from guerdon.stages import check, label

# what a reward can be given here: there is no policy, so nothing that one says
FIELDS = {"prompts", "samples", "completions"}
_WRITTEN = {"prompt", "chosen", "rejected", "scores", "score_chosen", "score_rejected", "completions", "completion"}
WHY = {
    "constant": "all scores are the same",
    "unscored": "fewer than two scored completions with text",
    "equal": "the two completions are the same text",
}
_FORMAT = 1

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
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half of a character that takes two, which JSON can say in letters
        return json.dumps(row, default=str).encode() + b"\n"


class _Output:
    """The file of pairs and its record."""

    def __init__(self, out: Path, settings: Mapping[str, Any], prompts: int) -> None:
        self.out, self.part = out, out.with_name(f"{out.name}.part")
        self.record = out.with_name(f"{out.name}.json")
        self.settings = json.loads(json.dumps(settings, default=str))
        self.prompts, self.done, self.size = prompts, 0, 0
        self.counts: dict[str, int] = {"pairs": 0, "completions": 0, "dropped": 0, **dict.fromkeys(WHY, 0)}
        self.agreement: dict[str, Agreement] = {}
        if self.record.exists():
            self._read()
        elif out.exists() or self.part.exists():
            there = out if out.exists() else self.part
            raise RecipeError(
                f"annotate: {there} is there already, without a record of its making. Choose another --out."
            )

    def _read(self) -> None:
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            before = record["settings"]
            done, size, counts = int(record["done"]), int(record["bytes"]), dict(record["counts"])
            agreement = {name: Agreement(found) for name, found in record["agreement"].items()}
            known = record["format"] == _FORMAT
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"annotate: {self.record} is no record of an annotation: {error}. Choose another --out."
            ) from error
        old, new = _flat(before), _flat(self.settings)
        changed = [name for name in old | new if name not in old or name not in new or old[name] != new[name]]
        if changed or not known:
            name = (changed or ["format"])[0]
            was, now = (f"{found[name]!r:.80}" if name in found else "not given" for found in (old, new))
            more = f" ({len(changed) - 1} more differ)" if len(changed) > 1 else ""
            raise RecipeError(
                f"annotate: {self.out} was begun with other settings: {name} was {was} and is {now} now{more}. Give the "
                "settings of then to go on, or choose another --out."
            )
        file = self.part if self.part.exists() else self.out
        if not file.exists() or file.stat().st_size < size:
            raise DataError(
                f"annotate: {file} is not what was written before. Remove {self.record} and it, and start again."
            )
        self.done, self.size, self.counts, self.agreement = done, size, counts, agreement

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """The file, cut to what its record vouches for; whole at the end under its own name."""
        if self.done == self.prompts and self.out.exists():
            yield None
            return
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with self.part.open("ab") as file:
            _alone(file, self.part)
            file.truncate(self.size)
            yield file
        os.replace(self.part, self.out)

    def tell(self, counts: Mapping[str, int]) -> None:
        """Add to the counts."""
        for name, value in counts.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def count(self, group: Group, scores: Sequence[float | None], domain: str, picked: Picked) -> None:
        """Take note of a group and of what was picked from it."""
        self.tell({"completions": len(group.completions), picked.why or "pairs": 1})
        if group.labels is not None:
            pair = None if picked.chosen is None or picked.rejected is None else (picked.chosen, picked.rejected)
            for name in dict.fromkeys(("", domain)):
                self.agreement.setdefault(name, Agreement()).add(scores, group.labels, pair)

    def add(self, file: Any, lines: Sequence[bytes], prompts: int) -> None:
        """Write the pairs of a batch, and then the record that vouches for them."""
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())
        self.size, self.done = self.size + sum(map(len, lines)), self.done + prompts
        record = {
            "format": _FORMAT,
            "settings": self.settings,
            "prompts": self.prompts,
            "done": self.done,
            "bytes": self.size,
            "counts": self.counts,
            "agreement": {name: found.counts for name, found in self.agreement.items()},
        }
        cache.replace(self.record, json.dumps(record, indent=1).encode() + b"\n")

    def annotation(self) -> Annotation:
        """What has been done so far."""
        finished = self.done == self.prompts and not self.part.exists()
        return Annotation(
            self.prompts, self.done, dict(self.counts), dict(self.agreement), self.out if finished else None
        )


def _flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Settings by dotted path."""
    if not isinstance(settings, Mapping):
        return {path: settings}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{path}.{name}" if path else str(name))
    return found


def _alone(file: Any, path: Path) -> None:
    """Hold the file for this process, where the system can."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RecipeError(
            f"annotate: another process is writing {path}. Wait for it, or choose another --out."
        ) from None
