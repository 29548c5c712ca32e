"""What a critic is, how it is named and how it is asked."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from guerdon.errors import ScoreError
from guerdon.rewards.critics.feedback import Feedback, parse_feedback
from guerdon.rewards.judges.base import resolve as _resolve
from guerdon.rewards.judges.base import wait_for


class Response(NamedTuple):
    """A sample to be criticised.

    Attributes:
        prompt: what it was sampled for.
        text: the sample.
        columns: what else the prompt's data row carries.
    """

    prompt: Any
    text: str
    columns: Mapping[str, Any] = {}


Remark = Feedback | str | Mapping[str, Any] | None


class Critic(Protocol):
    """A callable, or coroutine function, from responses to one remark for each, in order.

    A remark is a `Feedback`, a reply for `parse_feedback` to read, a mapping as in such a reply, or None for no feedback. A
    mapping may have `marks`, a label for every character of the response, in place of phrases.
    """

    def __call__(self, responses: Sequence[Response], /) -> Sequence[Remark] | Awaitable[Sequence[Remark]]:
        """Criticise every response."""
        ...


def resolve(critic: Any, where: str) -> Any:
    """A critic from a recipe (a name, {name: {option: value}} or `module:attribute`), or a callable as it is.

    Raises:
        UnknownNameError: there is nothing of that name.
        RecipeError: an option does not exist, is missing or has a wrong type.
    """
    return _resolve(critic, where, "rewards.critics")


def ask(critic: Any, responses: Sequence[Response], where: str) -> list[Feedback]:
    """Have a critic criticise responses.

    Args:
        critic: what `resolve` gave.
        responses: any number of them.
        where: opens the errors.

    Returns:
        One feedback per response; those that have failed say why.

    Raises:
        ScoreError: there is not one remark per response, or a remark is none.
    """
    remarks = critic(responses)
    if hasattr(remarks, "__await__"):
        remarks = wait_for(remarks)
    if not isinstance(remarks, (list, tuple)) or len(remarks) != len(responses):
        got = f"{len(remarks)}" if isinstance(remarks, (list, tuple)) else f"{type(remarks).__name__} {remarks!r:.80}"
        raise ScoreError(f"{where}: a critic must return one remark for each of {len(responses)} responses; got {got}.")
    return [_checked(read(remark, where), of, where) for remark, of in zip(remarks, responses, strict=True)]


def read(remark: Any, where: str) -> Feedback:
    """A remark as feedback.

    Raises:
        ScoreError: it is none.
    """
    if isinstance(remark, Feedback):
        return remark
    if remark is None:
        return Feedback(why="the critic returned None")
    if isinstance(remark, Mapping) and remark.get("marks") is not None:
        return Feedback(str(remark.get("textual_feedback", "")), marks=tuple(remark["marks"]))
    if isinstance(remark, Mapping):
        return parse_feedback(json.dumps(dict(remark)), repair=False)
    if isinstance(remark, str):
        return parse_feedback(remark)
    raise ScoreError(f"{where}: a critic must answer with a Feedback, a text, a mapping or None; got {remark!r:.80}.")


def _checked(found: Feedback, response: Response, where: str) -> Feedback:
    if found.marks is not None and len(found.marks) != len(response.text):
        raise ScoreError(
            f"{where}: marks must hold a label for each of the {len(response.text)} characters of a response; got "
            f"{len(found.marks)} for {response.text!r:.80}."
        )
    return found
