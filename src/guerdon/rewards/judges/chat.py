"""A language model behind an OpenAI-compatible chat endpoint as a judge."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

from guerdon.errors import RecipeError
from guerdon.rewards.judges.base import SCALE, Match, Verdict
from guerdon.rewards.judges.endpoint import Endpoint, PassingError, RefusedError, UnreadableError
from guerdon.rewards.judges.question import SYSTEM, TEMPLATE, Question
from guerdon.rewards.judges.verdict import Parsing

_LONGEST_PAUSE = 30.0


class ChatJudge:
    """Asks a served model to score both samples of a match from 0 to 10, many matches at a time.

    Prompts and samples leave this machine for `base_url`. A request that fails in passing (a timeout, no connection,
    HTTP 408, 409, 425, 429 or 5xx) is tried again after a pause that doubles each time; a reply that is no verdict is
    counted as malformed and tried again at once; a request that the server refuses (HTTP 400, 413, 422: too long,
    perhaps) is not. A match without a verdict after that has failed, and the tournament makes it a tie.

    Args:
        base_url: such as https://api.example.com/v1 or http://127.0.0.1:8000/v1; redirects are not followed.
        model: its name there.
        api_key_env: name of the environment variable that holds the key; None = no key is sent. The key itself is never
            an option: a run writes its options down.
        template: the question, plain text with {first}, {second} and, if wanted, {prompt}, {rubric}, {form} (the JSON
            expected) and names of data columns.
        system: the system message; empty = none.
        rubric: criteria with levels: name -> {levels: {points: text}, about: text, weight: number}; None = one score.
        parsing: `strict`: the reply is the JSON verdict and nothing else. `lenient`: see `judges.verdict`.
        temperature: of the judge.
        max_tokens: most tokens of a reply.
        body: further fields of the request, such as {response_format: {type: json_object}}.
        timeout: seconds for one request.
        concurrency: requests that run at a time, for each process of a run.
        tries: most requests for one match.
        backoff: seconds of the first pause; pauses end at 30 s unless the server asks for more (60 s at most).

    Raises:
        RecipeError: an option is out of its range, or the variable is not set.

    Source:
        ArenaRL, 2026, arXiv 2601.06487: scores from 0 to 10 by a rubric of several levels, ten tries.
    """

    scale = SCALE

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        template: str = TEMPLATE,
        system: str = SYSTEM,
        rubric: Mapping[str, Any] | None = None,
        parsing: Parsing = "lenient",
        temperature: float = 0.0,
        max_tokens: int = 1024,
        body: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        concurrency: int = 16,
        tries: int = 10,
        backoff: float = 0.5,
    ) -> None:
        where = "judges.chat"
        for name, value, least in (("concurrency", concurrency, 1), ("tries", tries, 1), ("backoff", backoff, 0)):
            if not value >= least:
                raise RecipeError(f"{where}.{name}: must be {least} or more; got {value}.")
        self.question = Question(where, template=template, system=system, rubric=rubric, parsing=parsing)
        self.endpoint = Endpoint(base_url, api_key_env, timeout, where)
        self.body = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **(body or {})}
        self.concurrency, self.tries, self.backoff = concurrency, tries, backoff
        self._jitter = Random()  # of the pauses; never enters a result

    def __call__(self, matches: Sequence[Match]) -> list[Verdict]:
        """Judge every match.

        Args:
            matches: any number of them.

        Returns:
            One verdict per match, in order, with the requests made for it and the malformed replies among them.

        Raises:
            ScoreError: the key, the address or the model is wrong (HTTP 401, 403, 404, ...).
            DataError: the template names a column that the data does not have.
        """
        if not matches:
            return []
        stop = threading.Event()
        questions = [self.question.messages(match) for match in matches]
        with ThreadPoolExecutor(min(self.concurrency, len(matches)), thread_name_prefix="judge") as pool:
            futures = [pool.submit(self._verdict, question, stop) for question in questions]
            try:
                return [future.result() for future in futures]
            except BaseException:  # an error, or Ctrl-C: end the pauses of the others, start no more
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _verdict(self, question: list[dict[str, str]], stop: threading.Event) -> Verdict:
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
                scores, why, categories = None, str(error), {}
            else:
                categories = self.question.categories(reply)
                scores, why = self.question.read(reply), f"no verdict in the reply {reply[-120:]!r}"
            if scores is not None:
                return Verdict(*scores, calls, malformed, categories=categories)
            malformed, pause = malformed + 1, 0.0
        return Verdict(math.nan, math.nan, calls, malformed, why)


chat = ChatJudge
