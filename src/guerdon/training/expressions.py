"""What a policy that writes reward expressions is asked for, and examples to learn the grammar from."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from guerdon.language.tasks.stream import Stream
from guerdon.rewards.expression import random_expression
from guerdon.rewards.grammar import Grammar

Row = Mapping[str, Any]

_INSTRUCTION = """\
Write one reward function for training a policy, as arithmetic over these scores of a sample:
{listed}
Use g1 to g{count}, numbers, + - * / and parentheses. Write the expression alone, on one line.
"""


def written_with(count: int) -> str:
    """The characters of expressions over g1 ... gK, and those that do no harm in them."""
    return "".join(sorted({*"0123456789+-*/().e: \n", *"".join(_names(count))}))


def restrict(policy: Any, count: int, *, grammar: bool) -> None:
    """Keep a policy to the characters of expressions over g1 ... gK, or to the expressions themselves.

    Raises:
        RecipeError: its tokenizer has not the tokens for it.
    """
    policy.restrict(written_with(count), Grammar(_names(count)) if grammar else None)


def instruction(primitives: Sequence[str]) -> list[Row]:
    """One row with a `prompt` that asks for an expression over g1 ... gK.

    Args:
        primitives: what these stand for.

    Example:
        >>> print(instruction(["right", "short"])[0]["prompt"].splitlines()[1:3])
        ['g1: right', 'g2: short']
    """
    listed = "\n".join(
        f"{name}: {primitive}" for name, primitive in zip(_names(len(primitives)), primitives, strict=True)
    )
    return [{"prompt": _INSTRUCTION.format(listed=listed, count=len(primitives))}]


def demonstrations(rows: Sequence[Row], count: int, seed: int, *, products: float = 0.15) -> Stream:
    """Endless rows with an instruction as `prompt` and a random expression over g1 ... gK as `completion`.

    Args:
        rows: with the instructions; the first thousand are taken by turns.
        count: K.
        seed: of the expressions.
        products: share of terms that are more than a scaled primitive.
    """
    turns, names = min(len(rows), 1000), _names(count)

    def make(i: int) -> dict[str, Any]:
        draw = random.Random(f"expressions {seed} {i}")
        return {"prompt": rows[i % turns]["prompt"], "completion": random_expression(draw, names, products=products)}

    return Stream(make)


def _names(count: int) -> list[str]:
    return [f"g{k + 1}" for k in range(count)]
