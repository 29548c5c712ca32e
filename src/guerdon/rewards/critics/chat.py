"""A language model behind an OpenAI-compatible chat endpoint as a critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.rewards.critics.base import Response
from guerdon.rewards.critics.feedback import Feedback
from guerdon.rewards.critics.question import SYSTEM, TEMPLATE, Question, as_feedback
from guerdon.rewards.judges.asking import Asker


class ChatCritic:
    """Asks a served model for feedback on every response, many at a time.

    Prompts and responses leave this machine for `base_url`. Failures are met as by the judge of the same name: a request that
    fails in passing is tried again after a pause, a reply that cannot be read is counted as malformed and asked for again, a
    request that the server refuses is not.

    Args:
        base_url: such as https://api.example.com/v1 or http://127.0.0.1:8000/v1; redirects are not followed.
        model: its name there.
        api_key_env: name of the environment variable that holds the key; None = no key is sent.
        template: the question, plain text with {response} and, if wanted, {prompt}, {form} (the JSON expected), {limit} and
            names of data columns.
        system: the system message; empty = none.
        spans_max: most phrases of each kind that are asked for; None = any number. The paper has 2 for summaries.
        repair: read what is no JSON but a literal of Python.
        temperature: of the critic.
        max_tokens: most tokens of a reply.
        body: further fields of the request, such as {response_format: {type: json_object}}.
        timeout: seconds for one request.
        concurrency: requests that run at a time, for each process of a run.
        tries: most requests for one response.
        backoff: seconds of the first pause.

    Raises:
        RecipeError: an option is out of its range, or the variable is not set.

    Source:
        The annotator of Text2Grad, 2025, arXiv 2505.22338; the words of the question are ours.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        template: str = TEMPLATE,
        system: str = SYSTEM,
        spans_max: int | None = None,
        repair: bool = True,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        body: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        concurrency: int = 16,
        tries: int = 3,
        backoff: float = 0.5,
    ) -> None:
        where = "critics.chat"
        self.question = Question(where, template=template, system=system, spans_max=spans_max, repair=repair)
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

    def __call__(self, responses: Sequence[Response]) -> list[Feedback]:
        """Criticise every response.

        Args:
            responses: any number of them.

        Returns:
            One feedback per response, in order; those that have failed say why.

        Raises:
            ScoreError: the key, the address or the model is wrong (HTTP 401, 403, 404, ...).
            DataError: the template names a column that the data does not have.
        """
        answers = self.ask([self.question.messages(response) for response in responses], self.question.read)
        return [as_feedback(answer) for answer in answers]


chat = ChatCritic
