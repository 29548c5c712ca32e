"""The model of the bundled tasks: 0.1 M weights, trained on one CPU thread in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guerdon.errors import require

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def small_llama(seed: int, *, tokens: int, pad: int, eos: int, bos: int | None = None) -> LlamaForCausalLM:
    """An untrained Llama of 2 layers, width 64 and 4 heads.

    Args:
        seed: of the initial weights. The global generator is left as it was.
        tokens: size of the vocabulary.
        pad: id that fills up.
        eos: id that ends a sample.
        bos: id that opens a prompt, if any.
    """
    import torch

    require("transformers", "language")
    from transformers import LlamaConfig, LlamaForCausalLM

    # 0.05 in place of the usual 0.02: the warm start then reaches the same accuracy from every seed
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=176,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=bos,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
