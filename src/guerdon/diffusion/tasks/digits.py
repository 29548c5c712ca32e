"""Handwritten digits: the 1797 grey pictures of 8 x 8 pixels that scikit-learn brings along, by class.

One picture in five is held out. The prompt is the digit as text.
E. Alpaydin and C. Kaynak 1998, Optical Recognition of Handwritten Digits, UCI machine learning repository.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from guerdon.diffusion.tasks import Row, Task
from guerdon.diffusion.tasks.stream import Demonstrations
from guerdon.errors import require

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

SIZE = 8
CAPTIONS = tuple(str(digit) for digit in range(10))
HELD_OUT_SHARE = 5  # one picture in this many is never trained on


@functools.cache
def pictures(held_out: bool) -> tuple[Tensor, ...]:
    """The pictures of each class, [n, 1, 8, 8] in [0, 1], of one side of the split.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    data = require("sklearn.datasets", "diffusion").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    chosen = (torch.arange(len(labels)) % HELD_OUT_SHARE == HELD_OUT_SHARE - 1) == held_out
    return tuple(images[chosen & (labels == label)] for label in range(len(CAPTIONS)))


def draw(labels: Int[Tensor, " N"], generator: Generator) -> Float[Tensor, "N 1 8 8"]:
    """A random training picture of each label, in [0, 1]."""
    return _pick(labels, generator, held_out=False)


def draw_held_out(labels: Int[Tensor, " N"], generator: Generator) -> Float[Tensor, "N 1 8 8"]:
    """A random held-out picture of each label, in [0, 1]."""
    return _pick(labels, generator, held_out=True)


def _pick(labels: Tensor, generator: Generator, held_out: bool) -> Tensor:
    known = pictures(held_out)
    uniform = torch.rand(len(labels), generator=generator).tolist()
    pairs = zip(labels.tolist(), uniform, strict=True)
    return torch.stack([known[label][int(u * len(known[label]))] for label, u in pairs])


def model(seed: int) -> UNet2DModel:
    """An untrained class-conditional U-Net on 8 x 8 positions: 635,681 weights.

    Args:
        seed: of the initial weights. The global generator is left as it was.
    """
    require("diffusers", "diffusion")
    from diffusers.models.unets.unet_2d import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=SIZE,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
            norm_num_groups=8,
            num_class_embeds=len(CAPTIONS) + 1,
        )


def prompt_rows() -> list[Row]:
    """One row for each class: `prompt` and `caption`, the digit as text, and `label`."""
    return [{"prompt": caption, "caption": caption, "label": label} for label, caption in enumerate(CAPTIONS)]


def demonstrations(seed: int) -> Demonstrations:
    """Endless rows of random classes with a training `image` [1, 8, 8] in [0, 1]."""
    return Demonstrations("digits", seed, prompt_rows(), draw)


TASK = Task(
    name="digits",
    description="8 x 8 pictures of handwritten digits; is the picture the digit asked for?",
    captions=CAPTIONS,
    channels=1,
    size=SIZE,
    patch=1,
    model=model,
    draw=draw,
    held_out=draw_held_out,
    prompt_rows=prompt_rows,
    demonstrations=demonstrations,
)
