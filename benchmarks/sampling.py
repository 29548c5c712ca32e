"""What choosing prompts costs: CPU seconds and memory of a sampler's draw and observe, against one rollout.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --prompts 1000000

Each number of prompts is measured in a process of its own, so that the peak of the memory is its own. The bookkeeping is
held against two rollouts of very small models: that of the GRPO benchmark (`grpo_step.py`: 1 M weights, 64 samples), to
which the limit belongs, and that of the sort task (0.1 M weights, 256 samples): hardly any other is as short.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

SIZES = (1_000, 10_000, 100_000, 1_000_000)
RESULTS = Path(__file__).parent / "results" / "sampling.json"
LIMIT = 0.01  # of a rollout's time
ROLLOUTS = ("grpo", "sort")
BATCH, GROUP, WARMUP, BETWEEN = 32, 8, 20, 10
# what the prompts are like: (share, chance of a right sample)
WORLDS = {
    "every kind": ((0.3, 0.0), (0.3, 1.0), (0.4, 0.4)),
    "nearly all hopeless": ((0.99, 0.0), (0.01, 0.4)),
}


def rollout(name: str) -> Callable[[], float]:
    """A function that makes one rollout of the GRPO benchmark or of the sort recipe and returns its CPU seconds."""
    if name == "sort":
        from guerdon.evidence.sort_task import base_policy
        from guerdon.language.tasks import sort

        policy = base_policy(0, steps=0)
        prompts = [sort.train_rows(0)[i]["prompt"] for i in range(BATCH)]
    else:
        from guerdon.language.policy import LanguagePolicy

        shape = common.ModelShape()
        options: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16}
        policy = LanguagePolicy.load(common.llama(shape), tokenizer=common.tokenizer(shape.vocabulary), **options)
        prompts = common.prompts(8, 8, shape.vocabulary, 0)
    seeds = iter(range(10**9))

    def once() -> float:
        start = time.process_time()
        policy.sample(prompts, GROUP, [next(seeds) for _ in prompts])
        return time.process_time() - start

    return once


def measure(prompts: int, steps: int) -> dict[str, Any]:
    """Draw and observe at one number of prompts: at the start, and when all of them have been seen."""
    import numpy as np
    import torch

    from guerdon.sampling import vade

    figures: dict[str, Any] = {"prompts": prompts}
    made = {name: rollout(name) for name in ROLLOUTS}
    for once in 3 * list(made.values()):
        once()
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
            rollouts: dict[str, list[float]] = {name: [] for name in made}
            for number in range(steps + WARMUP):
                if number % BETWEEN == 0:
                    # in between, so that what else the machine does falls on both
                    for name, once in made.items():
                        rollouts[name].append(once())
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
                "rollout_s": {name: common.summary(seconds) for name, seconds in rollouts.items()},
                "step_s": common.summary([d + o for d, o in zip(draws, observes, strict=True)]),
                "state_mib": sum(b.numel() * b.element_size() for b in sampler.buffers()) / 2**20,
            }
            del sampler
    figures["memory_added_mib"] = common.memory_mib("VmHWM") - before
    return figures


def show(record: dict[str, Any]) -> None:
    """A Markdown table; milliseconds are means."""
    print(
        "| prompts | which are | draw | observe | GRPO rollout | share | <= 1 % | sort rollout | share | slowest step | MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for found in record["sizes"]:
        for name, part in found.items():
            if not isinstance(part, dict):
                continue
            cells = [f"{1000 * part[f'{what}_s']['mean']:.2f}" for what in ("draw", "observe")]
            for which in ROLLOUTS:
                mean = part["rollout_s"][which]["mean"]
                share = part["step_s"]["mean"] / mean
                cells += [f"{1000 * mean:.1f}", f"{share:.2%}"]
                if which == "grpo":
                    cells.append("met" if share <= LIMIT else "MISSED")
            most = f"{1000 * part['step_s']['most']:.1f}"
            row = [format(found["prompts"], ","), name, *cells, most, f"{part['state_mib']:.2f}"]
            print(f"| {' | '.join(row)} |")
        print(f"  (peak of memory grew by {found['memory_added_mib']:.0f} MiB, the benchmark's own arrays included)")


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
