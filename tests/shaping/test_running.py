from __future__ import annotations

import pytest
import torch

from guerdon.errors import RecipeError, ScoreError
from guerdon.shaping import clip, mean_std, min_max

NAN = float("nan")


def draws(seed: int = 0, size: tuple[int, int] = (4, 6)) -> torch.Tensor:
    return 3 + 2 * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("split", [[4], [1, 3], [1, 1, 1, 1], [2, 2]])
@pytest.mark.parametrize("kind", [mean_std, clip, min_max])
def test_how_scores_are_split_into_batches_is_nothing(kind, split):
    scores = draws()
    stage = kind()
    for part in scores.split(split):
        stage.observe(part)
    n, mean, m2, low, high = stage.moments.tolist()
    assert n == 24
    assert mean == pytest.approx(scores.mean().item())
    assert m2 == pytest.approx((scores - scores.mean()).square().sum().item())
    assert (low, high) == (scores.min().item(), scores.max().item())


def test_the_batch_at_hand_is_in_the_statistics_before_they_are_used():
    first = mean_std()(draws())
    assert first.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert first.std(unbiased=False).item() == pytest.approx(1.0)
    stage = min_max()
    stage.observe(torch.tensor([[0.0, 1.0]]))
    assert stage(torch.tensor([[3.0, 1.5, -1.0]])).tolist() == [[1.0, 0.625, 0.0]]
    assert stage(torch.tensor([[0.5]])).tolist() == [[0.5]]  # looking changes no state


def test_the_range_is_kept_within_0_and_1_whatever_comes():
    stage = min_max()
    for seed in range(20):
        scores = draws(seed) * (1 + seed)
        shaped = stage(scores)
        assert shaped.min() >= 0
        assert shaped.max() <= 1
        stage.observe(scores)


def test_a_clip_saturates_at_two_values():
    stage = clip()
    stage.observe(torch.tensor([[-1.0, 1.0]], dtype=torch.float64))
    scores = draws(3, (1, 50)) - 3
    shaped = stage(scores)
    moved = shaped[shaped != scores]
    assert len(moved) > 10
    assert len(moved.unique()) == 2
    with pytest.raises(RecipeError, match=r"shaping.clip.width: must be at least 0; got -1"):
        clip(width=-1.0)


def test_equal_scores_are_defined():
    same = torch.full((2, 3), 4.0)
    assert mean_std()(same).tolist() == [[0.0] * 3] * 2
    assert min_max()(same).tolist() == [[0.5] * 3] * 2
    assert clip()(same).tolist() == same.tolist()


@pytest.mark.parametrize("kind", [mean_std, clip, min_max])
def test_an_unscored_sample_is_left_out_and_an_infinite_one_an_error(kind):
    stage = kind()
    stage.observe(torch.tensor([[1.0, NAN, 3.0]]))
    assert stage.moments[:2].tolist() == [2.0, 2.0]
    assert stage(torch.tensor([[NAN, 2.0]])).isnan().tolist() == [[True, False]]
    with pytest.raises(ScoreError, match=r"scores\[0, 1\] is infinite"):
        stage.observe(torch.tensor([[1.0, float("inf")]]))
    assert stage.moments[0] == 2.0
    stage.observe(torch.tensor([[NAN]]))
    assert stage.moments[0] == 2.0


@pytest.mark.parametrize("kind", [mean_std, clip, min_max])
def test_a_restored_state_goes_on_identically(kind):
    stage, other = kind(), kind()
    stage.observe(draws(1))
    other.load_state_dict(stage.state_dict())
    for seed in (2, 3):
        torch.testing.assert_close(other(draws(seed)), stage(draws(seed)), rtol=0, atol=0)
        stage.observe(draws(seed))
        other.observe(draws(seed))


def test_what_it_tells():
    stage = mean_std()
    assert stage.metrics() == {}
    stage.observe(torch.tensor([[0.0, 2.0]]))
    assert stage.metrics() == {"mean": 1.0, "std": 1.0}
