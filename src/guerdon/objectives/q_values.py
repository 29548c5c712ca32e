"""A language model's logits as Q-values: what its implicit reward says of every token.

Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections, 2025, arXiv 2507.00018; maximum-entropy control.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guerdon.errors import ShapeError
from guerdon.objectives.pairs import check_beta


class QValues(NamedTuple):
    """A language model's logits read as values of its implicit reward; every field [..., T], 0 where masked.

    Attributes:
        value: V(s) = beta logsumexp of the logits.
        q: of the token taken, beta times its logit.
        advantage: Q - V = beta log policy.
        reward: Q(s_t, a_t) - V(s_t+1), V after the last token being 0: the reward in which that of the reference is
            folded in. It sums to V(s_0) + beta log policy(y).
        reward_kl: beta (log policy - log reference), the reward beside a price on leaving the reference, as in DPO.
    """

    value: Tensor
    q: Tensor
    advantage: Tensor
    reward: Tensor
    reward_kl: Tensor


def q_values(
    logp: Float[Tensor, "*P T"],
    normaliser: Float[Tensor, "*P T"],
    logp_ref: Float[Tensor, "*P T"],
    mask: Bool[Tensor, "*P T"],
    *,
    beta: float = 1.0,
) -> QValues:
    """Read a model's logits as Q-values, from two numbers a token: no table of the vocabulary is needed.

    Args:
        logp: [..., T], log-probability of each token, in nats.
        normaliser: [..., T], logsumexp of the logits it was taken from, so that its logit is logp + normaliser.
        logp_ref: [..., T], under the reference.
        mask: [..., T], True = a live token.
        beta: scale of the reward; above 0.

    Returns:
        The values, with gradient through the arguments that have one.

    Raises:
        ShapeError: the four have not the same shape.
        RecipeError: beta is not above 0.

    Edge cases:
        V is relative: a constant added to all logits of a state moves V and Q and nothing else. It means something for a
        trained head, which ties states together, and for differences.

    Example:
        >>> one = torch.ones(1, 2)
        >>> found = q_values(-one, 3 * one, -2 * one, one.bool())
        >>> found.reward.tolist(), found.reward_kl.tolist()
        ([[-1.0, 2.0]], [[1.0, 1.0]])

    Source:
        Implicit Reward as the Bridge, arXiv 2507.00018: the reading is the paper's, the equations are our derivation.
    """
    check_beta("objectives.q_values", beta)
    check_same("objectives.q_values", logp=logp, normaliser=normaliser, logp_ref=logp_ref, mask=mask)
    logp, normaliser, logp_ref = (given.where(mask, 0.0) for given in (logp, normaliser, logp_ref))
    value, q = beta * normaliser, beta * (logp + normaliser)
    return QValues(value, q, beta * logp, (q - after(value)).where(mask, 0.0), beta * (logp - logp_ref))


class Reading(NamedTuple):
    """Two numbers a token, [..., T]: its log-probability, and the logsumexp of the logits it was taken from."""

    logp: Tensor
    normaliser: Tensor


def read_logits(logits: Float[Tensor, "*B T V"], actions: Int[Tensor, "*B T"]) -> Reading:
    """What whole logits say of the tokens taken, in single precision at least.

    Args:
        logits: [..., T, V].
        actions: [..., T], the tokens taken.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = logits.logsumexp(-1)
    return Reading(logits.gather(-1, actions[..., None])[..., 0] - normaliser, normaliser)


def after(value: Tensor) -> Tensor:
    """The value of the step after each; 0 after the last."""
    return torch.cat([value[..., 1:], torch.zeros_like(value[..., :1])], -1)


def check_same(where: str, **tensors: Tensor) -> None:
    """Raise ShapeError unless all have one shape."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(f"{where}: these must have one shape; got {shapes}.")
