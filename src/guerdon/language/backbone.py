"""A causal language model of transformers as body and head, and what a probe found out about it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from guerdon.language.logprob import logits_logprob, project, token_logit, token_logprob

IMPOSSIBLE = -1e30
"""The logit of a token that may not come: its probability is exactly 0, and its log-probability is a number."""


class Reading(NamedTuple):
    """What a model says at some positions.

    Attributes:
        hidden: [..., H] if the head is one matrix, or if it was asked for.
        logits: [..., V] if the head is more than one matrix.
    """

    hidden: Any
    logits: Any

    def map(self, function: Any) -> Reading:
        """Apply `function` to the parts that are there."""
        return Reading(*(None if part is None else function(part) for part in self))


def join_readings(first: Reading, second: Reading, dim: int) -> Reading:
    """Put two readings one after the other."""
    pairs = zip(first, second, strict=True)
    return Reading(*(None if a is None or b is None else torch.cat([a, b], dim) for a, b in pairs))


@dataclass(eq=False)
class Backbone:
    """A causal language model as a body that gives hidden states and a head that gives logits.

    Attributes:
        causal: the transformers model, with adapters in place but without peft's wrapper.
        plain_head: the logits are hidden @ matrix.T + bias, so they can be made a chunk at a time.
        shares_prompt: a cache filled by the prompts can be repeated over the group and keeps its gradient.
        caches: sampling can go on from a cache.
        wide_mask: the body takes a ready mask [B, 1, Q, S], which saves building one for every token.
        packs: under such a mask the samples of a group can be sampled in one row, with the prompt cached once.
        ignores_padding: padding on the left changes nothing.
        refused: why a short cut is not taken, by its name.
    """

    causal: Any
    plain_head: bool = False
    shares_prompt: bool = False
    caches: bool = False
    wide_mask: bool = False
    packs: bool = False
    ignores_padding: bool = True
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters

    @property
    def body(self) -> Any:
        """The model without its output layer."""
        return self.causal.base_model

    @property
    def head(self) -> nn.Linear:
        """The output layer."""
        return self.causal.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self.causal.get_input_embeddings().weight.device

    def new_cache(self) -> Any:
        """An empty cache of the kind the model needs."""
        from transformers import DynamicCache

        return DynamicCache(config=self.causal.config)

    def read(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        *,
        last: bool = False,
        hidden: bool = False,
    ) -> Reading:
        """Run the model.

        Args:
            ids: [B, S] tokens.
            mask: [B, cached + S] True where a token is no padding, or [B, 1, S, cached + S]; None = no padding.
            positions: [B, S] position of each token; None = counted from the start.
            cache: what came before; grows by S.
            last: give the last position only, [B, 1, ...].
            hidden: give hidden states even if the head needs the logits.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = cache
        if positions is not None and self.takes_positions:
            inputs["position_ids"] = positions
        if self.plain_head:
            states = self.body(**inputs).last_hidden_state
            return Reading(states[:, -1:] if last else states, None)
        output = self.causal(**inputs, output_hidden_states=hidden)
        reading = Reading(output.hidden_states[-1] if hidden else None, output.logits)
        return reading.map(lambda part: part[:, -1:]) if last else reading

    def logits(self, reading: Reading) -> Tensor:
        """Logits in float32 (or float64), without gradient."""
        if reading.logits is None:
            head = self.head
            return project(reading.hidden, head.weight, head.bias)
        return reading.logits if reading.logits.dtype == torch.float64 else reading.logits.float()

    def logprob(
        self,
        reading: Reading,
        ids: Tensor,
        *,
        temperature: float,
        chunk: int | None = None,
        entropy: bool = True,
        among: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of `ids` [N] at the positions of a reading [N, ...], and the entropy.

        With `among` [A], rising, only these tokens have any probability, and `ids` are places in it; `masks` bool [N, A] says
        which of them at each position.
        """
        logits, head = reading.logits, self.head
        if logits is not None:
            logits = logits if among is None else logits[..., among]
        else:
            matrix = head.weight if among is None else head.weight[among]
            bias = head.bias if among is None or head.bias is None else head.bias[among]
            if masks is None:
                return token_logprob(
                    reading.hidden, matrix, ids, bias=bias, temperature=temperature, chunk=chunk, entropy=entropy
                )
            wide = torch.promote_types(torch.float32, reading.hidden.dtype)
            logits = nn.functional.linear(
                reading.hidden.to(wide), matrix.to(wide), None if bias is None else bias.to(wide)
            )
        if masks is not None:
            logits = logits.masked_fill(~masks, IMPOSSIBLE)
        return logits_logprob(logits, ids, temperature=temperature, entropy=entropy)

    def logit(self, reading: Reading, ids: Tensor, *, temperature: float) -> Tensor:
        """The logit of `ids` [N] at the positions of a reading [N, ...], divided by the temperature; float32 at least."""
        if reading.logits is not None:
            chosen = reading.logits.gather(-1, ids[:, None]).squeeze(-1)
            return chosen.to(torch.promote_types(chosen.dtype, torch.float32)) / temperature
        head = self.head
        return token_logit(reading.hidden, head.weight, ids, bias=head.bias, temperature=temperature)

    def score(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        *,
        shared: bool,
        hidden: bool = False,
    ) -> Reading:
        """What the model says where each token of the completions is produced.

        Args:
            prompt_ids: [P, S] tokens of the prompts, padded on the left.
            prompt_mask: bool [P, S], True where a token is no padding.
            completion_ids: [P, G, T].
            shared: run each prompt once for its group; otherwise every whole sequence.
            hidden: give hidden states even if the head needs the logits.

        Returns:
            A reading with leading dimensions [P * G, T].
        """
        prompts, group, length = completion_ids.shape
        padded = not bool(prompt_mask.all())
        start = prompt_mask.sum(1)
        positions = torch.arange(length - 1, device=start.device) + start[:, None] if padded else None
        before = prompt_positions(prompt_mask) if padded else None
        tokens = completion_ids.reshape(prompts * group, length)[:, :-1]
        many = None if positions is None else positions.repeat_interleave(group, 0)
        if shared:
            cache = self.new_cache() if length > 1 else None
            first = self.read(prompt_ids, prompt_mask if padded else None, before, cache, last=True, hidden=hidden)
            first = first.map(lambda part: part.repeat_interleave(group, 0))
            if cache is None:
                return first
            cache.batch_repeat_interleave(group)
            mask = extend_mask(prompt_mask, group, length - 1) if padded else None
            return join_readings(first, self.read(tokens, mask, many, cache, hidden=hidden), 1)
        ids = torch.cat([prompt_ids.repeat_interleave(group, 0), tokens], 1)
        mask = extend_mask(prompt_mask, group, length - 1) if padded else None
        everywhere = None
        if before is not None and many is not None:
            everywhere = torch.cat([before.repeat_interleave(group, 0), many], 1)
        reading = self.read(ids, mask, everywhere, hidden=hidden)
        return reading.map(lambda part: part[:, prompt_ids.shape[1] - 1 :])


def prompt_positions(mask: Tensor) -> Tensor:
    """Position of each token [P, S] when padding does not count."""
    return (mask.long().cumsum(1) - 1).clamp_(min=0)


def extend_mask(prompt_mask: Tensor, group: int, length: int) -> Tensor:
    """Mask [P * G, S + length] of the prompts, repeated over the group, and `length` tokens after them."""
    mask = prompt_mask.repeat_interleave(group, 0)
    return torch.cat([mask, mask.new_ones(len(mask), length)], 1)
