"""Generalised advantage estimation for every reward component by a value of its own, mixed after normalisation.

Each component is a stream with a critic's head; weights multiply advantages, so that a weight means the same whatever a
component's unit. Confronting Reward Model Overoptimization with Constrained RLHF, 2023, arXiv 2310.04373.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.advantages.gae import gae
from guerdon.errors import check_shapes
from guerdon.rollout import paid_by_step


class GaeByComponentOutput(NamedTuple):
    """Mixed advantages [P, G, T], returns [P, G, T, K] that the heads are fitted to, both 0 at masked steps; and what each
    component contributed to the advantages, summed over a sample's steps, [P, G, K]."""

    advantages: Float[Tensor, "P G T"]
    returns: Float[Tensor, "P G T K"]
    contributions: Float[Tensor, "P G K"]


def gae_by_component(
    rewards: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
    scores: Float[Tensor, "P G K"],
    weights: Float[Tensor, " K"] | Float[Tensor, "P G K"],
    values: Float[Tensor, "P G T K"] | Float[Tensor, "P G T"],
    mask: Bool[Tensor, "P G T"],
    step_scores: Float[Tensor, "P G T K"] | None = None,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    normalise: bool = True,
    eps: float = 1e-8,
) -> GaeByComponentOutput:
    """A = sum_k w_k (A_k - mean A_k) / (std A_k + eps), with A_k the `gae` of component k by value head k.

    With the weights of `lagrangian`, the divergence being the component without a threshold, this is the mixture of
    constrained RLHF: A = (K - sum_k w_k) A_0 + sum_k w_k A_k. The policy gets a value head for each component.

    Args:
        rewards: [P, G] or [P, G, T]; a sample whose reward is NaN is left out. Nothing else is read of it.
        scores: [P, G, K], each component in its own unit, paid at the sample's last live step; NaN = not scored.
        weights: [K] or [P, G, K], without unit when streams are normalised; may be negative.
        values: [P, G, T, K], each head's value before a step in the unit of its component; [P, G, T] where K = 1.
        mask: [P, G, T], True = a live step.
        step_scores: [P, G, T, K], how much of a score is earned at each step; the last live step is paid the rest. 0
            everywhere for a component that is earned at the end.
        gamma: discount per step.
        lam: weight of the future, see `gae`.
        normalise: give the advantages of each stream mean 0 and std 1 over all live, scored steps of the batch (Bessel's
            correction); False mixes them as they are, each in its component's unit.
        eps: added to the stds.

    Returns:
        `advantages`, `returns` (shaped as values) and `contributions`.

    Raises:
        ShapeError: an argument has another shape.
        ScoreError: a score is infinite.

    Gradient:
        None; the results are detached from all arguments.

    Edge cases:
        A component that was not scored adds nothing to that sample; its returns are the head's values. A stream whose
        advantages are all equal adds 0. One that holds rounding errors alone, as a divergence does while the policy is its
        own reference, is normalised like any other; an eps above them leaves it out.

    Example:
        >>> scores, nothing = torch.tensor([[[0.0, 5.0], [2.0, 5.0]]]), torch.zeros(1, 2, 1, 2)
        >>> found = gae_by_component(scores.sum(-1), scores, torch.tensor([0.5, 1.5]), nothing, torch.ones(1, 2, 1).bool())
        >>> found.advantages.squeeze(-1)
        tensor([[-0.3536,  0.3536]])

    Source:
        arXiv 2310.04373, equation 3, and the authors' code, which normalises over each minibatch; here it is over all
        samples of a step, so that minibatches change no advantage.
    """
    where = "advantages.gae_by_component"
    single = values.ndim == 3
    by_step = "P G T" if single else "P G T K"
    letters = "P G K" if weights.ndim == 3 else "K"
    check_shapes(
        where, scores=(scores, "P G K"), mask=(mask, "P G T"), values=(values, by_step), weights=(weights, letters)
    )
    heads = values.unsqueeze(-1) if single else values
    check_shapes(where, scores=(scores, "P G K"), values=(heads, "P G T K"))
    if step_scores is not None:
        check_shapes(where, scores=(scores, "P G K"), mask=(mask, "P G T"), step_scores=(step_scores, "P G T K"))
    of_samples = rewards if rewards.ndim == 2 else rewards.where(mask, 0.0).sum(-1)
    check_shapes(where, mask=(mask, "P G T"), rewards=(of_samples, "P G"))
    scores = scores.detach().masked_fill(of_samples.isnan().unsqueeze(-1), torch.nan)

    streams, returns = [], []
    for k in range(scores.shape[-1]):
        earned = scores[..., k]
        if step_scores is not None:
            earned = paid_by_step(earned, step_scores[..., k].detach(), mask)
        found = gae(earned, heads[..., k], mask, gamma=gamma, lam=lam, whiten=normalise, eps=eps)
        streams.append(found.advantages)
        returns.append(found.returns)
    shares = weights.detach().expand(scores.shape).unsqueeze(2) * torch.stack(streams, -1)
    stacked = returns[0] if single else torch.stack(returns, -1)
    return GaeByComponentOutput(shares.sum(-1), stacked, shares.sum(2))
