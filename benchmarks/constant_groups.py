"""What helps when most groups are constant: the arms of docs/howto/constant-groups.md on the sort task.

    OMP_NUM_THREADS=1 python benchmarks/constant_groups.py            three seeds, about ten minutes of one core
    OMP_NUM_THREADS=1 python benchmarks/constant_groups.py --table    the table and the plot from what was measured

Every arm may sample the same number of tokens, those of groups that are thrown away included. What is measured already
is not measured again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "constant-groups.json"
PLOT = HERE.parent / "docs" / "howto" / "constant-groups.svg"
STARTS = {"weak": 50, "normal": 70}  # supervised steps
VADE: dict[str, Any] = {"sampling": {"vade": {"pool": 1024}}}
# the batch and the rate that copo's page gives: it compares prompts, so it wants many of them
COPO: dict[str, Any] = {"advantage": "copo", "objective": "copo_loss", "prompts": 128, "group_size": 6, "lr": 1e-4}
DYNAMIC: dict[str, Any] = {"sampling": {"dynamic": {"max_draws": 20, "on_shortage": "train"}}}
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "dynamic": DYNAMIC,
    "vade": VADE,
    "copo": COPO,
    "vade + copo": {**VADE, **COPO},
    # those that make fewer updates of the same samples, at a higher rate
    "dynamic, lr 6e-4": {**DYNAMIC, "lr": 6e-4},
    "copo, lr 3e-4": {**COPO, "lr": 3e-4},
    "vade + copo, lr 3e-4": {**VADE, **COPO, "lr": 3e-4},
}
COLOURS = ("#444444", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")
PLAIN: dict[str, Any] = {
    "sampling": "uniform",
    "advantage": "grpo",
    "objective": {"policy_gradient": {"clip_low": 0.2, "clip_high": 0.28, "denominator": "per_token"}},
    "prompts": 32,
    "group_size": 8,
    "lr": 3e-4,
}


def measure(arm: str, start: str, seed: int, tokens: int, every: int) -> dict[str, Any]:
    """Train until `tokens` were sampled; curves over sampled tokens."""
    from guerdon.components import build
    from guerdon.evidence.sort_task import accuracy, base_policy
    from guerdon.language.tasks import sort
    from guerdon.rewards import exact_answer
    from guerdon.signal import Signal
    from guerdon.training import Online, Optim

    chosen = {**PLAIN, **ARMS[arm]}
    policy = base_policy(seed, steps=STARTS[start])
    sample, spent = policy.sample, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal spent
        rollout = sample(*args, **options)
        spent += int(rollout.mask.sum())
        return rollout

    loop = Online(
        policy,
        sort.train_rows(seed),
        Signal(rewards={"correct": exact_answer}, advantage=build("advantages", chosen["advantage"])),
        build("objectives", chosen["objective"]),
        sampler=build("sampling", chosen["sampling"]),
        prompts_per_step=chosen["prompts"],
        group_size=chosen["group_size"],
        optim=Optim(lr=chosen["lr"], betas=(0.9, 0.99)),
        steps=10**6,
        seed=seed,
    )
    curves: dict[str, list[tuple[int, float]]] = {"greedy": [], "sampled": [], "constant_groups": []}

    def test() -> None:
        for mode, share in accuracy(policy, size=400, samples=2).items():
            curves[mode].append((spent, share))

    test()
    cpu, seen, steps = 0.0, [], 0
    filters = "dynamic" in chosen["sampling"]
    while spent < tokens:
        policy.sample, before = counted, spent
        cpu -= time.process_time()
        result = loop.step()
        cpu += time.process_time()
        policy.sample = sample
        steps += 1
        # of the groups that were sampled; a sampler that throws groups away trains on others
        groups = result.metrics["draws"] * chosen["prompts"]
        constant = None if filters else result.metrics["constant_groups"] * len(result.rollout)
        seen.append((groups, constant))
        if before // every < spent // every:
            test()
            if not filters:
                curves["constant_groups"].append((spent, sum(c for _, c in seen) / sum(g for g, _ in seen)))
                seen = []
    if curves["sampled"][-1][0] < spent:
        test()
    return {"arm": arm, "start": start, "seed": seed, "steps": steps, "tokens": spent, "cpu_s": cpu, "curves": curves}


def table(runs: list[dict[str, Any]], start: str) -> str:
    """Markdown: mean and, in brackets, standard deviation over seeds."""
    lines = [
        "| arm | updates | constant groups | greedy | sampled | CPU s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        own = [run for run in runs if (run["arm"], run["start"]) == (arm, start)]
        if not own:
            continue
        updates = statistics.fmean(run["steps"] for run in own)
        cpu = statistics.fmean(run["cpu_s"] for run in own)
        points = [[value for _, value in run["curves"]["constant_groups"]] for run in own]
        constant = spread([statistics.fmean(values) for values in points]) if all(points) else "thrown away"
        ends = [spread([run["curves"][mode][-1][1] for run in own]) for mode in ("greedy", "sampled")]
        lines.append(f"| {arm} | {updates:.0f} | {constant} | {ends[0]} | {ends[1]} | {cpu:.0f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def plot(runs: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "constant-groups"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for column, start in enumerate(STARTS):
        for row, (curve, title) in enumerate(
            {"sampled": "sampled accuracy", "constant_groups": "constant groups"}.items()
        ):
            axis = axes[row][column]
            for arm, colour in zip(ARMS, COLOURS, strict=False):
                lines = [run["curves"][curve] for run in runs if (run["arm"], run["start"]) == (arm, start)]
                for line in lines:
                    axis.plot([x / 1000 for x, _ in line], [y for _, y in line], color=colour, alpha=0.25, linewidth=1)
                shared = min((len(line) for line in lines), default=0)
                if shared:
                    mean = [statistics.fmean(line[i][1] for line in lines) for i in range(shared)]
                    where = [statistics.fmean(line[i][0] for line in lines) / 1000 for i in range(shared)]
                    axis.plot(where, mean, color=colour, linewidth=2, label=arm)
            axis.set_ylabel(title)
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(f"{start} start")
            else:
                axis.set_xlabel("thousands of sampled tokens")
    axes[0][0].legend(frameon=False, fontsize=8)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=300_000, help="sampled tokens of each run")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    if not args.table:
        common.quiet()
        record |= {"machine": common.machine(), "versions": common.versions(), "date": time.strftime("%Y-%m-%d")}
        record["settings"] = {"tokens": args.tokens, "plain": PLAIN, "arms": ARMS}
        done = {(run["arm"], run["start"], run["seed"]) for run in record["runs"]}
        for seed in range(args.seeds):
            for start in STARTS:
                for arm in ARMS:
                    if (arm, start, seed) not in done:
                        run = measure(arm, start, seed, args.tokens, args.tokens // 10)
                        record["runs"].append(run)
                        RESULTS.write_text(json.dumps(record) + "\n")
                        ends = {mode: round(run["curves"][mode][-1][1], 3) for mode in ("greedy", "sampled")}
                        print(
                            f"{start:>7} {seed} {arm:<26} {run['steps']:4} steps {run['cpu_s']:5.1f} s {ends}",
                            flush=True,
                        )
    for start in STARTS:
        print(f"\n{start} start\n\n{table(record['runs'], start)}")
    plot(record["runs"])


if __name__ == "__main__":
    main()
