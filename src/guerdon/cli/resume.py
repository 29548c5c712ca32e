"""`guerdon resume RUN`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from guerdon.cli.parser import Parser


def run(words: Sequence[str]) -> int:
    """Continue a run from its newest checkpoint."""
    parser = Parser("resume", "Continue a run from its newest checkpoint, as if it had never stopped.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, such as runs/NAME")
    parser.add_argument("--steps", type=int, help="length of the whole run, to train on beyond its recipe's")
    parser.add_argument("--from-step", type=int, help="the checkpoint to start from; by default the newest")
    args = parser.parse_args(list(words))
    folder = run_folder(args.run)
    overrides = [] if args.steps is None else ["--steps", str(args.steps)]
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as for train: the recipe may name module:attribute of a file here
    from guerdon.cli.train import finish
    from guerdon.training.run import resume

    finish(resume(folder, overrides, args.from_step))
    return 0


def run_folder(path: Path) -> Path:
    """The path of a run folder.

    Raises:
        UnknownNameError: there is no such folder, or it holds no run.
    """
    from guerdon.errors import UnknownNameError, nearest

    if not path.is_dir():
        there = [str(other) for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
        raise UnknownNameError(f"there is no run folder {str(path)!r}.{nearest(str(path), there)}")
    if not (path / "recipe.yaml").is_file():
        raise UnknownNameError(
            f"{str(path)!r} has no recipe.yaml, so it holds no run. Give the folder of one, runs/NAME."
        )
    return path
