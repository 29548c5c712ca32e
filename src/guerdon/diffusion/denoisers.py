"""Any denoiser of diffusers behind one face: encode prompts, predict, decode to images.

A `Denoiser` knows the parts of a pipeline (text encoders, image decoder, null condition) and how its network is called.
It holds no trained weights: the network is handed to `predict`, so that the same denoiser serves the policy, its
reference and a wrapped network alike.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from guerdon.errors import DataError, RecipeError, nearest

Condition = dict[str, Tensor]  # name -> [N, ...]

# beside the files of diffusers: what its own formats have no place for
SETTINGS_FILE = "guerdon.json"


class Denoiser(ABC):
    """A network of diffusers with what belongs to it.

    Attributes:
        part: the network's name in its pipeline: `unet` or `transformer`.
        pipeline: the pipeline it came from, whose other parts are frozen; None for a network alone.
        latent_shape: [C, H, W] of a state.
        layout: memory format of the states that the network gets: channels last where it is made of convolutions, which
            run faster so. Weights stay as they are: sharding takes no others.
        tokens: positions of an image in a transformer, None for other networks.
    """

    part: str = "unet"

    @property
    def layout(self) -> torch.memory_format:
        """How states lie in memory."""
        return torch.channels_last if self.part == "unet" else torch.contiguous_format

    def __init__(self, network: Any, pipeline: Any = None) -> None:
        self.pipeline = pipeline
        config = network.config
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape: tuple[int, int, int] = (config["in_channels"], height, width)
        patch = config.get("patch_size")
        self.tokens: int | None = None if patch is None else (height // patch) * (width // patch)
        self._null: Condition = {}

    @property
    def frozen(self) -> list[nn.Module]:
        """The parts of the pipeline that are not trained."""
        if self.pipeline is None:
            return []
        parts = [value for name, value in self.pipeline.components.items() if name != self.part]
        return [value for value in parts if isinstance(value, nn.Module)]

    @abstractmethod
    def encode(self, prompts: Sequence[Any], device: torch.device) -> Condition:
        """Condition of P prompts: name -> [P, ...], without gradient.

        Raises:
            DataError: naming the prompt that cannot be used.
        """

    @abstractmethod
    def make_null(self, device: torch.device) -> Condition:
        """The null condition that guidance goes away from, name -> [1, ...].

        Raises:
            RecipeError: the network was not made for one.
        """

    @abstractmethod
    def predict(self, network: Any, x: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Output [N, C, H, W] of the network for states x [N, C, H, W] at times [N]."""

    def null(self, count: int, device: torch.device) -> Condition:
        """The null condition of `count` samples; it is made once."""
        if not self._null or next(iter(self._null.values())).device != device:
            self._null = self.make_null(device)
        return {name: value.expand(count, *value.shape[1:]) for name, value in self._null.items()}

    def forget(self) -> None:
        """Make the null condition again when it is next asked for: the parts were moved or cast."""
        self._null = {}

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1], with gradient where the latents have one."""
        vae = self._vae()
        if vae is None:
            return to_unit(latents)
        shift = vae.config.get("shift_factor") or 0.0
        scaled = latents / vae.config["scaling_factor"] + shift
        return to_unit(vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float())

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Clean states [N, C, H, W] of images [N, 3, H, W] in [0, 1], the mean of the encoder's distribution."""
        vae = self._vae()
        if vae is None:
            return images * 2 - 1
        found = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
        return (found.float() - (vae.config.get("shift_factor") or 0.0)) * vae.config["scaling_factor"]

    def settings(self) -> dict[str, Any]:
        """What must be written beside the files of diffusers to build this denoiser again."""
        return {}

    def _vae(self) -> Any:
        return getattr(self.pipeline, "vae", None)


