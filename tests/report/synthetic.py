"""A run directory as training would write it, made up: two components, a policy that learns, samples of text."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

RECIPE = """\
loop: online
policy: {{kind: language, model: sort, max_new_tokens: 12, temperature: 1.0, dtype: float32}}
data: sort
sampling: uniform
prompts_per_step: {prompts}
group_size: {group}
rewards: {{correct: exact_answer, short: length_below}}
weighting: {{linear: {{weights: {{correct: 1.0, short: 0.2}}}}}}
advantage: {advantage}
objective: {{policy_gradient: {{clip_low: 0.2, clip_high: 0.28}}}}
optim: {{name: adamw, lr: {lr}, schedule: constant}}
steps: {steps}
evaluation: {{every: {every}, size: 8, greedy: true}}
watch: {{tidy: exact_format}}
seed: {seed}
run: {{directory: runs, name: {name}}}
"""
COMPONENTS = ["correct", "short"]


def write_run(
    folder: Path,
    steps: int = 100,
    prompts: int = 8,
    group: int = 4,
    seed: int = 0,
    advantage: str = "grpo",
    lr: str = "3.0e-4",
    sample: str | None = None,
    varying: bool = False,
    drops: bool = True,
) -> Path:
    """Write the directory and return it; `sample` replaces the text of every sample, `varying` moves the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    every = max(1, steps // 5)
    recipe = RECIPE.format(
        prompts=prompts, group=group, steps=steps, every=every, seed=seed, name=folder.name, advantage=advantage, lr=lr
    )
    (folder / "recipe.yaml").write_text(recipe)
    machine = {"device": "cpu", "processes": 1, "platform": "Linux-x86_64", "started": "2026-01-02T10:00:00.123"}
    _json(folder / "environment.json", {"guerdon": "0.1.0", "python": "3.11.9", "torch": "2.13.0"} | machine)
    _json(folder / "status.json", {"state": "finished", "step": steps, "steps": steps, "reason": ""})
    metrics, ledger, samples = [], [], []
    for step in range(steps + 1):
        skill = 1 / (1 + math.exp(-8 * (step / steps - 0.4 - 0.04 * seed)))
        record: dict[str, Any] = {"step": step, "elapsed": 0.8 * step}
        if step % every == 0:
            for mode, shift in (("greedy", 0.08), ("sampled", 0.0)):
                record[f"eval/{mode}/correct"] = min(1.0, 0.08 + 0.8 * skill + shift)
                record[f"eval/{mode}/short"] = 0.5 + 0.4 * skill
        if step:
            entry = _ledger(rng, step, skill, prompts, group, varying, drops)
            ledger.append(entry)
            record |= _metrics(rng, entry, skill, step)
            if step % max(1, steps // 10) == 0:
                samples += _samples(rng, step, entry, sample)
        metrics.append(record)
    for phase, step, skill in (("before", 0, 0.0), ("after", steps, 0.9)):
        for mode in ("greedy", "sampled"):
            samples += _held_out(rng, phase, mode, step, skill, sample)
    for name, records in (("metrics", metrics), ("ledger", ledger), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    warm = [{"step": s, "loss": 3 / s, "lr": 2e-3 * min(1, s / 20), "tokens_per_s": 9000.0} for s in range(1, 31)]
    (folder / "supervised.jsonl").write_text("".join(json.dumps(record) + "\n" for record in warm))
    return folder


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def _ledger(
    rng: random.Random, step: int, skill: float, prompts: int, group: int, varying: bool, drops: bool
) -> dict[str, Any]:
    raw: list[list[list[float | None]]] = []
    dropped: list[list[Any]] = []
    for p in range(prompts):
        ease = min(1.0, max(0.0, skill + rng.uniform(-0.4, 0.4)))
        raw.append([[float(rng.random() < ease), float(rng.random() < 0.5 + 0.45 * skill)] for _ in range(group)])
        if drops and step % 25 == 7 and p == 2:
            raw[p][1] = [None, 1.0]
            dropped.append([p, 1, "correct", "ZeroDivisionError: division by zero"])
    weights = [1.0, round(0.2 + 0.3 * skill, 4) if varying else 0.2]
    contributions, advantages, remainder, constant = [], [], [], []
    for scores in raw:
        totals = [sum(w * (s or 0.0) for w, s in zip(weights, row, strict=True)) for row in scores]
        mean = sum(totals) / group
        spread = math.sqrt(sum((t - mean) ** 2 for t in totals) / group) + 1e-4
        means = [sum(row[k] or 0.0 for row in scores) / group for k in (0, 1)]
        parts = [[weights[k] * ((row[k] or 0.0) - means[k]) / spread for k in (0, 1)] for row in scores]
        contributions.append(parts)
        advantages.append([sum(part) for part in parts])
        remainder.append([0.0] * group)
        constant.append(len(set(totals)) == 1)
    index = [(step * prompts + p) % 97 for p in range(prompts)]
    return {
        "step": step, "prompt_index": index, "components": COMPONENTS, "raw": raw, "shaped": raw, "weights": weights,
        "contributions": contributions, "remainder": remainder, "advantages": advantages, "constant": constant,
        "dropped": dropped,
    }  # fmt: skip


def _metrics(rng: random.Random, entry: dict[str, Any], skill: float, step: int) -> dict[str, Any]:
    columns = [[row[k] for rows in entry["raw"] for row in rows if row[k] is not None] for k in (0, 1)]
    correct, short = (sum(column) / len(column) for column in columns)
    moved = [sum(abs(c[k]) for rows in entry["contributions"] for c in rows) for k in (0, 1)]
    total = sum(moved) or 1.0
    return {
        "reward": correct + entry["weights"][1] * short, "reward_std": 0.3 + 0.1 * rng.random(),
        "score/correct": correct, "score/short": short, "shaped/correct": correct, "shaped/short": short,
        "weight/correct": entry["weights"][0], "weight/short": entry["weights"][1],
        "share/correct": moved[0] / total, "share/short": moved[1] / total,
        "watch/tidy": 0.6 - 0.3 * skill + 0.05 * rng.random(),
        "constant_groups": sum(entry["constant"]) / len(entry["constant"]), "dropped": len(entry["dropped"]),
        "entropy": 1.6 - 1.1 * skill + 0.05 * rng.random(), "kl": 0.12 * skill + 0.01 * rng.random(),
        "length": 8 - 2 * skill + rng.random(), "length_max": 12.0, "truncated": 0.3 * (1 - skill) * rng.random(),
        "grad_norm": 0.4 + 0.5 * rng.random(), "lr": 3e-4 * min(1.0, step / 10), "loss": 0.02 * rng.gauss(0, 1),
        "clip_share": 0.02 * rng.random(), "ratio_max": 1 + rng.random(), "logp_gap": 1e-6 * rng.random(),
        "tokens": 250 + rng.randrange(40), "tokens_per_s": 3100 + 400 * rng.random(),
        "seconds/sample": 0.4 + 0.05 * rng.random(), "seconds/reward": 0.05, "seconds/score": 0.06,
        "seconds/update": 0.25 + 0.03 * rng.random(), "seconds/log": 0.01,
    }  # fmt: skip


def _samples(rng: random.Random, step: int, entry: dict[str, Any], text: str | None) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "phase": "train", "mode": "sampled", "index": index,
            "prompt": f"sort: {' '.join(rng.sample('abcdefghij', 6))}\n>",
            "sample": text or f" {' '.join(rng.sample('abcdefghij', 6))}", "reward": row[0] or 0.0,
            "scores": dict(zip(COMPONENTS, row, strict=True)), "advantage": entry["advantages"][p][g],
        }
        for p, index in enumerate(entry["prompt_index"])
        for g, row in enumerate(entry["raw"][p])
    ]  # fmt: skip


def _held_out(
    rng: random.Random, phase: str, mode: str, step: int, skill: float, text: str | None
) -> list[dict[str, Any]]:
    records = []
    for index in range(24):
        letters = random.Random(index).sample("abcdefghij", 6)
        solved = rng.random() < skill or (index % 9 == 8 and phase == "before")
        answer = sorted(letters) if solved else rng.sample(letters, 6)
        scores = {"correct": float(answer == sorted(letters)), "short": 1.0}
        records.append(
            {
                "step": step, "phase": phase, "mode": mode, "index": index, "prompt": f"sort: {' '.join(letters)}\n>",
                "sample": text or " ".join(answer), "scores": scores, "reward": scores["correct"] + 0.2,
            }
        )  # fmt: skip
    return records
