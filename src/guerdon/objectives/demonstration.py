"""Supervised losses that learn an implicit reward: f-divergences to the demonstrations, under a KL price to a reference.

Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections, 2025, arXiv 2507.00018. The losses are our reading.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guerdon.errors import DataError, RecipeError, ShapeError, check_shapes, nearest
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import check_beta

Divergence = Literal["total_variation", "pearson", "hellinger", "reverse_kl", "jensen_shannon"]
LARGEST = 5.0  # beyond this size an implicit reward is outside the range in which divergences tell apart


class _Phi(NamedTuple):
    """phi(x) = -f*(-x), its derivative, and the edge below which it goes on along its tangent."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[float], float]
    edge: float = -math.inf


PHI: dict[str, _Phi] = {
    "total_variation": _Phi(lambda x: x, lambda x: 1.0),
    "pearson": _Phi(lambda x: x - x.square() / 4, lambda x: 1 - x / 2),
    "hellinger": _Phi(lambda x: x / (1 + x), lambda x: (1 + x) ** -2, -0.5),
    "reverse_kl": _Phi(lambda x: -(-x - 1).exp(), lambda x: math.exp(-x - 1), -10.0),
    "jensen_shannon": _Phi(lambda x: (2 - (-x).exp()).log(), lambda x: 1 / (2 * math.exp(x) - 1), -0.5),
}


def phi(x: Float[Tensor, ...], divergence: str = "pearson", *, clamp_positive: bool = False) -> Float[Tensor, ...]:
    """How much an implicit reward is worth: concave, phi(x) = -f*(-x) with f* the conjugate of the divergence's f.

    total_variation: x (without its bound); pearson: x - x^2 / 4; hellinger: x / (1 + x); reverse_kl: -exp(-x - 1);
    jensen_shannon: log(2 - exp(-x)). The supervised gradient is multiplied by phi'(x).

    Args:
        x: implicit rewards, any shape.
        divergence: which of them.
        clamp_positive: pearson has its maximum at x = 2 and pushes back beyond; True = it is constant there.

    Returns:
        The same shape.

    Raises:
        RecipeError: the divergence is unknown.

    Edge cases:
        Below -0.5 (hellinger, jensen_shannon) and -10 (reverse_kl) it goes on along its tangent: once differentiable, and
        without the pole.

    Example:
        >>> phi(torch.tensor([0.0, 1.0, 2.0])).tolist()
        [0.0, 0.75, 1.0]

    Source:
        Standard theory of f-divergences; the tangent is ours.
    """
    if divergence not in PHI:
        raise RecipeError(
            f"objectives.demonstration: divergence must be one of {', '.join(PHI)}; got {divergence!r}."
            f"{nearest(divergence, PHI)}"
        )
    known = PHI[divergence]
    if clamp_positive and divergence == "pearson":
        x = x.clamp(max=2.0)
    if known.edge == -math.inf:
        return known.value(x)
    edge = x.new_tensor(known.edge)
    below = known.value(edge) + known.slope(known.edge) * (x - edge)
    return torch.where(x < edge, below, known.value(torch.where(x < edge, edge, x)))


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
    ordinary supervised learning up to a constant. See `demonstration_value` for the form that needs logits.

    Args:
        logp: [..., T], log-probability of each step of the demonstrations under the policy, in nats.
        logp_ref: [..., T], under the model that training starts from.
        mask: [..., T], True = a live step.
        divergence: see `phi`.
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
    if not logp.shape == logp_ref.shape == mask.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (logp, logp_ref, mask))
        raise ShapeError(f"{where}: logp, logp_ref and mask must have one shape; got {shapes}.")
    if not mask.any():
        raise DataError(f"{where}: mask has no live step, so there is nothing to learn from.")
    x = (beta * (logp - logp_ref.detach())).where(mask, 0.0)
    whole = x.sum(-1)
    if level == "token":
        total = -phi(x, divergence, clamp_positive=clamp_positive).where(mask, 0.0).sum()
        return Loss(total, mask.sum().to(logp.dtype), {}, whole.detach())
    if not mask.any(-1).all():
        warnings.warn(f"{where}: a sample has no live step, and teaches nothing.", UserWarning, stacklevel=2)
    if (whole.detach().abs() > LARGEST).double().mean() > 0.5:
        warnings.warn(
            f"{where}: the implicit reward is beyond {LARGEST:g} for most samples. Lower beta.",
            UserWarning,
            stacklevel=2,
        )
    total = -phi(whole, divergence, clamp_positive=clamp_positive).sum()
    return Loss(total, logp.new_tensor(float(whole.numel())), {}, whole.detach())


class QValues(NamedTuple):
    """A language model's logits read as values of its implicit reward, with V after the last token 0.

    Attributes:
        value: [..., T], V(s) = beta logsumexp of the logits.
        q: [..., T], of the token taken, beta times its logit.
        advantage: [..., T], Q - V = beta log policy.
        reward: [..., T], Q(s_t, a_t) - V(s_t+1), the reference folded in; it sums to V(s_0) + beta log policy(y).
        reward_kl: [..., T], beta (log policy - log reference).
    """

    value: Tensor
    q: Tensor
    advantage: Tensor
    reward: Tensor
    reward_kl: Tensor


