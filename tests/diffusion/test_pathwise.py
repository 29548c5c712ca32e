"""Sampling with gradient: what it is equal to, where it is cut, and what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.diffusion.denoisers import Condition
from guerdon.diffusion.pathwise import first_noise, generator_of, sample_with_gradient, unroll
from guerdon.diffusion.policy import DenoisingPolicy
from guerdon.errors import RecipeError, ShapeError
from tests.diffusion.pipelines import stable_diffusion, stable_diffusion_3, unet

STEPS = 5


def small(kind: str = "flow", **settings: Any) -> DenoisingPolicy:
    """A class-conditional network in double precision."""
    from guerdon.diffusion.bases import scheduler

    made = DenoisingPolicy.load(
        (unet(), scheduler(kind)), captions=["a", "b", "c"], **{"steps": STEPS, "dtype": "float64", **settings}
    )
    return made


def gradient(policy: DenoisingPolicy, **options: Any) -> Tensor:
    found = sample_with_gradient(policy, ["a", "c"], 2, [3, 4], **options)
    policy.zero_grad()
    (found.images.square().mean() + found.drift.mean()).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_images_are_those_of_sample_whatever_the_cut(kind, guidance):
    policy = small(kind, guidance=guidance)
    samples = policy.sample(["a", "c"], 2, [3, 4]).samples
    expected = torch.stack([image for group in samples for image in group])
    for cut in (0, 2, STEPS - 1):
        found = sample_with_gradient(policy, ["a", "c"], 2, [3, 4], cut=cut)
        torch.testing.assert_close(found.images.detach().float(), expected)
        assert found.images.requires_grad


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_checkpoints_change_nothing(kind):
    policy = small(kind)
    for cut in (0, 3):
        assert torch.equal(gradient(policy, cut=cut), gradient(policy, cut=cut, checkpointing=False))


def test_without_a_graph_before_the_cut_is_the_same_as_with_constant_outputs(monkeypatch):
    policy = small()
    expected = gradient(policy, cut=2)
    inner, calls = policy.predict, iter(range(100))

    def constant(x: Tensor, times: Tensor, condition: Condition, *, network: Any = None) -> Tensor:
        out = inner(x, times, condition, network=network)
        return out.detach() if next(calls) < 2 else out

    monkeypatch.setattr(policy, "predict", constant)
    torch.testing.assert_close(gradient(policy, cut=0, checkpointing=False), expected, rtol=1e-10, atol=1e-14)


def test_the_whole_gradient_is_that_of_finite_differences():
    policy = small()
    weight = policy.model.conv_in.weight
    gradient(policy, cut=0)
    assert weight.grad is not None
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = (weight.grad * direction).sum().item()
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * 1e-5 * direction
            ends.append(sample_with_gradient(policy, ["a", "c"], 2, [3, 4]).images.square().mean().item())
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_a_linear_chain_by_hand():
    torch.manual_seed(0)
    x, matrix, ahead = torch.randn(3).double(), torch.randn(3, 3).double().requires_grad_(), torch.randn(3).double()
    for cut in range(4):
        states = [x]
        for _ in range(4):
            states.append((matrix @ states[-1]).detach())
        (found,) = torch.autograd.grad(ahead @ unroll(lambda s, _: matrix @ s, x, 4, cut=cut), matrix)
        m = matrix.detach()
        parts = [torch.outer(torch.linalg.matrix_power(m.T, 3 - i) @ ahead, states[i]) for i in range(cut, 4)]
        torch.testing.assert_close(found, sum(parts))


def test_only_one_step_is_held_with_its_activations():
    def held(steps: int, checkpointing: bool) -> int:
        weight = torch.ones(8, requires_grad=True)
        sizes: list[int] = []

        def step(x: Tensor, i: int) -> Tensor:
            wide = x.repeat(50, 1)  # what the activations of a network are
            return (wide * weight).tanh().mean(0)

        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            unroll(step, torch.ones(8), steps, checkpointing=checkpointing)
        return sum(sizes)

    assert held(10, False) > 5 * held(10, True)
    assert held(20, True) - held(10, True) <= 10 * 8 * 2  # a state a step, and no activation


def test_a_prediction_of_one_step_in_place_of_the_rest():
    policy = small()
    whole = sample_with_gradient(policy, ["a"], 2, [3], cut=STEPS - 1, predict=True)
    torch.testing.assert_close(whole.images, sample_with_gradient(policy, ["a"], 2, [3], cut=STEPS - 1).images)
    assert torch.equal(
        gradient(policy, cut=2, predict=True), gradient(policy, cut=2, predict=True, checkpointing=False)
    )
    early = sample_with_gradient(policy, ["a"], 2, [3], cut=1, predict=True).images
    assert not torch.allclose(early, whole.images)


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_samples_noised_again(kind):
    policy = small(kind)
    found = sample_with_gradient(policy, ["a", "c"], 2, [3, 4], renoise=3)
    assert found.images.shape == (12, 3, 8, 8)
    assert not torch.allclose(found.images[0], found.images[1])
    plain = sample_with_gradient(policy, ["a", "c"], 2, [3, 4]).images
    # the last step has little noise, so what comes back is near what went in
    near = (found.images - plain.repeat_interleave(3, 0)).abs().mean()
    far = (found.images - plain.flip(0).repeat_interleave(3, 0)).abs().mean()
    assert near < far


def test_drift_from_the_reference():
    policy = small(lora={"rank": 2})
    options = {"cut": 1, "drift": True}
    assert sample_with_gradient(policy, ["a"], 2, [3], **options).drift.tolist() == [0.0, 0.0]
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    assert (sample_with_gradient(policy, ["a"], 2, [3], **options).drift > 0).all()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert torch.equal(gradient(policy, **options), gradient(policy, **options, checkpointing=False))
    assert all(p.requires_grad for p in trained)  # switching adapters off and on leaves them trained
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


def test_adapters_begin_at_the_base():
    plain, adapted = small(), small(lora={"rank": 2})
    one, two = (sample_with_gradient(p, ["a"], 2, [3]).images for p in (plain, adapted))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("maker", [stable_diffusion, stable_diffusion_3])
def test_pipelines_with_text_and_a_decoder(maker, tmp_path):
    maker().save_pretrained(tmp_path)
    policy = DenoisingPolicy.load(tmp_path, steps=3, guidance=3.0, lora={"rank": 2, "alpha": 2})
    expected = torch.stack(policy.sample(["a red cat"], 2, [1]).samples[0])
    with_checkpoints, without = (
        sample_with_gradient(policy, ["a red cat"], 2, [1], cut=1, checkpointing=flag) for flag in (True, False)
    )
    torch.testing.assert_close(with_checkpoints.images, expected, rtol=1e-4, atol=1e-4)
    found = []
    for one in (with_checkpoints, without):
        policy.zero_grad()
        one.images.mean().backward()
        found.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    assert found[0]
    assert all("lora_" in name for name in found[0])
    assert all(p.grad is None for part in policy.denoiser.frozen for p in part.parameters())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_a_generator_from_noise_to_images():
    policy = small()
    noise = first_noise(policy, [7, 8])
    images = generator_of(policy, ["a", "b"], steps=3)(noise)
    policy.eval_steps = 3
    samples = policy.sample(["a", "b"], 1, [7, 8], greedy=True).samples
    torch.testing.assert_close(images.detach().float(), torch.stack([g[0] for g in samples]))
    noise.requires_grad_()
    same = generator_of(policy, ["a", "b"], steps=3, seeds=[1, 2])
    (found,) = torch.autograd.grad(same(noise).sum(), noise)
    assert found.abs().sum() > 0
    assert torch.equal(same(noise), same(noise))


def test_what_has_no_gradient_is_refused():
    policy = small()
    for cut in (STEPS, -1):
        with pytest.raises(RecipeError, match="cut must be from 0 to 4"):
            sample_with_gradient(policy, ["a"], 1, [0], cut=cut)
    with pytest.raises(ShapeError, match="one seed per prompt"):
        sample_with_gradient(policy, ["a"], 1, [0, 1])
    with pytest.raises(ShapeError, match="one seed per prompt"):
        generator_of(policy, ["a"], seeds=[0, 1])
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    clipped = DenoisingPolicy.load((unet(), DDIMScheduler(clip_sample=True)), captions=["a"], steps=3)
    with pytest.raises(RecipeError, match="clip_sample: false"):
        sample_with_gradient(clipped, ["a"], 1, [0])
