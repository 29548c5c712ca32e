"""Prompts made to ask for what a domain wants: its criteria and a worked example go before the question.

A domain is what a router, a language model that is asked once a prompt, says it is.
CDR: Customizable Density Ratios of Strong-over-weak LLMs for Preference Annotation, 2024, arXiv 2411.02481.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guerdon.errors import RecipeError, nearest
from guerdon.rewards.nested import draw

BUNDLED = Path(__file__).with_suffix(".toml")
FALLBACK = "chat"
_EXEMPLAR = ("instruction", "question", "good", "bad", "why")
_ANSWER = re.compile(r"\[START\](.*?)\[END\]", re.DOTALL)


class Domain(NamedTuple):
    """One kind of prompt.

    Attributes:
        name: in lower case.
        about: what belongs to it, for the router.
        criteria: what a good answer in it looks like; empty = nothing is added.
        exemplars: texts of which one goes before the question; may be empty.
    """

    name: str
    about: str = ""
    criteria: str = ""
    exemplars: tuple[str, ...] = ()


def read_domains(source: str | Path | Mapping[str, Any] | None = None) -> dict[str, Domain]:
    """Domains by name.

    Args:
        source: a TOML file; its content: name -> {about, criteria, exemplars}; None or `default` = the bundled ones. An
            exemplar is a text, or {question, good, bad, why} with a sentence of instruction before it.

    Raises:
        RecipeError: there is no such file, or it has an unknown key or a wrong type.

    Example:
        >>> sorted(read_domains())
        ['chat', 'reasoning', 'safety']
    """
    if source is None or source == "default":
        source = BUNDLED
    where = "domains"
    if not isinstance(source, Mapping):
        where = str(source)
        try:
            source = tomllib.loads(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"domains: {where} cannot be read: {error.strerror}. Name a TOML file.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"domains: {where} is no TOML file: {error}.") from error
    found = {str(name).lower(): _domain(str(name).lower(), content, where) for name, content in source.items()}
    if not found:
        raise RecipeError(f"{where}: there is no domain in it.")
    return found


def _domain(name: str, content: Any, where: str) -> Domain:
    where = f"{where}: {name}"
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where}: must be a mapping with about, criteria, exemplars; got {content!r:.60}.")
    for key in content:
        if key not in ("about", "criteria", "exemplars"):
            raise RecipeError(f"{where}.{key}: there is no such key.{nearest(key, ('about', 'criteria', 'exemplars'))}")
    texts = {key: content.get(key, "") for key in ("about", "criteria")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise RecipeError(f"{where}.{key}: must be text; got {text!r:.60}.")
    pool = content.get("exemplars", ())
    if isinstance(pool, str) or not isinstance(pool, Sequence):
        raise RecipeError(f"{where}.exemplars: must be a list; got {pool!r:.60}.")
    exemplars = tuple(_exemplar(one, f"{where}.exemplars[{i}]") for i, one in enumerate(pool))
    return Domain(name, texts["about"].strip(), texts["criteria"].strip(), exemplars)


def _exemplar(content: Any, where: str) -> str:
    """Its text, which ends where the question follows."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Mapping) or set(content) - set(_EXEMPLAR) or "question" not in content:
        raise RecipeError(f"{where}: must be a text, or a mapping with {', '.join(_EXEMPLAR)}; got {content!r:.80}.")
    parts = {key: str(content.get(key, "")).strip() for key in _EXEMPLAR}
    lines = [f"User: {parts['question']}"]
    lines += [f"Good Assistant: {parts['good']}"] if parts["good"] else []
    lines += [f"Bad Assistant: {parts['bad']}"] if parts["bad"] else []
    lines += [f"Why it is bad: {parts['why']}"] if parts["why"] else []
    return "\n\n".join([*([parts["instruction"]] if parts["instruction"] else []), "\n".join(lines), "User:"])


def customise(prompt: Any, domain: Domain, seed: int = 0) -> Any:
    """A prompt that asks for what the domain wants.

    The question becomes exemplar, question and "Good Assistant:", a line each, after the criteria, which are a message of
    the system in a conversation. A domain with neither leaves the prompt as it is.

    Args:
        prompt: a text, or a list of messages whose last one of the user is the question.
        domain: its domain.
        seed: of the exemplar, which is drawn from the domain's; the same prompt gets the same one again.

    Returns:
        A new text or list of messages.

    Example:
        >>> print(customise("2 + 2?", Domain("sums", criteria="Be right.", exemplars=("User: 1 + 1? 2. User:",))))
        Be right.
        <BLANKLINE>
        User: 1 + 1? 2. User:
        2 + 2?
        Good Assistant:

    Source:
        CDR, arXiv 2411.02481. Where the prompt is a plain text, or brings a message of the system, the form is our reading.
    """
    if not (domain.criteria or domain.exemplars):
        return prompt
    exemplar = ""
    if domain.exemplars:
        size = len(domain.exemplars)
        exemplar = domain.exemplars[int(draw(seed, domain.name, prompt) * size) % size]
    if isinstance(prompt, str):
        asked = _asked(exemplar, prompt)
        return f"{domain.criteria}\n\n{asked}" if domain.criteria else asked
    messages = [dict(message) for message in prompt]
    question = next((m for m in reversed(messages) if m.get("role") == "user"), None)
    if question is not None:
        question["content"] = _asked(exemplar, question["content"])
    if domain.criteria:
        system = messages.pop(0)["content"] if messages and messages[0].get("role") == "system" else ""
        text = f"{domain.criteria}\n\n{system}" if system else domain.criteria
        messages.insert(0, {"role": "system", "content": text})
    return messages


def _asked(exemplar: str, question: str) -> str:
    return f"{exemplar}\n{question}\nGood Assistant:" if exemplar else f"{question}\nGood Assistant:"


def question_of(prompt: Any) -> str:
    """What the user asked last."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m.get("role") == "user"), prompt[-1]["content"])


def ask_domain(prompt: Any, domains: Mapping[str, Domain]) -> str:
    """What a router is asked about a prompt."""
    kinds = "\n".join(f"{domain.name.upper()}: {domain.about}" for domain in domains.values())
    names = ", ".join(name.upper() for name in domains)
    return (
        f"Classify a user's question. The kinds are:\n{kinds}\n\nThe question, which is not for you to answer:\n<question>\n"
        f"{question_of(prompt)}\n</question>\n\nReply with one of {names} between [START] and [END], "
        "in the form [START]KIND[END], and nothing else."
    )


def read_domain(reply: str, domains: Mapping[str, Domain], fallback: str = FALLBACK) -> str:
    """The domain that a router's reply names between [START] and [END]; the fallback where it names none that there is.

    Example:
        >>> read_domain("It is [START] Safety [END].", read_domains()), read_domain("SAFETY", read_domains())
        ('safety', 'chat')
    """
    found = _ANSWER.findall(reply)
    name = found[-1].strip().lower() if found else ""
    return name if name in domains else fallback
