"""What a language model that criticises is asked, and how its reply is read."""

from __future__ import annotations

from typing import Any

from guerdon.errors import RecipeError
from guerdon.rewards.critics.base import Response
from guerdon.rewards.critics.feedback import Feedback, parse_feedback
from guerdon.rewards.judges.asking import Answer
from guerdon.rewards.judges.question import filled, places

SYSTEM = "You review answers. You say what is good and what is poor in them, and quote the words that you speak of."
TEMPLATE = """\
Task:
{prompt}

Answer:
{response}

First think about what the answer does well and what it does poorly. Then end with one JSON object and nothing after it:
{form}

A phrase is {limit}copied from the answer word for word, and each must be backed by the feedback. Leave a list empty if there
is nothing to quote.
"""
FORM = '{"textual_feedback": "<the feedback>", "good_spans": ["<phrase>", ...], "poor_spans": ["<phrase>", ...]}'
# what a model that was trained to criticise is asked: it knows the form
LEARNED = "{prompt}\n\n{response}\n\nReview:\n"


class Question:
    """A template, and how replies to it are read.

    Args:
        where: opens the errors.
        template: text with the place {response}, and any of {prompt}, {form} (the JSON that is expected), {limit} (how many
            phrases) and the names of data columns.
        system: a message that goes before it; empty = none.
        spans_max: most phrases of each kind that are asked for; None = any number.
        repair: see `parse_feedback`.

    Raises:
        RecipeError: the template does not show the response, or spans_max is below 1.
    """

    def __init__(
        self,
        where: str,
        *,
        template: str = TEMPLATE,
        system: str = SYSTEM,
        spans_max: int | None = None,
        repair: bool = True,
    ) -> None:
        if "response" not in places(template):
            raise RecipeError(f"{where}.template: it must show the answer; there is no {{response}} in it.")
        if spans_max is not None and spans_max < 1:
            raise RecipeError(f"{where}.spans_max: must be 1 or more, or null for any number; got {spans_max}.")
        self.where, self.template, self.system, self.repair = where, template, system, repair
        self.limit = "" if spans_max is None else f"one of at most {spans_max} in each list, "

    def text(self, response: Response) -> str:
        """The template with everything in its place.

        Raises:
            DataError: it names a column that the data does not have.
        """
        own = {"prompt": response.prompt, "response": response.text, "form": FORM, "limit": self.limit}
        return filled(self.template, {**response.columns, **own}, self.where)

    def messages(self, response: Response) -> list[dict[str, str]]:
        """The question as a chat."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        return [*start, {"role": "user", "content": self.text(response)}]

    def plain(self, response: Response) -> str:
        """The question for a model without a chat template."""
        return f"{self.system}\n\n{self.text(response)}" if self.system else self.text(response)

    def asked(self, tokenizer: Any, response: Response) -> Any:
        """The question in the form that a tokenizer's model takes."""
        chat = getattr(tokenizer, "chat_template", None) is not None
        return self.messages(response) if chat else self.plain(response)

    def read(self, reply: str) -> tuple[Feedback | None, str]:
        """The feedback in a reply, or None and why."""
        found = parse_feedback(reply, repair=self.repair)
        return (None, f"{found.why}: {reply[-120:]!r}") if found.failed else (found, "")


def as_feedback(answer: Answer) -> Feedback:
    """What came of a question, read by `Question.read`, as feedback."""
    if answer.content is None:
        return Feedback(calls=answer.calls, malformed=answer.malformed, why=answer.why or "no reply")
    return answer.content._replace(calls=answer.calls, malformed=answer.malformed)
