"""How likely given completions are under a causal language model: summed log-probabilities, without gradient."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guerdon.errors import RecipeError, ScoreError, check_shapes
from guerdon.rewards.score_store import ScoreStore


class SequenceLogp(NamedTuple):
    """Log-probability of whole completions, in nats, and the tokens that it is summed over."""

    total: Float[Tensor, "*batch"]
    tokens: Int[Tensor, "*batch"]


def summed_logp(
    logp: Float[Tensor, "*batch T"], mask: Bool[Tensor, "*batch T"], *, floor: float | None = None
) -> SequenceLogp:
    """Sum log-probabilities over live tokens.

    Args:
        logp: [..., T] log-probability of each token.
        mask: [..., T], True where a token belongs to the completion; what others hold is nothing.
        floor: log-probabilities below it are raised to it; None = none.

    Returns:
        Sums and counts [...].

    Raises:
        ScoreError: a live log-probability is NaN.

    Example:
        >>> found = summed_logp(torch.tensor([[-1.0, -2.5, 9.0]]), torch.tensor([[True, True, False]]))
        >>> found.total.tolist(), found.tokens.tolist()
        ([-3.5], [2])
    """
    check_shapes("rewards.likelihood", logp=(logp, "... T"), mask=(mask, "... T"))
    logp = torch.where(mask, logp, 0.0)
    if bool(logp.isnan().any()):
        where = logp.isnan().nonzero()[0].tolist()
        raise ScoreError(f"rewards.likelihood: the log-probability at {where} is NaN. Look at the model, or its dtype.")
    if floor is not None:
        logp = logp.clamp(min=floor)
    return SequenceLogp(logp.sum(-1), mask.sum(-1))


class Likelihood:
    """Scores completions under one model.

    Args:
        model: a folder, a name on the hub, a `LanguagePolicy`, or a model object.
        tokenizer: needed with a model object; None = the one beside the model.
        end_token: score the token that ends a completion as well.
        max_prompt: tokens of a longer prompt that are kept, its last ones.
        max_completion: tokens of a longer completion that are kept, its first ones.
        floor: of the log-probability of a token; None = none.
        batch_size: completions at a time; bounds memory alone.
        dtype: of the weights.
        device: where it runs, such as cuda:1; None = an accelerator if there is one. A `LanguagePolicy` stays where it is.
        cache: a file in which scores are kept, for models named by folder or hub name; None = they are not kept.
        trust_remote_code: run model code that comes with the files.

    Raises:
        RecipeError: an option is out of its range, or the model cannot be loaded.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any = None,
        end_token: bool = True,
        max_prompt: int = 2000,
        max_completion: int = 1024,
        floor: float | None = None,
        batch_size: int = 16,
        dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
        device: str | None = None,
        cache: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        where = "rewards.likelihood"
        for name, value in (("batch_size", batch_size), ("max_prompt", max_prompt), ("max_completion", max_completion)):
            if value < 1:
                raise RecipeError(f"{where}.{name}: must be 1 or more; got {value}.")
        if floor is not None and not floor < 0:
            raise RecipeError(f"{where}.floor: must be below 0, as a log-probability is; got {floor}.")
        if cache is not None and not isinstance(model, (str, Path)):
            raise RecipeError(f"{where}.cache: only scores of models named by folder or hub name can be kept.")
        from guerdon.language.policy import LanguagePolicy

        if isinstance(model, LanguagePolicy):
            self.policy = model
        else:
            self.policy = LanguagePolicy.load(
                model, tokenizer=tokenizer, dtype=dtype, trust_remote_code=trust_remote_code
            )
            self.policy.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.policy.requires_grad_(False)
        self.adapters, self.floor, self.batch_size = True, floor, batch_size
        self.form = {"end": end_token, "max_prompt": max_prompt, "max_completion": max_completion}
        self.cache = cache
        self.name = ["" if cache is None else fingerprint(str(model)), dtype, self.form, floor]
        self.store = self._store()

    def _store(self) -> ScoreStore | None:
        name = json.dumps([self.adapters, *self.name], sort_keys=True)
        return None if self.cache is None else ScoreStore(self.cache, name)

    def without_adapters(self) -> Likelihood:
        """The same weights with the adapters switched off."""
        found = copy.copy(self)
        found.adapters = False
        found.store = found._store()
        return found

    def __call__(self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]]) -> SequenceLogp:
        """Score every completion after its prompt.

        Args:
            prompts: P texts or message lists.
            samples: P lists of G completions.

        Returns:
            Sums and numbers of tokens [P, G], on the CPU, in float64.

        Raises:
            DataError: a prompt or completion cannot be encoded, or is too long for the model.
            ScoreError: a log-probability is NaN.
        """
        size = len(samples[0]) if samples else 0
        totals = torch.zeros(len(prompts), size, dtype=torch.float64)
        tokens = torch.zeros(len(prompts), size, dtype=torch.int64)
        # prompts of like length share a batch; which ones they are depends on nothing but the call
        order = sorted(range(len(prompts)), key=lambda p: len(str(prompts[p])) + max(map(len, map(str, samples[p]))))
        step = max(1, self.batch_size // max(size, 1)) if self.policy.backbone.ignores_padding else 1
        for start in range(0, len(order), step):
            part = order[start : start + step]
            found = self._scored([prompts[p] for p in part], [samples[p] for p in part])
            totals[part], tokens[part] = found.total, found.tokens
        return SequenceLogp(totals, tokens)

    def _scored(self, prompts: list[Any], samples: list[Sequence[Any]]) -> SequenceLogp:
        kept = self.store.find(prompts, samples) if self.store else None
        if kept is not None:
            return SequenceLogp(*kept)
        parts = []
        # a group larger than a batch goes through in pieces
        for start in range(0, len(samples[0]), self.batch_size):
            piece = [list(group[start : start + self.batch_size]) for group in samples]
            rollout = self.policy.pack(prompts, piece, **self.form)
            with torch.no_grad():
                if self.adapters:
                    logp = self.policy.log_prob(rollout, entropy=False).logp
                else:
                    logp = self.policy.reference_log_prob(rollout)
            parts.append(summed_logp(logp.double(), rollout.mask, floor=self.floor))
        total = torch.cat([part.total for part in parts], 1).cpu()
        found = SequenceLogp(total, torch.cat([part.tokens for part in parts], 1).cpu())
        if self.store:
            self.store.add(prompts, samples, *found)
        return found


def fingerprint(model: str) -> str:
    """What tells one model from another: a folder's path and its files with their sizes and times, or a name on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{folder.resolve()} {blake2b(repr(facts).encode(), digest_size=16).hexdigest()}"
