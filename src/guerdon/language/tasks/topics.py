"""Topics: preferences with a true reward behind them, so that win rates are measured.

The prompt is one of four topics, an answer is 2 to 12 letters, and each topic has four letters that are good for it. The
quality of an answer, which no loss ever sees, is its share of good letters. Demonstrations take a good letter with
probability 0.6. A pair is two such answers; the better one is preferred with probability sigmoid(6 x difference in quality),
so labels are noisy, and on demand longer answers are preferred for their length.
"""

from __future__ import annotations

import math
import random
from hashlib import blake2b
from typing import TYPE_CHECKING

from guerdon.language.tasks import Row, Task
from guerdon.language.tasks.small import small_llama
from guerdon.language.tasks.stream import Stream

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = ".", ">", "$"
LETTERS = "abcdefghijklmn"
GOOD = {"A": "aehk", "B": "bfhm", "C": "cgkn", "D": "dfim"}  # the hidden part: topic -> letters that are good for it
ALPHABET = PAD + BOS + EOS + "".join(GOOD) + LETTERS
SHORTEST, LONGEST = 2, 12
GOOD_SHARE = 0.6
SHARPNESS = 6.0
PAIRS = 3000


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `>` opens every prompt, `$` ends an answer, `.` fills up."""
    from guerdon.language.characters import character_tokenizer

    return character_tokenizer(ALPHABET, pad=PAD, eos=EOS, bos=BOS)


def model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 2 layers, width 64 and 4 heads: 0.1 M weights.

    Args:
        seed: of the initial weights. The global generator is left as it was.
    """
    ids = {"pad": ALPHABET.index(PAD), "eos": ALPHABET.index(EOS), "bos": ALPHABET.index(BOS)}
    return small_llama(seed, tokens=len(ALPHABET), **ids)


def quality(samples: list[list[str]], topic: list[str]) -> list[list[float]]:
    """The true reward: the share of an answer's letters that are good for its topic; 0 for an empty answer.

    Args:
        samples: [P][G] answers.
        topic: [P].

    Returns:
        [P][G], from 0 to 1.

    Example:
        >>> quality([["ae", "ab", ""]], ["A"])
        [[1.0, 0.5, 0.0]]
    """
    return [[share_good(text, t) for text in group] for group, t in zip(samples, topic, strict=True)]


def share_good(text: str, topic: str) -> float:
    """The quality of one answer."""
    return sum(letter in GOOD[topic] for letter in text) / len(text) if text else 0.0


def train_rows(seed: int) -> Stream:
    """Endless prompts with their `topic`, which `quality` reads."""
    return Stream(lambda i: _prompt(_draw("train", seed, i)))


def demonstrations(seed: int, *, good_share: float = GOOD_SHARE) -> Stream:
    """Endless rows with `completion`, for a supervised warm start.

    Args:
        seed: of the topics and answers.
        good_share: probability of a good letter.
    """
    return answered(good_share, "demonstrations", seed)


def answered(good_share: float, *key: object, count: int | None = None) -> Stream:
    """Rows with `completion` of a quality that can be chosen.

    Args:
        good_share: probability of a good letter.
        key: two streams of other keys have nothing in common.
        count: how many rows; None = without end.
    """

    def make(i: int) -> Row:
        draw = generator(*key, i)
        topic = draw.choice(list(GOOD))
        return {**_prompt(topic), "completion": answer(draw, topic, good_share)}

    return Stream(make, count)


def held_out_rows(count: int, *, good_share: float = GOOD_SHARE) -> list[Row]:
    """Fixed rows with `completion`, the four topics in turn; `good_share` as for `answered`."""
    topics = list(GOOD)
    return [
        {**_prompt(topic := topics[i % len(topics)]), "completion": answer(generator("held out", i), topic, good_share)}
        for i in range(count)
    ]


def pairs(seed: int, *, count: int = PAIRS, length_bias: float = 0.0, length: int | None = None) -> Stream:
    """Preferences: `prompt`, `chosen`, `rejected`, `topic`.

    Args:
        seed: of the topics, answers and labels.
        count: how many.
        length_bias: added to the log-odds of an answer for each letter that it is longer.
        length: letters of every answer; None = 2 to 12.
    """
    return Stream(lambda i: _pair(generator("pairs", seed, i), length_bias, length), count)


def held_out_pairs(count: int, *, length_bias: float = 0.0, length: int | None = None) -> Stream:
    """Fixed pairs that no training stream holds; arguments as for `pairs`."""
    return Stream(lambda i: _pair(generator("held-out pairs", i), length_bias, length), count)


def generator(*key: object) -> random.Random:
    """A source of randomness that follows from its key alone."""
    return random.Random(int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little"))


def _draw(*key: object) -> str:
    return generator(*key).choice(list(GOOD))


def _prompt(topic: str) -> Row:
    return {"prompt": topic, "topic": topic}


def answer(draw: random.Random, topic: str, good_share: float = GOOD_SHARE, length: int | None = None) -> str:
    """A random answer to a topic, each letter good for it with probability `good_share`; None = a random length."""
    good = GOOD[topic]
    poor = [letter for letter in LETTERS if letter not in good]
    length = draw.randint(SHORTEST, LONGEST) if length is None else length
    return "".join(draw.choice(good if draw.random() < good_share else poor) for _ in range(length))


def _pair(draw: random.Random, length_bias: float, length: int | None) -> Row:
    topic = draw.choice(list(GOOD))
    first, second = answer(draw, topic, length=length), answer(draw, topic, length=length)
    while second == first:  # of the shortest answers, now and then
        second = answer(draw, topic, length=length)
    return judged(draw, topic, first, second, length_bias)


def judged(draw: random.Random, topic: str, first: str, second: str, length_bias: float = 0.0) -> Row:
    """Two answers as a pair, the better one preferred with probability sigmoid(6 x difference in quality + ...)."""
    odds = SHARPNESS * (share_good(first, topic) - share_good(second, topic)) + length_bias * (len(first) - len(second))
    if draw.random() >= 1 / (1 + math.exp(-odds)):
        first, second = second, first
    return {**_prompt(topic), "chosen": first, "rejected": second}


TASK = Task(
    name="topics",
    description="answer a topic with letters that are good for it; noisy preferences, and a hidden quality to measure by",
    tokenizer=tokenizer,
    model=model,
    train_rows=train_rows,
    held_out_rows=held_out_rows,
    demonstrations=demonstrations,
    pairs=pairs,
    held_out_pairs=held_out_pairs,
)
