"""The work of a GPU: a model of half a billion weights in bfloat16, by guerdon and by TRL, and log-probabilities alone.

    python benchmarks/gpu.py                        every case, each in a process of its own: about six minutes
    python benchmarks/gpu.py --only grpo logprob    some of it; the rest stays
    python benchmarks/gpu.py --table                the table of docs/benchmarks.md from what was measured

Needs one GPU and both sides' packages in one environment (`--peers` names another python for TRL's side). What is not
installed is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
# the shape of Qwen2.5-0.5B
MODEL = (
    "--device cuda --dtype bfloat16 --vocabulary 151936 --layers 24 --width 896 --heads 14 --kv-heads 2 --mlp 4864 --tied "
    "--positions 1024"
)
GRPO = f"grpo_step.py {MODEL} --prompt-length 128 --new-tokens 256 --lr 1e-5 --steps 3 --warmup 1"
PAIRS = f"preference_step.py {MODEL} --prompt-length 128 --new-tokens 256 --lr 1e-6 --steps 8 --warmup 3"
LOGPROB = "logprob.py --device cuda --dtype bfloat16 --tokens 8192 --width 896 --vocabulary 151936 --repeat 10"
WAYS = ("naive", "chunked", "trl", "guerdon", "guerdon-entropy", "liger", "cce")
CASES = {
    "grpo": {
        "guerdon": f"{GRPO} --who guerdon",
        "TRL": f"{GRPO} --who trl",
        "TRL, liger": f"{GRPO} --who trl --liger",
    },
    "dpo": {"guerdon": f"{PAIRS} --who guerdon", "TRL": f"{PAIRS} --who trl"},
    "logprob": {way: f"{LOGPROB} --way {way}" for way in WAYS},
}
TITLES = {"grpo": "One GRPO step", "dpo": "One DPO step", "logprob": "Log-probabilities of chosen tokens"}


def run_once(python: str, words: str) -> dict[str, Any]:
    """One fresh process; its figures, or the last line of what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "figures.json"
        script, *settings = words.split()
        command = [python, str(HERE / script), *settings, "--json", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
        if done.returncode:
            print(done.stderr[-3000:], flush=True)
            return {"failed": done.stderr.strip().splitlines()[-1][:300]}
        return json.loads(target.read_text())


def table(record: dict[str, Any]) -> str:
    """The section of the page."""
    sides = record["cases"]
    some = next(figures for case in sides.values() for figures in case.values() if "failed" not in figures)
    packages = ", ".join(f"{name} {number}" for name, number in some["versions"].items())
    lines = [
        f"Taken {record['date']} on one {some['device']}, one process a case. {packages}. Wall seconds, the median step; the "
        "most memory in use on the device. The model has the shape of Qwen2.5-0.5B with random weights, in bfloat16 with "
        "autocast; 8 prompts of 128 tokens, 8 samples each, exactly 256 new tokens, no gradient checkpointing. DPO: 32 "
        "pairs, 128 + 256 tokens. Log-probabilities: 8192 tokens, width 896, 151,936 words, forward and backward. Half "
        "a minute of every process is imports, and clocks wait for the device.",
    ]
    for name, case in sides.items():
        first = next(iter(case.values()))
        phases = list(first.get("phases_cpu_s", ()))
        own = ["new tokens / s"] if name == "grpo" else ["pairs / s"] if name == "dpo" else ["in logits (float32)"]
        base = case.get("TRL") or case.get("naive") or {}
        lines += ["", f"### {TITLES[name]}, GPU", ""]
        heads = ["who", "s", *phases, *own, "peak MiB", "seconds, ratio", "memory, ratio"]
        lines += [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        for who, figures in case.items():
            if "failed" in figures:
                lines.append(f"| {who} | did not run: {figures['failed']} |" + " |" * (len(heads) - 2))
                continue
            seconds, peak = _seconds(figures), _memory(figures)
            rate = figures.get("new_tokens_per_s") or figures.get("pairs_per_s") or figures.get("memory_in_logits")
            cells = [who, f"{seconds:.4g}", *(f"{figures['phases_cpu_s'].get(p, 0):.2f}" for p in phases)]
            cells += [f"{rate:,.0f}" if rate > 10 else f"{rate:.2f}", f"{peak:,.0f}"]
            known = base and "failed" not in base
            cells += [f"{seconds / _seconds(base):.2f}", f"{peak / _memory(base):.2f}"] if known else ["-", "-"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(figures: dict[str, Any]) -> float:
    return figures["step"]["wall_s"]["median"] if "step" in figures else figures["wall_s"]["median"]


def _memory(figures: dict[str, Any]) -> float:
    return figures.get("memory_added_mib") or figures["device_peak_mib"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some cases")
    parser.add_argument("--peers", default=sys.executable, help="the python of TRL's side")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table again")
    args = parser.parse_args()
    common.quiet()
    record: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    if not args.table:
        for name in args.only:
            found = {}
            for who, words in CASES[name].items():
                start = time.perf_counter()
                found[who] = run_once(args.peers if who.lower().startswith("trl") else sys.executable, words)
                told = found[who].get("failed") or f"{_seconds(found[who]):.4g} s  {_memory(found[who]):.0f} MiB"
                print(f"{name:>8}  {who:<16} {time.perf_counter() - start:6.1f} s  {told}", flush=True)
            record["cases"][name] = found
        record |= {"machine": common.machine(), "date": time.strftime("%Y-%m-%d")}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    text = table(record)
    print(text)
    common.write_section(PAGE, (BEGIN, END), "On a GPU", text)


if __name__ == "__main__":
    main()
