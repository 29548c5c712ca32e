"""How long imports and command lines take before any work begins, by guerdon or by TRL.

    python benchmarks/imports.py --who guerdon
    .venv-peers/bin/python benchmarks/imports.py --who trl

Every figure is the least of `--repeat` fresh interpreters, in CPU seconds; that of an import leaves the interpreter's
own start out, that of a command line holds everything. `a:b` stands for `from a import b`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

IMPORTS = {
    "guerdon": [
        "guerdon",
        "torch",
        "guerdon.objectives:policy_gradient",
        "accelerate",
        "guerdon.training:Online",
        "guerdon.language.policy:LanguagePolicy",
        "transformers:LlamaForCausalLM",
    ],
    "trl": ["trl", "torch", "trl:GRPOTrainer"],
}
COMMANDS = {
    "guerdon": ["--help", "methods", "train --help", "train --stepz 3", "train sort --dry-run"],
    "trl": ["--help", "grpo --help"],
}
PROBE = """
import json, sys, time
start = time.process_time()
{statement}
seconds = time.process_time() - start
print(json.dumps([seconds, len(sys.modules), "torch" in sys.modules]))
"""


@dataclass(frozen=True)
class Work:
    """Whose imports and commands."""

    who: str = field(default="guerdon", metadata={"choices": list(IMPORTS)})
    repeat: int = 5


def import_figures(name: str, repeat: int) -> dict[str, Any]:
    module, _, attribute = name.partition(":")
    code = PROBE.format(statement=f"from {module} import {attribute}" if attribute else f"import {module}")
    runs = []
    for _ in range(repeat):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {"cpu_s": min(run[0] for run in runs), "modules": runs[0][1], "torch": runs[0][2]}


def command_figures(who: str, words: str, repeat: int) -> dict[str, Any]:
    script = str(Path(sys.executable).with_name(who))
    command = [sys.executable, script, *words.split()]
    seconds = []
    for _ in range(repeat):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds.append(usage.ru_utime + usage.ru_stime)
    traced = subprocess.run(
        [sys.executable, "-X", "importtime", *command[1:]], capture_output=True, text=True, check=False
    )
    modules = {
        line.rpartition("|")[2].strip() for line in traced.stderr.splitlines() if line.startswith("import time:")
    }
    return {"cpu_s": min(seconds), "modules": len(modules), "torch": "torch" in modules, "exit_code": child.returncode}


def main() -> None:
    common.quiet()
    work, target = common.settings(Work, __doc__)
    figures = {
        "imports": {name: import_figures(name, work.repeat) for name in IMPORTS[work.who]},
        "commands": {
            f"{work.who} {words}": command_figures(work.who, words, work.repeat) for words in COMMANDS[work.who]
        },
    }
    common.report(work, figures, target)


if __name__ == "__main__":
    main()
