"""Oracles: what they learn, how they score, and that they are kept."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.diffusion import oracle as module
from guerdon.diffusion.oracle import oracle, oracle_diversity, oracle_score, quality
from guerdon.diffusion.tasks import find
from guerdon.errors import RecipeError, ShapeError, UnknownNameError
from guerdon.stages import signature

DIGITS = find("digits")


@pytest.fixture(scope="module", autouse=True)
def _short(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUERDON_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(module, "RECIPE", {**module.RECIPE, "steps": 80})
        oracle.cache_clear()
        yield
        oracle.cache_clear()


def real(count: int = 100, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 10
    return DIGITS.held_out(labels, torch.Generator().manual_seed(seed)), labels


def test_it_knows_real_pictures_and_not_others():
    images, labels = real()
    assert quality("digits", images, labels, seed=0).accuracy > 0.9
    assert quality("digits", images, (labels + 1) % 10, seed=0).accuracy < 0.1


def test_it_is_trained_where_no_gradient_is_wanted_too():
    oracle.cache_clear()
    with torch.no_grad():
        assert not torch.equal(oracle("digits", 5)(real(2)[0])[0], oracle("digits", 0)(real(2)[0])[0])


def test_two_seeds_are_two_networks_and_one_is_kept(monkeypatch):
    images, _ = real(4)
    first, second = oracle("digits", 0), oracle("digits", 1)
    assert not torch.equal(first(images), second(images))
    oracle.cache_clear()

    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "_train", fail)
    assert torch.equal(oracle("digits", 0)(images), first(images))


def test_its_weights_are_frozen_and_the_pictures_have_a_gradient():
    network = oracle("digits")
    assert not any(p.requires_grad for p in network.parameters())
    images = real(2)[0].requires_grad_()
    network(images).sum().backward()
    assert images.grad.abs().sum() > 0


def scored(groups, labels, **options) -> torch.Tensor:
    found = oracle_score(task="digits", **options)(groups, labels.tolist())
    return torch.tensor([[score for score, _ in row] for row in found])


def test_scores_against_the_label():
    images, labels = real(4)
    groups = [[images[p], images[(p + 1) % 4]] for p in range(4)]
    logits = oracle("digits")(images).log_softmax(-1)
    scores = scored(groups, labels)
    assert scores.shape == (4, 2)
    for p in range(4):
        assert scores[p, 0].item() == pytest.approx(max(logits[p, p].item(), -10.0))
        assert scores[p, 1].item() == pytest.approx(max(logits[(p + 1) % 4, p].item(), -10.0), abs=1e-5)
    chance = scored(groups, labels, says="probability")
    torch.testing.assert_close(chance, scores.exp())
    right = scored(groups, labels, says="right")
    assert right[:, 0].tolist() == (logits.argmax(-1) == labels).float().tolist()
    assert scored(groups, labels, lowest=-1.0).min() >= -1.0
    # the answer is what the picture looks like, whatever was asked for
    answers = [[answer for _, answer in row] for row in oracle_score(task="digits")(groups, labels.tolist())]
    seen = [str(k) for k in logits.argmax(-1).tolist()]
    assert answers == [[seen[p], seen[(p + 1) % 4]] for p in range(4)]


def test_it_is_a_reward_like_any_other():
    read = signature(oracle_score(task="digits"))
    assert read.required == ("samples", "label")


def test_diversity_counts_directions():
    images, _ = real(100)
    threes = [images[i] for i in range(3, 100, 10)][:8]
    score = oracle_diversity(task="digits")
    varied, copies, alone = score([threes, [threes[0]] * 8, threes[:1]], [3, 3, 3])
    assert varied == [varied[0]] * 8
    assert 2.0 < varied[0] < 8.0
    assert copies[0] == pytest.approx(1.0)
    assert alone == [None]


def test_quality_of_noise_is_far_from_that_of_real_pictures():
    images, labels = real(200)
    noise = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    good, bad = quality("digits", images, labels), quality("digits", noise, labels)
    assert good.accuracy > 0.85
    assert bad.accuracy < 0.3
    assert bad.distance > 5 * good.distance
    assert math.isfinite(good.diversity)


def test_errors(friendly_errors):
    with pytest.raises(UnknownNameError, match="no bundled image task 'digit'"):
        oracle_score(task="digit")
    with pytest.raises(RecipeError, match="says must be one of log_probability, probability, right; got 'rihgt'"):
        oracle_score(task="digits", says="rihgt")
    with pytest.raises(ShapeError, match=r"labels must be \[N\]"):
        quality("digits", real(4)[0], torch.zeros(3, dtype=torch.long))
