"""Two adapters as one: a mixture of what two rewards have taught, chosen after training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guerdon.errors import CheckpointError, RecipeError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TOKENIZER = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges", "added_tokens")


def mix_adapters(first: str | Path, second: str | Path, out: str | Path, *, weight: float = 0.5) -> Path:
    """Write adapters that change the weights by w times what one set does and 1 - w times what another does.

    With W + s_1 B_1 A_1 and W + s_2 B_2 A_2, s = alpha / rank, the mixture is
    W + [w s_1 B_1, (1 - w) s_2 B_2] [A_1; A_2]: exact, with the ranks added up.

    Args:
        first: folder with adapters of peft, such as `runs/NAME/checkpoints/step-N/policy`.
        second: the same, over the same model and layers.
        out: folder to write; must not hold adapters yet. It gets the first one's tokenizer, where there is one.
        weight: w of the first; 0 and 1 give either back, outside of it one is exaggerated.

    Returns:
        The folder.

    Raises:
        CheckpointError: a folder holds no adapters, or `out` does already.
        RecipeError: weight is not finite, or the two are not of the same model and layers, or not plain LoRA.

    Source:
        Prabhudesai et al. 2023, AlignProp, arXiv 2310.03739: rewards mixed by mixing adapters.
    """
    from safetensors.torch import load_file, save_file

    if not torch.isfinite(torch.tensor(weight)):
        raise RecipeError(f"inference.mix_adapters: weight must be a number; got {weight}.")
    folders, out = (Path(first), Path(second)), Path(out)
    if (out / _CONFIG).exists():
        raise CheckpointError(f"inference.mix_adapters: {out} holds adapters already. Choose another folder.")
    configs = [_config(folder) for folder in folders]
    tensors = [load_file(folder / _WEIGHTS) for folder in folders]
    if differing := sorted(tensors[0].keys() ^ tensors[1].keys()):
        raise RecipeError(
            f"inference.mix_adapters: the two adapt different layers: only one of them has {differing[0]} "
            f"({len(differing)} in all)."
        )
    if differing := [
        name for name in ("base_model_name_or_path", "bias") if configs[0].get(name) != configs[1].get(name)
    ]:
        found = " and ".join(repr(config.get(differing[0])) for config in configs)
        raise RecipeError(f"inference.mix_adapters: the two differ in {differing[0]}: {found}.")
    mixed: dict[str, Tensor] = {}
    for name in tensors[0]:
        a, b = (part[name].float() for part in tensors)
        dtype = tensors[0][name].dtype
        if "lora_A" in name or "lora_embedding_A" in name:
            mixed[name] = torch.cat([a, b], 0).to(dtype)
        elif "lora_B" in name or "lora_embedding_B" in name:
            scales = [config["lora_alpha"] / config["r"] for config in configs]
            mixed[name] = torch.cat([weight * scales[0] * a, (1 - weight) * scales[1] * b], 1).to(dtype)
        else:
            raise RecipeError(f"inference.mix_adapters: {name} is no part of a plain LoRA.")
    rank = sum(config["r"] for config in configs)
    out.mkdir(parents=True, exist_ok=True)
    for file in folders[0].iterdir():
        if file.name.startswith(_TOKENIZER):
            shutil.copy(file, out)
    save_file({name: value.contiguous() for name, value in mixed.items()}, out / _WEIGHTS, metadata={"format": "pt"})
    (out / _CONFIG).write_text(
        json.dumps({**configs[0], "r": rank, "lora_alpha": rank}, indent=2) + "\n", encoding="utf-8"
    )
    return out


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"inference.mix_adapters: {folder} holds no adapters of peft: {error}") from error
    odd = [
        name
        for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
        if config.get(name)
    ]
    if config.get("peft_type") != "LORA" or odd:
        raise RecipeError(
            f"inference.mix_adapters: {folder} is no plain LoRA: it has {', '.join(odd) or config.get('peft_type')}."
        )
    return config
