"""How likely given completions are under a model that a server runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from guerdon.errors import DataError, RecipeError, require
from guerdon.rewards.judges.endpoint import Endpoint, UnreadableError
from guerdon.rewards.likelihood import SequenceLogp, summed_logp


class ServedLikelihood:
    """Scores completions under a model behind an OpenAI-compatible completions endpoint that echoes log-probabilities.

    Prompts and completions leave this machine for `base_url`, as token ids: the tokenizer is the model's own, on disk or on the
    hub, so that nothing depends on how the server cuts a text. vLLM answers such requests.

    Args:
        base_url: such as http://127.0.0.1:8000/v1; redirects are not followed.
        model: its name there.
        tokenizer: a folder or a name on the hub; None = the model's name.
        api_key_env: name of the environment variable that holds the key; None = no key is sent.
        end_token: see `Likelihood`.
        max_prompt: likewise.
        max_completion: likewise.
        floor: likewise.
        timeout: seconds for one request.
        concurrency: requests that run at a time.
        tries: most requests for one completion.

    Raises:
        RecipeError: an option is out of its range, or the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        tokenizer: str | None = None,
        api_key_env: str | None = None,
        end_token: bool = True,
        max_prompt: int = 2000,
        max_completion: int = 1024,
        floor: float | None = None,
        timeout: float = 120.0,
        concurrency: int = 16,
        tries: int = 10,
    ) -> None:
        where = "rewards.likelihood"
        for name, value in (("concurrency", concurrency), ("tries", tries), ("max_completion", max_completion)):
            if value < 1:
                raise RecipeError(f"{where}.{name}: must be 1 or more; got {value}.")
        require("transformers", "language")
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer or model)
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise RecipeError(f"{where}.tokenizer: {tokenizer or model!r} cannot be loaded: {reason}.") from error
        self.endpoint = Endpoint(base_url, api_key_env, timeout, where, "/completions")
        self.body = {"model": model, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0.0}
        self.end_token, self.max_prompt, self.max_completion = end_token, max_prompt, max_completion
        self.floor, self.concurrency, self.tries = floor, concurrency, tries

    def __call__(self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]]) -> SequenceLogp:
        """Score every completion after its prompt; see `Likelihood`.

        Args:
            prompts: P texts or message lists.
            samples: P lists of G completions.

        Returns:
            Sums and numbers of tokens [P, G].

        Raises:
            DataError: a prompt or completion cannot be encoded.
            ScoreError: the server gave no log-probabilities.
        """
        wanted = [self._tokens(prompt, text) for prompt, group in zip(prompts, samples, strict=True) for text in group]
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="likelihood") as pool:
            rows = list(pool.map(self._row, *zip(*wanted, strict=True))) if wanted else []
        width = max(map(len, rows), default=1)
        logp = torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)
        lengths = torch.tensor([len(row) for row in rows])
        shape = (len(prompts), -1, width)
        return summed_logp(logp.view(shape), (torch.arange(width) < lengths[:, None]).view(shape), floor=self.floor)

    def _tokens(self, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
        from guerdon.language.policy import prompt_tokens

        if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
            completion = completion[0].get("content")  # the conversational form: one message of the assistant
        try:
            before = prompt_tokens(self.tokenizer, prompt)
            said = self.tokenizer(completion, add_special_tokens=False).input_ids
        except Exception as error:  # tokenizers raise bare exceptions
            raise DataError(
                f"rewards.likelihood: {prompt!r:.100} with {completion!r:.100} cannot be encoded: {error}."
            ) from error
        end = self.tokenizer.eos_token_id
        if self.end_token and end is not None and said[-1:] != [end]:
            said = [*said, end]
        before = before[1:] if before[:2] == [self.tokenizer.bos_token_id] * 2 else before
        return before[-self.max_prompt :], said[: self.max_completion]

    def _row(self, before: list[int], said: list[int]) -> list[float]:
        """The log-probability of each token of a completion."""
        if not said:
            return []
        body = {**self.body, "prompt": [*before, *said]}
        return self.endpoint.patiently(lambda: _echoed(self.endpoint.post(body), len(before), len(said)), self.tries)


def _echoed(content: bytes, before: int, count: int) -> list[float]:
    try:
        found = json.loads(content)["choices"][0]["logprobs"]["token_logprobs"][before : before + count]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise UnreadableError(f"no echo of log-probabilities: {content[:120]!r}") from None
    if len(found) != count or not all(isinstance(value, (int, float)) for value in found):
        raise UnreadableError(f"{len(found)} log-probabilities of {count} tokens: {found!r:.80}")
    return [float(value) for value in found]
