"""Peak memory of a reward's gradient through the sampler, against the number of denoising steps, with and without a
checkpoint a step.

    OMP_NUM_THREADS=1 python benchmarks/pathwise_memory.py           every case in a process of its own, two minutes
    OMP_NUM_THREADS=1 python benchmarks/pathwise_memory.py --table   the table of docs/benchmarks.md from what was measured

The network is the 0.64 million weight U-Net of the bundled shapes, untrained; memory is what the resident peak grew by
over that of the imports, the weights and one small pass. The whole chain is differentiated (full), the costliest case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "pathwise-memory.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- pathwise memory: begin -->", "<!-- pathwise memory: end -->"
STEPS = (5, 10, 20, 40)
TARGET, AT = 0.35, 20


@dataclass(frozen=True)
class Work:
    """One case."""

    steps: int = 20
    checkpointing: bool = True
    samples: int = 32
    seed: int = 0


def measure(work: Work) -> dict[str, Any]:
    """Peak memory and CPU seconds of one gradient."""
    import torch

    from guerdon.diffusion.bases import untrained
    from guerdon.diffusion.pathwise import sample_with_gradient

    torch.manual_seed(work.seed)
    policy = untrained("shapes", "flow", seed=work.seed, steps=work.steps)

    def gradient(samples: int) -> float:
        policy.zero_grad()
        options = {"deterministic": True, "checkpointing": work.checkpointing}
        images = sample_with_gradient(policy, [0], samples, [work.seed], **options).images
        images.square().mean().backward()
        return float(sum(p.grad.square().sum() for p in policy.parameters() if p.grad is not None) ** 0.5)

    gradient(1)  # what a library sets up once is not memory of the work
    before, start = common.memory_mib(), time.process_time()
    norm = gradient(work.samples)
    return {
        "cpu_s": time.process_time() - start,
        "memory_added_mib": common.memory_mib("VmHWM") - before,
        "gradient_norm": norm,
    }


def run_all() -> None:
    found = []
    for steps in STEPS:
        for flag in ("--checkpointing", "--no-checkpointing"):
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "figures.json"
                words = [sys.executable, __file__, "--one", "--steps", str(steps), flag, "--json", str(target)]
                subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
                found.append(json.loads(target.read_text()))
            print(steps, flag, f"{found[-1]['memory_added_mib']:.0f} MiB  {found[-1]['cpu_s']:.2f} s", flush=True)
    record = {"machine": common.machine(), "date": time.strftime("%Y-%m-%d"), "cases": found}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    """The section of the page."""
    cases = {(case["settings"]["steps"], case["settings"]["checkpointing"]): case for case in record["cases"]}
    versions = record["cases"][0]["versions"]
    lines = [
        f"Taken {record['date']} on an {record['machine']['processor']}, one thread, torch {versions['torch']}. "
        "A gradient of 32 images of the bundled shapes' U-Net (0.64 million weights), through all steps, each case in a "
        "process of its own. MiB that the resident peak grew by; CPU seconds of forward and backward pass.",
        "",
        "| steps | without MiB | with a checkpoint a step MiB | ratio | without s | with s | target |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for steps in STEPS:
        plain, kept = cases[steps, False], cases[steps, True]
        ratio = kept["memory_added_mib"] / plain["memory_added_mib"]
        verdict = f"<= {TARGET:g}: {'met' if ratio <= TARGET else 'MISSED'}" if steps == AT else "-"
        lines.append(
            f"| {steps} | {plain['memory_added_mib']:.0f} | {kept['memory_added_mib']:.0f} | {ratio:.2f} | "
            f"{plain['cpu_s']:.2f} | {kept['cpu_s']:.2f} | {verdict} |"
        )
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
        "A reward's gradient through the sampler",
    )


if __name__ == "__main__":
    main()
