"""`guerdon doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from guerdon import __version__
from guerdon.cli.parser import Parser

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_LEAST_DISK = 1 << 30


class Requirement(NamedTuple):
    """One package that guerdon's own metadata asks for."""

    name: str
    wanted: str
    found: str | None
    fits: bool


def run(words: Sequence[str]) -> int:
    """Print what there is and what is missing; 1 if a core dependency is missing."""
    parser = Parser("doctor", "Say what is installed, what is missing for what, and the command that installs it.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs, for its disk space [runs]")
    args = parser.parse_args(list(words))
    print(f"guerdon     {__version__}")
    print(f"python      {platform.python_version()}  {sys.executable}")
    print(f"platform    {platform.platform()}, {os.cpu_count()} processors")
    for line in devices():
        print(f"device      {line}")
    print(f"accelerate  {accelerate_config()}")
    print(f"disk        {disk(args.runs)}")
    print(f"browser     {browser()}")
    groups = requirements()
    if groups is None:
        print("packages    unknown: guerdon is not installed as a package. pip install guerdon")
        return 1
    healthy = True
    for extra, wanted in groups.items():
        absent = [r for r in wanted if not r.fits]
        state = f"{len(absent)} of {len(wanted)} missing or too old" if absent else "complete"
        print(f"\n{extra or 'core'}: {state}")
        for requirement in wanted:
            mark, found = "ok" if requirement.fits else "--", requirement.found or "missing"
            print(f"  {mark}  {requirement.name:<15} {found:<12} {requirement.wanted}".rstrip())
        if absent:
            print(f"  install with: pip install 'guerdon{f'[{extra}]' if extra else ''}'")
            healthy = healthy and bool(extra)
    return 0 if healthy else 1


def requirements() -> dict[str, list[Requirement]] | None:
    """What guerdon's metadata asks for, by extra ('' = core); None if it is not installed as a package."""
    try:
        declared = metadata.requires("guerdon") or []
    except metadata.PackageNotFoundError:
        return None
    groups: dict[str, list[Requirement]] = {"": []}
    for line in declared:
        text, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        match = re.match(r"\s*([\w.-]+)\s*(?:\[[^]]*\])?\s*(.*)", text)
        if match:
            name, wanted = match[1], match[2].strip(" ()")
            groups.setdefault(extra[1] if extra else "", []).append(_look_up(name, wanted))
    return groups


def _look_up(name: str, wanted: str) -> Requirement:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Requirement(name, wanted, None, False)
    if importlib.util.find_spec("packaging") is None:  # comes with the core dependencies
        return Requirement(name, wanted, found, True)
    from packaging.specifiers import SpecifierSet

    return Requirement(name, wanted, found, SpecifierSet(wanted).contains(found, prereleases=True))


def devices() -> Iterator[str]:
    """The devices that torch sees."""
    if importlib.util.find_spec("torch") is None:
        yield "unknown: torch is not installed"
        return
    try:
        import torch
    except Exception as error:  # a broken installation is what one asks a doctor about
        yield f"unknown: torch cannot be imported: {type(error).__name__}: {error}"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB (torch {torch.__version__})"
    if torch.backends.mps.is_available():
        yield f"mps (torch {torch.__version__})"
    yield f"cpu, {torch.get_num_threads()} threads (torch {torch.__version__})"


def accelerate_config() -> str:
    """What `accelerate launch` would read."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "huggingface")
    path = Path(home, "accelerate", "default_config.yaml")
    if not path.is_file():
        return "no configuration: one process. To train on several devices: accelerate config"
    keys = ("distributed_type", "num_processes", "mixed_precision")
    found = re.findall(rf"^({'|'.join(keys)}):\s*(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return f"{path}: {', '.join(f'{key} {value}' for key, value in found)}"


def disk(folder: Path) -> str:
    """Free space where runs are written."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    warning = "" if free >= _LEAST_DISK else "  TOO LITTLE for checkpoints"
    writable = "" if os.access(existing, os.W_OK) else "  NOT WRITABLE"
    return f"{free / 2**30:.1f} GiB free for {folder}{warning}{writable}"


def browser() -> str:
    """Whether a Chromium opens, which only the test of the report page needs."""
    path = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        return "no Chromium found; only the test of the report page needs one"
    command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "data:text/html,<p>guerdon</p>"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not open: {type(error).__name__}"
    return (
        f"{path} opens" if "<p>guerdon</p>" in result.stdout else f"{path} does not open: exit code {result.returncode}"
    )
