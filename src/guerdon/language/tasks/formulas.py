"""Reward expressions over four primitives, written character by character: a small model for the outer policy of DERL.

The prompt is `=`, a completion is an expression such as `0.5*g2+g4`. There is no right answer: what an expression is worth
only training with it can tell.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from guerdon.language.tasks import Row, Task
from guerdon.language.tasks.small import small_llama
from guerdon.language.tasks.stream import Stream

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = "0123456789.+-*/()g=_$"  # a character's place is its token
PROMPT, PAD, EOS = "=", "_", "$"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: digits, `.`, operators, parentheses, `g`, the prompt `=`, the padding `_` and the end `$`."""
    from guerdon.language.characters import character_tokenizer

    return character_tokenizer(ALPHABET, pad=PAD, eos=EOS)


def model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 2 layers, width 64 and 4 heads: about 100 thousand weights.

    Args:
        seed: of the initial weights. The global generator is left as it was.
    """
    return small_llama(seed, tokens=len(ALPHABET), pad=ALPHABET.index(PAD), eos=ALPHABET.index(EOS))


def train_rows(seed: int) -> Stream:
    """The one prompt that there is, without end."""
    return Stream(lambda i: {"prompt": PROMPT})


def demonstrations(seed: int) -> Stream:
    """Endless random sums of one to three of g1 ... g4, scaled, as `completion`."""
    return Stream(lambda i: {"prompt": PROMPT, "completion": _sum(random.Random(f"{seed} {i}"))})


def held_out_rows(count: int) -> list[Row]:
    """The prompt with fixed expressions."""
    return [{"prompt": PROMPT, "completion": _sum(random.Random(f"held out {i}"))} for i in range(count)]


def _sum(draw: random.Random) -> str:
    return "+".join(f"{draw.choice(('', '0.5*', '2*'))}g{draw.randint(1, 4)}" for _ in range(draw.randint(1, 3)))


TASK = Task(
    name="formulas",
    description="write a reward expression over four primitives; for the outer policy of loop: bilevel",
    tokenizer=tokenizer,
    model=model,
    train_rows=train_rows,
    held_out_rows=held_out_rows,
    demonstrations=demonstrations,
)
