"""Coloured shapes: 16 x 16 pictures of a circle, a square or a triangle in one of four colours, on a grey ground.

The twelve classes have captions such as "a red circle". Place, size and ground vary, edges are smooth, and pictures are
drawn on the fly, so that there is no end of real ones. A denoiser of 0.6 million weights draws them well after 100 CPU
seconds of training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from guerdon.diffusion.tasks import Row, Task
from guerdon.diffusion.tasks.stream import Demonstrations
from guerdon.errors import require

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

SIZE, PATCH = 16, 2
COLOURS = {
    "red": (1.0, -0.8, -0.8),
    "green": (-0.8, 1.0, -0.8),
    "blue": (-0.8, -0.6, 1.0),
    "yellow": (1.0, 1.0, -0.8),
}  # in [-1, 1]
SHAPES = ("circle", "square", "triangle")
CENTRE, RADIUS, GROUND = (5.5, 9.5), (2.8, 4.6), (-0.9, -0.3)
CAPTIONS = tuple(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)


class Drawing(NamedTuple):
    """Pictures and what they were drawn from.

    Attributes:
        images: [N, 3, 16, 16], in [0, 1].
        mask: [N, 16, 16], the share of each pixel that the shape covers: a condition, or the truth for an overlap.
    """

    images: Float[Tensor, "N 3 16 16"]
    mask: Float[Tensor, "N 16 16"]


def drawing(labels: Int[Tensor, " N"], generator: Generator) -> Drawing:
    """Draw a picture of each label with random place, size and ground.

    Args:
        labels: [N], 3 * colour + shape, in the order of `COLOURS` and `SHAPES`.
        generator: of the random parts; four numbers are drawn a picture.

    Returns:
        The pictures and their masks.

    Example:
        >>> picture = drawing(torch.tensor([1]), Generator().manual_seed(0))
        >>> picture.images.shape, picture.mask.max().item()
        (torch.Size([1, 3, 16, 16]), 1.0)
    """
    uniform = torch.rand(len(labels), 4, generator=generator)
    bounds = torch.tensor([CENTRE, CENTRE, RADIUS, GROUND])
    x, y, r, ground = (bounds[:, 0] + (bounds[:, 1] - bounds[:, 0]) * uniform).T[..., None, None]
    pixel = torch.arange(SIZE, dtype=torch.float32)
    dx, dy = pixel[None, None, :] - x, pixel[None, :, None] - y
    # signed distances to the edge, in pixels, positive inside
    circle = r - (dx.square() + dy.square()).sqrt()
    square = 0.9 * r - torch.maximum(dx.abs(), dy.abs())
    triangle = torch.minimum(0.8 * r - dy, (dy + 1.1 * r - 1.9 * dx.abs()) / 2.1)
    distance = torch.stack([circle, square, triangle], 1)[torch.arange(len(labels)), labels % len(SHAPES)]
    mask = (distance + 0.5).clamp(0, 1)
    colour = torch.tensor(list(COLOURS.values()))[labels // len(SHAPES)][..., None, None]
    images = mask[:, None] * colour + (1 - mask[:, None]) * ground[:, None]
    return Drawing((images + 1) / 2, mask)


def draw(labels: Int[Tensor, " N"], generator: Generator) -> Float[Tensor, "N 3 16 16"]:
    """The pictures of `drawing` alone."""
    return drawing(labels, generator).images


def model(seed: int) -> UNet2DModel:
    """An untrained class-conditional U-Net on 8 x 8 positions of 12 numbers: 642,284 weights.

    Args:
        seed: of the initial weights. The global generator is left as it was.
    """
    require("diffusers", "diffusion")
    from diffusers.models.unets.unet_2d import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=SIZE // PATCH,
            in_channels=3 * PATCH**2,
            out_channels=3 * PATCH**2,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
            norm_num_groups=8,
            num_class_embeds=len(CAPTIONS) + 1,
        )


def prompt_rows() -> list[Row]:
    """One row for each class: `prompt` and `caption`, `label`, `colour`, `shape`."""
    named = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [
        {"prompt": caption, "caption": caption, "label": label, "colour": colour, "shape": shape}
        for label, (caption, (colour, shape)) in enumerate(zip(CAPTIONS, named, strict=True))
    ]


def demonstrations(seed: int) -> Demonstrations:
    """Endless rows of random classes with an `image` [3, 16, 16] in [0, 1]."""
    return Demonstrations("shapes", seed, prompt_rows(), draw)


TASK = Task(
    name="shapes",
    description="16 x 16 pictures of coloured shapes with captions; is the picture what the caption says?",
    captions=CAPTIONS,
    channels=3,
    size=SIZE,
    patch=PATCH,
    model=model,
    draw=draw,
    held_out=draw,
    prompt_rows=prompt_rows,
    demonstrations=demonstrations,
)
