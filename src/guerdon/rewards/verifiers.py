"""Verifiers: rewards that compare a sample's answer with the one in the data.

Each returns pairs (score, answer): 1 or 0, and the answer it found, so that methods that ask whether samples agree
(consistency, majority) can use the same extraction. A data row whose answer is None is not scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from guerdon.errors import DataError, RecipeError
from guerdon.rewards.math_process import judge

Verdict = tuple[float, str | None] | None


def exact_answer(
    samples: Sequence[Sequence[str]], answer: Sequence[Any], *, strip: bool = True, ignore_case: bool = False
) -> list[list[Verdict]]:
    """1 if the whole sample is the answer, else 0.

    For tasks whose answer is one known text.

    Args:
        samples: [P][G] texts.
        answer: [P]; numbers are compared as text, None is not scored.
        strip: whether white space at both ends is ignored.
        ignore_case: whether upper and lower case are the same.

    Returns:
        [P][G] pairs (score, the sample as it was compared), or None where there is no answer.

    Example:
        >>> exact_answer([["12", " 21 "], ["x", "y"]], ["21", None])
        [[(0.0, '12'), (1.0, '21')], [None, None]]
    """

    def form(text: str) -> str:
        text = text.strip() if strip else text
        return text.casefold() if ignore_case else text

    return [
        [None if gold is None else (float(form(sample) == form(str(gold))), form(sample)) for sample in group]
        for group, gold in zip(samples, answer, strict=True)
    ]


def regex(
    samples: Sequence[Sequence[str]],
    answer: Sequence[Any] | None = None,
    *,
    pattern: str,
    where: Literal["anywhere", "whole"] = "anywhere",
    ignore_case: bool = False,
) -> list[list[Verdict]]:
    r"""1 if the sample matches a regular expression, and what it captures is the answer if it captures one.

    Without a group named `answer` this rewards a format. With one, such as `#### (?P<answer>-?\d+)`, the text captured
    by the last match must equal the data's answer (white space at both ends aside).

    Args:
        samples: [P][G] texts.
        answer: [P]; read only if the pattern has a group named `answer`. None is not scored.
        pattern: a regular expression of Python's `re`.
        where: whether it may match `anywhere`, or must match the `whole` sample (white space at both ends aside).
        ignore_case: whether upper and lower case are the same, in the pattern and in the answer.

    Returns:
        [P][G] pairs (score, captured text or None).

    Raises:
        RecipeError: the pattern is not a regular expression.
        DataError: the pattern captures an answer and the data has no column `answer`.

    Edge cases:
        A pattern with nested repetition can take very long on long samples; `re` has no time limit.

    Example:
        >>> regex([["so #### 7", "7"]], [7], pattern=r"#### (?P<answer>\d+)")
        [[(1.0, '7'), (0.0, None)]]
        >>> regex([["<a>x</a>", "x"]], pattern="<a>.*</a>", where="whole")
        [[(1.0, None), (0.0, None)]]
    """
    try:
        compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    except re.error as error:
        raise RecipeError(f"rewards.regex: pattern {pattern!r} is not a regular expression: {error}.") from None
    captures = "answer" in compiled.groupindex
    if captures and answer is None:
        raise DataError("rewards.regex: the pattern has a group named 'answer', but the data has no column 'answer'.")

    def form(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    def verdict(sample: str, gold: Any) -> Verdict:
        if captures and gold is None:
            return None
        matches = [compiled.fullmatch(sample.strip())] if where == "whole" else list(compiled.finditer(sample))
        match = matches[-1] if matches else None
        if match is None or not captures:
            return float(match is not None), None
        found = form(match["answer"] or "")
        return float(found == form(str(gold))), found

    golds = answer if captures and answer is not None else [None] * len(samples)
    return [[verdict(sample, gold) for sample in group] for group, gold in zip(samples, golds, strict=True)]


def math_verify(
    samples: Sequence[Sequence[str]],
    answer: Sequence[Any],
    *,
    accept: Literal["any", "boxed"] = "any",
    timeout: float = 5.0,
) -> list[list[Verdict]]:
    r"""1 if the sample's final answer equals the data's mathematically, else 0: 0.5, 1/2, \frac{1}{2} are the same.

    Parsing and comparing are done by the package math-verify, in a process of its own: a comparison can be abandoned
    after `timeout` wherever the reward is called from (a thread too), and no signal handler of this process is touched.

    Args:
        samples: [P][G] texts. LaTeX is looked for first (`\boxed{}` before others), then a plain expression; the last
            one counts.
        answer: [P]; with or without LaTeX delimiters, or a whole solution that ends in `#### answer`. None is not
            scored.
        accept: `boxed` takes an answer in `\boxed{}` only, which leaves less to luck.
        timeout: seconds for one sample.

    Returns:
        [P][G] pairs (score, answer found). Right answers are all returned in the form of the data's answer; a sample
        without an answer, or with one that is not judged in time, has score 0 and None.

    Raises:
        DataError: an answer in the data cannot be parsed; a column `answer` in words needs another reward.
        MissingExtraError: math-verify is not installed.

    Example:
        >>> math_verify([[r"It is $\frac{2}{4}$.", "Perhaps 0.6", "no idea"]], ["1/2"])
        [[(1.0, '1/2'), (0.0, '0.6'), (0.0, None)]]

    Source:
        H. Kydlíček, Math-Verify: math verification library, Hugging Face, 2025 (the package math-verify).
    """
    process = judge()
    return [
        [None if gold is None else process.verdict(sample, _gold(gold), accept == "boxed", timeout) for sample in group]
        for group, gold in zip(samples, answer, strict=True)
    ]


def _gold(answer: Any) -> str:
    """The answer in LaTeX delimiters, without which only its first number would be read."""
    text = str(answer)
    if "####" in text:
        text = text.rsplit("####", 1)[1]
    text = text.strip()
    return text if not text or "$" in text or any(mark in text for mark in (r"\boxed", r"\(", r"\[")) else f"${text}$"
