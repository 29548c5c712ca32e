"""The samples a run wrote: the same prompts before and after training, and what was drawn at a few steps between."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guerdon.report.groups import SHOWN_STEPS
from guerdon.report.records import finite, read_lines
from guerdon.report.thinning import Evenly
from guerdon.report.words import cut

SHOWN_PAIRS = 8
SHOWN_PICTURES = 24
TEXT = 1500
_IMAGE = re.compile(r"images/[A-Za-z0-9-]+\.png")


@dataclass(frozen=True)
class Shown:
    """A sample as the page shows it: a text, or a picture and where it lies in the run directory."""

    text: str
    image: str = ""


@dataclass
class Pair:
    """One held-out prompt with what the policy made of it before and after training."""

    index: int
    prompt: str
    before: Shown
    after: Shown
    reward_before: float | None
    reward_after: float | None
    scores: list[tuple[str, float | None, float | None]]

    @property
    def gain(self) -> float:
        """Reward after minus reward before; 0 where one of them is missing."""
        if self.reward_before is None or self.reward_after is None:
            return 0.0
        return self.reward_after - self.reward_before


@dataclass
class PairSet:
    """Some of the pairs that went one way, and how many there are."""

    title: str
    count: int
    pairs: list[Pair]


@dataclass
class Samples:
    """What the page shows of `samples.jsonl`.

    Attributes:
        mode: how the pairs were drawn, `greedy` or `sampled`.
        sets: the pairs by whether the reward rose, fell or stayed.
        texts: step -> prompt row -> prompt and its samples in the order they were drawn, at a few training steps.
        pictures: whether the pairs are pictures.
    """

    mode: str = ""
    sets: list[PairSet] = field(default_factory=list)
    texts: dict[int, dict[int, tuple[str, list[Shown]]]] = field(default_factory=dict)
    pictures: bool = False


def read_samples(path: Path, notes: list[str]) -> Samples:
    """Stream the samples file, keeping the held-out ones and a few training steps.

    Args:
        path: `samples.jsonl`; a missing file gives no samples.
        notes: gets a sentence if the last line is cut off.

    Returns:
        The samples; greedy ones are paired where there are any, else sampled ones.

    Raises:
        DataError: a line is malformed.
    """
    ends: dict[str, dict[tuple[str, int, int], dict[str, Any]]] = {"before": {}, "after": {}}
    seen: dict[str, Counter[tuple[str, int]]] = {"before": Counter(), "after": Counter()}
    written: dict[str, int] = {}
    steps: Evenly[tuple[int, dict[int, tuple[str, list[Shown]]]]] = Evenly(SHOWN_STEPS)
    current: tuple[int, dict[int, tuple[str, list[Shown]]]] | None = None
    for _, record in read_lines(path, notes):
        phase, step, index = record.get("phase"), record["step"], record.get("index", -1)
        if phase in ends:
            if written.setdefault(phase, step) != step:  # evaluated again by a resumed run: the later one counts
                ends[phase].clear()
                seen[phase].clear()
                written[phase] = step
            key = (record.get("mode", ""), index)
            ends[phase][(*key, seen[phase][key])] = record
            seen[phase][key] += 1
        elif phase == "train":
            if current is None or current[0] != step:
                current = (step, {})
                steps.add(current)
            texts = current[1].setdefault(index, (cut(record.get("prompt", ""), TEXT), []))[1]
            texts.append(_shown(record.get("sample", "")))
    modes = {key[0] for key in ends["before"].keys() & ends["after"].keys()}
    mode = next((name for name in ("greedy", "sampled") if name in modes), min(modes, default=""))
    pairs = [
        _pair(before, ends["after"][key])
        for key, before in ends["before"].items()
        if key[0] == mode and key in ends["after"]
    ]
    pictures = any(pair.before.image or pair.after.image for pair in pairs)
    return Samples(mode, _sets(pairs), dict(steps.pick()), pictures)


def _pair(before: dict[str, Any], after: dict[str, Any]) -> Pair:
    old, new = before.get("scores") or {}, after.get("scores") or {}
    names = dict.fromkeys([*old, *new])
    return Pair(
        index=before.get("index", -1),
        prompt=cut(before.get("prompt", ""), TEXT),
        before=_shown(before.get("sample", "")),
        after=_shown(after.get("sample", "")),
        reward_before=finite(before.get("reward")),
        reward_after=finite(after.get("reward")),
        scores=[(name, finite(old.get(name)), finite(new.get(name))) for name in names],
    )


def _shown(sample: Any) -> Shown:
    image = sample.get("image") if isinstance(sample, dict) else None
    # a name that a run gives, and no other file of the reader's machine
    if isinstance(image, str) and _IMAGE.fullmatch(image):
        return Shown(image, image)
    return Shown(cut(sample, TEXT))


def _sets(pairs: list[Pair]) -> list[PairSet]:
    """Pairs by the way the reward went, the largest changes first."""
    rose = sorted((pair for pair in pairs if pair.gain > 0), key=lambda pair: -pair.gain)
    fell = sorted((pair for pair in pairs if pair.gain < 0), key=lambda pair: pair.gain)
    same = [pair for pair in pairs if pair.gain == 0]
    named = [("Reward rose", rose), ("Reward fell", fell), ("Reward unchanged", same)]
    most = SHOWN_PICTURES if any(pair.before.image for pair in pairs) else SHOWN_PAIRS
    return [PairSet(title, len(group), group[:most]) for title, group in named if group]
