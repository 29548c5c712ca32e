"""Finds out, on a few tokens, which short cuts a causal language model takes without changing its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from guerdon.language.backbone import Backbone

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def probe(model: Any) -> Backbone:
    """Split a model into body and head and test every short cut against whole, unpadded sequences.

    Four sequences of at most seven tokens are run; a short cut that raises or gives other logits is not taken.

    Args:
        model: a causal language model of transformers, with or without peft adapters.

    Returns:
        The `Backbone`; `refused` of it says why a short cut is not taken.

    Raises:
        TypeError: the model has no output embeddings, so it is no causal language model.
    """
    causal = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    if getattr(causal, "get_output_embeddings", lambda: None)() is None:
        raise TypeError(
            f"language.policy: {type(causal).__name__} has no output embeddings; give a causal language model."
        )
    training = causal.training
    causal.eval()
    try:
        with torch.no_grad():
            return _probe(causal)
    finally:
        causal.train(training)


def _probe(causal: Any) -> Backbone:
    backbone = Backbone(causal)
    tokens = causal.get_input_embeddings().weight.shape[0]
    device = backbone.device
    width, group, length = 4, 2, 3
    ids = torch.arange(width * 2 + group * 2 * length, device=device).mul_(7).add_(1) % tokens
    prompt_ids, completion_ids = ids[: width * 2].view(2, width), ids[width * 2 :].view(2, group, length)
    mask = torch.ones(2, width, dtype=torch.bool, device=device)
    mask[1, :2] = False
    whole = [torch.cat([prompt_ids[p][mask[p]].expand(group, -1), completion_ids[p]], 1) for p in range(2)]
    truth = torch.stack([causal(input_ids=w, use_cache=False).logits[:, -length - 1 : -1] for w in whole]).flatten(0, 1)

    def test(name: str, logits: Callable[[], Tensor], expected: Tensor = truth) -> bool:
        try:
            error = (logits().double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        except Exception as reason:  # whatever a model raises here means that it cannot
            backbone.refused[name] = f"{type(reason).__name__}: {reason}"
            return False
        if not error <= _TOLERANCE[truth.dtype]:
            backbone.refused[name] = f"logits differ by {float(error):.1e}"
            return False
        return True

    def score(shared: bool) -> Tensor:
        return backbone.logits(backbone.score(prompt_ids, mask, completion_ids, shared=shared))

    def plain() -> Tensor:
        if type(backbone.head) is not nn.Linear or backbone.body is causal:
            raise TypeError(f"the head is a {type(backbone.head).__name__}")
        backbone.plain_head = True
        return score(False) if backbone.ignores_padding else unpadded()

    def unpadded() -> Tensor:
        return torch.cat([backbone.logits(backbone.read(w))[:, -length - 1 : -1] for w in whole])

    backbone.ignores_padding = test("ignores_padding", lambda: score(False))
    backbone.plain_head = test("plain_head", plain)
    if not backbone.ignores_padding:
        # only prompts of one length can be run together, so only those are tried
        prompt_ids, completion_ids, mask = prompt_ids[:1], completion_ids[:1], mask[:1]
        truth = truth[:group]

    def shared() -> Tensor:
        with torch.enable_grad():
            hook = causal.get_input_embeddings().register_forward_hook(lambda *call: call[-1].detach().requires_grad_())
            try:
                cache = backbone.new_cache()
                backbone.read(prompt_ids, mask, cache=cache)
            finally:
                hook.remove()
        if not all(layer.keys.requires_grad and layer.values.requires_grad for layer in cache.layers):
            raise TypeError("the cache does not keep its gradient")
        return score(True)

    def step_by_step(packed: bool = False) -> Tensor:
        from guerdon.language.generation import _Cached, _Packed

        reader = (_Packed if packed else _Cached)(backbone, prompt_ids, mask, group, length)
        chosen = completion_ids.flatten(0, 1)
        steps = [reader.start(), reader.next(chosen[:, 0], 0)]
        # the rows are put in another order on the way, as when samples leave the batch
        order = torch.arange(len(truth), device=device).flip(0)
        reader = reader.keep(order)
        steps += [reader.next(chosen[order, step], step)[order] for step in range(1, length - 1)]
        return torch.stack(steps, 1)

    def wide() -> Tensor:
        from transformers.cache_utils import DynamicLayer

        if causal.config._attn_implementation != "sdpa" or any(
            type(c) is not DynamicLayer for c in backbone.new_cache().layers
        ):
            raise TypeError("the layers need masks of their own")
        backbone.wide_mask = True
        return step_by_step()

    backbone.shares_prompt = test("shares_prompt", shared, truth)
    backbone.caches = test("caches", step_by_step, truth)
    backbone.wide_mask = backbone.caches and test("wide_mask", wide, truth)
    backbone.packs = backbone.wide_mask and test("packs", lambda: step_by_step(packed=True), truth)
    return backbone
