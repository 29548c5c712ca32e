"""Sampling from a causal language model, a group of samples per prompt, with the prompt computed once.

A token is chosen by inverting the cumulative distribution at a given uniform number. Each prompt has its own stream of
uniform numbers, so what is sampled for it does not depend on which other prompts are in the batch, nor on the number of
processes the prompts are spread over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guerdon.errors import NumericsError
from guerdon.language.allowed import Allowed
from guerdon.language.backbone import IMPOSSIBLE, Backbone, prompt_positions


class Generation(NamedTuple):
    """Samples of P prompts in groups of G, T tokens long.

    Attributes:
        completion_ids: [P, G, T] tokens; padding after the end.
        mask: bool [P, G, T], True up to and including the first end token.
        logp: [P, G, T] log-probability of each token, 0 where not live.
        truncated: bool [P, G], True where the end token never came.
    """

    completion_ids: Tensor
    mask: Tensor
    logp: Tensor
    truncated: Tensor


class Uniforms:
    """Uniform numbers in [0, 1) for sampling: one stream per prompt, drawn a block of steps at a time.

    Args:
        seeds: one per prompt.
        group_size: samples per prompt.
        device: where the numbers go; they are always drawn on the CPU.
        block: steps drawn at once. The numbers depend on it, so it is not a setting to tune.

    Example:
        >>> one, many = Uniforms([7], 2), Uniforms([3, 7], 2)
        >>> bool((one(0) == many(0)[2:]).all())
        True
    """

    def __init__(
        self, seeds: Sequence[int], group_size: int, device: torch.device | str = "cpu", *, block: int = 32
    ) -> None:
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape = (block, group_size)
        self.device = torch.device(device)
        # the only device without float64
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.at = -1
        self.numbers = torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """The numbers [P * G] of a step; steps are asked for in order."""
        block, offset = divmod(step, self.shape[0])
        if block < self.at:
            raise ValueError(f"language.generation: uniform numbers of step {step} are gone; ask for steps in order.")
        while self.at < block:
            drawn = [torch.rand(self.shape, dtype=torch.float64, generator=g) for g in self.generators]
            # kept clear of 1, so that a number times a total of mass stays below that total
            self.numbers = torch.cat(drawn, 1).clamp_(max=1 - 2.0**-24).to(self.device, self.dtype)
            self.at += 1
        return self.numbers[offset]


def generate(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    group_size: int,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    uniforms: Callable[[int], Tensor] | None = None,
    min_new_tokens: int = 0,
    all_done: Callable[[bool], bool] | None = None,
    allowed: Allowed | None = None,
) -> Generation:
    """Sample completions of each prompt.

    The prompts run once; their cache is then repeated over the group. Sampling stops when every sample has ended, and
    samples that have ended leave the batch as soon as they are half of it.

    Args:
        model: a `Backbone`, or a causal language model of transformers (which is then probed).
        prompt_ids: [P, S] tokens, padded on the left.
        prompt_mask: bool [P, S], True where a token is no padding.
        group_size: G, samples per prompt.
        max_new_tokens: most tokens of a sample.
        eos_ids: tokens that end a sample.
        pad_id: fills the rest of a sample that has ended.
        temperature: divides the logits; 0 = always the most probable token.
        top_p: smallest set of most probable tokens with at least this probability; 1 = all.
        top_k: number of most probable tokens; 0 = all. Applied before `top_p`.
        uniforms: step -> numbers [P * G] in [0, 1), such as `Uniforms`. Not needed at temperature 0.
        min_new_tokens: tokens before which no sample ends.
        all_done: asks the other processes whether they are done too, where all must run the model equally often.
        allowed: the tokens that samples may be made of; all others then have no probability. None = all.

    Returns:
        A `Generation`. `logp` is under softmax(logits / temperature) over the whole vocabulary, which is what training
        computes again: top-k, top-p and `min_new_tokens` do not enter. At temperature 0 it is under softmax(logits).

    Raises:
        NumericsError: the model gave logits that are no numbers.

    Gradient:
        None.

    Edge cases:
        T is the length of the longest sample. A sample whose first token is an end token has one live step.
    """
    from guerdon.language.probe import probe

    if not isinstance(model, Backbone):
        model = probe(model)
    if temperature > 0 and uniforms is None:
        raise ValueError("language.generate: sampling needs uniforms, such as Uniforms(seeds, group_size).")
    prompts, rows, device = len(prompt_ids), len(prompt_ids) * group_size, prompt_ids.device
    choose = _Chooser(temperature, top_p, top_k, eos_ids, min_new_tokens, device)
    # inference mode is faster, but sharded weights gathered in it could not be trained afterwards
    with torch.no_grad() if all_done else torch.inference_mode():
        reader = _reader(model, group_size, device)(model, prompt_ids, prompt_mask, group_size, max_new_tokens)
        logits = reader.start()
        ids = torch.full((max_new_tokens, rows), pad_id, device=device)
        logp = logits.new_zeros(max_new_tokens, rows)
        # the rows still in the batch; None = all
        batch: Tensor | None = None
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        length = max_new_tokens
        keeper = None if allowed is None else _Keeper(allowed, rows, max_new_tokens, device)
        # asking an accelerator for the count waits for it
        every = 1 if device.type == "cpu" else 8
        for step in range(max_new_tokens):
            numbers = None if uniforms is None or temperature == 0 else uniforms(step)
            if batch is not None and numbers is not None:
                numbers = numbers[batch]
            if keeper is not None:
                logits = keeper.cut(logits, batch, step)
            chosen, value = choose(logits, numbers, step)
            if keeper is not None:
                keeper.take(chosen, batch)
            if batch is None:
                ids[step], logp[step] = chosen, value
            else:
                ids[step, batch], logp[step, batch] = chosen, value
            if step + 1 == max_new_tokens:
                break
            if step + 1 > min_new_tokens:
                finished = finished | choose.ends(chosen)
                if (step + 1) % every == 0:
                    left = len(finished) - int(finished.sum())
                    if all_done(left == 0) if all_done else left == 0:
                        length = step + 1
                        break
                    if 0 < left <= len(finished) // 2:
                        kept = (~finished).nonzero().squeeze(1)
                        batch = kept if batch is None else batch[kept]
                        chosen, finished = chosen[kept], finished[kept]
                        reader = reader.keep(kept)
            logits = reader.next(chosen, step)
        ids, logp = ids[:length].T.contiguous(), logp[:length].T.contiguous()
    # out here, so that the results are ordinary tensors
    ends = choose.ends(ids)
    mask = ends.long().cumsum(1) - ends.long() == 0
    length = int(mask.sum(1).max())
    ids, mask, logp = ids[:, :length], mask[:, :length], logp[:, :length]
    bad = ~logp.masked_fill(~mask, 0.0).isfinite().all(1)
    if bool(bad.any()):
        prompt, sample = divmod(int(bad.nonzero()[0]), group_size)
        raise NumericsError(
            f"language.generate: the log-probability of a token of prompt {prompt}, sample {sample} is not finite. "
            "The model's weights or activations have overflowed; lower the learning rate or use a wider dtype."
        )
    shape = (prompts, group_size, length)
    return Generation(
        ids.masked_fill(~mask, pad_id).reshape(shape),
        mask.reshape(shape),
        logp.masked_fill(~mask, 0.0).reshape(shape),
        ~ends.any(1).reshape(prompts, group_size),
    )


class _Chooser:
    """Chooses a token per row, and tells which tokens end a sample."""

    def __init__(
        self,
        temperature: float,
        top_p: float,
        top_k: int,
        eos_ids: Sequence[int],
        min_new_tokens: int,
        device: torch.device,
    ) -> None:
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.eos, self.min_new_tokens = torch.tensor(list(eos_ids), dtype=torch.long, device=device), min_new_tokens
        self.single = int(eos_ids[0]) if len(eos_ids) == 1 else None

    def ends(self, ids: Tensor) -> Tensor:
        return ids == self.single if self.single is not None else torch.isin(ids, self.eos)

    def __call__(self, logits: Tensor, numbers: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        table = torch.log_softmax(logits, -1)
        early = step < self.min_new_tokens
        allowed = table.index_fill(1, self.eos, -torch.inf) if early else table
        chosen = allowed.argmax(-1, keepdim=True) if numbers is None else self._draw(allowed, numbers, early)
        return chosen.squeeze(1), table.gather(1, chosen).squeeze(1)

    def _draw(self, table: Tensor, numbers: Tensor, early: bool) -> Tensor:
        tokens = table.shape[-1]
        order = None
        if 0 < self.top_k < tokens:
            table, order = table.topk(self.top_k, -1)
        elif self.top_p < 1:
            table, order = table.sort(dim=-1, descending=True, stable=True)
        mass = table.exp().cumsum(-1, dtype=numbers.dtype)
        total = mass[:, -1:]
        if self.top_p < 1:
            # a token is kept while the more probable ones have less than top_p of the mass; the most probable always is
            kept = (mass < self.top_p * total).sum(-1, keepdim=True).clamp_(max=mass.shape[-1] - 1)
            total = mass.gather(1, kept)
        # the first token whose cumulative mass exceeds the number: never one without mass
        place = torch.searchsorted(mass, numbers[:, None] * total, right=True)
        # only logits that are no numbers lead beyond the last token; generate() reports them
        place.clamp_(max=mass.shape[-1] - 1)
        return place if order is None else order.gather(1, place)


class _Keeper:
    """Keeps samples to the allowed tokens, row by row where a grammar says which may come next."""

    def __init__(self, allowed: Allowed, rows: int, room: int, device: torch.device) -> None:
        self.allowed, self.room, self.ids = allowed, room, allowed.ids(device)
        self.states = None if allowed.grammar is None else [allowed.grammar.start] * rows

    def cut(self, logits: Tensor, batch: Tensor | None, step: int) -> Tensor:
        """The logits with those of other tokens out of the way."""
        own = logits[:, self.ids]
        if self.states is not None:
            left = self.room - step
            masks = torch.stack([self.allowed.mask(self.states[row], left) for row in self._rows(batch)])
            own = own.masked_fill(~masks.to(own.device), IMPOSSIBLE)
        return torch.full_like(logits, IMPOSSIBLE).index_copy_(1, self.ids, own)

    def take(self, chosen: Tensor, batch: Tensor | None) -> None:
        """Note what came next."""
        if self.states is not None:
            for row, token in zip(self._rows(batch), chosen.tolist(), strict=True):
                self.states[row] = self.allowed.next(self.states[row], token)

    def _rows(self, batch: Tensor | None) -> Sequence[int]:
        assert self.states is not None
        return range(len(self.states)) if batch is None else batch.tolist()


# the work of a packed step grows with the square of the group; above this a row per sample is faster
_LARGEST_PACK = 16


def _reader(model: Backbone, group: int, device: torch.device) -> type[_Cached] | type[_Whole]:
    """What reads with the least work; packing was measured on CPU only."""
    if model.packs and 1 < group <= _LARGEST_PACK and device.type == "cpu":
        return _Packed
    return _Cached if model.caches else _Whole


class _Cached:
    """Reads token by token from a cache with a row per sample."""

    def __init__(self, model: Backbone, prompt_ids: Tensor, prompt_mask: Tensor, group: int, room: int) -> None:
        self.model, self.ids, self.group, self.room = model, prompt_ids, group, room
        self.prompt_mask = None if bool(prompt_mask.all()) else prompt_mask
        self.width = prompt_ids.shape[1]
        self.cache = model.new_cache()

    def start(self) -> Tensor:
        logits = self._read_prompts()
        repeat_cache(self.cache, self.group, self.room)
        self._lay_out(torch.arange(len(logits), device=logits.device))
        return logits

    def _read_prompts(self) -> Tensor:
        """Logits [P * G, V] after the prompts, which are in the cache then, once each."""
        mask = self.prompt_mask
        positions = None if mask is None else prompt_positions(mask)
        reading = self.model.read(self.ids, mask, positions, self.cache, last=True)
        return self.model.logits(reading)[:, 0].repeat_interleave(self.group, 0)

    def _lay_out(self, rows: Tensor) -> None:
        """Masks and positions for these samples of all P * G."""
        if self.prompt_mask is not None:
            mask = self.prompt_mask[rows // self.group]
            self.positions = mask.sum(1, keepdim=True)
            self.mask = torch.cat([mask, mask.new_ones(len(rows), self.room)], 1)

    def next(self, chosen: Tensor, step: int) -> Tensor:
        mask = positions = None
        if self.prompt_mask is not None:
            mask, positions = self.mask[:, : self.width + step + 1], self.positions + step
            mask = mask[:, None, None] if self.model.wide_mask else mask
        return self.model.logits(self.model.read(chosen[:, None], mask, positions, self.cache, last=True))[:, 0]

    def keep(self, rows: Tensor) -> _Cached:
        self.cache.batch_select_indices(rows)
        if self.prompt_mask is not None:
            self.mask, self.positions = self.mask[rows], self.positions[rows]
        return self


class _Packed(_Cached):
    """Reads token by token from a cache with a row per prompt: its samples go on in it side by side, under a mask.

    The prompt stands in the cache once, and all queries of a group meet it in one product. But each sample also passes
    over the tokens of the others.
    """

    def start(self) -> Tensor:
        logits = self._read_prompts()
        repeat_cache(self.cache, 1, self.group * self.room)
        mask = torch.ones_like(self.ids, dtype=torch.bool) if self.prompt_mask is None else self.prompt_mask
        own = torch.eye(self.group, dtype=torch.bool, device=mask.device).repeat(1, self.room)
        pair = mask[:, None].expand(-1, self.group, -1), own.expand(len(mask), -1, -1)
        hidden = ~torch.cat(pair, 2)[:, None]
        # what is added to the scores: a bool mask would be turned into this by every layer for every token
        self.mask = torch.zeros(hidden.shape, dtype=self.cache.layers[0].keys.dtype, device=mask.device)
        self.mask.masked_fill_(hidden, -torch.inf)
        self.positions = mask.sum(1, keepdim=True).expand(-1, self.group)
        return logits

    def next(self, chosen: Tensor, step: int) -> Tensor:
        mask = self.mask[..., : self.width + (step + 1) * self.group]
        reading = self.model.read(chosen.view(-1, self.group), mask, self.positions + step, self.cache)
        return self.model.logits(reading).flatten(0, 1)

    def keep(self, rows: Tensor) -> _Cached:
        """Groups are no longer whole: from here on a row per sample."""
        apart = _Cached(self.model, self.ids, self.mask[:, 0, 0, : self.width] == 0, self.group, self.room)
        apart.cache = self.cache
        for layer in self.cache.layers:
            layer.unpack(rows, self.group, self.width)
        apart._lay_out(rows)
        return apart


class _Whole:
    """Reads the whole sequence again for every token."""

    def __init__(self, model: Backbone, prompt_ids: Tensor, prompt_mask: Tensor, group: int, room: int) -> None:
        self.model, self.padded = model, not bool(prompt_mask.all())
        self.ids, self.mask = prompt_ids, prompt_mask
        self.group = group

    def start(self) -> Tensor:
        logits = self._read()
        self.ids, self.mask = self.ids.repeat_interleave(self.group, 0), self.mask.repeat_interleave(self.group, 0)
        return logits.repeat_interleave(self.group, 0)

    def next(self, chosen: Tensor, step: int) -> Tensor:
        self.ids = torch.cat([self.ids, chosen[:, None]], 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return self._read()

    def keep(self, rows: Tensor) -> _Whole:
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        return self

    def _read(self) -> Tensor:
        positions = prompt_positions(self.mask) if self.padded else None
        reading = self.model.read(self.ids, self.mask if self.padded else None, positions, last=True)
        return self.model.logits(reading)[:, 0]


def repeat_cache(cache: Any, group: int, room: int) -> None:
    """Repeat a cache over the group, leaving room for more tokens where a layer just grows."""
    from transformers.cache_utils import DynamicLayer

    kind = _roomy_layer()
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            cache.layers[index] = kind(layer, group, room)
        else:
            layer.batch_repeat_interleave(group)


_KINDS: dict[str, type] = {}


def _roomy_layer() -> type:
    """A cache layer that writes new tokens into memory set aside, instead of copying everything for every token."""
    if "roomy" in _KINDS:
        return _KINDS["roomy"]
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        def __init__(self, layer: DynamicLayer, group: int, room: int) -> None:
            super().__init__()
            self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
            self.length = layer.get_seq_length()
            room = min(room, self._growth())
            self.key_store = self._store(layer.keys, group, room)
            self.value_store = self._store(layer.values, group, room)
            self.keys, self.values = self._views()

        def _growth(self) -> int:
            return max(64, self.length)

        def _store(self, states: Any, group: int, room: int) -> Tensor:
            batch, heads, length, width = states.shape
            store = states.new_empty(batch, group, heads, length + room, width)
            store[:, :, :, :length] = states[:, None]
            return store.flatten(0, 1)

        def _views(self) -> tuple[Tensor, Tensor]:
            return self.key_store[:, :, : self.length], self.value_store[:, :, : self.length]

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            end = self.length + key_states.shape[-2]
            if end > self.key_store.shape[2]:
                room = max(end - self.length, self._growth())
                self.key_store, self.value_store = self._store(self.keys, 1, room), self._store(self.values, 1, room)
            self.key_store[:, :, self.length : end] = key_states
            self.value_store[:, :, self.length : end] = value_states
            self.length = end
            views = self.keys, self.values = self._views()
            return views

        def unpack(self, rows: Tensor, group: int, prompt: int) -> None:
            """From a row per prompt, its samples' tokens by turns after it, to a row for each of these samples."""

            def apart(states: Tensor) -> Tensor:
                own = states[:, :, prompt:].unflatten(2, (-1, group)).permute(0, 3, 1, 2, 4).flatten(0, 1)
                return torch.cat([states[rows // group, :, :prompt], own[rows]], 2)

            self.key_store, self.value_store = map(apart, self._views())
            self.length = self.key_store.shape[2]
            self.keys, self.values = self._views()

        def batch_select_indices(self, indices: Tensor) -> None:
            self.key_store, self.value_store = self.key_store[indices], self.value_store[indices]
            self.keys, self.values = self._views()

    _KINDS["roomy"] = RoomyLayer
    return RoomyLayer
