"""What a run writes: one line a step, so that a killed run leaves at most a cut last line."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from guerdon.ledger import entry
from guerdon.rollout import Rollout
from guerdon.training.images import is_image, write_image
from guerdon.training.online import StepResult

_LINES = ("metrics.jsonl", "ledger.jsonl", "samples.jsonl", "supervised.jsonl", "pairs.jsonl", "expressions.jsonl")
_PACKAGES = ("guerdon", "torch", "transformers", "peft", "accelerate", "diffusers", "gymnasium", "numpy")


class Records:
    """The files of a run directory.

    Args:
        run: the directory.
        enabled: False on every process but the first; all methods then do nothing.
    """

    def __init__(self, run: Path, *, enabled: bool = True) -> None:
        self.run, self.enabled = run, enabled
        self._open: dict[str, Any] = {}

    def line(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one record to `<name>.jsonl`; numbers that are not finite become null."""
        if not self.enabled:
            return
        if name not in self._open:
            self._open[name] = (self.run / f"{name}.jsonl").open("a", encoding="utf-8")
        self._open[name].write(json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n")
        self._open[name].flush()

    def metrics(self, step: int, elapsed: float, metrics: Mapping[str, float]) -> None:
        """A line of `metrics.jsonl`."""
        finite = {name: _figure(value) for name, value in metrics.items()}
        self.line("metrics", {"step": step, "elapsed": round(elapsed, 3), **finite})

    def step(self, result: StepResult, elapsed: float, *, samples: bool) -> None:
        """All lines of one step of the online loop."""
        if not self.enabled:
            return
        start = time.perf_counter()
        self.line("ledger", entry(result.step, result.rollout, result.attribution))
        if samples:
            self.samples(
                result.step, "train", "sampled", result.rollout.select(slice(0, 4)), result.attribution.advantages
            )
        log = time.perf_counter() - start
        self.metrics(result.step, elapsed, {**result.metrics, "seconds/log": log})

    def samples(
        self, step: int, phase: str, mode: str, rollout: Rollout, advantages: torch.Tensor | None = None
    ) -> None:
        """A line of `samples.jsonl` for every sample of a rollout; pictures lie beside it and are named in their line."""
        if not self.enabled or rollout.scores is None:
            return
        for p, group in enumerate(rollout.samples):
            for g, sample in enumerate(group):
                scores = {
                    n: _figure(v) for n, v in zip(rollout.score_names, rollout.scores[p, g].tolist(), strict=True)
                }
                record = {
                    "step": step,
                    "phase": phase,
                    "mode": mode,
                    "index": rollout.indices[p] if rollout.indices else p,
                    "prompt": _text(rollout.prompts[p]),
                    "sample": self._sample(sample, f"{step}-{phase}-{mode}-{p}-{g}"),
                    "scores": scores,
                    "reward": _figure(_total(rollout, p, g)),
                }
                if advantages is not None:
                    record["advantage"] = _figure(advantages[p, g].item())
                self.line("samples", record)

    def _sample(self, sample: Any, name: str) -> Any:
        """A sample as it stands in its line."""
        if not is_image(sample):
            return _text(sample)
        write_image(self.run / "images", name, sample)
        return {"image": f"images/{name}.png"}

    def status(self, state: str, step: int, steps: int, reason: str = "") -> None:
        """Replace `status.json`, in one move."""
        if self.enabled:
            _replace(self.run / "status.json", {"state": state, "step": step, "steps": steps, "reason": reason})

    def record(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace `<name>.json`, in one move."""
        if self.enabled:
            _replace(self.run / f"{name}.json", record)

    def environment(self, processes: int, device: str) -> None:
        """Write `environment.json`: versions and machine."""
        if self.enabled:
            record = {
                **_versions(_PACKAGES),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "device": device,
                "threads": torch.get_num_threads(),
                "processes": processes,
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            _replace(self.run / "environment.json", record)

    def rewind(self, step: int) -> None:
        """Drop every line after `step`: a resumed run writes them again."""
        if not self.enabled:
            return
        self.close()
        for name in _LINES:
            path = self.run / name
            if path.exists() and name != "supervised.jsonl":
                kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _within(line, step)]
                draft = path.with_suffix(".draft")
                draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                os.replace(draft, path)

    def close(self) -> None:
        """Close all files."""
        for handle in self._open.values():
            handle.close()
        self._open.clear()


def _within(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except ValueError:
        return False  # the line that a kill cut off


def _figure(value: float) -> float | None:
    return round(value, 9) if math.isfinite(value) else None


def _total(rollout: Rollout, p: int, g: int) -> float:
    if rollout.rewards is None:
        return float("nan")
    return rollout.rewards[p, g].sum().item()


def _text(value: Any) -> Any:
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in value)
    return repr(value)


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _replace(path: Path, record: Mapping[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(record, indent=1))
    os.replace(draft, path)
