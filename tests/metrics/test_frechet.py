"""The Frechet distance of Gaussians that are known."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import ShapeError
from guerdon.metrics import frechet_distance


def test_a_shift_and_a_scale_by_hand():
    features = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -2.0], [0.0, 2.0]])
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(features, features + torch.tensor([3.0, 4.0])) == pytest.approx(25.0)
    # covariances diag(2/3, 8/3) and 4 times that: each std s gives (2 s - s)^2 = s^2
    assert frechet_distance(features, 2 * features) == pytest.approx(10 / 3)


def test_it_is_symmetric_and_turns_with_the_features():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(50, 4, generator=generator).double() for _ in range(2))
    second = second * 2 + 1
    distance = frechet_distance(first, second)
    assert frechet_distance(second, first) == pytest.approx(distance)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator).double()).Q
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(distance)


def test_fewer_samples_than_dimensions():
    first = torch.eye(2, 10)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


def test_errors(friendly_errors):
    with pytest.raises(ShapeError, match=r"metrics\.frechet_distance: second"):
        frechet_distance(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="at least two samples are needed on each side; got 1 and 3"):
        frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2))
