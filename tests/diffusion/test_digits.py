"""The bundled digits: scikit-learn's pictures by class, one in five held out."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from guerdon.diffusion.tasks import find
from guerdon.diffusion.tasks.digits import model, pictures

TASK = find("digits")


def test_the_split_holds_every_picture_once():
    train, held_out = pictures(False), pictures(True)
    assert sum(map(len, train)) == 1438
    assert sum(map(len, held_out)) == 359
    data = load_digits()
    assert torch.equal(held_out[int(data.target[4])][0, 0], torch.tensor(data.images[4] / 16).float())
    rows = {tuple(image.flatten().tolist()) for images in train for image in images}
    assert not any(tuple(image.flatten().tolist()) in rows for images in held_out for image in images)


def test_pictures_are_of_the_class_that_was_asked_for():
    labels = torch.tensor([3, 3, 8])
    drawn = TASK.draw(labels, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 1, 8, 8)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    for label, image in zip(labels.tolist(), drawn, strict=True):
        assert any(torch.equal(image, known) for known in pictures(False)[label])
    real = TASK.held_out(labels, torch.Generator().manual_seed(0))
    assert any(torch.equal(real[2], known) for known in pictures(True)[8])


def test_rows():
    rows = TASK.demonstrations(0)[:100]
    assert {row["prompt"] for row in rows} == set("0123456789")
    assert rows[0]["prompt"] == str(rows[0]["label"])
    held_out = TASK.held_out_rows(12)
    assert held_out[11] == {"prompt": "1", "caption": "1", "label": 1}


def test_the_denoiser():
    assert sum(p.numel() for p in model(0).parameters()) == 635_681
    assert model(0).config.num_class_embeds == 11
