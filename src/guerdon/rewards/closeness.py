"""How close a sample came to its target: clicks against a box, grids and sequences block by block.

Each gives a closeness in [0, 1] for `shaping: sweet_spot`.
SSL: Sweet Spot Learning for Differentiated Guidance in Agentic Optimization, 2026, arXiv 2601.22491.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import DataError, RecipeError, check_shapes

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_POINT = re.compile(rf"{_NUMBER}[\s,;]+{_NUMBER}")


class BoxField(NamedTuple):
    """Points against boxes.

    Attributes:
        distance: [P, G], squared distance from the centre; 1 at the middle of an edge with sigma_scale 1.
        closeness: [P, G], exp(-distance / 2), in (0, 1].
        inside: [P, G], within the box, its edges included.
    """

    distance: Float[Tensor, "P G"]
    closeness: Float[Tensor, "P G"]
    inside: Bool[Tensor, "P G"]


def box_field(point: Float[Tensor, "P G 2"], box: Float[Tensor, "P 4"], *, sigma_scale: float = 1.0) -> BoxField:
    """A Gaussian around the centre of a box, as wide as the box: exp(-((dx / sx)^2 + (dy / sy)^2) / 2).

    Args:
        point: [P, G, 2], x and y.
        box: [P, 4], x0, y0, width and height, in the unit of the points.
        sigma_scale: sx and sy are this many half widths and half heights. Where samples start far off, the field must
            reach as far as their errors.

    Returns:
        Distance, closeness and whether it is inside. A point that is NaN is outside, with closeness 0.

    Raises:
        ShapeError: an argument has another shape.
        DataError: a box has no area.
        RecipeError: sigma_scale is not above 0.

    Example:
        >>> box_field(torch.tensor([[[1.0, 2.0], [2.0, 2.0]]]), torch.tensor([[0.0, 0.0, 2.0, 4.0]])).closeness
        tensor([[1.0000, 0.6065]])

    Source:
        SSL, arXiv 2601.22491: a Gaussian of a normalised Mahalanobis distance; its scale is our reading.
    """
    check_shapes("rewards.box_field", point=(point, "P G 2"), box=(box, "P 4"))
    if not sigma_scale > 0:
        raise RecipeError(f"rewards.box_field.sigma_scale: must be above 0; got {sigma_scale}.")
    half = box[:, 2:] / 2
    if not bool((half > 0).all()):
        p = int((half <= 0).any(-1).nonzero()[0])
        raise DataError(f"rewards.box_field: box {p} must have a width and a height above 0; got {box[p].tolist()}.")
    offset = (point - (box[:, :2] + half).unsqueeze(1)) / half.unsqueeze(1)
    distance = (offset / sigma_scale).square().sum(-1)
    return BoxField(distance, (-distance / 2).exp().nan_to_num(nan=0.0), (offset.abs() <= 1).all(-1))


def box_closeness(
    samples: Sequence[Sequence[str]], box: Sequence[Any], *, sigma_scale: float = 1.0
) -> list[list[float | None]]:
    """How near the point that a text names is to the centre of a box, in (0, 1]; 0 if it names none.

    Args:
        samples: [P][G] texts; the last two numbers with a comma or white space between them are the point.
        box: [P], lists x0, y0, width, height in the unit of the texts; None is not scored.
        sigma_scale: as in `box_field`; 1 asks for much, where clicks start far off take about their error in half
            widths.

    Returns:
        [P][G] closeness.

    Example:
        >>> box_closeness([["click(1, 2)", "nowhere"]], [[0, 0, 2, 4]])
        [[1.0, 0.0]]
    """
    return _boxes(samples, box, sigma_scale, hit=False)


def box_hit(samples: Sequence[Sequence[str]], box: Sequence[Any]) -> list[list[float | None]]:
    """1 if the point that a text names lies in a box, its edges included, else 0.

    Args:
        samples: [P][G] texts; the last two numbers with a comma or white space between them are the point.
        box: [P], lists x0, y0, width, height in the unit of the texts; None is not scored.

    Returns:
        [P][G] scores.

    Example:
        >>> box_hit([["click(1, 2)", "5, 5"]], [[0, 0, 2, 4]])
        [[1.0, 0.0]]
    """
    return _boxes(samples, box, 1.0, hit=True)


def _boxes(
    samples: Sequence[Sequence[str]], box: Sequence[Any], sigma_scale: float, *, hit: bool
) -> list[list[float | None]]:
    rows: list[list[float | None]] = []
    for p, (group, given) in enumerate(zip(samples, box, strict=True)):
        if given is None:
            rows.append([None] * len(group))
            continue
        try:
            corners = torch.tensor([[float(value) for value in given]], dtype=torch.float64)
        except (TypeError, ValueError):
            corners = torch.zeros(1, 0)
        if corners.shape != (1, 4):
            raise DataError(f"rewards.box: box {p} must be four numbers x0, y0, width, height; got {given!r:.60}.")
        points = torch.tensor([[_point(sample) for sample in group]], dtype=torch.float64)
        found = box_field(points, corners, sigma_scale=sigma_scale)
        rows.append([*(found.inside.double() if hit else found.closeness)[0].tolist()])
    return rows


def _point(text: str) -> tuple[float, float]:
    matches = _POINT.findall(text)
    return (float(matches[-1][0]), float(matches[-1][1])) if matches else (math.nan, math.nan)


class BlockOutput(NamedTuple):
    """Closeness block by block.

    Attributes:
        scores: [P][G], mean over blocks; None where there is no answer.
        closeness: [P][G][blocks], share of matching cells of each.
    """

    scores: list[list[float | None]]
    closeness: list[list[list[float]]]


def block_closeness(
    samples: Sequence[Sequence[str]], answer: Sequence[Any], *, block: int = 3, width: int | None = None
) -> BlockOutput:
    """The share of cells that are as in the answer, for each block of it: partial credit for grids and sequences.

    A cell is a character that is no white space. `shaping: {NAME: [{sweet_spot: {aggregate: tiers}}]}` takes the tier
    of every block and their mean.

    Args:
        samples: [P][G] texts.
        answer: [P]; None is not scored.
        block: cells of a run, or side of a square.
        width: cells in a row of a grid, which is then cut into squares (block 3, width 9: Sudoku); None = runs of
            consecutive cells.

    Returns:
        The mean over blocks, and every block.

    Raises:
        RecipeError: block or width is below 1.

    Edge cases:
        Cells that are missing count as wrong; those beyond the answer do not count. The last block may be smaller. An
        empty answer has closeness 0.

    Example:
        >>> block_closeness([["12 34", "123"]], ["1235"], block=2)
        BlockOutput(scores=[[0.75, 0.75]], closeness=[[[1.0, 0.5], [1.0, 0.5]]])

    Source:
        SSL, arXiv 2601.22491: matches counted in blocks; the mean over blocks is our reading.
    """
    if block < 1 or (width is not None and width < 1):
        raise RecipeError(f"rewards.block_closeness: block and width must be at least 1; got {block} and {width}.")
    shares = [
        [[] if gold is None else block_shares(_cells(sample), _cells(str(gold)), block, width) for sample in group]
        for group, gold in zip(samples, answer, strict=True)
    ]
    scores = [
        [None if gold is None else sum(parts) / max(len(parts), 1) for parts in group]
        for group, gold in zip(shares, answer, strict=True)
    ]
    return BlockOutput(scores, shares)


def block_shares(found: Sequence[Any], truth: Sequence[Any], block: int, width: int | None = None) -> list[float]:
    """The share of right cells in each block of a sequence, or of a grid with rows of `width` cells.

    Example:
        >>> block_shares([1, 2, 0, 4], [1, 2, 3, 4], 2), block_shares([1, 2, 0, 4], [1, 2, 3, 4], 1, 2)
        ([1.0, 0.5], [1.0, 1.0, 0.0, 1.0])
    """
    matches: dict[tuple[int, int], list[bool]] = {}
    for position, cell in enumerate(truth):
        row, column = (0, position) if width is None else divmod(position, width)
        matches.setdefault((row // block, column // block), []).append(
            position < len(found) and found[position] == cell
        )
    return [sum(cells) / len(cells) for cells in matches.values()]


def _cells(text: str) -> list[str]:
    return [character for character in text if not character.isspace()]
