"""What choosing prompts costs: CPU seconds and memory of a sampler's draw and observe, against one rollout.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --prompts 1000000

Each number of prompts is measured in a process of its own, so that the peak of the memory is its own. The rollout is
that of the sort task, of a 0.1 M parameter model: hardly any other is as short.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

SIZES = (1_000, 10_000, 100_000, 1_000_000)
RESULTS = Path(__file__).parent / "results" / "sampling.json"
LIMIT = 0.01  # of a rollout's time
BATCH, GROUP, WARMUP = 32, 8, 20
# what the prompts are like: (share, chance of a right sample)
WORLDS = {
    "every kind": ((0.3, 0.0), (0.3, 1.0), (0.4, 0.4)),
    "nearly all hopeless": ((0.99, 0.0), (0.01, 0.4)),
}


def rollout_seconds(repeat: int = 23) -> float:
    """CPU seconds of one rollout of the sort recipe, the mean."""
    from guerdon.evidence.sort_task import base_policy
    from guerdon.language.tasks import sort

    policy = base_policy(0, steps=0)
    prompts = [sort.train_rows(0)[i]["prompt"] for i in range(BATCH)]
    laps = common.Laps()
    for number in range(repeat):
        policy.sample(prompts, GROUP, list(range(number * BATCH, (number + 1) * BATCH)))
        laps.lap()
    return laps.figures(3)["cpu_s"]["mean"]


def measure(prompts: int, steps: int) -> dict[str, Any]:
    """Draw and observe at one number of prompts: at the start, and when all of them have been seen."""
    import numpy as np
    import torch

    from guerdon.sampling import vade

    figures: dict[str, Any] = {"prompts": prompts, "rollout_s": rollout_seconds()}
    before = common.memory_mib()
    for world, kinds in WORLDS.items():
        for when in ("unseen", "seen"):
            random = np.random.default_rng(0)
            chance = random.choice([p for _, p in kinds], size=prompts, p=[share for share, _ in kinds])
            sampler = vade()
            sampler.prepare(prompts, 0)
            if when == "seen":  # one group of each, so that no two posteriors need be alike
                for part in np.array_split(np.arange(prompts), max(prompts // 4096, 1)):
                    right = np.arange(GROUP) < random.binomial(GROUP, chance[part])[:, None]
                    scale = float(sampler.scale)
                    sampler.observe(part.tolist(), torch.from_numpy(right).float().unsqueeze(-1))
                    sampler.scale.fill_(scale)  # all of it in one step, without fading
            draws, observes = [], []
            for _ in range(steps + WARMUP):
                start = time.process_time()
                chosen = sampler.draw(BATCH)
                middle = time.process_time()
                right = torch.from_numpy(np.arange(GROUP) < random.binomial(GROUP, chance[chosen])[:, None]).float()
                resumed = time.process_time()
                sampler.observe(chosen, right.unsqueeze(-1))
                draws.append(middle - start)
                observes.append(time.process_time() - resumed)
            draws, observes = draws[WARMUP:], observes[WARMUP:]
            figures[f"{world}, {when}"] = {
                "draw_s": common.summary(draws),
                "observe_s": common.summary(observes),
                "step_s": common.summary([d + o for d, o in zip(draws, observes, strict=True)]),
                "state_mib": sum(b.numel() * b.element_size() for b in sampler.buffers()) / 2**20,
            }
            del sampler
    figures["memory_added_mib"] = common.memory_mib("VmHWM") - before
    return figures


def show(record: dict[str, Any]) -> None:
    for found in record["sizes"]:
        rollout = found["rollout_s"]
        print(f"\n{found['prompts']:>9,} prompts; a rollout of the sort task {1000 * rollout:.1f} ms of CPU; "
              f"peak of memory grew by {found['memory_added_mib']:.0f} MiB")  # fmt: skip
        for name, part in found.items():
            if not isinstance(part, dict):
                continue
            step = part["step_s"]
            share = step["mean"] / rollout
            verdict = "met" if share <= LIMIT else "MISSED"
            print(f"  {name:<29} draw {1000 * part['draw_s']['median']:7.3f} ms, observe "
                  f"{1000 * part['observe_s']['median']:.3f} ms, mean of both {1000 * step['mean']:7.3f} (most "
                  f"{1000 * step['most']:.1f}) = {share:.2%} of the rollout, <= {LIMIT:.0%}: {verdict}; state "
                  f"{part['state_mib']:.2f} MiB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=SIZES)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    common.quiet()
    if args.one:
        print(json.dumps(measure(args.prompts[0], args.steps)))
        return
    sizes = []
    for prompts in args.prompts:
        words = [sys.executable, __file__, "--one", "--prompts", str(prompts), "--steps", str(args.steps)]
        done = subprocess.run(words, env=dict(os.environ), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        sizes.append(json.loads(done.stdout))
    record = {"machine": common.machine(), "versions": common.versions(), "date": time.strftime("%Y-%m-%d"),
              "load_average": os.getloadavg()[0], "steps": args.steps, "sizes": sizes}  # fmt: skip
    show(record)
    if set(args.prompts) == set(SIZES):
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
