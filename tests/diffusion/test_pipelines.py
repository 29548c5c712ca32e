"""Pipelines as users have them: saved on disk by diffusers, loaded, compared with diffusers' own sampling, trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from torch import Generator

from guerdon.advantages import grpo
from guerdon.diffusion.draws import generator, path_noise
from guerdon.diffusion.policy import DenoisingPolicy
from guerdon.errors import DataError, RecipeError
from guerdon.objectives import policy_gradient
from guerdon.signal import Signal
from guerdon.training.online import Online
from guerdon.training.optimisation import Optim
from tests.diffusion.pipelines import dit, stable_diffusion, stable_diffusion_3, unet

MAKERS: dict[str, Callable[[], Any]] = {"sd": stable_diffusion, "sd3": stable_diffusion_3, "dit": dit}
PROMPTS = {"sd": ["a red cat", "dog"], "sd3": ["a red cat", "dog"], "dit": ["kitten", 2]}
NAMES = tuple(MAKERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a pipeline, written by diffusers' own save_pretrained."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name in ("sd", "sd3"):
        MAKERS[name]().save_pretrained(folder / name)
    DenoisingPolicy.load(dit()).save(folder / "dit")  # DiTPipeline itself does not write its labels
    return {name: folder / name for name in NAMES}


def load(folders: dict[str, Path], name: str, **settings: Any) -> DenoisingPolicy:
    return DenoisingPolicy.load(folders[name], **{"steps": 4, "guidance": 3.0, **settings})


def stir(made: DenoisingPolicy) -> None:
    drawn = Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=drawn))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_pipeline_samples_and_scores(folders, name):
    made = load(folders, name)
    assert made.process.kind == ("flow" if name == "sd3" else "diffusion")
    rollout = made.sample(PROMPTS[name], 2, [1, 2]).validate()
    assert rollout.steps["latents"].shape == (2, 2, 5, 4, 8, 8)
    assert rollout.samples[1][1].shape == (3, 16, 16)
    out = made.log_prob(rollout)
    torch.testing.assert_close(out.logp.detach(), rollout.logp_old, atol=2e-6, rtol=1e-5)
    out.logp.sum().backward()
    trained = {name for name, p in made.named_parameters() if p.grad is not None}
    assert trained
    # nothing but the network is trained, saved or handed to a wrapper
    assert all(name.startswith("model.") for name in made.state_dict())
    assert all(p.grad is None for part in made.denoiser.frozen for p in part.parameters())
    # prompts make a difference, and the order of a batch none
    swapped = made.sample(PROMPTS[name][::-1], 2, [2, 1])
    torch.testing.assert_close(swapped.steps["latents"].flip(0), rollout.steps["latents"], rtol=1e-4, atol=1e-4)
    same = made.sample([PROMPTS[name][0]] * 2, 2, [1, 2])
    assert (same.steps["latents"][1] - rollout.steps["latents"][1]).abs().amax() > 1e-5
    picture = made.to_pil(rollout.samples)[0][1]
    assert isinstance(picture, Image.Image)
    assert picture.size == (16, 16)


def diffusers_images(pipeline: Any, name: str, guidance: float, steps: int, seeds: list[int]) -> torch.Tensor:
    """What the pipeline itself makes of the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    if name == "dit":
        drawn = [generator(seed, 0, 0) for seed in seeds]
        images = pipeline([0, 2], generator=drawn, output_type="np", **options).images
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    noise = path_noise(seeds, 1, 1, (4, 8, 8))[:, 0, 0]
    images = pipeline(PROMPTS[name], latents=noise, output_type="np", **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# DiTPipeline gives its null class the number 1000, whatever the model's is
@pytest.mark.parametrize(("name", "guidance"), [("sd", 1.0), ("sd", 3.0), ("sd3", 1.0), ("sd3", 3.0), ("dit", 1.0)])
def test_the_deterministic_sampler_is_diffusers_own(folders, name, guidance):
    made = load(folders, name, eval_steps=5, guidance=guidance)
    found = made.sample(PROMPTS[name], 1, [1, 2], greedy=True)
    pipeline = made.denoiser.pipeline if name == "dit" else DiffusionPipeline.from_pretrained(folders[name])
    if name == "sd":  # PNDM takes other steps than DDIM over the same schedule
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    expected = diffusers_images(pipeline, name, guidance, 5, [1, 2])
    images = torch.stack([group[0] for group in found.samples])
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
    assert images.std() > 0.01


def brightness(samples: Any) -> list[list[float]]:
    return [[image.mean().item() for image in group] for group in samples]


@pytest.mark.parametrize(("name", "adapters"), [("sd", True), ("sd3", False), ("sd3", True)])
def test_a_pipeline_is_trained_as_a_user_would(folders, name, adapters, tmp_path):
    policy = DenoisingPolicy.load(
        folders[name],
        steps=3,
        guidance=3.0,
        gradient_checkpointing=True,
        lora={"rank": 4, "alpha": 8} if adapters else None,
    )
    policy.keep_reference()
    frozen = [p.clone() for part in policy.denoiser.frozen for p in part.parameters()]
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}

    def objective(logp, logp_old, advantages, mask, kl, *, beta=0.04):
        return policy_gradient(
            logp, logp_old, advantages, mask, kl=kl, clip_low=1e-4, clip_high=1e-4, beta=beta, kl_estimator="exact"
        )

    loop = Online(
        policy,
        [{"prompt": "a red cat"}, {"prompt": "a dog"}],
        Signal(rewards=[brightness], advantage=grpo),
        objective,
        prompts_per_step=2,
        group_size=4,
        micro_batch=1,
        optim=Optim(lr=1e-3),
        steps=2,
    )
    first, second = loop.step().metrics, loop.step().metrics
    assert first["kl"] == 0 < second["kl"]
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5)
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    if adapters:
        assert all("lora_" in n for n in moved)
    assert all(
        torch.equal(a, p)
        for a, p in zip(frozen, (p for m in policy.denoiser.frozen for p in m.parameters()), strict=True)
    )
    policy.save(tmp_path / "trained")
    back = DenoisingPolicy.load(tmp_path / "trained", steps=3, guidance=3.0)
    one, two = (p.sample(["a dog"], 2, [5]).steps["latents"] for p in (policy, back))
    assert torch.equal(one, two)


