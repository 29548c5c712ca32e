"""Reference-frozen normalisation: scores on the scale of the reference policy's own, which never changes afterwards.

Quark Medical Alignment, 2026, arXiv 2602.11661. The formulas are our reading: the paper's were not at hand.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guerdon.errors import GuerdonError, RecipeError, ScoreError, check_shapes
from guerdon.shaping.bounded import check_scores

_WHERE = "shaping.reference_frozen"


class NotCalibratedError(GuerdonError, RuntimeError):
    """A stage is used before it was calibrated."""


class ReferenceFrozen(nn.Module):
    """z = clip(sign (r - mean) / max(std, eps), -c, c), mean and std (divisor N) of the reference policy's scores.

    The same score has the same z throughout training, unlike with the statistics of a group or a running mean, so targets
    can be set in reference standard deviations. The loop calibrates it once, before training.

    Args:
        sign: 1 if more is better, -1 if less is.
        bound: c, in reference standard deviations, above 0.
        eps: least divisor, in the unit of the scores.

    Raises:
        RecipeError: an option is out of range.
        NotCalibratedError: it is used before `calibrate`.
        ShapeError: scores is not [P, G].
        ScoreError: a score is infinite, or there are fewer than two reference scores.

    Edge cases:
        NaN stays NaN. Constant reference scores saturate z, with a warning at calibration.

    Example:
        >>> stage = ReferenceFrozen()
        >>> stage.calibrate(torch.tensor([[0.0, 2.0]]))
        >>> stage(torch.tensor([[1.0, 3.0]]))
        tensor([[0., 2.]])

    Source:
        arXiv 2602.11661; our reading.
    """

    def __init__(self, *, sign: int = 1, bound: float = 5.0, eps: float = 1e-6) -> None:
        super().__init__()
        if sign not in (1, -1) or not bound > 0 or not eps > 0:
            raise RecipeError(f"{_WHERE}: sign must be 1 or -1, bound and eps above 0; got {sign}, {bound} and {eps}.")
        self.sign, self.bound, self.eps = sign, bound, eps
        self.moments: Tensor
        self.register_buffer("moments", torch.full((2,), torch.nan, dtype=torch.float64))  # mean, std

    @property
    def ready(self) -> bool:
        """Whether it is calibrated."""
        return not bool(self.moments.isnan().any())

    @torch.no_grad()
    def calibrate(self, ref_scores: Float[Tensor, ...]) -> None:
        """Take the reference policy's scores, once.

        Args:
            ref_scores: of any shape; NaN = not scored. The counted ones must be at least two.
        """
        check_scores(_WHERE, ref_scores, "ref_scores")
        found = ref_scores[~ref_scores.isnan()].double()
        if len(found) < 2:
            raise ScoreError(f"{_WHERE}: at least 2 reference scores are needed to calibrate; got {len(found)}.")
        std = found.std(unbiased=False)
        if std < self.eps:
            warnings.warn(f"{_WHERE}: all reference scores are {found[0]:g}; z will be 0 or saturate.", stacklevel=2)
        self.moments.copy_(torch.stack([found.mean(), std]))

    def forward(self, scores: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        """Normalise one component's scores; changes no state.

        Args:
            scores: [P, G], raw scores; NaN = not scored.

        Returns:
            z [P, G], in reference standard deviations.
        """
        check_shapes(_WHERE, scores=(scores, "P G"))
        check_scores(_WHERE, scores)
        if not self.ready:
            raise NotCalibratedError(f"{_WHERE}: it is not calibrated yet; call calibrate(ref_scores) before training.")
        mean, std = self.moments.to(scores).unbind()
        return (self.sign * (scores - mean) / std.clamp(min=self.eps)).clamp(-self.bound, self.bound)


def reference_frozen_per_prompt(
    scores: Float[Tensor, "P G"],
    ref_scores: Float[Tensor, "P M"],
    *,
    sign: int = 1,
    bound: float = 5.0,
    eps: float = 1e-6,
) -> Float[Tensor, "P G"]:
    """The same with the statistics of each prompt's own reference answers.

    Args:
        scores: [P, G], raw scores; NaN = not scored.
        ref_scores: [P, M], of M >= 2 reference answers to the same prompt.
        sign: 1 if more is better, -1 if less is.
        bound: in reference standard deviations, above 0.
        eps: least divisor, in the unit of the scores.

    Returns:
        z [P, G].

    Raises:
        ShapeError: shapes do not fit.
        ScoreError: a score is infinite, or a prompt has fewer than two reference scores.

    Gradient:
        To scores.

    Edge cases:
        NaN stays NaN.

    Example:
        >>> reference_frozen_per_prompt(torch.tensor([[3.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([[2.]])

    Source:
        arXiv 2602.11661; our reading.
    """
    check_shapes(_WHERE, scores=(scores, "P G"), ref_scores=(ref_scores, "P M"))
    check_scores(_WHERE, scores)
    check_scores(_WHERE, ref_scores, "ref_scores")
    count = (~ref_scores.isnan()).sum(-1, keepdim=True)
    if (count < 2).any():
        raise ScoreError(f"{_WHERE}: every prompt needs at least 2 reference scores; raise reference.samples.")
    mean = ref_scores.nanmean(-1, keepdim=True)
    std = ((ref_scores - mean).square().nansum(-1, keepdim=True) / count).sqrt().clamp(min=eps)
    return (sign * (scores - mean.to(scores)) / std.to(scores)).clamp(-bound, bound)


reference_frozen = ReferenceFrozen
