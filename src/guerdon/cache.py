"""What is costly to make and the same every time is kept under the user's cache folder. Importing this takes no torch."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guerdon import __version__

if TYPE_CHECKING:
    from torch import Tensor


def cache_folder() -> Path:
    """`$GUERDON_CACHE`, else `guerdon` in `$XDG_CACHE_HOME`, else `~/.cache/guerdon`."""
    if own := os.environ.get("GUERDON_CACHE"):
        return Path(own)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "guerdon"


def replace(path: Path, content: bytes) -> None:
    """Write a file under another name first, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(draft, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def weights_path(folder: str, name: str, recipe: Mapping[str, Any]) -> Path:
    """Where weights made by a recipe are kept; the recipe and the library's version decide the file's name."""
    key = json.dumps([recipe, __version__], sort_keys=True).encode()
    return cache_folder() / folder / f"{name}-{hashlib.sha256(key).hexdigest()[:24]}.safetensors"


def weights(
    folder: str, name: str, recipe: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]], what: str = ""
) -> dict[str, Tensor]:
    """Weights from the cache, or made and kept.

    Args:
        folder: of the cache, such as `bases`.
        name: begins the file's name.
        recipe: everything that decides the weights, as plain values; it is written into the file as well.
        make: makes them where the cache has none, or has them damaged (a warning says so).
        what: said on standard error before they are made, for what takes more than a few seconds.

    Returns:
        The weights by name, as they were written: the same whether they were just made or read.
    """
    from safetensors.torch import load, save

    path = weights_path(folder, name, recipe)
    kept = _read(path)
    if kept is not None:
        return kept
    if what:
        print(f"{what}; kept in {path.parent}", file=sys.stderr, flush=True)
    made = {key: value.detach().cpu().contiguous() for key, value in make().items()}
    content = save(made, metadata={"sha256": digest(made), "recipe": json.dumps(recipe, sort_keys=True)})
    replace(path, content)
    return load(content)


def _read(path: Path) -> dict[str, Tensor] | None:
    """Weights in the cache, if they are whole."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
            expected = (file.metadata() or {}).get("sha256")
        if digest(found) == expected:
            return found
        reason = "its hash is not the one written"
    except (SafetensorError, OSError) as error:
        reason = str(error)
    warnings.warn(f"{path} is damaged ({reason}); it is made again.", stacklevel=4)
    return None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(_bytes()).numpy().tobytes())
    return digest.hexdigest()


def _bytes() -> Any:
    import torch

    return torch.uint8
