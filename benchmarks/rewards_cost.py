"""What shaping, weighting and the ledger cost in the short GRPO step with eight rewards.

    OMP_NUM_THREADS=1 python benchmarks/rewards_cost.py            three fresh processes, a minute
    OMP_NUM_THREADS=1 python benchmarks/rewards_cost.py --table    the table of docs/benchmarks.md from what was measured

The step is that of grpo_step.py, its records included. Each reward is shaped by running moments and a clip, and the
weights are fixed. Timed are the signal's way from scores to rewards, the shares of each component, and the ledger's line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import grpo_step

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rewards-cost.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- rewards cost: begin -->", "<!-- rewards cost: end -->"
PARTS = ("shaping and weighting", "shares", "ledger line")
TARGET, ROUNDS = 0.05, 3


@dataclass(frozen=True)
class Work(grpo_step.Work):
    """The short step with eight rewards."""

    rewards: int = 8
    steps: int = 15


def measure(work: Work) -> dict[str, Any]:
    """CPU seconds of a step and of its parts."""
    from functools import partial

    from accelerate import Accelerator

    from guerdon.advantages import grpo
    from guerdon.language.policy import LanguagePolicy
    from guerdon.objectives import policy_gradient
    from guerdon.shaping import clip, mean_std
    from guerdon.signal import Signal
    from guerdon.training import Online, Optim, online, records
    from guerdon.weighting import linear

    names = [function.__name__ for function in work.functions()]
    signal = Signal(
        rewards=dict(zip(names, work.functions(), strict=True)),
        shaping={name: [mean_std(), clip()] for name in names},
        weighting=partial(linear, weights={name: 1 / len(names) for name in names}),
        advantage=grpo,
    )
    loop = Online(
        LanguagePolicy.load(
            common.llama(work),
            tokenizer=common.tokenizer(work.vocabulary),
            max_new_tokens=work.new_tokens,
            min_new_tokens=work.new_tokens,
        ),
        work.data(),
        signal,
        policy_gradient,
        prompts_per_step=work.prompts,
        group_size=work.group,
        optim=Optim(lr=work.lr),
        steps=work.total,
        seed=work.seed,
        accelerator=Accelerator(),
    )
    phases, laps = common.Phases(), common.Laps()
    phases.wrap(signal, "weigh", PARTS[0])
    phases.wrap(signal, "observe", PARTS[0])
    phases.wrap(online, "attribute", PARTS[1])
    phases.wrap(records, "entry", PARTS[2])
    phases.wrap(records.Records, "line", lambda _, name, *__: PARTS[2] if name == "ledger" else "other lines")
    with tempfile.TemporaryDirectory() as folder:
        book = records.Records(Path(folder))
        laps.start()
        for done in range(work.total):
            phases.running = done >= work.warmup
            result = loop.step()
            book.step(result, 0.0, samples=result.step % 10 == 0)
            laps.lap()
        book.close()
    return {"step": laps.figures(work.warmup), "parts_cpu_s": phases.per(work.steps)}


def run_all() -> None:
    found = []
    for seed in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "figures.json"
            words = [sys.executable, __file__, "--one", "--seed", str(seed), "--json", str(target)]
            subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
            found.append(json.loads(target.read_text()))
    record = {"machine": common.machine(), "date": time.strftime("%Y-%m-%d"), "runs": found}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    """The section of the page."""
    runs = record["runs"]
    step = statistics.median(run["step"]["cpu_s"]["mean"] for run in runs)
    spent = {part: statistics.median(run["parts_cpu_s"][part] for run in runs) for part in PARTS}
    shares = [sum(run["parts_cpu_s"][part] for part in PARTS) / run["step"]["cpu_s"]["mean"] for run in runs]
    share = statistics.median(shares)
    lines = [
        f"Taken {record['date']} on an {record['machine']['processor']}, one thread, torch {runs[0]['versions']['torch']}. "
        f"The short step at vocabulary 64 with {runs[0]['settings']['rewards']} rewards, each shaped by running moments and a "
        f"clip, fixed weights. Mean CPU ms a step, the median of {len(runs)} processes; the step takes {1000 * step:.0f} ms.",
        "",
        "| part | CPU ms | share of the step | target |",
        "| --- | --- | --- | --- |",
        *(f"| {part} | {1000 * seconds:.2f} | {seconds / step:.1%} | - |" for part, seconds in spent.items()),
        f"| together | {1000 * sum(spent.values()):.2f} | {share:.1%} ({min(shares):.1%} to {max(shares):.1%}) | "
        f"<= {TARGET:.0%}: {'met' if share <= TARGET else 'MISSED'} |",
    ]
    return "\n".join(lines)


def main() -> None:
    common.measure_or_tabulate(
        Work,
        __doc__,
        measure,
        run_all,
        lambda: table(json.loads(RESULTS.read_text())),
        PAGE,
        (BEGIN, END),
        "Many rewards",
    )


if __name__ == "__main__":
    main()
