"""Maps of a single score: bounds without a reference answer, a ceiling, a price for length.

They are what `par` is compared with. Reward Shaping to Mitigate Reward Hacking in RLHF, 2025, arXiv 2502.18770.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guerdon.errors import RecipeError, ScoreError, check_shapes

# least squares of degree 5 to the sigmoid at 100 even places of [-5, 5]; even coefficients vanish but for the constant
_POLYNOMIAL = (2.02669170e-4, -1.01309121e-2, 0.228788512, 0.5)


def sigmoid(scores: Float[Tensor, "P G"], *, k: float = 1.0) -> Float[Tensor, "P G"]:
    """s = sigmoid(k r): bounded, but not measured against a reference.

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        k: slope, above 0.

    Returns:
        Shaped scores [P, G], from 0 to 1.

    Raises:
        ShapeError: scores is not [P, G].
        ScoreError: a score is infinite.
        RecipeError: k is not above 0.

    Gradient:
        To scores.

    Edge cases:
        NaN stays NaN. Where raw scores are far from 0 all shaped ones are nearly equal.

    Example:
        >>> sigmoid(torch.tensor([[0.0, 2.0]]))
        tensor([[0.5000, 0.8808]])

    Source:
        arXiv 2502.18770, authors' code.
    """
    if not k > 0:
        raise RecipeError(f"shaping.sigmoid.k: must be above 0; got {k}.")
    return torch.sigmoid(k * _checked("shaping.sigmoid", scores))


def tanh(scores: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """s = tanh(r), from -1 to 1.

    Args:
        scores: [P, G], raw scores; NaN = not scored.

    Returns:
        Shaped scores [P, G].

    Raises:
        ShapeError: scores is not [P, G].
        ScoreError: a score is infinite.

    Gradient:
        To scores.

    Edge cases:
        NaN stays NaN.

    Example:
        >>> tanh(torch.tensor([[0.0, 1.0]]))
        tensor([[0.0000, 0.7616]])

    Source:
        arXiv 2502.18770, authors' code.
    """
    return torch.tanh(_checked("shaping.tanh", scores))


def poly(scores: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """s = p(r), the polynomial of degree 5 that was fitted to the sigmoid on [-5, 5]; 0 below, 1 above.

    Args:
        scores: [P, G], raw scores; NaN = not scored.

    Returns:
        Shaped scores [P, G], from -0.011 to 1.011.

    Raises:
        ShapeError: scores is not [P, G].
        ScoreError: a score is infinite.

    Gradient:
        To scores within (-5, 5).

    Edge cases:
        NaN stays NaN. It overshoots: 1.011 just below 5, then 1.

    Example:
        >>> poly(torch.tensor([[0.0, 5.0]]))
        tensor([[0.5000, 1.0000]])

    Source:
        arXiv 2502.18770, authors' code.
    """
    return sigmoid_polynomial(_checked("shaping.poly", scores))


def ceil(scores: Float[Tensor, "P G"], *, c: float) -> Float[Tensor, "P G"]:
    """s = min(r, c): more than c is not paid for.

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        c: the ceiling, in the unit of the scores; 3, 4 and 5 were tried.

    Returns:
        Shaped scores [P, G].

    Raises:
        ShapeError: scores is not [P, G].
        ScoreError: a score is infinite.

    Gradient:
        To scores below c.

    Edge cases:
        NaN stays NaN.

    Example:
        >>> ceil(torch.tensor([[1.0, 7.0]]), c=3.0)
        tensor([[1., 3.]])

    Source:
        arXiv 2502.18770, authors' code.
    """
    return _checked("shaping.ceil", scores).clamp(max=c)


def length_penalty(
    scores: Float[Tensor, "P G"], lengths: Int[Tensor, "P G"], *, limit: int = 300, per_token: float = 0.01
) -> Float[Tensor, "P G"]:
    """s = r - per_token * (L - limit) for samples longer than limit: a price for length, before any other shaping.

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        lengths: [P, G], live steps of each sample.
        limit: steps that cost nothing.
        per_token: price of each further step, in the unit of the scores.

    Returns:
        Shaped scores [P, G].

    Raises:
        ShapeError: an argument is not [P, G].
        ScoreError: a score is infinite.

    Gradient:
        To scores.

    Edge cases:
        Exactly the score at L = limit. In a chain it stands first, so that what follows sees the price.

    Example:
        >>> length_penalty(torch.tensor([[1.0, 1.0]]), torch.tensor([[300, 350]]))
        tensor([[1.0000, 0.5000]])

    Source:
        arXiv 2502.18770, authors' code, where it is on by default.
    """
    where = "shaping.length_penalty"
    check_shapes(where, scores=(scores, "P G"), lengths=(lengths, "P G"))
    return _checked(where, scores) - per_token * (lengths - limit).clamp(min=0).to(scores)


def saturated(scores: Float[Tensor, "P G"], *, threshold: float) -> Float[Tensor, "P G"]:
    """s = -(r - threshold)^2: the best score is the threshold, more costs as much as less (PPO-SAT).

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        threshold: theta, in the unit of the scores.

    Returns:
        Shaped scores [P, G], at most 0, in the squared unit.

    Raises:
        ShapeError: scores is not [P, G].
        ScoreError: a score is infinite.

    Gradient:
        To scores.

    Edge cases:
        NaN stays NaN. It holds every sample at the threshold, not their mean: a score of 0 or 1 cannot hit 0.45.

    Example:
        >>> saturated(torch.tensor([[1.5, 2.5]]), threshold=0.5)
        tensor([[-1., -4.]])

    Source:
        Confronting Reward Model Overoptimization with Constrained RLHF, 2023, arXiv 2310.04373, authors' code.
    """
    return -(_checked("shaping.saturated", scores) - threshold).square()


def sigmoid_polynomial(x: Tensor) -> Tensor:
    """The polynomial of `poly` at every entry.

    Example:
        >>> sigmoid_polynomial(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    fifth, third, first, constant = _POLYNOMIAL
    square = x * x
    inside = ((fifth * square + third) * square + first) * x + constant
    return torch.where(x >= 5, 1.0, torch.where(x <= -5, 0.0, inside))


def check_scores(where: str, scores: Tensor, name: str = "scores") -> None:
    """Raise on an infinite score; NaN means that a sample was not scored.

    Raises:
        ScoreError: naming the place.
    """
    bad = scores.isinf().nonzero()
    if len(bad):
        raise ScoreError(f"{where}: {name}{bad[0].tolist()} is infinite. Return None for what cannot be scored.")


def _checked(where: str, scores: Tensor) -> Tensor:
    check_shapes(where, scores=(scores, "P G"))
    check_scores(where, scores)
    return scores
