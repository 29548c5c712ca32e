"""Weighting by an expression: the reward is arithmetic over the components, written down or searched for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import check_shapes
from guerdon.rewards.expression import RewardExpression
from guerdon.weighting.weighted import WeightedOutput


def expression(scores: Float[Tensor, "P G K"], score_names: Sequence[str] = (), *, formula: str) -> WeightedOutput:
    """The value of an expression over a sample's scores, such as `correct + 0.5 * (short / 2)`.

    Args:
        scores: [P, G, K], each component in its own unit; NaN = not scored.
        score_names: the K component names; without them components are g1 ... gK, as they also are beside their names.
        formula: numbers, names of components, + - * / and parentheses.

    Returns:
        `rewards` [P, G], and as `weights` [P, G, K] the slope of the reward in each component: its factor where the
        expression is linear. What a bend adds stands in the ledger's remainder.

    Raises:
        ShapeError: scores is not [P, G, K].
        RecipeError: formula is no expression, names a component that is not there, or has no value at a test point.

    Gradient:
        To scores.

    Edge cases:
        A sample for which something is divided by zero, or whose value is not finite, gets 0. A component that was not
        scored counts as 0; a sample for which nothing was scored that the expression names gets NaN.

    Example:
        >>> expression(torch.tensor([[[1.0, 4.0]]]), ("right", "short"), formula="right + short / 2").rewards
        tensor([[3.]])

    Source:
        Differentiable Evolutionary Reinforcement Learning, arXiv 2512.13399, section 3 (the language of rewards).
    """
    size = check_shapes("weighting.expression", scores=(scores, "P G K"))["K"]
    parsed = RewardExpression.parse(formula, tuple(score_names) or size)
    unscored = scores.isnan()
    known = scores.masked_fill(unscored, 0.0)
    rewards = parsed(known)
    with torch.enable_grad():
        leaf = known.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(parsed(leaf).sum(), leaf)
    nothing = unscored[..., list(parsed.used)].all(-1)
    return WeightedOutput(rewards.masked_fill(nothing, torch.nan), slopes.nan_to_num(0.0, 0.0, 0.0))
