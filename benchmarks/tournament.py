"""What a tournament costs: judge calls, rounds and CPU seconds of the bookkeeping, for groups of 4 to 64.

    OMP_NUM_THREADS=1 python benchmarks/tournament.py

The judge is a table look-up, so the CPU seconds are those of guerdon: pairing, batching, ranking. A round is one call
of the judge with all its matches, and rounds are what a slow judge is waited for. `order` says what they buy: the mean
Spearman correlation with the true order under a judge with noise 0.25 on points that differ by the difference in
quality, quality being N(0, 1).
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

RESULTS = Path(__file__).parent / "results" / "tournament.json"
SIZES = (4, 8, 16, 32, 64)
LIMIT = 2.0  # judge calls for each sample in one order, for the default topology


@dataclass(frozen=True)
class Work:
    """The sizes; P groups are played in step."""

    prompts: int = 32
    repeat: int = 5
    noise: float = 0.25
    seed: int = 0


def measure(topology: Any, size: int, work: Work) -> dict[str, Any]:
    """One topology at one group size."""
    import torch

    from guerdon.evidence.arena_rl import spearman
    from guerdon.rewards import tournament

    draw = random.Random(work.seed)
    quality = [[draw.gauss(0, 1) for _ in range(size)] for _ in range(work.prompts)]
    calls: list[int] = []

    def judge(matches: Any) -> list[tuple[float, float]]:
        calls.append(len(matches))
        gaps = [(m.first - m.second) / 2 for m in matches]
        return [(5 + g + draw.gauss(0, work.noise), 5 - g + draw.gauss(0, work.noise)) for g in gaps]

    stage = tournament(judge=judge, topology=topology, both_orders=False)
    prompts = [f"p{p}" for p in range(work.prompts)]
    laps = common.Laps()
    order = []
    for _ in range(work.repeat):
        calls.clear()
        found = stage(prompts, quality)
        laps.lap()
        order.append(spearman(-found.ranks.double(), torch.tensor(quality).double()).mean().item())
    return {
        "size": size,
        "topology": topology,
        "comparisons": int(found.comparisons[0]),
        "rounds": len(calls),
        "order": sum(order) / len(order),
        "cpu_s": common.summary([seconds / work.prompts for seconds in laps.cpu]),
    }


def main() -> None:
    common.quiet()
    work, target = common.settings(Work, __doc__)
    from guerdon.rewards.topologies import TOPOLOGIES

    found = [measure(topology, size, work) for size in SIZES for topology in TOPOLOGIES]
    print(f"{'N':>4}  {'topology':<20}{'comparisons':>12}{'rounds':>8}{'order':>8}{'CPU ms a group':>16}")
    for row in found:
        print(
            f"{row['size']:>4}  {row['topology']:<20}{row['comparisons']:>12}{row['rounds']:>8}{row['order']:>8.3f}"
            f"{1000 * row['cpu_s']['median']:>16.3f}"
        )
    largest = next(row for row in found if (row["size"], row["topology"]) == (SIZES[-1], "single_elimination"))
    share = largest["comparisons"] / largest["size"]
    print(f"single elimination of {SIZES[-1]}: {share:.2f} comparisons a sample, "
          f"<= {LIMIT:g}: {'met' if share <= LIMIT else 'MISSED'}")  # fmt: skip
    record = {"machine": common.machine(), "versions": common.versions(), "date": time.strftime("%Y-%m-%d"),
              "load_average": os.getloadavg()[0], "settings": vars(work), "tournaments": found}  # fmt: skip
    (target or RESULTS).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
