"""Supervised learning under a price on leaving a reference, exactly: an f-divergence to the demonstrations plus a KL.

Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections, 2025, arXiv 2507.00018. The loss is our reading.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import DataError, RecipeError
from guerdon.objectives.f_divergence import Divergence, phi
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import check_beta
from guerdon.objectives.q_values import after, check_same


def demonstration_value(
    logp: Float[Tensor, "*P T"],
    normaliser: Float[Tensor, "*P T"],
    logp_ref: Float[Tensor, "*P T"],
    normaliser_ref: Float[Tensor, "*P T"],
    mask: Bool[Tensor, "*P T"],
    *,
    divergence: Divergence = "pearson",
    beta: float = 1.0,
    centre: bool = True,
    clamp_positive: bool = False,
    denominator: Literal["per_token", "per_sample"] = "per_token",
) -> Loss:
    """Its minimiser solves min D_f(policy || demonstrations) + beta KL(policy || reference), over whole sequences.

    With V_t = beta (normaliser_t - normaliser_ref_t), 0 after the last step, and the implicit reward
    x_t = beta (logp_t - logp_ref_t) + V_t - V_t+1, a sample costs V(start) - sum phi(x_t). total_variation is supervised
    learning, in which V cancels; with any other divergence a V remains, and it is the price of leaving the reference.
    pearson, written out, is supervised learning plus sum x_t^2 / 4.

    Args:
        logp: [..., T], log-probability of each step of the demonstrations, in nats.
        normaliser: [..., T], logsumexp of the logits each was taken from.
        logp_ref: [..., T], under the frozen model that training starts from.
        normaliser_ref: [..., T], of its logits.
        mask: [..., T], one run of live steps a sample.
        divergence: see `guerdon.objectives.f_divergence.phi`.
        beta: price of leaving the reference; above 0.
        centre: count V from the reference's normaliser. False: V_t = beta normaliser_t, which has the same minimiser and a
            worse start.
        clamp_positive: see `phi`.
        denominator: per_token divides the sum over a batch by its live steps, so that learning rates are those of
            ordinary supervised learning; per_sample by its samples.

    Returns:
        The loss; `implicit` [...] is the sum of x over a sample. Metrics: `value_start`, the mean of V(start).

    Raises:
        ShapeError: the arguments have not the same shape.
        DataError: a sample's mask has a gap, or nothing is live.
        RecipeError: beta is not above 0; the divergence or the denominator is unknown.

    Gradient:
        Through logp and normaliser. Centred and at the reference every x is 0 and the gradient is that of supervised
        learning (reverse_kl excepted, whose phi'(0) is 1 / e).

    Edge cases:
        A sample without live steps contributes 0. Masked steps may hold anything.

    Example:
        >>> zero, live = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2).bool()
        >>> demonstration_value(zero, zero.detach(), zero.detach(), zero.detach(), live).total.backward()
        >>> zero.grad.tolist()
        [[-1.0, -1.0]]

    Source:
        Implicit Reward as the Bridge, arXiv 2507.00018; our reading, by the theory of inverse soft Q-learning.
    """
    where = "objectives.demonstration_value"
    if denominator not in ("per_token", "per_sample"):
        raise RecipeError(f"{where}: denominator must be per_token or per_sample; got {denominator!r}.")
    x, start = value_terms(logp, normaliser, logp_ref, normaliser_ref, mask, beta=beta, centre=centre)
    if not mask.any():
        raise DataError(
            f"{where}: mask[0] has no live step, nor has any other sample, so there is nothing to learn from."
        )
    worth = phi(x, divergence, clamp_positive=clamp_positive).where(mask, 0.0).sum()
    precise = torch.promote_types(logp.dtype, torch.float32)
    samples = torch.tensor(start.numel(), dtype=precise, device=logp.device)
    count = mask.sum().to(precise) if denominator == "per_token" else samples
    return Loss(start.sum() - worth, count, {"value_start": start.detach().mean()}, x.sum(-1).detach())


class ValueTerms(NamedTuple):
    """`reward` [..., T], the implicit reward x of a step, 0 where masked; `start` [...], V at the first live step."""

    reward: Tensor
    start: Tensor


def value_terms(
    logp: Float[Tensor, "*P T"],
    normaliser: Float[Tensor, "*P T"],
    logp_ref: Float[Tensor, "*P T"],
    normaliser_ref: Float[Tensor, "*P T"],
    mask: Bool[Tensor, "*P T"],
    *,
    beta: float = 1.0,
    centre: bool = True,
) -> ValueTerms:
    """What `demonstration_value` is made of; its arguments and errors."""
    where = "objectives.demonstration_value"
    check_beta(where, beta)
    check_same(where, logp=logp, normaliser=normaliser, logp_ref=logp_ref, normaliser_ref=normaliser_ref, mask=mask)
    first = mask & ~torch.cat([torch.zeros_like(mask[..., :1]), mask[..., :-1]], -1)
    if (first.sum(-1) > 1).any():
        place = (first.sum(-1) > 1).nonzero()[0].tolist()
        raise DataError(f"{where}: mask{place} has a gap. A demonstration is one run of live steps.")
    ratio = (logp - logp_ref.detach()).where(mask, 0.0)
    zero = normaliser_ref.detach() if centre else torch.zeros_like(normaliser)
    value = (beta * (normaliser - zero)).where(mask, 0.0)
    return ValueTerms((beta * ratio + value - after(value)).where(mask, 0.0), value.where(first, 0.0).sum(-1))
