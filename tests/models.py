"""Small models and data on disk, as a user would have them."""

from __future__ import annotations

import json
from pathlib import Path

from guerdon.language.tasks import find


def saved_model(folder: Path, seed: int = 0) -> Path:
    """The bundled task's untrained model and tokenizer, written in the hub's format."""
    task = find("sort")
    task.model(seed).save_pretrained(folder)
    task.tokenizer().save_pretrained(folder)
    return folder


def problems(path: Path, count: int = 40) -> Path:
    """Prompts with answers: the first digit, which random samples hit now and then."""
    rows = [{"prompt": f"{i % 10}{(i * 7) % 10}=", "answer": f"{i % 10}", "level": i % 3} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


REWARDS = '''
import math, os, signal
calls = 0

def first(samples, answer):
    """1 where the sample begins with the answer, and a little for its digits."""
    return [[float(s.startswith(a)) + 0.1 * len(set(s)) for s in group] for group, a in zip(samples, answer)]

def deadly(samples, answer):
    """Kills the process in the middle of a step, the DEADLY-th time it is called."""
    global calls
    calls += 1
    if calls == int(os.environ.get("DEADLY", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return first(samples, answer)

def interrupted(samples, answer):
    """As if someone pressed Ctrl-C in the middle of a step."""
    global calls
    calls += 1
    if calls == int(os.environ.get("DEADLY", -1)):
        os.kill(os.getpid(), signal.SIGINT)
    return first(samples, answer)

def sometimes_nan(samples):
    return [[math.nan if s.endswith("7") else float(len(s)) for s in group] for group in samples]

def sometimes_raises(completions, **_):
    return [1 / (0 if s.endswith("7") else 1) * len(s) for s in completions]

def short_list(completions, **_):
    return [1.0] * (len(completions) - 1)

def sometimes_none(samples):
    return [[None if s.endswith("7") else float(len(s)) for s in group] for group in samples]
'''


def settings(folder: Path, **changes: object) -> list[str]:
    """Words of a short run of `rlvr` on the model and data in `folder`."""
    wanted = {
        "policy.model": folder / "model",
        "policy.max_new_tokens": 6,
        "data": folder / "problems.jsonl",
        "rewards.correct": "myrewards:first",
        "prompts_per_step": 4,
        "group_size": 4,
        "optim.lr": 3e-3,
        "steps": 6,
        "evaluation.every": 3,
        "evaluation.size": 4,
        "run.directory": folder / "runs",
        "run.checkpoint_every": 2,
        "run.samples_every": 2,
        **changes,
    }
    return [word for name, value in wanted.items() for word in (f"--{name}", str(value))]
