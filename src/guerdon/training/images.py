"""Samples that are images, as PNG files: written by hand, so that a run needs no image library."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SHOWN = 192  # pixels: of larger images a reduced copy is written for the page


def is_image(sample: Any) -> bool:
    """Whether a sample is a picture: a tensor [1, H, W] (grey) or [3, H, W] (colour)."""
    return isinstance(sample, Tensor) and sample.ndim == 3 and sample.shape[0] in (1, 3) and sample.is_floating_point()


def png(image: Tensor) -> bytes:
    """A picture [1, H, W] or [3, H, W] in [0, 1] as the bytes of a PNG file; what lies outside is clipped.

    Example:
        >>> png(torch.zeros(3, 2, 2))[1:4]
        b'PNG'
    """
    pixels = (image.detach().float().nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, width * channels).numpy()
    raw = b"".join(b"\0" + row.tobytes() for row in rows)  # 0: no filter
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(raw, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_image(folder: Path, name: str, image: Tensor) -> None:
    """Write `<name>.png`, and `<name>.small.png` where the picture is larger than the page shows."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.png").write_bytes(png(image))
    longest = max(image.shape[1:])
    if longest > SHOWN:
        size = [max(1, side * SHOWN // longest) for side in image.shape[1:]]
        small = functional.interpolate(image.detach().float()[None], size, mode="area")[0]
        (folder / f"{name}.small.png").write_bytes(png(small))
