"""Which domain a prompt belongs to, as a language model says that is asked once a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from guerdon.components import build
from guerdon.errors import DataError, RecipeError, ScoreError, nearest
from guerdon.rewards.domains import FALLBACK, Domain, ask_domain, read_domain
from guerdon.rewards.judges.endpoint import Endpoint

_SERVED = {"api_key_env": None, "timeout": 60.0, "concurrency": 16, "tries": 10, "max_tokens": 32}
_LOCAL = {"batch_size": 16, "dtype": "float32", "device": None, "max_new_tokens": 32}
_KEPT = 10_000  # prompts whose domain is remembered


class Router:
    """Asks a model for the domain of each prompt, greedily; what cannot be read counts as `chat`.

    Args:
        model: a folder or a name on the hub; {base_url, model, api_key_env, ...}: a chat endpoint; {model, dtype, device,
            batch_size, max_new_tokens}; `module:attribute`; or a callable from questions to replies.
        domains: what there is.

    Raises:
        RecipeError: an option does not exist.

    Example:
        >>> domains = {"sums": Domain("sums"), "chat": Domain("chat")}
        >>> route = Router(lambda questions: ["[START]SUMS[END]" if "+" in q else "?" for q in questions], domains)
        >>> route(["2 + 2", "hello"])
        ['sums', 'chat']
    """

    def __init__(self, model: Any, domains: Mapping[str, Domain]) -> None:
        self.domains = dict(domains)
        self.known: dict[str, str] = {}
        if isinstance(model, str) and ":" in model and not Path(model).exists():
            model = build("rewards", model, "router")
        if callable(model):
            self.reply: Any = model  # from questions to replies
        elif isinstance(model, Mapping) and "base_url" in model:
            self.reply = _Served(**_options(model, {"base_url": "", "model": "", **_SERVED}))
        else:
            given = {"model": str(model)} if isinstance(model, (str, Path)) else model
            self.reply = _Local(**_options(given, {"model": "", **_LOCAL}))

    def __call__(self, prompts: Sequence[Any]) -> list[str]:
        """The domain of every prompt.

        Raises:
            ScoreError: the model gave no replies, or not one a prompt.
        """
        keys = [repr(prompt) for prompt in prompts]
        new = [p for p, key in enumerate(keys) if key not in self.known and key not in keys[:p]]
        found = dict(self.known)
        if new:
            replies = self.reply([ask_domain(prompts[p], self.domains) for p in new])
            if not isinstance(replies, (list, tuple)) or len(replies) != len(new):
                raise ScoreError(f"router: one reply for each of {len(new)} prompts is needed; got {replies!r:.80}.")
            for p, reply in zip(new, replies, strict=True):
                found[keys[p]] = read_domain(str(reply), self.domains, FALLBACK)
        self.known = found if len(found) <= _KEPT else {}
        return [found[key] for key in keys]


def _options(given: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not given.get("model"):
        raise RecipeError(f"router: a model, or {{model: ..., base_url: ...}}, is needed; got {given!r:.80}.")
    for name in given:
        if name not in known:
            raise RecipeError(
                f"router.{name}: there is no such option.{nearest(name, known)} Options: {', '.join(known)}."
            )
    return {**known, **given}


class _Local:
    """A model of transformers on this machine."""

    def __init__(self, model: str, batch_size: int, dtype: Any, device: str | None, max_new_tokens: int) -> None:
        import torch

        from guerdon.language.policy import LanguagePolicy

        self.policy = LanguagePolicy.load(model, dtype=dtype, max_new_tokens=max_new_tokens)
        self.policy.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).requires_grad_(False)
        self.batch_size = batch_size if self.policy.backbone.ignores_padding else 1

    def __call__(self, questions: Sequence[str]) -> list[str]:
        chat = getattr(self.policy.tokenizer, "chat_template", None) is not None
        prompts: list[Any] = [[{"role": "user", "content": q}] if chat else q for q in questions]
        replies = []
        for start in range(0, len(prompts), self.batch_size):
            part = prompts[start : start + self.batch_size]
            try:
                replies += [group[0] for group in self.policy.sample(part, 1, [0] * len(part), greedy=True).samples]
            except DataError as error:
                raise DataError(f"router: {error}") from error
        return replies


class _Served:
    """A model behind an OpenAI-compatible chat endpoint."""

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None,
        timeout: float,
        concurrency: int,
        tries: int,
        max_tokens: int,
    ) -> None:
        self.endpoint = Endpoint(base_url, api_key_env, timeout, "router")
        self.body = {"model": model, "temperature": 0.0, "max_tokens": max_tokens}
        self.concurrency, self.tries = concurrency, tries

    def __call__(self, questions: Sequence[str]) -> list[str]:
        with ThreadPoolExecutor(min(self.concurrency, len(questions)), thread_name_prefix="router") as pool:
            return list(pool.map(self._ask, questions))

    def _ask(self, question: str) -> str:
        body = {**self.body, "messages": [{"role": "user", "content": question}]}
        # a prompt without a domain would be scored like one of `chat`, and nobody would know: so no reply is an error
        return self.endpoint.patiently(lambda: self.endpoint.ask(body), self.tries)