def q_values(
    logits: Float[Tensor, "*B T V"],
    ref_logits: Float[Tensor, "*B T V"],
    actions: Int[Tensor, "*B T"],
    *,
    beta: float = 1.0,
) -> QValues:
    """Read logits as Q-values. V is relative: a constant added to a state's logits moves it and nothing else.

    Args:
        logits: [..., T, V], of whole samples without padding.
        ref_logits: [..., T, V], of the reference.
        actions: [..., T], the tokens taken.
        beta: scale of the reward; above 0.

    Raises:
        RecipeError: beta is not above 0.

    Source:
        Implicit Reward as the Bridge, arXiv 2507.00018, and maximum-entropy control.
    """
    check_beta("objectives.q_values", beta)
    value = beta * _normaliser(logits)
    q = beta * _taken(logits, actions)
    reward_kl = q - value - beta * (_taken(ref_logits, actions) - _normaliser(ref_logits))
    return QValues(value, q, q - value, q - _next(value), reward_kl)


def demonstration_value(
    logits: Float[Tensor, "B T V"],
    ref_logits: Float[Tensor, "B T V"],
    actions: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    divergence: Divergence = "pearson",
    beta: float = 1.0,
    centre: bool = True,
    clamp_positive: bool = False,
) -> Loss:
    """The exact form: its minimiser solves min D_f(policy || demonstrations) + beta KL(policy || reference).

    With Q and V from the logits, x_t = Q(s_t, a_t) - beta times that of the reference - V(s_t+1), a sample costs
    V(start) - sum phi(x_t). total_variation is supervised learning; the V(start) that does not cancel is the KL.

    Args:
        logits: [B, T, V], with graph.
        ref_logits: [B, T, V], of the frozen reference: logits, not log-probabilities.
        actions: [B, T], the tokens of the demonstrations.
        mask: [B, T], one run of live steps a row.
        divergence: see `phi`.
        beta: price of leaving the reference; above 0.
        centre: count Q from the reference's normaliser, which is the better start.
        clamp_positive: see `phi`.

    Returns:
        The loss; count is B. `implicit` [B] is the sum of x. Divide by the mean length for a learning rate that was tuned
        on the mean over tokens.

    Raises:
        ShapeError: an argument has another shape.
        DataError: a row's mask has a gap, or nothing is live.
        RecipeError: beta is not above 0, or the divergence is unknown.

    Gradient:
        Through `logits` alone. Centred and at the reference it is that of supervised learning (reverse_kl excepted).

    Edge cases:
        A row without live steps contributes 0. Masked steps may hold anything.

    Source:
        Implicit Reward as the Bridge, arXiv 2507.00018; our reading, by the theory of inverse soft Q-learning.
    """
    where = "objectives.demonstration_value"
    check_beta(where, beta)
    check_shapes(
        where,
        mask=(mask, "B T"),
        logits=(logits, "B T V"),
        ref_logits=(ref_logits, "B T V"),
        actions=(actions, "B T"),
    )
    if not mask.any():
        raise DataError(f"{where}: mask has no live step, so there is nothing to learn from.")
    gaps = _starts(mask).sum(-1) > 1
    if gaps.any():
        row = gaps.nonzero()[0].item()
        raise DataError(f"{where}: mask[{row}] has a gap. A demonstration is one run of live steps.")
    x, start = value_terms(logits, ref_logits, actions, mask, beta=beta, centre=centre)
    worth = phi(x, divergence, clamp_positive=clamp_positive).where(mask, 0.0).sum()
    return Loss(start.sum() - worth, x.detach().new_tensor(float(len(mask))), {}, x.sum(-1).detach())


class ValueTerms(NamedTuple):
    """`reward` [B, T], the implicit reward x of a step, 0 where masked; `start` [B], V at the first live step."""

    reward: Tensor
    start: Tensor


def value_terms(
    logits: Float[Tensor, "B T V"],
    ref_logits: Float[Tensor, "B T V"],
    actions: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float = 1.0,
    centre: bool = True,
) -> ValueTerms:
    """What `demonstration_value` is made of; its arguments."""
    live = mask[..., None]
    logits, reference = logits.where(live, 0.0), ref_logits.detach().where(live, 0.0)
    actions = actions.where(mask, 0)
    normaliser = _normaliser(reference)
    zero = normaliser if centre else torch.zeros_like(normaliser)
    value = (beta * (_normaliser(logits) - zero)).where(mask, 0.0)
    from_reference = _taken(reference, actions) - (0 if centre else normaliser)
    x = (beta * (_taken(logits, actions) - from_reference) - _next(value)).where(mask, 0.0)
    return ValueTerms(x, value.where(_starts(mask), 0.0).sum(-1))


def _starts(mask: Tensor) -> Tensor:
    """Where a run of live steps begins."""
    return mask & ~torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], -1)


def _normaliser(logits: Tensor) -> Tensor:
    """logsumexp over the vocabulary, in single precision at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1)


def _taken(logits: Tensor, actions: Tensor) -> Tensor:
    return logits.gather(-1, actions[..., None])[..., 0]


def _next(value: Tensor) -> Tensor:
    """The value of the step after each; 0 after the last."""
    return torch.cat([value[..., 1:], torch.zeros_like(value[..., :1])], -1)
