"""Supervised learning that pays less for what was learnt already: f-divergences to the demonstrations, from log-probabilities.

Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections, 2025, arXiv 2507.00018. The losses are our reading.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import DataError, RecipeError
from guerdon.objectives.f_divergence import Divergence, phi
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import check_beta
from guerdon.objectives.q_values import check_same

LARGEST = 5.0  # beyond this size an implicit reward is outside the range in which divergences tell apart


def demonstration(
    logp: Float[Tensor, "*P T"],
    logp_ref: Float[Tensor, "*P T"],
    mask: Bool[Tensor, "*P T"],
    *,
    divergence: Divergence = "pearson",
    level: Literal["token", "sequence"] = "token",
    beta: float | None = None,
    clamp_positive: bool = False,
) -> Loss:
    """Supervised learning that pays less for demonstrations which the policy has already raised above a reference.

    With x = beta (logp - logp_ref) of a token, or of a whole sample, the cost is -phi(x); total_variation with beta 1 is
    ordinary supervised learning up to a constant. See `demonstration_value` for the form that keeps the price exactly, and
    needs the normalisers of the logits too.

    Args:
        logp: [..., T], log-probability of each step of the demonstrations under the policy, in nats.
        logp_ref: [..., T], under the model that training starts from.
        mask: [..., T], True = a live step.
        divergence: see `guerdon.objectives.f_divergence.phi`.
        level: x of a `token`, averaged over tokens; or of a `sequence`, averaged over samples.
        beta: scale of the implicit reward; above 0. None = 1.0 at level token, 0.1 at level sequence.
        clamp_positive: see `phi`.

    Returns:
        The loss; count is the number of live tokens, or of samples. `implicit` [...] is the sum of x over a sample.

    Raises:
        ShapeError: the three have not the same shape.
        DataError: there is no live step at all.
        RecipeError: beta is not above 0; level or divergence is unknown.

    Gradient:
        -beta phi'(x) on each live step of logp. The reference is detached.

    Edge cases:
        A sample without live steps has x = 0, no gradient, and warns at level sequence. Masked steps may hold anything.

    Example:
        >>> zero, live = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2).bool()
        >>> demonstration(zero, zero, live).total.backward()
        >>> zero.grad.tolist()
        [[-1.0, -1.0]]

    Source:
        Implicit Reward as the Bridge, arXiv 2507.00018; the losses are our reading.
    """
    where = "objectives.demonstration"
    if level not in ("token", "sequence"):
        raise RecipeError(f"{where}: level must be token or sequence; got {level!r}.")
    beta = {"token": 1.0, "sequence": 0.1}[level] if beta is None else beta
    check_beta(where, beta)
    check_same(where, logp=logp, logp_ref=logp_ref, mask=mask)
    if not mask.any():
        raise DataError(
            f"{where}: mask[0] has no live step, nor has any other sample, so there is nothing to learn from."
        )
    precise = torch.promote_types(logp.dtype, torch.float32)
    x = (beta * (logp - logp_ref.detach())).where(mask, 0.0)
    whole = x.sum(-1)
    if level == "token":
        total = -phi(x, divergence, clamp_positive=clamp_positive).where(mask, 0.0).sum()
        return Loss(total, mask.sum().to(precise), {}, whole.detach())
    if not mask.any(-1).all():
        warnings.warn(f"{where}: a sample has no live step, and teaches nothing.", UserWarning, stacklevel=2)
    if (whole.detach().abs() > LARGEST).double().mean() > 0.5:
        warnings.warn(
            f"{where}: the implicit reward is beyond {LARGEST:g} for most samples. Lower beta.",
            UserWarning,
            stacklevel=2,
        )
    total = -phi(whole, divergence, clamp_positive=clamp_positive).sum()
    samples = torch.tensor(whole.numel(), dtype=precise, device=logp.device)
    return Loss(total, samples, {}, whole.detach())
