"""The command line starts fast: torch is imported by nothing that does not train."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, time
from guerdon.cli.main import main
code = main(sys.argv[1:])
heavy = [name for name in ("torch", "numpy", "transformers", "", "rich", "plotly") if name in sys.modules]
print(json.dumps({"code": code, "heavy": heavy, "cpu": time.process_time()}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["--help"], 0, "guerdon train sort"),
        (["methods"], 0, "grpo-family"),
        (["methods", "--stage", "advantages"], 0, "Names for a recipe"),
        (["train", "--help"], 0, "--optim.lr"),
        (["train", "sort", "--dry-run"], 0, "loop: online"),
        (["methods", "--stge", "x"], 2, ""),
        (["train", "sort", "--optim.lrr", "1e-4"], 2, ""),
        (["train", "sort", "--objective.policy_gradient.clip_hihg", "1"], 2, ""),
        (["train", "sort", "--advantage", "grpoo"], 2, ""),
        (["annotate", "--help"], 0, "--strong"),
        (["annotate", "x.jsonl", "--reward", "density"], 2, ""),
        (["annotate", "x.jsonl", "--strong", "a", "--reward.wek", "b"], 2, ""),
        (["annotate", "nowhere.jsonl", "--strong", "a", "--weak", "b"], 1, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_torch_is_not_imported(words: list[str], code: int, shown: str) -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True)
    facts = json.loads(result.stderr.splitlines()[-1])
    print(f"{' '.join(words)}: {facts['cpu']:.3f} s CPU")
    assert facts["heavy"] == []
    assert facts["code"] == code
    assert shown in result.stdout


def test_the_module_runs_and_exit_codes_reach_the_shell() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "guerdon", "train", "srt"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("guerdon: there is no recipe 'srt'. Did you mean 'sort'")
    assert "Traceback" not in result.stderr
