"""Dispatch: one small module per command, imported when it is called, and one place that turns errors into messages."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from guerdon import __version__
from guerdon.errors import GuerdonError, RecipeError, nearest


class Command(NamedTuple):
    """Where a command lives, and its line of help."""

    module: str
    help: str


COMMANDS = {
    "train": Command("train", "train from a recipe"),
    "resume": Command("resume", "continue a run as if it had never stopped"),
    "report": Command("report", "summary and page of a run"),
    "compare": Command("compare", "one page that compares runs"),
    "annotate": Command("annotate", "preference pairs of raw completions, by any reward or judge"),
    "reproduce": Command("reproduce", "test a paper's claim at small scale against its baseline"),
    "optimise-noise": Command("optimise_noise", "pictures whose initial noise a reward chose (ReNO)"),
    "methods": Command("methods", "the methods there are, by stage"),
    "doctor": Command("doctor", "what is installed, and what is missing for what"),
}


def usage() -> str:
    """The text of `guerdon --help`."""
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items())
    return (
        "usage: guerdon COMMAND ...\n\n"
        "Train models against rewards, and see whether the reward is earned or gamed.\n\n"
        f"commands:\n{lines}\n\n"
        "options:\n"
        "  --help       this text; after a command, that command's\n"
        "  --version    the version\n"
        "  --traceback  show where an error was raised (also GUERDON_TRACEBACK=1)\n\n"
        "first run:  guerdon train sort"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the words after the program's name; by default those of the process.

    Returns:
        Exit code: 0; 1 for an error while running; 2 for a mistake in the command or recipe; 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words or os.environ.get("GUERDON_TRACEBACK", "") not in ("", "0")
    words = [word for word in words if word != "--traceback"]
    try:
        return _dispatch(words)
    except GuerdonError as error:
        if traceback:
            raise
        print(f"guerdon: {error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    except KeyboardInterrupt:
        print("guerdon: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `guerdon methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"guerdon {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise RecipeError(f"there is no {kind} {name!r}.{nearest(name, COMMANDS)} Commands: {', '.join(COMMANDS)}.")
    module = importlib.import_module(f"guerdon.cli.{COMMANDS[name].module}")
    try:
        code = module.run(rest)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a mistake it has explained
        code = stop.code
    sys.stdout.flush()
    return code if isinstance(code, int) else 0
