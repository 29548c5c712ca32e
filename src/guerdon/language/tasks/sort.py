"""Sort digits: the prompt is 3 to 10 digits and `=`, the right answer is the digits in ascending order.

The number of digits is the difficulty. A model of 100 thousand weights learns the task on one CPU thread in seconds,
and after a short supervised warm start it is right often enough to be rewarded and wrong often enough to improve.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from guerdon.language.tasks import Row, Task
from guerdon.language.tasks.small import small_llama
from guerdon.language.tasks.stream import Stream

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = "0123456789=.$"  # a character's place is its token
PAD = "."
EOS = "$"
SHORTEST, LONGEST = 3, 10
HELD_OUT_SHARE = 8  # one digit string in this many is never trained on


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: the digits, `=`, the padding `.` and the end `$`."""
    from guerdon.language.characters import character_tokenizer

    return character_tokenizer(ALPHABET, pad=PAD, eos=EOS)


def model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 2 layers, width 64 and 4 heads: 102,336 weights.

    Args:
        seed: of the initial weights. The global generator is left as it was.
    """
    return small_llama(seed, tokens=len(ALPHABET), pad=ALPHABET.index(PAD), eos=ALPHABET.index(EOS))


def _held_out(digits: str) -> bool:
    return blake2b(digits.encode(), digest_size=8).digest()[0] % HELD_OUT_SHARE == 0


def _draw(*key: object, held_out: bool) -> str:
    """The digits that belong to a key: hashed again until they fall on the wanted side of the split."""
    attempt = 0
    while True:
        number = int.from_bytes(blake2b(repr((*key, attempt)).encode(), digest_size=32).digest(), "little")
        number, length = divmod(number, LONGEST - SHORTEST + 1)
        length += SHORTEST
        digits = f"{number % 10**length:0{length}d}"
        if _held_out(digits) == held_out:
            return digits
        attempt += 1


def _row(digits: str) -> Row:
    return {"prompt": digits + "=", "answer": "".join(sorted(digits)), "length": len(digits)}


def _demonstrate(row: Row) -> Row:
    return {**row, "completion": row["answer"] + EOS}


def critique(prompt: str, response: str, answer: str) -> dict[str, object]:
    """Written feedback on an answer, for rewards that read spans: right digits in their places, wrong ones and those too many.

    Args:
        prompt: not read.
        response: the answer to be judged.
        answer: the right one.

    Returns:
        `textual_feedback`, and `marks`: 1 for a right digit, -1 for any other character.

    Example:
        >>> critique("2013=", "01339", "0123")
        {'textual_feedback': 'Right: 013. Wrong: 39.', 'marks': [1, 1, -1, 1, -1]}
    """
    right = [n < len(answer) and letter == answer[n] for n, letter in enumerate(response)]
    good, poor = (
        "".join(letter for letter, is_right in zip(response, right, strict=True) if is_right is of)
        for of in (True, False)
    )
    said = [f"{name}: {letters}." for name, letters in (("Right", good), ("Wrong", poor)) if letters]
    return {"textual_feedback": " ".join(said), "marks": [1 if is_right else -1 for is_right in right]}


def _criticise(row: Row, *key: object) -> Row:
    """A record of feedback on an answer in which about a third of the digits are others, and one may be missing or too many."""
    number = int.from_bytes(blake2b(repr(("answer", *key, row["prompt"])).encode(), digest_size=32).digest(), "little")
    number, change = divmod(number, 4)
    text = ""
    for digit in row["answer"][: -1 if change == 0 else None] + ("0" if change == 1 else ""):
        number, chance = divmod(number, 30)
        text += str(chance % 10) if chance >= 20 else digit
    return {"prompt": row["prompt"], "response": text, "answer": row["answer"], **critique("", text, row["answer"])}


def feedback(seed: int) -> Stream:
    """Endless records of feedback on right and wrong answers: `response`, `textual_feedback`, `marks`."""
    return Stream(lambda i: _criticise(_row(_draw("feedback", seed, i, held_out=False)), seed, i))


def held_out_feedback(count: int) -> list[Row]:
    """Fixed records of feedback, on digits that no training stream can hold; fewer are the first of more."""
    return [_criticise(row, "held out") for row in held_out_rows(count)]


def train_rows(seed: int) -> Stream:
    """Endless training rows: `prompt` (digits and `=`), `answer` (the digits sorted), `length` (number of digits)."""
    return Stream(lambda i: _row(_draw("train", seed, i, held_out=False)))


def demonstrations(seed: int) -> Stream:
    """Endless rows with `completion` (the answer and the end `$`), for a supervised warm start."""
    return Stream(lambda i: _demonstrate(_row(_draw("demonstrations", seed, i, held_out=False))))


def held_out_rows(count: int) -> list[Row]:
    """Fixed rows, all different, with `completion`, whose digit strings no training stream can hold.

    Fewer rows are the first of more.

    Args:
        count: how many.
    """
    rows: dict[str, Row] = {}
    position = 0
    while len(rows) < count:
        digits = _draw("held out", position, held_out=True)
        rows.setdefault(digits, _demonstrate(_row(digits)))
        position += 1
    return list(rows.values())


TASK = Task(
    name="sort",
    description="sort 3 to 10 digits; the answer is right or wrong, and longer is harder",
    tokenizer=tokenizer,
    model=model,
    train_rows=train_rows,
    held_out_rows=held_out_rows,
    demonstrations=demonstrations,
    feedback=feedback,
    held_out_feedback=held_out_feedback,
)
