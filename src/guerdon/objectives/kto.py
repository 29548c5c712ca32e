"""Kahneman-Tversky optimisation: learn from samples that are each called good or bad, without pairs.

KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import NumericsError, ShapeError, check_shapes
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import check_beta, check_not_negative


def kto(
    logp: Float[Tensor, "P G T"],
    logp_ref: Float[Tensor, "P G T"],
    desirable: Bool[Tensor, "P G"],
    mask: Bool[Tensor, "P G T"],
    reference_point: Float[Tensor, ""] | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """Raise desirable samples above a reference point and lower undesirable ones below it.

    With h = log policy - log reference of a sample and z the reference point, an estimate of the policy's divergence from
    the reference, a desirable sample costs weight (1 - sigmoid(beta (h - z))), an undesirable one
    weight (1 - sigmoid(beta (z - h))). The value saturates on both sides, so hopeless and settled samples teach little.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_ref: [P, G, T], under the reference.
        desirable: [P, G], True = a good sample.
        mask: [P, G, T], True = a live step.
        reference_point: z, from `kto_reference_point`; None = 0.
        beta: price of leaving the reference. Above 0.
        desirable_weight: of good samples. Advice of the authors: desirable_weight * good samples should be 1 to 4/3
            times undesirable_weight * bad samples.
        undesirable_weight: of bad samples.

    Returns:
        The loss over samples; count is P * G. `implicit` [P, G] is beta h. Metrics: `reference_point`.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        RecipeError: beta is not above 0, or a weight is negative.

    Gradient:
        To logp at live steps only: none through reference and reference point.

    Edge cases:
        All samples of one kind: allowed. A sample without live steps has h = 0.

    Example:
        >>> zero = torch.zeros(2, 1, 1, requires_grad=True)
        >>> kto(zero, zero, torch.tensor([[True], [False]]), torch.ones(2, 1, 1).bool()).total.item()
        1.0

    Source:
        KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306.
    """
    where = "objectives.kto"
    check_beta(where, beta)
    check_not_negative(where, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    check_shapes(where, mask=(mask, "P G T"), logp=(logp, "P G T"), logp_ref=(logp_ref, "P G T"))
    check_shapes(where, mask=(mask, "P G T"), desirable=(desirable, "P G"))
    ratio = _ratios(where, logp, logp_ref, mask)
    point = ratio.new_zeros(()) if reference_point is None else reference_point.detach().to(ratio.dtype)
    # 1 - sigmoid(x) = sigmoid(-x)
    good = desirable_weight * torch.sigmoid(-beta * (ratio - point))
    bad = undesirable_weight * torch.sigmoid(-beta * (point - ratio))
    total = torch.where(desirable, good, bad).sum()
    count = torch.tensor(desirable.numel(), dtype=torch.promote_types(ratio.dtype, torch.float32), device=ratio.device)
    return Loss(total, count, {"reference_point": point}, beta * ratio.detach())


def kto_reference_point(
    logp: Float[Tensor, "P G T"], logp_ref: Float[Tensor, "P G T"], mask: Bool[Tensor, "P G T"]
) -> Float[Tensor, ""]:
    """The reference point of `kto`: max(0, the mean log-ratio of samples that answer another prompt).

    Args:
        logp: [P, G, T], of mismatched samples (each put after the prompt of the next example) under the policy.
        logp_ref: [P, G, T], under the reference.
        mask: [P, G, T], True = a live step.

    Returns:
        z, a scalar without graph, in nats.

    Raises:
        ShapeError: there is one sample only, which no other prompt can be given.
        NumericsError: a log-probability of a live step is not finite.
    """
    check_shapes("objectives.kto", mask=(mask, "P G T"), logp=(logp, "P G T"), logp_ref=(logp_ref, "P G T"))
    if mask.shape[0] * mask.shape[1] < 2:
        raise ShapeError(
            "objectives.kto: the reference point needs mismatched samples, so a batch must hold at least 2 examples; "
            "got 1. Raise prompts_per_step."
        )
    return _ratios("objectives.kto", logp, logp_ref, mask).mean().clamp(min=0.0).detach()


def _ratios(where: str, logp: Tensor, logp_ref: Tensor, mask: Tensor) -> Tensor:
    ratio = (logp.where(mask, 0.0) - logp_ref.detach().where(mask, 0.0)).sum(-1)
    if not ratio.isfinite().all():
        p, g = (~ratio.isfinite()).nonzero()[0].tolist()
        raise NumericsError(
            f"{where}: a log-probability of a live step of sample [{p}, {g}] is not finite. Lower the learning rate, or "
            "look at the precision of the policy."
        )
    return ratio
