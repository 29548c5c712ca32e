"""Asking a language model many questions and reading its replies: one behind a chat endpoint, or one on this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from random import Random
from typing import Any, NamedTuple

from guerdon.errors import DataError, RecipeError
from guerdon.rewards.judges.endpoint import Endpoint, PassingError, RefusedError, UnreadableError

_LONGEST_PAUSE = 30.0

# what a reply says, None if it cannot be read; and then why not
Read = Callable[[str], tuple[Any, str]]


class Answer(NamedTuple):
    """What came of a question.

    Attributes:
        content: what the reply said, None where none could be read.
        calls: how often the model was called, tries that failed included.
        malformed: how many of its replies could not be read.
        why: why there is no content.
    """

    content: Any = None
    calls: int = 0
    malformed: int = 0
    why: str = ""


class Asker:
    """Puts questions to a served model, many at a time; see `ChatJudge` for the arguments and how failures are met.

    Raises:
        RecipeError: an option is out of its range, or the variable of the key is not set.
    """

    def __init__(
        self,
        where: str,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None,
        temperature: float,
        max_tokens: int,
        body: Mapping[str, Any] | None,
        timeout: float,
        concurrency: int,
        tries: int,
        backoff: float,
    ) -> None:
        for name, value, least in (("concurrency", concurrency, 1), ("tries", tries, 1), ("backoff", backoff, 0)):
            if not value >= least:
                raise RecipeError(f"{where}.{name}: must be {least} or more; got {value}.")
        self.endpoint = Endpoint(base_url, api_key_env, timeout, where)
        self.body = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **(body or {})}
        self.concurrency, self.tries, self.backoff = concurrency, tries, backoff
        self._jitter = Random()  # of the pauses; never enters a result

    def __call__(self, questions: Sequence[list[dict[str, str]]], read: Read) -> list[Answer]:
        """Ask every question.

        Args:
            questions: chats.
            read: how a reply is read.

        Returns:
            One answer per question, in order.

        Raises:
            ScoreError: the key, the address or the model is wrong (HTTP 401, 403, 404, ...).
        """
        if not questions:
            return []
        stop = threading.Event()
        with ThreadPoolExecutor(min(self.concurrency, len(questions)), thread_name_prefix="judge") as pool:
            futures = [pool.submit(self._answer, question, read, stop) for question in questions]
            try:
                return [future.result() for future in futures]
            except BaseException:  # an error, or Ctrl-C: end the pauses of the others, start no more
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _answer(self, question: list[dict[str, str]], read: Read, stop: threading.Event) -> Answer:
        malformed, calls, pause, why = 0, 0, 0.0, ""
        while calls < self.tries and not stop.wait(pause):
            calls += 1
            try:
                reply = self.endpoint.ask({**self.body, "messages": question})
            except PassingError as error:
                usual = min(self.backoff * 2.0 ** min(calls - 1, 30), _LONGEST_PAUSE)
                pause, why = max(usual * self._jitter.uniform(0.5, 1.0), error.wait), str(error)
                continue
            except RefusedError as error:
                why = str(error)
                break
            except UnreadableError as error:
                content, why = None, str(error)
            else:
                content, why = read(reply)
            if content is not None:
                return Answer(content, calls, malformed)
            malformed, pause = malformed + 1, 0.0
        return Answer(None, calls, malformed, why)


def fits(policy: Any, question: Any) -> Answer:
    """No answer yet; and why there cannot be one, where a question is too long for a model."""
    try:
        policy.encode([question])
    except DataError as error:
        return Answer(why=str(error))
    return Answer()


def write_answers(
    policy: Any, questions: Sequence[Any], read: Read, *, greedy: bool, seed: int, tries: int, batch_size: int
) -> list[Answer]:
    """Have a policy write a reply to every question.

    Args:
        policy: a language policy.
        questions: texts or chats.
        read: how a reply is read.
        greedy: take the likeliest token everywhere; a malformed reply is then not written anew.
        seed: a question is answered alike in whatever batch it comes.
        tries: how often a malformed reply is written anew.
        batch_size: questions at a time.

    Returns:
        One answer per question, in order. A question too long for the model fails, the others go on.
    """
    answers = [fits(policy, question) for question in questions]
    left = [k for k, answer in enumerate(answers) if not answer.why]
    for attempt in range(1 if greedy else tries):
        for start in range(0, len(left), batch_size):
            chosen = left[start : start + batch_size]
            asked = [questions[k] for k in chosen]
            seeds = [_seed(seed, attempt, question) for question in asked]
            for k, group in zip(chosen, policy.sample(asked, 1, seeds, greedy=greedy).samples, strict=True):
                content, why = read(group[0])
                old = answers[k]
                answers[k] = Answer(content, old.calls + 1, old.malformed + (content is None), why)
        left = [k for k in left if answers[k].content is None]
    return answers


def _seed(seed: int, attempt: int, question: Any) -> int:
    text = f"{seed} {attempt} {question!r}"
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1