@pytest.mark.parametrize(("name", "kind"), [("sd", StableDiffusionPipeline), ("sd3", StableDiffusion3Pipeline)])
def test_what_is_saved_is_diffusers_own(folders, name, kind, tmp_path):
    made = load(folders, name)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.mul_(1.1)
    made.save(tmp_path / "whole")
    opened = kind.from_pretrained(tmp_path / "whole")
    network = opened.components[made.denoiser.part]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), made.model.parameters(), strict=True))
    texts = opened.text_encoder.parameters()
    assert all(torch.equal(a, b) for a, b in zip(texts, made.denoiser.pipeline.text_encoder.parameters(), strict=True))
    assert opened.tokenizer("a cat").input_ids == made.denoiser.pipeline.tokenizer("a cat").input_ids
    assert type(opened.scheduler).__name__ == type(made.scheduler).__name__


@pytest.mark.parametrize(("name", "kind"), [("sd", StableDiffusionPipeline), ("sd3", StableDiffusion3Pipeline)])
def test_adapters_go_into_the_users_pipeline(folders, name, kind, tmp_path):
    made = load(folders, name, lora={"rank": 2, "alpha": 6})
    stir(made)
    made.save(tmp_path)
    assert not (tmp_path / "vae").exists()
    x, times = torch.randn(2, 4, 8, 8, generator=Generator().manual_seed(0)), torch.tensor([300.0, 700.0])
    condition = made.encode(PROMPTS[name])
    with torch.no_grad():
        expected = made.denoiser.predict(made.model, x, times, condition)
        pipeline = kind.from_pretrained(folders[name])
        plain = made.denoiser.predict(pipeline.components[made.denoiser.part], x, times, condition)
        pipeline.load_lora_weights(tmp_path)
        found = made.denoiser.predict(pipeline.components[made.denoiser.part], x, times, condition)
    assert (plain - expected).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_adapters_are_on_attention_alone(folders):
    for name, ends in (("sd", ("to_q", "to_k", "to_v", "to_out.0")), ("sd3", ("to_q", "add_q_proj", "to_add_out"))):
        made = load(folders, name, lora={"rank": 2})
        adapted = {n.split(".lora_")[0] for n, p in made.named_parameters() if p.requires_grad}
        assert all("attn" in n for n in adapted)
        for end in ends:
            assert any(n.endswith(end) for n in adapted)


def test_labels_of_a_dit_survive(folders):
    made = load(folders, "dit")
    assert made.encode(["cat", "kitten", "fish", 1])["label"].tolist() == [0, 0, 2, 1]
    assert made.denoiser.make_null(torch.device("cpu"))["label"].tolist() == [3]
    with pytest.raises(DataError, match="prompt 1 must be a label from 0 to 2 or a known caption; got 'bird'"):
        made.encode(["cat", "bird"])


def test_wrong_prompts(folders):
    with pytest.raises(DataError, match="prompt 1 must be a text; got 3"):
        load(folders, "sd").encode(["a cat", 3])


def test_a_pipeline_may_be_handed_over(folders):
    pipeline = stable_diffusion()
    made = DenoisingPolicy.load(pipeline, steps=4, guidance=3.0)
    assert made.model is pipeline.unet
    expected = load(folders, "sd").sample(["dog"], 1, [1]).steps["latents"]
    torch.testing.assert_close(made.sample(["dog"], 1, [1]).steps["latents"], expected)


def test_in_half_precision(folders):
    made = load(folders, "sd3", dtype="bfloat16")
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    rollout = made.sample(["dog"], 2, [1])
    assert rollout.steps["latents"].dtype == torch.float32
    assert torch.equal(made.log_prob(rollout).logp, rollout.logp_old)
    assert rollout.samples[0][0].dtype == torch.float32


def test_the_parts_move_with_the_policy(folders):
    made = load(folders, "sd")
    made.sample(["dog"], 1, [1])
    made.to(torch.float64)
    assert {p.dtype for part in made.denoiser.frozen for p in part.parameters()} == {torch.float64}
    assert made.sample(["dog"], 1, [1]).steps["latents"].dtype == torch.float64


def test_networks_that_ask_for_more_are_told_apart():
    pipeline = stable_diffusion()
    network = unet()
    with pytest.raises(RecipeError, match="needs its pipeline with a text encoder"):
        DenoisingPolicy.load(pipeline.unet, scheduler=pipeline.scheduler)
    with pytest.raises(RecipeError, match="has neither a unet nor a transformer"):
        DenoisingPolicy.load(type("Other", (), {"components": {"vae": network}})())
