"""The bundled shapes: what is drawn, and that rows depend on their position alone."""

from __future__ import annotations

import sys

import pytest
import torch

from guerdon.diffusion.tasks import find
from guerdon.diffusion.tasks.shapes import CAPTIONS, drawing, model
from guerdon.errors import UnknownNameError

TASK = find("shapes")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_twelve_classes():
    assert CAPTIONS[0] == "a red circle"
    assert CAPTIONS[5] == "a green triangle"
    assert CAPTIONS[11] == "a yellow triangle"
    rows = TASK.prompt_rows()
    assert rows[7] == {
        "prompt": "a blue square", "caption": "a blue square", "label": 7, "colour": "blue", "shape": "square",
    }  # fmt: skip


def test_a_picture_is_its_colour_inside_and_its_ground_outside():
    labels = torch.arange(12)
    images, mask = drawing(labels, generator())
    assert images.shape == (12, 3, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1
    inside = {0: (1.0, 0.1, 0.1), 3: (0.1, 1.0, 0.1), 6: (0.1, 0.2, 1.0), 9: (1.0, 1.0, 0.1)}
    for label in range(12):
        whole = images[label][:, mask[label] == 1]
        torch.testing.assert_close(whole.mean(1), torch.tensor(inside[label // 3 * 3]))
        ground = images[label][:, mask[label] == 0]
        assert ground.unique().numel() == 1
        assert 0.05 <= ground[0, 0] <= 0.35


def test_shapes_have_the_areas_of_their_formulas():
    # the mean radius is 3.7: pi r^2, (1.8 r)^2 and a triangle of height 1.9 r and base 2 r
    areas = {0: 43.0, 1: 44.4, 2: 26.0}
    for shape, area in areas.items():
        mask = drawing(torch.full((4000,), shape), generator()).mask
        assert mask.sum((1, 2)).mean().item() == pytest.approx(area * 1.02, rel=0.06)


def test_a_triangle_is_wider_below():
    mask = drawing(torch.tensor([2]), generator(3)).mask[0]
    rows = mask.sum(1)
    live = rows.nonzero().flatten()
    assert rows[live[-2]] > rows[live[len(live) // 2]] > rows[live[1]]


def test_the_same_generator_draws_the_same():
    labels = torch.tensor([4, 9])
    assert torch.equal(TASK.draw(labels, generator(5)), TASK.draw(labels, generator(5)))
    assert not torch.equal(TASK.draw(labels, generator(5)), TASK.draw(labels, generator(6)))


def test_demonstrations_depend_on_seed_and_position_alone():
    rows = TASK.demonstrations(3)
    assert len(rows) == sys.maxsize
    later = rows[1000]
    other = TASK.demonstrations(3)[998:1002]
    assert torch.equal(other[2]["image"], later["image"])
    assert other[2]["label"] == later["label"]
    assert not torch.equal(TASK.demonstrations(4)[1000]["image"], later["image"])
    assert {row["label"] for row in rows[:200]} == set(range(12))
    with pytest.raises(IndexError, match="endless"):
        rows[-1]


def test_fewer_held_out_rows_are_the_first_of_more():
    few, many = TASK.held_out_rows(5, images=True), TASK.held_out_rows(30, images=True)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(few, many, strict=False))
    assert [row["label"] for row in many[10:14]] == [10, 11, 0, 1]
    assert not torch.equal(many[0]["image"], many[12]["image"])
    assert "image" not in TASK.held_out_rows(1)[0]


def test_the_denoiser_is_made_from_its_seed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = model(0), model(0), model(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.numel() for p in first.parameters()) == 642_284
    assert torch.equal(first.conv_in.weight, again.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)
    assert first.config.num_class_embeds == 13


def test_an_unknown_task():
    with pytest.raises(UnknownNameError, match=r"no bundled image task 'shape'. Did you mean 'shapes'\?"):
        find("shape")
