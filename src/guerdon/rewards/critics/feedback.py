"""Written feedback: a critique and the phrases that it calls good or poor, and how it is read out of a reply.

Two forms are read, each a JSON object that may stand after any other text:
{"textual_feedback": "...", "good_spans": ["...", ...], "poor_spans": ["...", ...]}, phrases as they stand in the sample;
{"word_score_list": [["word", -1 | 0 | 1], ...]}, all words of the sample, the critique before it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from guerdon.rewards.judges.verdict import json_objects

_CRITIQUE, _GOOD, _POOR, _WORDS = "textual_feedback", "good_spans", "poor_spans", "word_score_list"
_LONGEST = 50_000  # characters that are looked at, from the end
_START = re.compile(r"\{\s*[\"']")


class Feedback(NamedTuple):
    """What a critic says of a sample.

    Attributes:
        critique: in words.
        spans: (phrase, label), the label 1 for good, -1 for poor, 0 for neither; to be found in the sample.
        marks: a label for every character of the sample, from a critic that knows the places; `spans` then only tell.
        calls: how often a model was called for it, tries that failed included.
        malformed: how many of its replies could not be read.
        why: why there is no feedback; empty where there is.
        in_order: the phrases are in the order of the sample, as a list of all its words.
    """

    critique: str = ""
    spans: tuple[tuple[str, float], ...] = ()
    marks: tuple[float, ...] | None = None
    calls: int = 0
    malformed: int = 0
    why: str = ""
    in_order: bool = False

    @property
    def failed(self) -> bool:
        """Whether there is no feedback."""
        return bool(self.why)


def parse_feedback(reply: str, *, repair: bool = True) -> Feedback:
    """Read the last feedback in a reply.

    Args:
        reply: what a model wrote.
        repair: where there is none, look once more at what is no JSON but a literal of Python: single quotes, tuples, None.
            Code fences and text around the object are let be in any case.

    Returns:
        The feedback; one that has failed says why.

    Example:
        >>> parse_feedback('Good. {"textual_feedback": "Short.", "good_spans": ["a fox"], "poor_spans": []}').spans
        (('a fox', 1.0),)
        >>> parse_feedback("Wordy. {'word_score_list': [('a', 0), ('fox', -1)]}")[:2]
        ('Wordy.', (('a', 0.0), ('fox', -1.0)))
        >>> parse_feedback('{"good_spans": "a fox"}').why
        'good_spans must be a list of texts'

    Source:
        The two forms are those of the authors' code of arXiv 2505.22338; what is repaired is our reading.
    """
    reply = reply[-_LONGEST:]
    found = Feedback(why="there is no JSON object with feedback in the reply")
    for reader in (json_objects, _literals) if repair else (json_objects,):
        for content, start in reader(reply):
            if isinstance(content, Mapping) and {_GOOD, _POOR, _WORDS} & set(content):
                found = _read(content, reply[:start])
        if not found.failed:
            return found
    return found


def _literals(text: str) -> Iterator[tuple[Any, int]]:
    """The literal of Python from the first brace to the last, read as a tree and never run."""
    start, end = _START.search(text), text.rfind("}")
    if start is None or end < start.start():
        return
    try:
        yield _plain(ast.parse(text[start.start() : end + 1].strip(), mode="eval").body), start.start()
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # neither a literal
        return


def _plain(node: ast.expr) -> Any:
    """The value of a literal.

    Raises:
        ValueError: it is none.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_plain(entry) for entry in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_plain(key)): _plain(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.Name):
        names = {"true": True, "false": False, "null": None}
        if node.id in names:
            return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _plain(node.operand)
        if isinstance(value, (int, float)):
            return -value
    raise ValueError(f"no literal: {type(node).__name__}")


def _read(content: Mapping[str, Any], before: str) -> Feedback:
    critique = content.get(_CRITIQUE)
    if not isinstance(critique, str):
        critique = _unfenced(before)
    if _WORDS in content:
        return _of_words(content[_WORDS], critique)
    spans: list[tuple[str, float]] = []
    for key, label in ((_GOOD, 1.0), (_POOR, -1.0)):
        phrases = content.get(key)
        phrases = [] if phrases is None else phrases
        if not isinstance(phrases, (list, tuple)) or not all(isinstance(phrase, str) for phrase in phrases):
            return Feedback(why=f"{key} must be a list of texts")
        spans += [(phrase, label) for phrase in phrases]
    return Feedback(critique, tuple(spans))


def _of_words(words: Any, critique: str) -> Feedback:
    if not isinstance(words, (list, tuple)):
        return Feedback(why=f"{_WORDS} must be a list of [word, label]")
    spans = []
    for entry in words:
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)):
            return Feedback(why=f"{_WORDS} must be a list of [word, label]; got {entry!r:.40}")
        if isinstance(entry[1], bool) or entry[1] not in (-1, 0, 1):
            return Feedback(why=f"a label must be -1, 0 or 1; got {entry[1]!r:.20} for {entry[0]!r:.40}")
        spans.append((entry[0], float(entry[1])))
    return Feedback(critique, tuple(spans), in_order=True)


def _unfenced(text: str) -> str:
    return re.sub(r"```\w*\s*$", "", text.strip()).strip()
