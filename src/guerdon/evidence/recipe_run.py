"""A run from a bundled recipe, made as `guerdon train` makes it, and what its records say."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.evidence.base import Points


def overrides(settings: Mapping[str, str]) -> list[str]:
    """Settings as on the command line."""
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def recipe_run(
    recipe: str, settings: Mapping[str, str], judged: Sequence[str], *, seed: int, steps: int, samples: int
) -> dict[str, Any]:
    """Train from a recipe in a folder that is thrown away.

    Args:
        recipe: a bundled one.
        settings: dotted path -> value, as on the command line.
        judged: metrics of the evaluations before and after, the first of which gives `before`, `after` and `gain`; the others
            `NAME_before` and `NAME_after`, by the last part of their names.
        seed: of everything.
        steps: online steps.
        samples: of each held-out prompt.

    Returns:
        What `measure` returns. Curves: `judged` (before and after) and `reward` (each step).
    """
    from guerdon.recipes import load_recipe
    from guerdon.training.run import train

    once = {"every": "0", "greedy": "false", "samples": str(samples)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        written = {"checkpoint_every": "0", "samples_every": "0", "directory": folder}
        own = {f"evaluation.{key}": value for key, value in once.items()}
        own |= {f"run.{key}": value for key, value in written.items()} | {"seed": str(seed), "steps": str(steps)}
        run = train(load_recipe(recipe, overrides({**settings, **own})))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards: Points = [(float(line["step"]), line["reward"]) for line in lines[1:]]
    before, after = lines[0][judged[0]], lines[-1][judged[0]]
    figures = {"before": before, "after": after, "gain": after - before}
    for name in judged[1:]:
        short = name.rpartition("/")[2]
        figures |= {f"{short}_before": lines[0][name], f"{short}_after": lines[-1][name]}
    return {"figures": figures, "curves": {"judged": [(0.0, before), (rewards[-1][0], after)], "reward": rewards}}
