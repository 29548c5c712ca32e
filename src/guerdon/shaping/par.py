"""Preference as reward: the probability, by the reward's own measure, that a sample beats a reference answer.

A reward that grows without bound pays for ever more of what it is wrong about; one that is bounded, grows fast at first
and is measured against a reference answer to the same prompt does not. The maps that it is compared with are here too.
Reward Shaping to Mitigate Reward Hacking in RLHF, 2025, arXiv 2502.18770.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import RecipeError, ScoreError, ShapeError, check_shapes
from guerdon.shaping.bounded import check_scores, sigmoid_polynomial


def par(
    scores: Float[Tensor, "P G"],
    ref_scores: Float[Tensor, "P M"],
    ref_mask: Bool[Tensor, "P M"] | None = None,
    *,
    k: float = 1.0,
) -> Float[Tensor, "P G"]:
    """The mean probability that a sample beats a reference answer: s = mean_m sigmoid(k (r - r_m)).

    r is read as the score of a Bradley-Terry model, for which sigmoid(r - r_m) is the probability that the sample is
    preferred to answer m. One reference answer is about as good as ten.

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        ref_scores: [P, M], raw scores of M answers of the reference policy to the same prompt; NaN = not there.
        ref_mask: [P, M], True = the reference answer counts; None = all that are there.
        k: slope, above 0, in 1 / unit of the scores. 1 is the probability; 2 and 3 were tried too.

    Returns:
        Shaped scores [P, G], from 0 to 1.

    Raises:
        ShapeError: an argument has another shape, or M = 0.
        ScoreError: a score is infinite, or a prompt has no reference answer.
        RecipeError: k is not above 0.

    Gradient:
        To scores; none to the references.

    Edge cases:
        NaN (not scored) stays NaN. A sample equal to its only reference answer gets exactly 0.5. Averaging comes after
        the sigmoid: two references at -4 and 4 are not one at 0.

    Example:
        >>> par(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0]]))
        tensor([[0.5000, 0.8808]])

    Source:
        Reward Shaping to Mitigate Reward Hacking in RLHF, arXiv 2502.18770 (PAR), and the authors' code.
    """
    where = "shaping.par"
    _check_slope(where, k)
    return _over_references(where, scores, ref_scores, ref_mask, lambda x: torch.sigmoid(k * x))


def centred(
    scores: Float[Tensor, "P G"], ref_scores: Float[Tensor, "P M"], ref_mask: Bool[Tensor, "P M"] | None = None
) -> Float[Tensor, "P G"]:
    """A score less the mean score of the reference answers: s = mean_m (r - r_m), without bound.

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        ref_scores: [P, M], of the reference answers; NaN = not there.
        ref_mask: [P, M], True = the reference answer counts.

    Returns:
        Shaped scores [P, G], in the unit of the scores.

    Raises:
        ShapeError, ScoreError: as `par`.

    Gradient:
        To scores.

    Edge cases:
        NaN stays NaN. Methods that compare a group see no difference from the raw score.

    Example:
        >>> centred(torch.tensor([[1.0]]), torch.tensor([[0.0, 4.0]]))
        tensor([[-1.]])

    Source:
        arXiv 2502.18770, authors' code.
    """
    return _over_references("shaping.centred", scores, ref_scores, ref_mask, lambda x: x)


def tanh_centred(
    scores: Float[Tensor, "P G"], ref_scores: Float[Tensor, "P M"], ref_mask: Bool[Tensor, "P M"] | None = None
) -> Float[Tensor, "P G"]:
    """s = mean_m tanh(r - r_m), from -1 to 1.

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        ref_scores: [P, M], of the reference answers; NaN = not there.
        ref_mask: [P, M], True = the reference answer counts.

    Returns:
        Shaped scores [P, G].

    Raises:
        ShapeError, ScoreError: as `par`.

    Gradient:
        To scores.

    Edge cases:
        As `par`, with 0 in place of 0.5.

    Example:
        >>> tanh_centred(torch.tensor([[1.0]]), torch.tensor([[1.0]]))
        tensor([[0.]])

    Source:
        arXiv 2502.18770, authors' code.
    """
    return _over_references("shaping.tanh_centred", scores, ref_scores, ref_mask, torch.tanh)


def poly_centred(
    scores: Float[Tensor, "P G"], ref_scores: Float[Tensor, "P M"], ref_mask: Bool[Tensor, "P M"] | None = None
) -> Float[Tensor, "P G"]:
    """s = mean_m p(r - r_m), with the polynomial of degree 5 that was fitted to the sigmoid on [-5, 5].

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        ref_scores: [P, M], of the reference answers; NaN = not there.
        ref_mask: [P, M], True = the reference answer counts.

    Returns:
        Shaped scores [P, G], from -0.011 to 1.011.

    Raises:
        ShapeError, ScoreError: as `par`.

    Gradient:
        To scores; none where a difference is beyond 5.

    Edge cases:
        As `par`. It overshoots: 1.011 just below a difference of 5, then 1.

    Example:
        >>> poly_centred(torch.tensor([[1.0, 6.0]]), torch.tensor([[0.0]])).round(decimals=3)
        tensor([[0.7190, 1.0000]])

    Source:
        arXiv 2502.18770, authors' code.
    """
    return _over_references("shaping.poly_centred", scores, ref_scores, ref_mask, sigmoid_polynomial)


def sgfc(
    scores: Float[Tensor, "P G"],
    ref_scores: Float[Tensor, "P M"],
    ref_mask: Bool[Tensor, "P M"] | None = None,
    *,
    k: float = 1.0,
    shift: float = 3.0,
) -> Float[Tensor, "P G"]:
    """Slow growth, fast convergence: s = mean_m sigmoid(k (r - shift - r_m)), the counter-example to PAR.

    Bounded like PAR, but nearly flat where training begins: the rise comes only `shift` above the references.

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        ref_scores: [P, M], of the reference answers; NaN = not there.
        ref_mask: [P, M], True = the reference answer counts.
        k: slope, above 0: 1 in the published command line, 3 in the figure.
        shift: how far above a reference the steepest place lies, in the unit of the scores.

    Returns:
        Shaped scores [P, G], from 0 to 1.

    Raises:
        ShapeError, ScoreError, RecipeError: as `par`.

    Gradient:
        To scores.

    Edge cases:
        As `par`.

    Example:
        >>> sgfc(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0]])).round(decimals=3)
        tensor([[0.0470, 0.5000]])

    Source:
        arXiv 2502.18770, authors' code.
    """
    where = "shaping.sgfc"
    _check_slope(where, k)
    return _over_references(where, scores, ref_scores, ref_mask, lambda x: torch.sigmoid(k * (x - shift)))


def log_sigmoid_centred(
    scores: Float[Tensor, "P G"],
    ref_scores: Float[Tensor, "P M"],
    ref_mask: Bool[Tensor, "P M"] | None = None,
    *,
    quantile: float = 0.85,
) -> Float[Tensor, "P G"]:
    """s = log sigmoid(r - q), where q is a high quantile of the reference answers' scores.

    q is the quantile of a normal with the mean and the sample standard deviation (divisor M - 1) of the references:
    q = mean + z (std + 1e-5), z = 1.0364 for 0.85. Above q a better score brings next to nothing, below it the loss is
    linear.

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        ref_scores: [P, M], of the reference answers; NaN = not there.
        ref_mask: [P, M], True = the reference answer counts.
        quantile: between 0 and 1.

    Returns:
        Shaped scores [P, G], at most 0.

    Raises:
        ShapeError, ScoreError: as `par`.
        RecipeError: quantile is not between 0 and 1.

    Gradient:
        To scores.

    Edge cases:
        With one reference answer the standard deviation is 0. A score equal to q gives -log 2.

    Example:
        >>> log_sigmoid_centred(torch.tensor([[0.0]]), torch.tensor([[-1.0, 1.0]])).round(decimals=3)
        tensor([[-1.6730]])

    Source:
        Wang et al. 2024, as arXiv 2502.18770 compares it; the authors' code.
    """
    where = "shaping.log_sigmoid_centred"
    if not 0 < quantile < 1:
        raise RecipeError(f"{where}.quantile: must be between 0 and 1; got {quantile}.")
    references, counted = _references(where, scores, ref_scores, ref_mask)
    count = counted.sum(-1, keepdim=True)
    mean = references.sum(-1, keepdim=True) / count
    spread = torch.where(counted, references - mean, 0.0).square().sum(-1, keepdim=True)
    deviation = (spread / (count - 1).clamp(min=1)).sqrt()
    z = torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)).item()
    return torch.nn.functional.logsigmoid(scores - (mean + z * (deviation + 1e-5)))


def _over_references(
    where: str, scores: Tensor, ref_scores: Tensor, ref_mask: Tensor | None, shape: Callable[[Tensor], Tensor]
) -> Tensor:
    """The mean over references of a map of the difference: centre first, map, then average."""
    references, counted = _references(where, scores, ref_scores, ref_mask)
    mapped = shape(scores.unsqueeze(-1) - references.unsqueeze(1))
    counted = counted.unsqueeze(1)
    # an unscored sample stays NaN; a reference that does not count adds nothing
    return torch.where(counted, mapped, 0.0).sum(-1) / counted.sum(-1)


def _references(where: str, scores: Tensor, ref_scores: Tensor, ref_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """References with 0 where they do not count, and which count, both [P, M]."""
    size = check_shapes(where, scores=(scores, "P G"), ref_scores=(ref_scores, "P M"))
    if size["M"] == 0:
        raise ShapeError(f"{where}: ref_scores must hold at least one reference answer a prompt (M >= 1); got M = 0.")
    check_scores(where, scores)
    counted = ~ref_scores.isnan()
    if ref_mask is not None:
        check_shapes(where, ref_scores=(ref_scores, "P M"), ref_mask=(ref_mask, "P M"))
        counted = counted & ref_mask
    references = ref_scores.detach().to(scores).where(counted, 0.0)
    check_scores(where, references, "ref_scores")
    alone = (~counted.any(-1)).nonzero()
    if len(alone):
        raise ScoreError(
            f"{where}: prompt {int(alone[0])} has no reference answer with a score. Score at least one answer of the "
            "reference policy, or leave the prompt out."
        )
    return references, counted


def _check_slope(where: str, k: float) -> None:
    if not k > 0:
        raise RecipeError(f"{where}.k: must be above 0; got {k}.")
