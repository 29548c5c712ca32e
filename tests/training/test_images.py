"""Pictures as files, read back by an image library."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from guerdon.training.images import is_image, png, write_image

NAMES = ["large.png", "large.small.png"]


def pixels(content: bytes) -> list:
    return np.asarray(Image.open(io.BytesIO(content))).tolist()


def test_colours_and_greys_come_back():
    colour = torch.tensor([[[1.0, 0.0]], [[0.5, 0.0]], [[0.0, 1.0]]])  # orange, blue
    assert pixels(png(colour)) == [[[255, 128, 0], [0, 0, 255]]]
    assert pixels(png(torch.tensor([[[0.0, 0.2], [1.0, 0.6]]]))) == [[0, 51], [255, 153]]


def test_what_is_no_intensity_is_clipped():
    assert pixels(png(torch.tensor([[[-3.0, 7.0, float("nan")]]]))) == [[0, 255, 0]]


def test_large_pictures_have_a_small_copy(tmp_path):
    write_image(tmp_path / "images", "small", torch.zeros(3, 16, 16))
    write_image(tmp_path / "images", "large", torch.ones(3, 400, 200))
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"small.png", "large.png", "large.small.png"}
    sizes = [np.asarray(Image.open(io.BytesIO((tmp_path / "images" / name).read_bytes()))).shape for name in NAMES]
    assert sizes == [(400, 200, 3), (192, 96, 3)]


def test_what_counts_as_a_picture():
    assert is_image(torch.zeros(3, 4, 4))
    assert is_image(torch.zeros(1, 4, 4))
    assert not is_image(torch.zeros(4, 4))
    assert not is_image(torch.zeros(2, 4, 4))
    assert not is_image(torch.zeros(3, 4, 4, dtype=torch.int64))
    assert not is_image("a text")
