"""ReNO: the norm's penalty, steps, the best iterate, and samples that have nothing to do with each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.errors import RecipeError, ScoreError, ShapeError
from guerdon.inference import best_of_n, norm_penalty, optimise_noise

DIM = 6
MATRIX = torch.randn(4, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def generator(noise: Tensor) -> Tensor:
    return (noise @ MATRIX.T.to(noise.dtype)).tanh()


def likes(images: Tensor) -> Tensor:
    return images[:, 0] - images[:, 1].square()


def start(count: int = 3) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def search(noise: Tensor, rewards: Any = None, **options: Any) -> Any:
    return optimise_noise(generator, noise, rewards or {"likes": likes}, **options)


def test_the_penalty_and_its_gradient():
    noise = start(4).requires_grad_()
    (found,) = torch.autograd.grad(norm_penalty(noise).sum(), noise)
    square = noise.detach().square().sum(1, keepdim=True)
    torch.testing.assert_close(found, (1 - (DIM - 1) / square) * noise.detach())
    at_best = (noise.detach() * math.sqrt(DIM - 1) / square.sqrt()).requires_grad_()
    (still,) = torch.autograd.grad(norm_penalty(at_best).sum(), at_best)
    assert still.abs().max() < 1e-12
    half = torch.full((1, 16384), 20.0, dtype=torch.float16)  # its square is beyond float16
    assert norm_penalty(half).isfinite().all()


def test_the_penalty_alone_moves_the_norm_and_not_the_direction():
    noise = 3 * start()
    flat = {"flat": lambda images: 0.0 * images.sum(1)}
    found = search(noise, flat, iterations=200, lr=0.5, momentum=0.0, grad_clip=None, norm_weight=0.1)
    torch.testing.assert_close(found.norm[-1], torch.full((3,), math.sqrt(DIM - 1)).double(), rtol=1e-6, atol=1e-6)
    seen: list[Tensor] = []
    search(noise, flat, iterations=5, norm_weight=0.1, on_iteration=lambda i, x, images, loss: seen.append(x))
    cosine = torch.nn.functional.cosine_similarity(seen[-1], noise)
    torch.testing.assert_close(cosine, torch.ones(3).double())


def test_steps_are_bounded_by_the_clip():
    seen: list[Tensor] = []
    search(start(), {"steep": lambda i: 100 * likes(i)}, iterations=2, on_iteration=lambda i, x, *_: seen.append(x))
    assert ((seen[1] - seen[0]).norm(dim=1) <= 5 * 0.1 * 1.9 + 1e-9).all()


def test_the_best_is_returned_and_never_gets_worse():
    losses = [search(start(), iterations=n).loss.amin(0) for n in (1, 5, 20)]
    assert (losses[1] <= losses[0]).all()
    assert (losses[2] <= losses[1]).all()
    found = search(start(), iterations=20, lr=30.0)  # so large that the last is not the best
    torch.testing.assert_close(-likes(generator(found.noise)), found.loss.amin(0))
    torch.testing.assert_close(found.images, generator(found.noise))
    assert torch.equal(found.best, found.loss.argmin(0))
    first = search(start(), iterations=1)
    assert torch.equal(first.images, generator(start()))
    assert found.loss.shape == (20, 3)


def test_the_norm_has_no_say_in_which_is_best():
    found = search(10 * start(), iterations=30, norm_weight=5.0)
    assert torch.equal(found.best, found.loss.argmin(0))


def test_the_last_iteration_is_only_looked_at_and_images_are_counted():
    calls = []

    def counted(noise: Tensor) -> Tensor:
        calls.append(1)
        return generator(noise)

    optimise_noise(counted, start(), {"likes": likes}, iterations=7)
    assert len(calls) == 7


def test_batched_is_one_by_one():
    together = search(start(), iterations=10)
    for n in range(3):
        alone = search(start()[n : n + 1], iterations=10)
        torch.testing.assert_close(alone.noise[0], together.noise[n])
        assert alone.best[0] == together.best[n]


def test_offsets_and_a_common_scale_change_nothing_where_the_clip_acts():
    options: dict[str, Any] = {"iterations": 6, "norm_weight": 0.0, "grad_clip": 1e-3, "lr": 50.0}
    plain = search(start(), **options)
    moved = search(start(), offsets={"likes": 4.0}, **options)
    torch.testing.assert_close(plain.noise, moved.noise)
    torch.testing.assert_close(plain.loss + 4, moved.loss)
    scaled = search(start(), weights={"likes": 3.0}, **options)
    torch.testing.assert_close(plain.noise, scaled.noise, rtol=1e-2, atol=1e-3)


def test_rotating_noise_and_generator_rotates_the_path():
    turn, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    plain = search(start(), iterations=8)
    turned = optimise_noise(lambda z: generator(z @ turn), start() @ turn.T, {"likes": likes}, iterations=8)
    torch.testing.assert_close(turned.noise, plain.noise @ turn.T)


def test_several_rewards_and_one_that_is_only_watched():
    rewards = {"likes": likes, "third": lambda images: images[:, 2]}
    both = search(start(), rewards, weights={"likes": 1.0, "third": 2.0}, iterations=5)
    torch.testing.assert_close(both.loss, -(both.scores[..., 0] + 2 * both.scores[..., 1]))
    watched = search(start(), rewards, weights={"third": 0.0}, iterations=5)
    torch.testing.assert_close(watched.noise, search(start(), iterations=5).noise)
    assert watched.names == ("likes", "third")


def test_weights_of_the_generator_are_left_alone():
    network = torch.nn.Linear(DIM, 4).double()
    before = network.weight.detach().clone()
    optimise_noise(network, start(), {"likes": likes}, iterations=5)
    assert torch.equal(network.weight, before)
    assert network.weight.grad is None


def test_a_loss_that_is_not_finite_stops_its_sample_alone():
    calls = [0]

    def breaks(images: Tensor) -> Tensor:
        calls[0] += 1
        broken = torch.tensor([0.0, math.nan if calls[0] >= 4 else 0.0, 0.0])
        return likes(images) + broken

    found = search(start(), {"breaks": breaks}, iterations=10)
    assert found.stopped.tolist() == [False, True, False]
    assert found.best[1] <= 2
    assert found.noise.isfinite().all()
    whole = search(start(), iterations=10)
    torch.testing.assert_close(found.noise[[0, 2]], whole.noise[[0, 2]])
    assert found.loss[4:, 1].isnan().all()


@pytest.mark.parametrize("kind", ["adam", "lbfgs"])
def test_other_optimisers(kind):
    found = search(start(1), iterations=10, optimiser=kind, lr=0.1 if kind == "adam" else 1.0)
    assert found.loss.amin() < found.loss[0, 0] - 0.1


def test_best_of_n():
    noises = torch.stack([start(2), 2 * start(2), -start(2)])
    found = best_of_n(generator, noises, {"likes": likes})
    losses = torch.stack([-likes(generator(noise)) for noise in noises])
    assert torch.equal(found.best, losses.argmin(0))
    assert torch.equal(found.noise[0], noises[found.best[0], 0])


def test_noise_in_half_precision_is_optimised_in_single():
    found = search(start().half(), iterations=3)
    assert found.noise.dtype == torch.float16
    assert found.norm.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"iterations": 0}, RecipeError, "iterations must be at least 1"),
        ({"weights": {"likes": 0.0}}, RecipeError, "at least one reward"),
        ({"weights": {"lices": 1.0}}, RecipeError, "Did you mean 'likes'"),
        ({"weights": {"likes": -1.0}}, RecipeError, "0 or more"),
        ({"lr": 0.0}, RecipeError, "above 0"),
        ({"optimiser": "lbfgs"}, ShapeError, "one sample at a time"),
        ({"rewards": {"likes": lambda images: likes(images).detach()}}, ScoreError, "no gradient to the noise"),
        ({"rewards": {"likes": lambda images: images}}, ScoreError, "one score for each of the 3"),
    ],
)
def test_errors(options, error, text):
    with pytest.raises(error, match=text):
        search(start(), **options)


def test_noise_of_zero():
    with pytest.raises(ShapeError, match="zero throughout"):
        search(torch.zeros(1, DIM))


@pytest.mark.usefixtures("friendly_errors")
def test_an_unknown_optimiser():
    with pytest.raises(RecipeError, match="Did you mean 'adam'"):
        search(start(), optimiser="adm")
