"""How a draft is put before a language model: the prompt of a revision."""

from __future__ import annotations

import re
from typing import Any

from guerdon.errors import DataError, RecipeError

SLOTS = ("{prompt}", "{draft}")
TEMPLATE = "{prompt}\n\nA draft of the answer:\n{draft}\n\nA better answer:\n"
_SLOT = re.compile("|".join(map(re.escape, SLOTS)))


def check_template(template: str) -> None:
    """Raise RecipeError unless a template has both slots."""
    for slot in SLOTS:
        if slot not in template:
            raise RecipeError(
                f"policy.revision: must contain {slot}; got {template!r:.80}. It is the text of a prompt that asks for a "
                "better answer: {prompt} stands for the prompt, {draft} for the answer to improve."
            )


def revision_prompt(template: str, prompt: Any, draft: str) -> Any:
    """A prompt that asks for an improvement of a draft, of the same form as the prompt without one.

    Args:
        template: a text with the slots {prompt} and {draft}, each once or more often.
        prompt: a text; or messages, the last of which is a text of the user's: its content takes the place of {prompt},
            and the filled template that of the content, so that it stays one turn.
        draft: the answer to improve.

    Raises:
        DataError: the messages do not end in a text of the user's.

    Example:
        >>> revision_prompt("{prompt} Not {draft}, but", "Two and two?", "five")
        'Two and two? Not five, but'
        >>> revision_prompt("{prompt} ({draft}?)", [{"role": "user", "content": "Say hello."}], "Bye.")
        [{'role': 'user', 'content': 'Say hello. (Bye.?)'}]
    """
    if isinstance(prompt, str):
        return _fill(template, prompt, draft)
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    if not isinstance(last, dict) or last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise DataError(
            "language.revision: a prompt must be a text, or messages that end in a text of the user's, to hold a draft; "
            f"got {prompt!r:.200}."
        )
    return [*prompt[:-1], {**last, "content": _fill(template, last["content"], draft)}]


def _fill(template: str, prompt: str, draft: str) -> str:
    # in one pass, so that a prompt may speak of {draft}
    return _SLOT.sub(lambda slot: prompt if slot[0] == SLOTS[0] else draft, template)
