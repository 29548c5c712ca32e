"""A causal language model as a policy: it samples completions of prompts and scores them again with gradient."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from guerdon.errors import CheckpointError, DataError, RecipeError, ShapeError, nearest, require
from guerdon.language.allowed import Allowed, Grammar
from guerdon.language.backbone import Backbone, Reading
from guerdon.language.generation import Generation, Uniforms, generate
from guerdon.language.logprob import LOGITS_IN_A_CHUNK, LOGITS_ON_A_DEVICE
from guerdon.language.offsets import Offsets
from guerdon.language.probe import probe
from guerdon.language.revision import TEMPLATE, check_template, revision_prompt
from guerdon.objectives.loss import Imitation, Loss
from guerdon.rollout import Rollout

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
_CRITIC_FILE = "critic.safetensors"
_LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}


class LogProb(NamedTuple):
    """What `log_prob` gives, each [P, G, T], 0 where a step is not live; `entropy` in nats, `values` with a critic, which are
    [P, G, T, K] if it has K > 1 heads.

    `kl` is None: in a loss the divergence of tokens is estimated; see `divergence` for the exact one of samples. `normaliser`
    is the logsumexp of a position's logits, so that the logit of its token is logp + normaliser.
    """

    logp: Tensor
    entropy: Tensor | None
    values: Tensor | None
    kl: Tensor | None = None
    normaliser: Tensor | None = None


class _Live(NamedTuple):
    """A model's reading at the N live tokens of samples [P, G, T].

    Attributes:
        reading: [N, ...].
        ids: [N], the tokens; their places in `among` where that is given.
        kept: [N], where they are in the flattened samples; None = everywhere.
        shape: P, G and the longest sample's length.
        length: T.
        among: the only tokens that may come, rising; None = all.
        masks: which of these at each token, bool [N, A]; None = all.
    """

    reading: Reading
    ids: Tensor
    kept: Tensor | None
    shape: torch.Size
    length: int
    among: Tensor | None = None
    masks: Tensor | None = None

    def spread(self, flat: Tensor) -> Tensor:
        """Values [N] as [P, G, T], or [N, K] as [P, G, T, K]; 0 elsewhere."""
        of_each = flat.shape[1:]
        if self.kept is not None:
            flat = flat.new_zeros(self.shape.numel(), *of_each).index_copy(0, self.kept, flat)
        table = flat.view(*self.shape, *of_each)
        more = self.length - self.shape[2]
        return nn.functional.pad(table, [0, 0] * len(of_each) + [0, more]) if more else table


class LanguagePolicy(nn.Module):
    """Any causal language model of transformers, with or without LoRA adapters and a critic.

    The prompt is computed once for its group, in sampling and in training, where the model allows that: a probe at load
    compares the short cuts with whole sequences (see `backbone`). Dropout is always off, since a policy's
    log-probabilities must be the same when they are computed again.

    Everything that runs the model goes through `forward`, so a wrapper of torch (DDP, FSDP) can be put around the
    policy; hand it to `sample` and `log_prob` as `module`.
    """

    # the second only where a loop asks for it: see `keep_offsets`
    fields = ("truncated", "offsets")

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_new_tokens: int = 0,
        gradient_checkpointing: bool = False,
        critic: bool | int = False,
        logprob_chunk: int | None = None,
        revision: str = TEMPLATE,
    ) -> None:
        super().__init__()
        _check_settings(max_new_tokens, temperature, top_p, top_k, min_new_tokens)
        check_template(revision)
        self.revision = revision
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.min_new_tokens = max_new_tokens, min_new_tokens
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.logprob_chunk = logprob_chunk
        self.backbone: Backbone = probe(model)
        self.eos_ids = _end_ids(self.backbone.causal, tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            _switch_checkpointing_on(self.backbone.causal)
        # set by a loop with a reward that asks for the field `offsets`
        self.keep_offsets = False
        self._spans = Offsets(tokenizer)
        self.allowed: Allowed | None = None
        self.critic: nn.Linear | None = None
        if critic:
            self.add_critic(int(critic))
        # in a tuple, so that it is neither trained nor saved nor wrapped with the policy
        self._reference: tuple[Backbone, ...] = ()
        _switch_dropout_off(model)
        self.train(False)

    @classmethod
    def load(
        cls,
        model: Any,
        *,
        tokenizer: Any = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_new_tokens: int = 0,
        lora: dict[str, Any] | None = None,
        dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
        critic: bool | int = False,
        trust_remote_code: bool = False,
        logprob_chunk: int | None = None,
        revision: str = TEMPLATE,
    ) -> LanguagePolicy:
        """Load a policy from a folder, from the hub, or around a model that is there already.

        Args:
            model: a folder written by `save` or by transformers or peft, a name on the hub, or a model object.
            tokenizer: a tokenizer object; None = the one beside the model (needed with a model object).
            max_new_tokens: most tokens of a sample.
            temperature: divides the logits, in sampling and in training alike; positive.
            top_p: sample from the most probable tokens with at least this probability; 1 = all.
            top_k: sample from that many most probable tokens; 0 = all.
            min_new_tokens: tokens before which no sample ends.
            lora: train adapters instead of the model: `rank`, `alpha`, `target_modules` (default: all linear layers).
            dtype: of the weights.
            gradient_checkpointing: compute activations again in the backward pass, to save memory.
            critic: add a linear head that values every step, or so many; a critic that was saved has those it had.
            trust_remote_code: run model code that comes with the files.
            logprob_chunk: rows whose logits are held at once; None = as many as make 16M logits.
            revision: the text of a prompt that asks for a better answer than a draft, with the slots {prompt} and {draft};
                see `revision_prompts`.

        Raises:
            RecipeError: a setting is out of range or unknown, or the tokenizer is missing.
            MissingExtraError: transformers (or, for LoRA, peft) is not installed.
        """
        require("transformers", "language")
        if dtype not in _DTYPES:
            raise RecipeError(
                f"policy.dtype: {dtype!r} is not known.{nearest(dtype, _DTYPES)} There are {sorted(_DTYPES)}."
            )
        if isinstance(model, (str, Path)):
            source = str(model)
            try:
                tokenizer = tokenizer if tokenizer is not None else _load_tokenizer(source, trust_remote_code)
                network = _load_model(source, _DTYPES[dtype], trust_remote_code)
            except (OSError, ValueError) as error:  # what transformers raises for a wrong name, folder or file
                reason = str(error).split("\n")[0]
                raise RecipeError(
                    f"policy.model: {source!r} cannot be loaded as a causal language model with its tokenizer: {reason} "
                    "Give a folder written by save_pretrained, or a name on the Hugging Face hub."
                ) from error
        else:
            source, network = None, model.to(_DTYPES[dtype])
        if tokenizer is None:
            raise RecipeError("policy: a model object needs its tokenizer; pass tokenizer=.")
        if lora is not None:
            network = _add_lora(network, lora)
        policy = cls(
            network,
            tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_new_tokens=min_new_tokens,
            gradient_checkpointing=gradient_checkpointing,
            critic=critic,
            logprob_chunk=logprob_chunk,
            revision=revision,
        )
        if policy.critic is not None and source is not None and (Path(source) / _CRITIC_FILE).exists():
            from safetensors.torch import load_file

            saved = load_file(Path(source) / _CRITIC_FILE)
            policy.add_critic(len(saved["weight"]))
            policy.critic.load_state_dict(saved)
        return policy

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    @property
    def has_critic(self) -> bool:
        """Whether there is a critic."""
        return self.critic is not None

    @property
    def max_steps(self) -> int:
        """The longest sample there can be."""
        return self.max_new_tokens

    @property
    def has_adapters(self) -> bool:
        """Whether peft adapters are trained, the reference being the model without them."""
        return hasattr(self.model, "peft_config")

    def add_critic(self, heads: int = 1) -> None:
        """Add a linear head on the hidden state that produces each token, or several; they start at zero.

        Args:
            heads: values of each step.
        """
        embedding = self.backbone.causal.get_input_embeddings().weight
        width = getattr(self.backbone.causal.config.get_text_config(), "hidden_size", embedding.shape[1])
        self.critic = nn.Linear(width, heads, device=embedding.device, dtype=embedding.dtype)
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)

    def restrict(self, characters: str, grammar: Grammar | None = None) -> None:
        """Keep samples to tokens made of these characters, in sampling and in training alike.

        Args:
            characters: those allowed.
            grammar: what a whole sample must be; None = any text of these characters.

        Raises:
            RecipeError: the tokenizer has no such tokens, or not all that the grammar may need.
        """
        allowed = Allowed(self.tokenizer, self.eos_ids, characters, grammar)
        if grammar is not None and grammar.shortest(grammar.start) + 1 > self.max_new_tokens:
            raise RecipeError(f"policy.max_new_tokens: {self.max_new_tokens} are too few for any text of the grammar.")
        self.allowed = allowed

    def add_adapters(self, **lora: Any) -> None:
        """Train LoRA adapters from now on instead of the model, which becomes the reference.

        Args:
            **lora: `rank`, `alpha`, `target_modules`.

        Raises:
            RecipeError: a setting is unknown.
            MissingExtraError: peft is not installed.
        """
        self.model = _add_lora(self.model, lora)
        self.backbone = probe(self.model)
        _switch_dropout_off(self.model)

    def train(self, mode: bool = True) -> LanguagePolicy:
        """Set the mode; the model stays in evaluation mode unless gradient checkpointing needs the other."""
        super().train(mode)
        self.model.train(mode and self.gradient_checkpointing)
        return self

    def _set_mode(self, mode: bool) -> None:
        if self.model.training != mode:
            self.model.train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for reference in self._reference:
            reference.causal._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def encode(
        self, prompts: Sequence[Any], room: int | None = None, *, keep: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens of prompts, padded on the left.

        Args:
            prompts: texts, or lists of chat messages ({"role": ..., "content": ...}), which go through the tokenizer's
                chat template and end where the answer begins.
            room: tokens that must fit after each prompt; None = `max_new_tokens`.
            keep: tokens of a longer prompt that are kept, its last ones; None = all.

        Returns:
            Ids [P, S] and bool mask [P, S], True where a token is no padding.

        Raises:
            DataError: naming the prompt that is empty, too long or cannot be encoded.
        """
        room = self.max_new_tokens if room is None else room
        encoded = enumerate(self._prompt_ids(prompts))
        rows = [self._checked(index, prompts[index], ids, room, keep) for index, ids in encoded]
        if not rows:
            raise DataError("language.policy: no prompts were given.")
        width = max(map(len, rows))
        if not self.backbone.ignores_padding and min(map(len, rows)) < width:
            raise DataError(
                "language.policy: this model does not ignore padding, so all prompts of a batch must have the same "
                f"number of tokens; got {min(map(len, rows))} to {width}."
            )
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        return ids.to(self.device), mask.to(self.device)

    def _prompt_ids(self, prompts: Sequence[Any]) -> list[list[int]]:
        each = range(len(prompts))
        if not all(isinstance(prompt, str) for prompt in prompts):
            return [self._encode_one(index, prompts[index]) for index in each]
        try:
            return self.tokenizer(list(prompts), return_attention_mask=False).input_ids  # many times faster than each
        except Exception:  # tokenizers raise bare exceptions, without saying which text was at fault
            return [self._encode_one(index, prompts[index]) for index in each]

    def _encode_one(self, index: int, prompt: Any) -> list[int]:
        try:
            return prompt_tokens(self.tokenizer, prompt)
        except Exception as error:  # tokenizers raise bare exceptions
            raise DataError(
                f"language.policy: prompt {index} cannot be encoded: {error}. It is {prompt!r:.200}."
            ) from error

    def _checked(self, index: int, prompt: Any, ids: list[int], room: int, keep: int | None) -> list[int]:
        ids = self._opened_once(ids)
        if not ids:
            raise DataError(f"language.policy: prompt {index} is empty. It is {prompt!r:.200}.")
        ids = ids if keep is None else ids[-keep:]
        if (excess := self._excess(ids, room)) > 0:
            raise DataError(
                f"language.policy: prompt {index} is too long: its {len(ids)} tokens and {room} to follow "
                f"(max_new_tokens, or the completion) are more than the {len(ids) + room - excess} positions of the model."
            )
        return ids

    def _opened_once(self, ids: list[int]) -> list[int]:
        # the text may bring the opening token that the tokenizer adds
        return ids[1:] if ids[:2] == [self.tokenizer.bos_token_id] * 2 else ids

    def _excess(self, ids: list[int], room: int) -> int:
        """How many tokens of a prompt are more than the model has positions for, with `room` to follow; 0 if none."""
        longest = getattr(self.backbone.causal.config.get_text_config(), "max_position_embeddings", None)
        return 0 if longest is None else max(len(ids) + room - longest, 0)

    def revision_prompts(
        self, prompts: Sequence[Any], drafts: Sequence[str | None], room: int | None = None
    ) -> tuple[list[Any], list[bool]]:
        """Prompts that ask for a better answer than a draft, by the template `revision`.

        A draft that leaves too few positions for the answer is cut at its end; the prompt and the template never are.

        Args:
            prompts: P texts or message lists (see `revision.revision_prompt`).
            drafts: P answers to improve; None = the prompt stays as it is.
            room: tokens that must fit after each prompt; None = `max_new_tokens`.

        Returns:
            P prompts, and for each whether its draft was cut.

        Raises:
            DataError: a prompt is no text and does not end in a text of the user's.
        """
        room = self.max_new_tokens if room is None else room
        filled = [
            prompt if draft is None else revision_prompt(self.revision, prompt, draft)
            for prompt, draft in zip(prompts, drafts, strict=True)
        ]
        cut, times = [False] * len(filled), self.revision.count("{draft}")
        for index, ids in enumerate(self._prompt_ids(filled)):
            draft, excess = drafts[index], self._excess(self._opened_once(ids), room)
            if draft is None or not excess:
                continue
            cut[index], kept = True, self._completion_ids([draft])[0]
            while excess and kept:
                # cut where tokens meet, and a text read again may have a few tokens more
                kept = kept[: max(len(kept) + -excess // times, 0)]
                draft = self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)
                filled[index] = revision_prompt(self.revision, prompts[index], draft)
                excess = self._excess(self._opened_once(self._encode_one(index, filled[index])), room)
        return filled, cut

    def sample(
        self,
        prompts: Sequence[Any],
        group_size: int,
        seeds: Sequence[int],
        *,
        greedy: bool = False,
        module: Callable[..., Any] | None = None,
    ) -> Rollout:
        """Sample a group of completions for each prompt, without gradient.

        Args:
            prompts: P texts or message lists.
            group_size: G.
            seeds: P integers. A prompt's samples depend on its own seed only, not on the other prompts of the batch.
            greedy: take the most probable token every time instead.
            module: what wraps the policy, if anything does.

        Returns:
            A rollout with `samples` (texts without special tokens), `steps` (prompt_ids, prompt_mask, completion_ids),
            `mask`, `logp_old`, with a critic `values`, `extras["truncated"]` bool [P, G], and `indices` 0 ... P - 1. Where a
            loop has set `keep_offsets`, `extras` has `offsets` [P, G, T, 2]: the characters (from, to) that a token wrote.

        Raises:
            ShapeError: there is not one seed per prompt.
            DataError: a prompt cannot be used.
        """
        if len(seeds) != len(prompts):
            raise ShapeError(
                f"language.policy: sample needs one seed per prompt (P = {len(prompts)}); got {len(seeds)}."
            )
        prompt_ids, prompt_mask = self.encode(prompts)
        steps = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
        options = {"group_size": group_size, "seeds": list(seeds), "greedy": greedy}
        result: Generation = (module or self)(steps, kind="sample", **options)
        steps["completion_ids"] = result.completion_ids
        texts = self.decode(result.completion_ids, result.mask)
        rollout = Rollout(
            prompts=list(prompts),
            samples=texts,
            steps=steps,
            mask=result.mask,
            logp_old=result.logp,
            extras={"truncated": result.truncated, **self._placed(result.completion_ids, result.mask, texts)},
            indices=list(range(len(prompts))),
        )
        if self.critic is not None:
            with torch.no_grad():
                rollout.values = self.log_prob(rollout, module=module).values
        return rollout

    @torch.no_grad()
    def reference_sample(
        self,
        prompts: Sequence[Any],
        group_size: int,
        seeds: Sequence[int],
        *,
        module: Callable[..., Any] | None = None,
    ) -> Rollout:
        """Sample as `sample` does, from the reference; without `values`.

        Args:
            prompts, group_size, seeds, module: as in `sample`.

        Raises:
            CheckpointError: there are no adapters to switch off and `keep_reference` was not called.
        """
        own, critic = self.backbone, self.critic
        with self._as_reference() as reference:
            self.backbone, self.critic = reference, None
            try:
                return self.sample(prompts, group_size, seeds, module=module)
            finally:
                self.backbone, self.critic = own, critic

    def decode(self, completion_ids: Tensor, mask: Tensor) -> list[list[str]]:
        """Texts [P][G] of completions [P, G, T], without special tokens."""
        lengths = mask.sum(-1).tolist()
        rows = [
            ids[:n]
            for group, ns in zip(completion_ids.tolist(), lengths, strict=True)
            for ids, n in zip(group, ns, strict=True)
        ]
        # as they were written: a clean-up of spaces would move the characters that tokens stand for
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        size = completion_ids.shape[1]
        return [texts[p * size : (p + 1) * size] for p in range(len(completion_ids))]

    def _placed(self, completion_ids: Tensor, mask: Tensor, texts: list[list[str]]) -> dict[str, Tensor]:
        """The field `offsets` [P, G, T, 2], if a loop asks for it."""
        if not self.keep_offsets:
            return {}
        offsets = torch.zeros(*mask.shape, 2, dtype=torch.long)
        lengths = mask.sum(-1).tolist()
        for p, group in enumerate(completion_ids.tolist()):
            for g, ids in enumerate(group):
                found = self._spans(ids[: lengths[p][g]], texts[p][g])
                offsets[p, g, : len(found)] = torch.tensor(found, dtype=torch.long).view(-1, 2)
        return {"offsets": offsets.to(mask.device)}

    def log_prob(
        self,
        rollout: Rollout,
        *,
        entropy: bool = True,
        normaliser: bool = False,
        module: Callable[..., Any] | None = None,
    ) -> LogProb:
        """Log-probability of every sampled token under the policy as it is now, at the sampling temperature.

        Args:
            rollout: its `steps` and `mask` are read.
            entropy: also the entropy of the distribution each token came from.
            normaliser: also the logsumexp of its logits, at no further memory.
            module: what wraps the policy, if anything does.

        Returns:
            `LogProb` of [P, G, T], 0 where a step is not live.

        Gradient:
            Through the model's trained parameters and the critic's.
        """
        options = {"entropy": entropy, "normaliser": normaliser}
        return (module or self)(rollout.steps, rollout.mask, kind="log_prob", **options)

    @torch.no_grad()
    def reference_log_prob(self, rollout: Rollout, *, module: Callable[..., Any] | None = None) -> Tensor:
        """Log-probability [P, G, T] under the reference, without gradient.

        Args:
            rollout: its `steps` and `mask` are read.
            module: what wraps the policy, if anything does.

        Raises:
            CheckpointError: there are no adapters to switch off and `keep_reference` was not called.
        """
        return self.reference_scores(rollout, module=module).logp

    @torch.no_grad()
    def reference_scores(
        self, rollout: Rollout, *, normaliser: bool = False, module: Callable[..., Any] | None = None
    ) -> LogProb:
        """What `log_prob` gives, under the reference and without gradient: log-probabilities, on demand the normalisers.

        Args:
            rollout, normaliser, module: as in `log_prob`.

        Raises:
            CheckpointError: there are no adapters to switch off and `keep_reference` was not called.
        """
        return (module or self)(rollout.steps, rollout.mask, kind="reference", normaliser=normaliser)

    @torch.no_grad()
    def divergence(self, rollout: Rollout, *, module: Callable[..., Any] | None = None) -> Tensor:
        """Divergence [P, G, T] from the reference over all tokens that could have been drawn, in nats, without gradient.

        sum_v pi(v) (log pi(v) - log pi_ref(v)) at the temperature of sampling.

        Args:
            rollout: its `steps` and `mask` are read.
            module: what wraps the policy, if anything does.

        Raises:
            CheckpointError: there are no adapters to switch off and `keep_reference` was not called.
        """
        return (module or self)(rollout.steps, rollout.mask, kind="divergence")

    @torch.no_grad()
    def start_log_prob(self, rollout: Rollout) -> Tensor:
        """Log-probability [P, G, T] under what is the reference of a run that starts now: without adapters, if any."""
        if self.has_adapters:
            return self.reference_log_prob(rollout)
        return self.log_prob(rollout, entropy=False).logp

    def _divergence(self, steps: dict[str, Tensor], mask: Tensor) -> Tensor:
        self._refuse_restricted("the exact divergence")
        own = self._read(self.backbone, steps, mask)
        with self._as_reference() as reference:
            other = self._read(reference, steps, mask)
            return own.spread(self._kl_of_readings(own.reading, reference, other.reading))

    def _kl_of_readings(self, own: Reading, reference: Backbone, other: Reading) -> Tensor:
        """[N], a few rows at a time: logits over the vocabulary are never all there."""
        first = next(part for part in own if part is not None)
        words = self.backbone.causal.get_input_embeddings().weight.shape[0]
        most = LOGITS_IN_A_CHUNK if first.device.type == "cpu" else LOGITS_ON_A_DEVICE
        rows = self.logprob_chunk or max(most // words, 1)
        found = []
        for start in range(0, len(first), rows):
            part = slice(start, start + rows)
            tables = [
                (backbone.logits(reading.map(lambda values, part=part: values[part])) / self.temperature).log_softmax(
                    -1
                )
                for backbone, reading in ((self.backbone, own), (reference, other))
            ]
            found.append((tables[0].exp() * (tables[0] - tables[1])).sum(-1))
        return torch.cat(found) if found else first.new_zeros(0)

    def _refuse_restricted(self, what: str) -> None:
        if self.allowed is not None:
            raise RecipeError(
                f"language.policy: {what} of a policy whose samples are kept to some tokens cannot be had."
            )

    def _score_reference(self, steps: dict[str, Tensor], mask: Tensor, normaliser: bool) -> LogProb:
        with self._as_reference() as reference:
            return self._score(reference, steps, mask, entropy=False, normaliser=normaliser)

    @contextmanager
    def _as_reference(self) -> Iterator[Backbone]:
        """The reference: its own copy of the model, or the model with its adapters off for as long as this lasts."""
        if self._reference:
            yield self._reference[0]
            return
        if not self.has_adapters:
            raise CheckpointError("language.policy: there is no reference; call keep_reference() before training.")
        with self.model.disable_adapter():
            yield self.backbone

    def imitation_loss(self, given: Rollout, *, module: Callable[..., Any] | None = None) -> Loss:
        """Minus the log-probability of given completions, summed over their tokens.

        Args:
            given: from `demonstrations`.
            module: what wraps the policy, if anything does.

        Returns:
            The loss; count is the number of live tokens.

        Gradient:
            Through the model's trained parameters.
        """
        logp = self.log_prob(given, entropy=False, module=module).logp
        return Loss(-logp.masked_fill(~given.mask, 0.0).sum(), given.mask.sum().to(logp.dtype), {})

    def imitation(
        self, rollout: Rollout, seeds: Sequence[int], *, drift: bool = False, module: Callable[..., Any] | None = None
    ) -> Imitation:
        """What learning from each sample would cost: minus its log-probability.

        Args:
            rollout: samples, of any origin.
            seeds: not used: nothing is drawn.
            drift: also half the squared difference from the reference's log-probability, the mean over live tokens.
            module: what wraps the policy, if anything does.

        Returns:
            `imitation` and `drift` [P, G].

        Gradient:
            Through the model's trained parameters.
        """
        logp = self.log_prob(rollout, entropy=False, module=module).logp.masked_fill(~rollout.mask, 0.0)
        if not drift:
            return Imitation(-logp.sum(-1), None)
        gap = logp - self.reference_log_prob(rollout, module=module).masked_fill(~rollout.mask, 0.0)
        return Imitation(-logp.sum(-1), gap.square().sum(-1) / (2 * rollout.mask.sum(-1).clamp(min=1)))

    def demonstrations(self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None = None) -> Rollout:
        """Given completions as a rollout with one sample a prompt, for supervised training.

        Args:
            rows: each with `prompt` (text or messages) and `completion` (text); an end token is added.
            seeds: not used: nothing is drawn.

        Returns:
            A rollout [B, 1, T]; `logp_old` is zero.

        Raises:
            DataError: naming the row that cannot be used.
        """
        return self.pack([row["prompt"] for row in rows], [[row["completion"]] for row in rows])

    def pack(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        drafts: Sequence[Any] | None = None,
        *,
        end: bool = True,
        max_prompt: int | None = None,
        max_completion: int | None = None,
    ) -> Rollout:
        """Given completions as a rollout [P, G, T] that nobody has scored.

        Args:
            prompts: P texts or message lists.
            completions: P lists of G texts (or of one assistant's message each).
            drafts: P answers that the completions are revisions of; they go into the prompts by `revision_prompts`, with
                room for `max_new_tokens` at least. None in place of one = the prompt as it is.
            end: add an end token to each completion.
            max_prompt: tokens of a longer prompt that are kept, its last ones; None = all.
            max_completion: tokens of a longer completion that are kept, its first ones; None = all.

        Returns:
            A rollout; `logp_old` is zero. With drafts it has `extras["draft_cut"]` bool [P].

        Raises:
            DataError: naming the row that cannot be used.
        """
        size = len(completions[0])
        texts = [
            self._answer(text, f"completion {index}" if size == 1 else f"completion {index}, {g}")
            for index, group in enumerate(completions)
            for g, text in enumerate(group)
        ]
        rows = [(self._ended(ids) if end else ids)[:max_completion] for ids in self._completion_ids(texts)]
        longest = max(1, *map(len, rows))
        extras: dict[str, Any] = {}
        if drafts is not None:
            texts = [None if draft is None else self._answer(draft, f"draft {p}") for p, draft in enumerate(drafts)]
            prompts, cut = self.revision_prompts(prompts, texts, max(longest, self.max_new_tokens))
            extras["draft_cut"] = torch.tensor(cut, device=self.device)
        prompt_ids, prompt_mask = self.encode(prompts, room=longest, keep=max_prompt)
        shape = (len(prompts), size, longest)
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.tensor([row + [self.pad_id] * (longest - len(row)) for row in rows])
        mask = (torch.arange(longest) < lengths[:, None]).view(shape).to(self.device)
        return Rollout(
            prompts=list(prompts),
            samples=[list(group) for group in completions],
            steps={
                "prompt_ids": prompt_ids,
                "prompt_mask": prompt_mask,
                "completion_ids": ids.view(shape).to(self.device),
            },
            mask=mask,
            logp_old=torch.zeros(shape, device=self.device),
            extras=extras,
            indices=list(range(len(prompts))),
        )

    @torch.no_grad()
    def given(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        *,
        module: Callable[..., Any] | None = None,
    ) -> Rollout:
        """Completions of any origin as a rollout, scored by the policy as it is now.

        Args:
            prompts: P texts or message lists.
            completions: P lists of the same number of texts; an end token is added.
            module: what wraps the policy, if anything does.

        Returns:
            A rollout as `sample` gives it; `logp_old` is the policy's own, whoever wrote the completions.

        Raises:
            DataError: naming the row that cannot be used.
        """
        sizes = {len(group) for group in completions}
        if len(sizes) != 1 or 0 in sizes:
            raise DataError(
                "language.policy: every prompt must have the same number of completions, at least one; got "
                f"{sorted(sizes)}."
            )
        rollout = self.pack(prompts, completions)
        rollout.samples = self.decode(rollout.steps["completion_ids"], rollout.mask)
        placed = self._placed(rollout.steps["completion_ids"], rollout.mask, rollout.samples)
        rollout.extras = {"truncated": torch.zeros_like(rollout.mask[..., 0]), **placed}
        scored = self.log_prob(rollout, entropy=False, module=module)
        return rollout.update({"logp_old": scored.logp, "values": scored.values})

    def _answer(self, completion: Any, which: str) -> str:
        if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
            completion = completion[0].get("content")  # the conversational form: one message of the assistant
        if not isinstance(completion, str):
            raise DataError(f"language.policy: {which} must be a text; got {completion!r:.200}.")
        return completion

    def _completion_ids(self, texts: list[str]) -> list[list[int]]:
        try:
            return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids
        except Exception:  # tokenizers raise bare exceptions, without saying which text was at fault
            return [self._completion_id(index, text) for index, text in enumerate(texts)]

    def _completion_id(self, index: int, text: str) -> list[int]:
        try:
            return self.tokenizer(text, add_special_tokens=False).input_ids
        except Exception as error:
            raise DataError(
                f"language.policy: completion {index} cannot be encoded: {error}. It is {text!r:.200}."
            ) from error

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] and ids[-1] in self.eos_ids else [*ids, self.eos_ids[0]]

    def keep_reference(self) -> None:
        """Make the policy as it is now the reference. With adapters nothing is copied: the model without them is it."""
        if self.has_adapters:
            return
        frozen = copy.deepcopy(self.backbone.causal).requires_grad_(False)
        frozen.eval()
        self._reference = (copy.copy(self.backbone),)
        self._reference[0].causal = frozen

    def forward(
        self,
        steps: dict[str, Tensor],
        mask: Tensor | None = None,
        kind: Literal["log_prob", "reference", "divergence", "sample"] = "log_prob",
        **options: Any,
    ) -> Any:
        """Run the model: score `steps`, or sample completions of `steps["prompt_ids"]` (kind "sample").

        Use `log_prob`, `reference_log_prob`, `divergence` and `sample`, which call this one directly or through a wrapper.
        """
        if kind == "sample":
            return self._sample(steps, **options)
        if mask is None:
            raise ShapeError("language.policy: forward needs the mask [P, G, T] of the steps it scores.")
        if kind in ("reference", "divergence"):
            self._set_mode(False)
            return (self._score_reference if kind == "reference" else self._divergence)(steps, mask, **options)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        self._set_mode(checkpointing)
        return self._score(self.backbone, steps, mask, whole=checkpointing, **options)

    def _sample(self, steps: dict[str, Tensor], group_size: int, seeds: Sequence[int], greedy: bool) -> Generation:
        self._set_mode(False)
        uniforms = None if greedy else Uniforms(seeds, group_size, self.device)
        return generate(
            self.backbone,
            steps["prompt_ids"],
            steps["prompt_mask"],
            group_size,
            max_new_tokens=self.max_new_tokens,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            temperature=0.0 if greedy else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            uniforms=uniforms,
            min_new_tokens=self.min_new_tokens,
            all_done=_agreement(self.model),
            allowed=self.allowed,
        )

    def _score(
        self,
        backbone: Backbone,
        steps: dict[str, Tensor],
        mask: Tensor,
        *,
        entropy: bool = True,
        normaliser: bool = False,
        whole: bool = False,
    ) -> LogProb:
        if normaliser:
            self._refuse_restricted("normalisers")
        found = self._read(backbone, steps, mask, whole=whole)
        logp, entropies = backbone.logprob(
            found.reading,
            found.ids,
            temperature=self.temperature,
            chunk=self.logprob_chunk,
            entropy=entropy,
            among=found.among,
            masks=found.masks,
        )
        values = total = None
        if normaliser:  # what a logit lacks to its log-probability
            total = backbone.logit(found.reading, found.ids, temperature=self.temperature) - logp
        if self.critic is not None and backbone is self.backbone:
            values = self.critic(found.reading.hidden.to(self.critic.weight.dtype)).to(logp.dtype)
            values = values.squeeze(-1)  # one head gives one number a step
        spread = [None if flat is None else found.spread(flat) for flat in (entropies, values, total)]
        return LogProb(found.spread(logp), spread[0], spread[1], normaliser=spread[2])

    def _read(self, backbone: Backbone, steps: dict[str, Tensor], mask: Tensor, *, whole: bool = False) -> _Live:
        """What a model says where each live token was produced."""
        prompt_ids, prompt_mask, completion_ids = steps["prompt_ids"], steps["prompt_mask"], steps["completion_ids"]
        full = mask.shape
        # nothing is computed for columns that no sample of this batch uses
        live = mask.any(0).any(0).nonzero()
        length = int(live[-1]) + 1 if len(live) else 1
        first = int(prompt_mask.any(0).long().argmax())
        prompt_ids, prompt_mask = prompt_ids[:, first:], prompt_mask[:, first:]
        completion_ids, mask = completion_ids[:, :, :length], mask[:, :, :length]
        reading = backbone.score(
            prompt_ids,
            prompt_mask,
            completion_ids,
            # a group of one shares nothing, and one pass is faster than two
            shared=backbone.shares_prompt and full[1] > 1 and not whole,
            hidden=self.critic is not None,
        )
        reading, ids = reading.map(lambda part: part.flatten(0, 1)), completion_ids.flatten()
        masks = among = None
        if self.allowed is not None:
            among, masks = (
                self.allowed.ids(ids.device),
                self.allowed.masks(completion_ids.flatten(0, 1), self.max_new_tokens),
            )
            masks = None if masks is None else masks.flatten(0, 1)
        kept = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
        if kept is not None:
            reading, ids = reading.map(lambda part: part[kept]), ids[kept]
            masks = None if masks is None else masks[kept]
        if self.allowed is not None:
            ids = self.allowed.places(ids)
        return _Live(reading, ids, kept, mask.shape, full[2], among, masks)

    def load_weights(self, folder: str | Path) -> None:
        """Put back the weights that `save` wrote, into this policy's model (or its adapters) and critic.

        Raises:
            CheckpointError: the folder holds another model.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            if self.has_adapters:
                from peft import set_peft_model_state_dict

                found = set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
            else:
                state: dict[str, Tensor] = {}
                for path in sorted(folder.glob("model*.safetensors")):
                    state |= load_file(path)
                found = self.model.load_state_dict(state, strict=False)
                tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
                if missing := [name for name in found.missing_keys if name not in tied]:
                    raise CheckpointError(f"{folder} lacks {len(missing)} weights of this model, such as {missing[0]}.")
            if found.unexpected_keys:
                raise CheckpointError(
                    f"{folder} holds weights that this model has not, such as {found.unexpected_keys[0]}."
                )
            if self.critic is not None:
                self.critic.load_state_dict(load_file(folder / _CRITIC_FILE))
        except (OSError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{folder}: the weights cannot be read: {error}") from error

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the model (with adapters: these only), the tokenizer and the critic to a folder.

        `AutoModelForCausalLM.from_pretrained` (peft's `PeftModel.from_pretrained` for adapters) and
        `LanguagePolicy.load` read it back.

        Args:
            folder: where to; made if it is not there.
            state: the policy's `state_dict` with whole tensors, where the policy's own are shards; None = its own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        whole = dict(self.state_dict() if state is None else state)
        parts = {part: _under(whole, part) for part in ("model", "critic")}
        self.model.save_pretrained(folder, state_dict=None if state is None else parts["model"])
        self.tokenizer.save_pretrained(folder)
        if self.critic is not None:
            from safetensors.torch import save_file

            critic = {name: value.detach().cpu().contiguous() for name, value in parts["critic"].items()}
            save_file(critic, folder / _CRITIC_FILE)


def prompt_tokens(tokenizer: Any, prompt: Any) -> list[int]:
    """Tokens of a text as it stands, or of messages by the chat template, up to where the answer begins."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def _under(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The entries of a submodule, under its own names."""
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


def _check_settings(max_new_tokens: int, temperature: float, top_p: float, top_k: int, min_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise RecipeError(f"policy.max_new_tokens must be at least 1; got {max_new_tokens}.")
    if not temperature > 0:
        raise RecipeError(
            f"policy.temperature must be positive; got {temperature}. Greedy samples are asked for in sample()."
        )
    if not 0 < top_p <= 1:
        raise RecipeError(f"policy.top_p must be in (0, 1]; got {top_p}.")
    if top_k < 0:
        raise RecipeError(f"policy.top_k must be 0 (all) or positive; got {top_k}.")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise RecipeError(f"policy.min_new_tokens must be between 0 and max_new_tokens; got {min_new_tokens}.")


def _end_ids(causal: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a sample: the tokenizer's and those the model's generation settings list."""
    listed = getattr(getattr(causal, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    found = [end for end in (tokenizer.eos_token_id, *listed) if end is not None]
    tokens = causal.get_input_embeddings().weight.shape[0]
    ends = [end for end in dict.fromkeys(found) if 0 <= end < tokens]
    if not ends:
        raise RecipeError("policy: neither the tokenizer nor the model names an end token (eos_token_id).")
    return ends


def _load_tokenizer(source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, padding_side="left")


def _load_model(source: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    if (Path(source) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        with _peft_on_new_transformers():
            return AutoPeftModelForCausalLM.from_pretrained(
                source, is_trainable=True, dtype=dtype, trust_remote_code=trust_remote_code
            )
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)


def _add_lora(model: Any, options: dict[str, Any]) -> Any:
    require("peft", "language")
    from peft import LoraConfig, get_peft_model

    unknown = [name for name in options if name not in _LORA]
    if unknown:
        raise RecipeError(
            f"policy.lora: {unknown[0]!r} is not known.{nearest(unknown[0], _LORA)} There are {sorted(_LORA)}."
        )
    settings = {**_LORA, **options}
    if settings["dropout"]:
        raise RecipeError(
            f"policy.lora.dropout must be 0; got {settings['dropout']}. Log-probabilities must be reproducible."
        )
    targets = settings["target_modules"]
    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with _peft_on_new_transformers():
        return get_peft_model(model, config)


@contextmanager
def _peft_on_new_transformers() -> Iterator[None]:
    """peft asks models for a property that newer transformers have renamed; no user can act on the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _switch_checkpointing_on(causal: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(causal, "activation_checkpointing_enable"):
        causal.activation_checkpointing_enable(options)
    else:
        causal.gradient_checkpointing_enable(options)


def _switch_dropout_off(model: nn.Module) -> None:
    """Training mode is needed for gradient checkpointing only, and must then not switch dropout on."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _agreement(model: nn.Module) -> Callable[[bool], bool] | None:
    """How processes that share one sharded model agree that all their samples are done; None where they need not."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    kinds = {type(module).__name__ for module in model.modules()} | {type(p).__name__ for p in model.parameters()}
    if not any(kind.startswith("FSDP") or kind in ("FullyShardedDataParallel", "DTensor") for kind in kinds):
        return None
    device = next(model.parameters()).device

    def all_done(mine: bool) -> bool:
        flag = torch.tensor(int(mine), device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MIN)
        return bool(flag)

    return all_done
