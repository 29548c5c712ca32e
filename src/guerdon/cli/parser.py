"""An argparse parser whose mistakes are guerdon's errors."""

from __future__ import annotations

import argparse
from typing import NoReturn

from guerdon.errors import RecipeError, nearest


class Parser(argparse.ArgumentParser):
    """No abbreviations; a mistake raises and names the nearest option."""

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"guerdon {command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def options(self) -> list[str]:
        """The long options there are."""
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Raise in place of printing usage and exiting."""
        if message.startswith("unrecognized arguments: "):
            self.unknown(message.split(": ", 1)[1].split()[0].partition("=")[0])
        raise RecipeError(f"{self.prog.removeprefix('guerdon ')}: {message}. See {self.prog} --help.")

    def unknown(self, word: str) -> NoReturn:
        """Raise for a word that the command does not know."""
        kind = "option" if word.startswith("-") else "argument"
        command = self.prog.removeprefix("guerdon ")
        raise RecipeError(f"{command}: there is no {kind} {word!r}.{self.near(word)} See {self.prog} --help.")

    def near(self, word: str) -> str:
        """A sentence that offers the nearest options, or an empty string."""
        return nearest(word.lstrip("-"), [option.removeprefix("--") for option in self.options()])
