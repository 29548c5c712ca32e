"""The samples a run wrote: the same prompts before and after training, and what was drawn at a few steps between."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guerdon.report.groups import SHOWN_STEPS
from guerdon.report.records import finite, read_lines
from guerdon.report.thinning import Evenly
from guerdon.report.words import cut

SHOWN_PAIRS = 8
TEXT = 1500


@dataclass
class Pair:
    """One held-out prompt with what the policy made of it before and after training."""

    index: int
    prompt: str
    before: str
    after: str
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
    """

    mode: str = ""
    sets: list[PairSet] = field(default_factory=list)
    texts: dict[int, dict[int, tuple[str, list[str]]]] = field(default_factory=dict)


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
    steps: Evenly[tuple[int, dict[int, tuple[str, list[str]]]]] = Evenly(SHOWN_STEPS)
    current: tuple[int, dict[int, tuple[str, list[str]]]] | None = None
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
            texts.append(cut(record.get("sample", ""), TEXT))
    modes = {key[0] for key in ends["before"].keys() & ends["after"].keys()}
    mode = "greedy" if "greedy" in modes else min(modes, default="")
    pairs = [
        _pair(before, ends["after"][key])
        for key, before in ends["before"].items()
        if key[0] == mode and key in ends["after"]
    ]
    return Samples(mode, _sets(pairs), dict(steps.pick()))


def _pair(before: dict[str, Any], after: dict[str, Any]) -> Pair:
    old, new = before.get("scores") or {}, after.get("scores") or {}
    names = dict.fromkeys([*old, *new])
    return Pair(
        index=before.get("index", -1),
        prompt=cut(before.get("prompt", ""), TEXT),
        before=cut(before.get("sample", ""), TEXT),
        after=cut(after.get("sample", ""), TEXT),
        reward_before=finite(before.get("reward")),
        reward_after=finite(after.get("reward")),
        scores=[(name, finite(old.get(name)), finite(new.get(name))) for name in names],
    )


def _sets(pairs: list[Pair]) -> list[PairSet]:
    """Pairs by the way the reward went, the largest changes first."""
    rose = sorted((pair for pair in pairs if pair.gain > 0), key=lambda pair: -pair.gain)
    fell = sorted((pair for pair in pairs if pair.gain < 0), key=lambda pair: pair.gain)
    same = [pair for pair in pairs if pair.gain == 0]
    named = [("Reward rose", rose), ("Reward fell", fell), ("Reward unchanged", same)]
    return [PairSet(title, len(group), group[:SHOWN_PAIRS]) for title, group in named if group]
