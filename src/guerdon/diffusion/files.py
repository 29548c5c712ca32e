"""Denoising policies on disk, in the formats of diffusers and peft."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from guerdon.diffusion.denoisers import Denoiser, denoiser_of, read_settings, write_settings
from guerdon.errors import CheckpointError, RecipeError, nearest, require

LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": None}
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Parts(NamedTuple):
    """What a policy is made of: the network, the rest of its pipeline, its scheduler, where it came from."""

    network: Any
    denoiser: Denoiser
    scheduler: Any
    source: str | None


def read_parts(
    model: Any, scheduler: Any, dtype: torch.dtype, captions: Sequence[str] | None, patch: int | None
) -> Parts:
    """A pipeline (its folder, its name on the hub, the object) or a network of diffusers, taken apart.

    Raises:
        RecipeError: it cannot be loaded, is of a kind that is not supported, or its scheduler is missing.
    """
    source = str(model) if isinstance(model, (str, Path)) else None
    settings: dict[str, Any] = {}
    if source is not None:
        settings = read_settings(Path(source))
        try:
            with quiet():
                model = _read_network(Path(source), settings, dtype) if settings else _read_pipeline(source, dtype)
        except (OSError, ValueError, KeyError, AttributeError) as error:  # what diffusers raises for a wrong folder
            reason = str(error).split("\n")[0]
            raise RecipeError(
                f"policy.model: {source!r} cannot be loaded as a pipeline of diffusers: {reason} Give a folder written "
                "by save_pretrained, or a name on the Hugging Face hub."
            ) from error
    network, own, pipeline = _take_apart(model)
    scheduler = scheduler if scheduler is not None else own
    if scheduler is None:
        raise RecipeError("policy: a network alone needs its scheduler; pass scheduler=.")
    denoiser = denoiser_of(
        network,
        pipeline,
        captions=captions if captions is not None else settings.get("captions", ()),
        patch=patch if patch is not None else settings.get("patch", 1),
    )
    for part in denoiser.frozen:
        part.requires_grad_(False).eval()
    if source is None:
        for part in (network, *denoiser.frozen):
            _cast(part, dtype)
    else:
        for weight in network.parameters():
            # memory of a mapped file is not aligned, where sums may differ in their last bit from those of a run
            # that made the weights itself
            weight.data = weight.data.clone()
    return Parts(network, denoiser, scheduler, source)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    # diffusers warns of every cast, needed or not
    if any(p.dtype != dtype for p in module.parameters()):
        nn.Module.to(module, dtype)


def _take_apart(model: Any) -> tuple[Any, Any, Any]:
    """Network, scheduler, and the pipeline if it has more than these."""
    if isinstance(model, tuple):
        return (*model, None)
    if not hasattr(model, "components"):
        return model, None, None
    components = model.components
    part = "transformer" if "transformer" in components else "unet"
    if part not in components:
        raise RecipeError(f"policy: {type(model).__name__} has neither a unet nor a transformer.")
    return components[part], components["scheduler"], model if len(components) > 2 else None


def _read_pipeline(source: str, dtype: torch.dtype) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(source, dtype=dtype)


def _read_network(folder: Path, settings: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """A network and scheduler that were written without a pipeline."""
    diffusers: Any = importlib.import_module("diffusers")
    part = folder / settings["part"]
    kind = json.loads((part / "config.json").read_text(encoding="utf-8"))["_class_name"]
    network = getattr(diffusers, kind).from_pretrained(part, dtype=dtype)
    place = folder / "scheduler"
    kind = json.loads((place / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    return network, getattr(diffusers, kind).from_pretrained(place)


def write_parts(folder: Path, network: Any, denoiser: Denoiser, scheduler: Any, weights: Mapping[str, Tensor]) -> None:
    """Write a policy as the pipeline it came from; a network alone as its parts, with `guerdon.json` beside them.

    Args:
        folder: where to; it is there.
        network: whose configuration is written.
        denoiser: the rest of its pipeline.
        scheduler: of the policy.
        weights: the network's, whole.
    """
    from safetensors.torch import save_file

    pipeline = denoiser.pipeline
    network.save_config(folder / denoiser.part)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, folder / denoiser.part / _WEIGHTS, metadata={"format": "pt"})
    scheduler.save_pretrained(folder / "scheduler")
    if pipeline is None:
        write_settings(folder, {"part": denoiser.part, **denoiser.settings()})
        if type(network).__name__ == "UNet2DModel":
            from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

            DDPMPipeline(network, scheduler).save_config(folder)  # so that diffusers itself can open the folder
        return
    with quiet():
        for name, component in pipeline.components.items():
            if component is not None and name not in (denoiser.part, "scheduler"):
                component.save_pretrained(folder / name)
    pipeline.save_config(folder)
    if labels := getattr(pipeline, "labels", None):  # DiTPipeline reads them from here and does not write them
        _add_labels(folder / "model_index.json", labels)


def _add_labels(path: Path, labels: Mapping[str, int]) -> None:
    index = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, list[str]] = {}
    for name, label in labels.items():
        names.setdefault(str(label), []).append(name)
    index["id2label"] = {label: ", ".join(found) for label, found in names.items()}
    path.write_text(json.dumps(index, indent=2), encoding="utf-8")


def read_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """The network's weights that `write_parts` or diffusers wrote, in one file or several."""
    from safetensors.torch import load_file

    files = sorted((folder / part).glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no weights of this policy's {part}.")
    return {name: value for path in files for name, value in load_file(path).items()}


def add_lora(network: Any, options: Mapping[str, Any], source: str | None) -> Any:
    """The network with LoRA adapters of peft, which alone are trained.

    Raises:
        RecipeError: an option is unknown, or dropout is asked for.
        MissingExtraError: peft is not installed.
    """
    require("peft", "diffusion")
    from peft import LoraConfig, get_peft_model

    unknown = [name for name in options if name not in LORA]
    if unknown:
        raise RecipeError(
            f"policy.lora: {unknown[0]!r} is not known.{nearest(unknown[0], LORA)} There are {sorted(LORA)}."
        )
    settings = {**LORA, **options}
    if settings["dropout"]:
        raise RecipeError(
            f"policy.lora.dropout must be 0; got {settings['dropout']}. Log-probabilities must be reproducible."
        )
    targets = settings["target_modules"]
    if targets in (None, "all-linear"):
        targets = _targets(network, attention=targets is None)
    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    adapted = get_peft_model(network, config)
    adapted.peft_config["default"].base_model_name_or_path = source  # peft looks for it where transformers keep it
    return adapted


def _targets(network: nn.Module, *, attention: bool) -> list[str]:
    """The projections of attention layers, or every linear layer and convolution where there is no attention."""
    names = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    attending = [name for name in names if attention and name.endswith(tuple(f".{end}" for end in _ATTENTION))]
    return attending or names


def read_adapters(folder: Path) -> dict[str, Any] | None:
    """The configuration of adapters in a folder, None if it holds none."""
    path = folder / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_adapters(folder: Path, model: Any, denoiser: Denoiser, state: Mapping[str, Tensor] | None) -> None:
    """Write adapters as peft does, and once more as the pipeline's `load_lora_weights` reads them."""
    given = None if state is None else dict(state)
    # there are no embeddings of tokens to be saved with adapters; looking for them, peft would ask the hub
    model.save_pretrained(folder, state_dict=given, save_embedding_layers=False)
    kind = type(denoiser.pipeline)
    if hasattr(kind, "save_lora_weights"):
        from peft.utils.save_and_load import get_peft_model_state_dict

        layers = get_peft_model_state_dict(model, state_dict=given, save_embedding_layers=False)
        layers = {name.removeprefix("base_model.model."): value for name, value in layers.items()}
        about = model.peft_config["default"].to_dict()
        kind.save_lora_weights(
            folder,
            **{f"{denoiser.part}_lora_layers": layers, f"{denoiser.part}_lora_adapter_metadata": about},
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of diffusers and transformers: a run shows one display, its own."""
    kinds: list[Any] = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    shown = [kind for kind in kinds if kind.is_progress_bar_enabled()]
    for kind in shown:
        kind.disable_progress_bar()
    try:
        yield
    finally:
        for kind in shown:
            kind.enable_progress_bar()
