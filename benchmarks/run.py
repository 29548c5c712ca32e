"""Run every benchmark, ours and the peers' in turn, and write the table of docs/benchmarks.md.

    python benchmarks/run.py                      everything, three rounds: about half an hour of one core
    python benchmarks/run.py --only short-64 kl   some of it; the rest of the table stays
    python benchmarks/run.py --table              the table from benchmarks/results once more, nothing is run

Cases with a peer run both sides in the peers' environment, which holds guerdon as well: see benchmarks/requirements.txt.
What else is installed changes what transformers imports, hence the memory. Each run is a fresh process with one thread.
The sides take turns, so that a change of the machine's mood falls on both.
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
from typing import Any, NamedTuple

import common
import table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"


class Case(NamedTuple):
    """One comparison: a script, settings for both sides, and each side's own settings."""

    script: str
    settings: str
    sides: dict[str, str]
    rounds: int | None = None


PAIR = {"guerdon": "--who guerdon", "trl": "--who trl"}
LONG = "--prompt-length 128 --new-tokens 32 --steps 20"
FLOW = {"guerdon": "--who guerdon", "loop": "--who loop", "loop, channels last": "--who loop --channels-last"}
WAYS = ("naive", "selective", "chunked", "trl", "guerdon", "guerdon-entropy")
CASES = {
    "short-64": Case("grpo_step.py", "", PAIR),
    "short-1024": Case("grpo_step.py", "--vocabulary 1024", PAIR),
    "long-64": Case("grpo_step.py", LONG, PAIR),
    "long-1024": Case("grpo_step.py", f"--vocabulary 1024 {LONG}", PAIR),
    "kl": Case("grpo_step.py", "--beta 0.05", PAIR),
    "passes": Case("grpo_step.py", "--passes 4 --steps 20", PAIR),
    "rewards": Case("grpo_step.py", "--rewards 3", PAIR),
    "records": Case(
        "grpo_step.py", "", {"on": "--who guerdon --rewards 3", "off": "--who guerdon --rewards 3 --no-records"}
    ),
    "logprob": Case("logprob.py", "", {way: f"--way {way}" for way in WAYS}),
    "dpo": Case("preference_step.py", "", PAIR),
    "dpo-1024": Case("preference_step.py", "--vocabulary 1024", PAIR),
    "dpo-long": Case("preference_step.py", LONG, PAIR),
    "dpo-precomputed": Case("preference_step.py", "--precompute", PAIR),
    "simpo": Case("preference_step.py", "--loss simpo", PAIR),
    "simpo-1024": Case("preference_step.py", "--loss simpo --vocabulary 1024", PAIR),
    "simpo-long": Case("preference_step.py", f"--loss simpo {LONG}", PAIR),
    "flow-step": Case("flow_step.py", "--steps 8 --warmup 2", FLOW),
    "imports": Case("imports.py", "", PAIR, rounds=1),
}
PEERS = {"trl"}


def run_once(python: Path, script: str, settings: str) -> dict[str, Any]:
    """One fresh process; its figures."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "figures.json"
        words = [str(python), str(HERE / script), *settings.split(), "--json", str(target)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words[1:])}\n{done.stderr[-3000:]}")
        return json.loads(target.read_text())


def run_case(name: str, rounds: int, peers: Path) -> None:
    """Run a case's sides in turn and keep the figures."""
    case = CASES[name]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in case.sides}
    python = peers if PEERS & set(case.sides) else Path(sys.executable)
    for number in range(case.rounds or rounds):
        # a seed for every round: what is learnt depends on it, the work does not
        seed = "" if case.script == "imports.py" else f"--seed {number}"
        for side, own in case.sides.items():
            start = time.perf_counter()
            found[side].append(run_once(python, case.script, f"{case.settings} {own} {seed}"))
            print(f"{name:>12}  round {number + 1}  {side:<16} {time.perf_counter() - start:6.1f} s", flush=True)
    record = {"machine": common.machine(), "date": time.strftime("%Y-%m-%d"), "sides": found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument(
        "--peers", type=Path, default=HERE.parent / ".venv-peers" / "bin" / "python", help="their python"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table again")
    args = parser.parse_args()
    if not args.table:
        if not args.peers.exists() and any(PEERS & set(CASES[name].sides) for name in args.only):
            parser.error(f"{args.peers} is not there; make the peers' environment as benchmarks/requirements.txt says")
        for name in args.only:
            run_case(name, args.rounds, args.peers)
    paths = {name: RESULTS / f"{name}.json" for name in CASES}
    results = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    sections = table.sections(results)
    table.show(sections)
    table.write(PAGE, sections, results)


if __name__ == "__main__":
    main()
