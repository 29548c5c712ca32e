from __future__ import annotations

import pytest
import torch

from guerdon.errors import ScoreError
from guerdon.shaping import reference_frozen, reference_frozen_per_prompt
from guerdon.shaping.reference_frozen import NotCalibratedError

REFERENCE = torch.tensor([[1.0, 2.0, 4.0, 5.0]], dtype=torch.float64)


def test_the_reference_itself_has_mean_0_and_std_1():
    stage = reference_frozen()
    stage.calibrate(REFERENCE)
    z = stage(REFERENCE)
    assert z.mean().item() == pytest.approx(0.0)
    assert z.std(unbiased=False).item() == pytest.approx(1.0)
    torch.testing.assert_close(reference_frozen_per_prompt(REFERENCE, REFERENCE), z)


@pytest.mark.parametrize("scale", [3.0, -0.5])
def test_unit_and_direction_of_a_score_are_nothing(scale):
    plain, other = reference_frozen(), reference_frozen(sign=1 if scale > 0 else -1)
    plain.calibrate(REFERENCE)
    other.calibrate(REFERENCE * scale + 7)
    scores = torch.tensor([[0.0, 3.0, 99.0]], dtype=torch.float64)
    torch.testing.assert_close(other(scores * scale + 7), plain(scores))
    assert plain(scores)[0, 2] == 5.0  # clipped


def test_the_same_score_is_worth_the_same_for_ever():
    stage = reference_frozen()
    stage.calibrate(REFERENCE)
    before = stage(torch.tensor([[3.5]]))
    for seed in range(1000):
        stage(torch.full((2, 2), float(seed)))
    assert torch.equal(stage(torch.tensor([[3.5]])), before)


def test_calibration_comes_first_and_needs_a_spread():
    with pytest.raises(NotCalibratedError, match="call calibrate"):
        reference_frozen()(torch.zeros(1, 1))
    with pytest.raises(RuntimeError):
        reference_frozen()(torch.zeros(1, 1))
    with pytest.raises(ScoreError, match="at least 2 reference scores are needed to calibrate; got 1"):
        reference_frozen().calibrate(torch.tensor([1.0, float("nan")]))
    with pytest.warns(UserWarning, match="all reference scores are 2"):
        reference_frozen().calibrate(torch.tensor([2.0, 2.0]))
    with pytest.raises(ScoreError, match=r"raise reference.samples"):
        reference_frozen_per_prompt(torch.zeros(1, 1), torch.zeros(1, 1))