class ClassDenoiser(Denoiser):
    """A class-conditional (or unconditional) UNet2DModel or DiTTransformer2DModel.

    Args:
        network: the network.
        pipeline: a DiTPipeline, or None.
        captions: the prompt of each class; prompts may then be captions as well as labels.
        patch: pixels of a side that one position of the state holds (`pixel_unshuffle`); 1 = states are images.
    """

    def __init__(self, network: Any, pipeline: Any = None, *, captions: Sequence[str] = (), patch: int = 1) -> None:
        super().__init__(network, pipeline)
        config = network.config
        self.transformer = "num_embeds_ada_norm" in config
        self.part = "transformer" if self.transformer else "unet"
        self.captions, self.patch = tuple(captions), patch
        if self.transformer:
            self.classes: int | None = config["num_embeds_ada_norm"]
            self.null_label: int | None = self.classes  # diffusers' own place for it
        else:
            embedded = config.get("num_class_embeds")
            if embedded is not None and len(self.captions) > embedded:
                raise RecipeError(
                    f"policy: there are {len(self.captions)} captions and only {embedded} classes in the network."
                )
            self.classes = None if embedded is None else (len(self.captions) or embedded)
            # the last embedding, unless it has a caption and so is a class like any other
            self.null_label = None if embedded is None or len(self.captions) == embedded else embedded - 1
        self.places = {caption: label for label, caption in enumerate(self.captions)}
        self.places |= {str(name): int(label) for name, label in (getattr(pipeline, "labels", None) or {}).items()}

    def encode(self, prompts: Sequence[Any], device: torch.device) -> Condition:
        """Labels [P] of labels or captions; nothing for an unconditional network."""
        if self.classes is None:
            return {}
        return {"label": torch.tensor([self._label(i, prompt) for i, prompt in enumerate(prompts)], device=device)}

    def _label(self, index: int, prompt: Any) -> int:
        if isinstance(prompt, str) and prompt in self.places:
            return self.places[prompt]
        if isinstance(prompt, int) and self.classes is not None and 0 <= prompt < self.classes:
            return prompt
        hint = nearest(prompt, self.places) if isinstance(prompt, str) else ""
        known = f" Known captions: {', '.join(list(self.places)[:20])}." if self.places else ""
        raise DataError(
            f"diffusion.policy: prompt {index} must be a label from 0 to {(self.classes or 0) - 1} or a known caption; "
            f"got {prompt!r:.200}.{hint}{known}"
        )

    def make_null(self, device: torch.device) -> Condition:
        """The null class."""
        if self.null_label is None:
            raise RecipeError(
                "policy.guidance: this network has no null class to be guided away from; use guidance: 1."
            )
        return {"label": torch.tensor([self.null_label], device=device)}

    def predict(self, network: Any, x: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Run the network on states, times and labels."""
        labels = condition.get("label")
        if self.transformer:
            out = network(x, timestep=times, class_labels=labels, return_dict=False)[0]
            return out[:, : x.shape[1]]  # what follows is a learned variance
        return network(x, times, class_labels=labels, return_dict=False)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1]."""
        return super().decode(functional.pixel_shuffle(latents, self.patch) if self.patch > 1 else latents)

    def latents(self, images: Tensor) -> Tensor:
        """Clean states of images in [0, 1]."""
        found = super().latents(images)
        return functional.pixel_unshuffle(found, self.patch) if self.patch > 1 else found

    def settings(self) -> dict[str, Any]:
        """Captions and patch."""
        return {"captions": list(self.captions), "patch": self.patch}


class TextUNetDenoiser(Denoiser):
    """The UNet2DConditionModel of a StableDiffusionPipeline, its text encoder and its image decoder."""

    def encode(self, prompts: Sequence[Any], device: torch.device) -> Condition:
        """Embeddings of texts."""
        return self._encode(_texts(prompts), device)

    def make_null(self, device: torch.device) -> Condition:
        """Embeddings of the empty text."""
        return self._encode([""], device)

    @torch.no_grad()
    def _encode(self, texts: list[str], device: torch.device) -> Condition:
        embeds, _ = self.pipeline.encode_prompt(texts, device, 1, do_classifier_free_guidance=False)
        return {"embeds": embeds}

    def predict(self, network: Any, x: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Run the network on states, times and embeddings."""
        return network(x, times, encoder_hidden_states=condition["embeds"], return_dict=False)[0]


class StableDiffusion3Denoiser(Denoiser):
    """The SD3Transformer2DModel of a StableDiffusion3Pipeline, its three text encoders and its image decoder."""

    part = "transformer"

    def encode(self, prompts: Sequence[Any], device: torch.device) -> Condition:
        """Embeddings of texts."""
        return self._encode(_texts(prompts), device)

    def make_null(self, device: torch.device) -> Condition:
        """Embeddings of the empty text."""
        return self._encode([""], device)

    @torch.no_grad()
    def _encode(self, texts: list[str], device: torch.device) -> Condition:
        found: Any = self.pipeline.encode_prompt(
            cast(Any, texts), cast(Any, None), cast(Any, None), device=device, do_classifier_free_guidance=False
        )
        return {"embeds": found[0], "pooled": found[2]}

    def predict(self, network: Any, x: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Run the network on states, times and embeddings."""
        return network(
            hidden_states=x,
            timestep=times,
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]


def to_unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], held within."""
    return ((images + 1) / 2).clamp(0, 1)


def _texts(prompts: Sequence[Any]) -> list[str]:
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise DataError(f"diffusion.policy: prompt {index} must be a text; got {prompt!r:.200}.")
    return list(prompts)


def denoiser_of(network: Any, pipeline: Any = None, *, captions: Sequence[str] = (), patch: int = 1) -> Denoiser:
    """The denoiser for a network and its pipeline.

    Args:
        network: a model of diffusers.
        pipeline: what it came in, or None.
        captions: of the classes of a class-conditional network.
        patch: see `ClassDenoiser`.

    Raises:
        RecipeError: the network is of a kind that is not supported, or lacks its text encoder.
    """
    name = type(network).__name__
    if name in ("UNet2DModel", "DiTTransformer2DModel"):
        return ClassDenoiser(network, pipeline, captions=captions, patch=patch)
    known = {"UNet2DConditionModel": TextUNetDenoiser, "SD3Transformer2DModel": StableDiffusion3Denoiser}
    if name not in known:
        there = ["UNet2DModel", "DiTTransformer2DModel", *known]
        raise RecipeError(f"policy: the network {name} is not supported. There are: {', '.join(there)}.")
    if pipeline is None or getattr(pipeline, "text_encoder", None) is None:
        raise RecipeError(f"policy: a {name} needs its pipeline with a text encoder; pass the pipeline or its folder.")
    added = network.config.get("addition_embed_type") or network.config.get("time_cond_proj_dim")
    if added:
        raise RecipeError(f"policy: this {name} asks for conditions beside the text ({added}), which is not supported.")
    return known[name](network, pipeline)


def read_settings(folder: Path) -> dict[str, Any]:
    """What `write_settings` wrote, or nothing."""
    path = folder / SETTINGS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write settings beside the files of diffusers."""
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")
