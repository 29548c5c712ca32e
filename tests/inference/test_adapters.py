"""Mixing two sets of adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guerdon.errors import CheckpointError, RecipeError
from guerdon.inference import mix_adapters
from guerdon.language.policy import LanguagePolicy
from tests.models import saved_model


def adapters(folder: Path, model: Path, seed: int, rank: int, alpha: int) -> Path:
    """A folder of adapters that change something."""
    policy = LanguagePolicy.load(str(model), max_new_tokens=3, lora={"rank": rank, "alpha": alpha})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy.save(folder)
    return folder


def change(folder: Path) -> dict[str, torch.Tensor]:
    """What adapters add to every weight: s B A."""
    config, found = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    pairs = {name: name.replace("lora_A", "lora_B") for name in found if "lora_A" in name}
    return {a: config["lora_alpha"] / config["r"] * found[b] @ found[a] for a, b in pairs.items()}


def log_probabilities(folder: Path) -> torch.Tensor:
    policy = LanguagePolicy.load(str(folder), max_new_tokens=3)
    return policy.log_prob(policy.pack(["12="], [["21"]]), entropy=False).logp.detach()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_change_is_the_weighted_sum_of_changes(tmp_path, weight):
    model = tmp_path / "model"
    saved_model(model)
    one, two = adapters(tmp_path / "one", model, 1, 2, 8), adapters(tmp_path / "two", model, 2, 3, 3)
    mixed = mix_adapters(one, two, tmp_path / "mixed", weight=weight)
    first, second, found = (change(folder) for folder in (one, two, mixed))
    assert max(value.abs().max() for value in first.values()) > 1e-2
    for name, value in found.items():
        torch.testing.assert_close(value, weight * first[name] + (1 - weight) * second[name], rtol=1e-4, atol=1e-5)
    # read back as a user would
    own, whole = log_probabilities(mixed), {1.0: one, 0.0: two}.get(weight)
    if whole is not None:
        torch.testing.assert_close(own, log_probabilities(whole), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(own, log_probabilities(model), atol=1e-2)
    assert json.loads((mixed / "adapter_config.json").read_text())["r"] == 5


def test_what_does_not_fit_is_refused(tmp_path):
    model = tmp_path / "model"
    saved_model(model)
    one = adapters(tmp_path / "one", model, 1, 2, 2)
    with pytest.raises(CheckpointError, match="no adapters"):
        mix_adapters(one, model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="already"):
        mix_adapters(one, one, one)
    with pytest.raises(RecipeError, match="number"):
        mix_adapters(one, one, tmp_path / "out", weight=float("nan"))
    few = {"rank": 2, "alpha": 2, "target_modules": ["q_proj"]}
    policy = LanguagePolicy.load(str(model), max_new_tokens=3, lora=few)
    policy.save(tmp_path / "few")
    with pytest.raises(RecipeError, match="different layers"):
        mix_adapters(one, tmp_path / "few", tmp_path / "out")
    assert not (tmp_path / "out").exists()
