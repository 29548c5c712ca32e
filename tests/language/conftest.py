from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from guerdon.language.characters import character_tokenizer

ALPHABET = "abcdefghijklm"
WORDS = len(ALPHABET) + 2


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer(ALPHABET)


def make_model(kind: str = "llama", dtype: torch.dtype = torch.float64, words: int = WORDS, scale: float = 0.5):
    """A tiny model whose log-probabilities are far from uniform."""
    sizes = {"vocab_size": words, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": kind == "tied"}
    grouped = {**sizes, "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}
    configs = {
        "llama": lambda: LlamaConfig(**grouped, **ids),
        "tied": lambda: LlamaConfig(**grouped, **ids),
        "eager": lambda: LlamaConfig(**grouped, **ids, attn_implementation="eager"),
        "window": lambda: MistralConfig(**grouped, **ids, sliding_window=4),
        "softcap": lambda: Gemma2Config(
            **grouped, **ids, head_dim=4, sliding_window=4, final_logit_softcapping=1.0, attn_implementation="eager"
        ),
        "gpt2": lambda: GPT2Config(vocab_size=words, n_embd=16, n_layer=2, n_head=4, n_positions=64, **ids),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[kind](), dtype=dtype)
    if dtype == torch.float64:
        # transformers takes these norms in float32, which would be all the precision there is
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__.endswith("RMSNorm"):
                    setattr(module, name, torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=dtype))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()
