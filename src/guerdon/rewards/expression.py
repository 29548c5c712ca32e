"""Rewards written as arithmetic over other rewards: a small language with its own parser; nothing is ever evaluated as code.

An expression is made of numbers, names of primitives, + - * / and parentheses, such as `g1 + (g2 * (g3/2)) - (g4/3)`.
Differentiable Evolutionary Reinforcement Learning, 2025, arXiv 2512.13399.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import RecipeError, check_shapes, nearest

DEEPEST = 64
"""Parentheses within one another; what is nested deeper is no expression."""
LONGEST = 4096
"""Characters of an expression."""

_TEST_POINT = (1.0, 1.0, 1e-6, 1.0 + 1e-6)
_NUMBER = r"(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][+-]?[0-9]+)?"
_TOKEN = re.compile(rf"[ \t]*(?:(?P<number>{_NUMBER})(?!\w)|(?P<name>[A-Za-z_]\w*)|(?P<sign>[-+*/()]))", re.ASCII)
_ARITHMETIC = {"+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div}
_TIGHTNESS = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3, "positive": 3}


class Evaluated(NamedTuple):
    """Values of an expression, and where it has none.

    Attributes:
        values: [...], 0 where it has none.
        failed: [...], True where something is divided by zero, or the value is not finite.
    """

    values: Float[Tensor, "*N"]
    failed: Bool[Tensor, "*N"]


class RewardExpression:
    """A parsed expression: a function of the scores of K primitives. Made by `parse`.

    Attributes:
        text: as it was written, without the spaces around it.
        names: of the K primitives.
        program: its operations in the order in which they are done (reverse Polish): numbers, positions of primitives as
            `("score", k)`, and signs. Two expressions with the same program are the same.

    Example:
        >>> reward = RewardExpression.parse("g1 + (g2 * (g3/2)) - (g4/3)", 4)
        >>> reward(torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]))
        tensor([0.6667, 0.5000])
        >>> RewardExpression.parse("g1.__class__", 4)
        Traceback (most recent call last):
        ...
        guerdon.errors.RecipeError: expression 'g1.__class__': at 3, '.__class__' is no part of an expression: numbers, ...

    Source:
        arXiv 2512.13399, section 3 and the authors' checker of expressions.
    """

    def __init__(self, text: str, names: tuple[str, ...], program: tuple[tuple[str, float], ...]) -> None:
        self.text, self.names, self.program = text, names, program

    @classmethod
    def parse(cls, text: str, primitives: int | Sequence[str]) -> RewardExpression:
        """Read an expression, and try it at a fixed point.

        Args:
            text: numbers as Python writes them, names, + - * / and parentheses.
            primitives: K, for the names g1 ... gK; or K names, beside which g1 ... gK stand for their places.

        Raises:
            RecipeError: it is no such expression, names no primitive or an unknown one, or has no finite value at the test
                point 1, 1, 1e-6, 1 + 1e-6, 1, 1, ...
        """
        names = _names(primitives)
        text = text.strip()
        expression = cls(text, names, tuple(_program(text, _places(names))))
        if not expression.used:
            raise _fault(text, "it names no primitive, so that all samples would be worth the same")
        point = torch.tensor([_TEST_POINT[k % 4] for k in range(len(names))], dtype=torch.float64)
        if expression.evaluate(point).failed:
            raise _fault(text, "it divides by zero or is not finite at the test point 1, 1, 1e-6, 1 + 1e-6")
        return expression

    @property
    def used(self) -> tuple[int, ...]:
        """The places of the primitives that it names."""
        return tuple(sorted({int(value) for kind, value in self.program if kind == "score"}))

    def __call__(self, scores: Float[Tensor, "*N K"]) -> Float[Tensor, "*N"]:
        """The reward of each sample; 0 where the expression has no value.

        Args:
            scores: [..., K].

        Raises:
            ShapeError: the last dimension is not K.

        Gradient:
            To scores; 0 where the expression has no value.
        """
        return self.evaluate(scores).values

    def evaluate(self, scores: Float[Tensor, "*N K"]) -> Evaluated:
        """The reward of each sample, and where there is none; arguments as for a call."""
        check_shapes("expression", scores=(scores, f"... {len(self.names)}"))
        value, failed = self._run(scores)
        if bool(failed.any()):
            # once more where it has a value everywhere: no gradient comes to be NaN behind what is left out
            safe = scores.new_tensor([_TEST_POINT[k % 4] for k in range(len(self.names))])
            value = torch.where(failed, 0.0, self._run(torch.where(failed.unsqueeze(-1), safe, scores))[0])
        return Evaluated(value, failed)

    def _run(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        stack: list[Tensor] = []
        failed = torch.zeros(scores.shape[:-1], dtype=torch.bool, device=scores.device)
        for kind, value in self.program:
            if kind == "number":
                stack.append(scores.new_full(scores.shape[:-1], value))
            elif kind == "score":
                stack.append(scores[..., int(value)])
            elif kind == "negative":
                stack.append(-stack.pop())
            else:
                right, left = stack.pop(), stack.pop()
                if kind == "/":
                    failed = failed | (right == 0)
                    right = torch.where(right == 0, 1.0, right)
                stack.append(_ARITHMETIC[kind](left, right))
        return stack[0], failed | ~stack[0].isfinite()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RewardExpression) and (self.names, self.program) == (other.names, other.program)

    def __hash__(self) -> int:
        return hash((self.names, self.program))

    def __repr__(self) -> str:
        return f"RewardExpression({self.text!r})"


def _names(primitives: int | Sequence[str]) -> tuple[str, ...]:
    names = tuple(f"g{k + 1}" for k in range(primitives)) if isinstance(primitives, int) else tuple(primitives)
    if not names:
        raise RecipeError("expression: there must be at least one primitive to name.")
    return names


def _places(names: Sequence[str]) -> dict[str, int]:
    """Name -> place; g1 ... gK too, where they are not the names of others."""
    return {f"g{k + 1}": k for k in range(len(names))} | {name: k for k, name in enumerate(names)}


def _fault(text: str, what: str) -> RecipeError:
    return RecipeError(f"expression {text!r:.120}: {what}.")


def _program(text: str, places: dict[str, int]) -> list[tuple[str, float]]:
    """The operations of an expression in reverse Polish notation (Dijkstra's shunting yard).

    Raises:
        RecipeError: it is no expression; says where and why.
    """
    if len(text) > LONGEST:
        raise _fault(text, f"it has {len(text)} characters; at most {LONGEST} are read")
    program: list[tuple[str, float]] = []
    waiting: list[str] = []
    at, deep, wants_operand = 0, 0, True

    def pop_down_to(tightness: int) -> None:
        while waiting and waiting[-1] != "(" and _TIGHTNESS[waiting[-1]] >= tightness:
            program.append((waiting.pop(), 0.0))

    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise _fault(
                text,
                f"at {at + 1}, {text[at : at + 20]!r} is no part of an expression: numbers, names, + - * / and parentheses are",
            )
        token, at = found[0].strip(), found.end()
        operand = found["number"] is not None or found["name"] is not None
        if operand or token == "(":
            if not wants_operand:
                raise _fault(text, f"there is no operator before {token!r}, which ends at {at}")
        elif wants_operand and token not in ("+", "-"):
            raise _fault(text, f"there is no operand before {token!r}, which ends at {at}")
        if operand:
            program.append(_operand(text, token, found["name"] is not None, places))
            wants_operand = False
        elif token == "(":
            deep += 1
            if deep > DEEPEST:
                raise _fault(text, f"parentheses are nested more than {DEEPEST} deep")
            waiting.append(token)
        elif token == ")":
            pop_down_to(0)
            if not waiting:
                raise _fault(text, f"the parenthesis closed at {at} was never opened")
            waiting.pop()
            deep -= 1
        elif wants_operand:
            waiting.append("negative" if token == "-" else "positive")
        else:
            pop_down_to(_TIGHTNESS[token])
            waiting.append(token)
            wants_operand = True
    if wants_operand:
        raise _fault(text, "it is empty" if not text else "an operand is missing at its end")
    pop_down_to(0)
    if waiting:
        raise _fault(text, "a parenthesis is never closed")
    return [step for step in program if step[0] != "positive"]


def _operand(text: str, token: str, is_name: bool, places: dict[str, int]) -> tuple[str, float]:
    if is_name:
        if token not in places:
            raise _fault(
                text, f"there is no primitive {token!r}.{nearest(token, places)} There are: {', '.join(places)}"
            )
        return "score", float(places[token])
    if re.fullmatch("0[0-9]+", token) and token.strip("0"):
        raise _fault(text, f"the number {token} begins with 0")
    if token.isdigit() and not math.isfinite(float(token)):
        raise _fault(text, f"the number {token:.20}... is too large")
    return "number", float(token)


def random_expression(draw: random.Random, names: Sequence[str], *, terms: int = 4, products: float = 0.15) -> str:
    """A short expression to learn the grammar from: a sum or difference of primitives, most of them scaled.

    Args:
        draw: where it comes from.
        names: of the primitives.
        terms: at most.
        products: probability of a term in parentheses: a product of two primitives, or a quotient by a number.

    Example:
        >>> [random_expression(random.Random(seed), ["g1", "g2"]) for seed in (1, 2, 5)]
        ['(g1/0.5)-(g2*g2)', 'g1', '2*g2+0.1*g2+g2']
    """
    parts = []
    for number in range(draw.randint(1, terms)):
        sign = draw.choice("+-") if number else ""
        name, scale = draw.choice(names), draw.choice(("0.1", "0.5", "2"))
        if draw.random() < products:
            term = f"({name}*{draw.choice(names)})" if draw.random() < 0.5 else f"({name}/{scale})"
        else:
            term = name if draw.random() < 0.4 else f"{scale}*{name}"
        parts.append(sign + term)
    return "".join(parts)


def thirds(step_scores: Float[Tensor, "*N T"], mask: Bool[Tensor, "*N T"] | None = None) -> Float[Tensor, "*N 3"]:
    """The mean score of the steps in the first, the middle and the last third of each trajectory: three primitives.

    Step t of n live ones, counted from 0, belongs to third floor(3 t / n).

    Args:
        step_scores: [..., T].
        mask: [..., T], which steps are live; None = all.

    Returns:
        [..., 3]; 0 for a third without a step.

    Raises:
        ShapeError: the shapes differ.

    Gradient:
        To the scores of live steps.

    Example:
        >>> thirds(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]))
        tensor([0.5000, 1.0000, 0.0000])

    Source:
        arXiv 2512.13399, section 4; other numbers of steps than multiples of 3 are our reading.
    """
    live = torch.ones_like(step_scores, dtype=torch.bool) if mask is None else mask
    check_shapes("rewards.thirds", step_scores=(step_scores, "... T"), mask=(live, "... T"))
    place = live.long().cumsum(-1) - 1
    third = 3 * place // live.sum(-1, keepdim=True).clamp(min=1)
    means = []
    for k in range(3):
        own = live & (third == k)
        means.append(torch.where(own, step_scores, 0.0).sum(-1) / own.sum(-1).clamp(min=1))
    return torch.stack(means, -1)
