"""Train language, diffusion and flow models and control policies against rewards, and see whether these are earned.

Importing `guerdon` imports nothing heavy: submodules are loaded when they are first asked for.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_"):  # a private name is never a part of the library; __main__ would run the command line
        raise AttributeError(f"module 'guerdon' has no attribute {name!r}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module 'guerdon' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    import pkgutil

    return sorted({*globals(), *(module.name for module in pkgutil.iter_modules(__path__))})
