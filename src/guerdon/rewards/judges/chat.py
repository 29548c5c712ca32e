"""A language model behind an OpenAI-compatible chat endpoint as a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.rewards.judges.asking import Asker
from guerdon.rewards.judges.base import SCALE, Match, Verdict
from guerdon.rewards.judges.question import SYSTEM, TEMPLATE, Question, as_verdict
from guerdon.rewards.judges.verdict import Parsing


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
        self.question = Question(where, template=template, system=system, rubric=rubric, parsing=parsing)
        self.ask = Asker(
            where,
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            temperature=temperature,
            max_tokens=max_tokens,
            body=body,
            timeout=timeout,
            concurrency=concurrency,
            tries=tries,
            backoff=backoff,
        )

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
        answers = self.ask([self.question.messages(match) for match in matches], self.question.verdict)
        return [as_verdict(answer) for answer in answers]


chat = ChatJudge
