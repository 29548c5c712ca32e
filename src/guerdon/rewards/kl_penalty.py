"""Staying near the reference as a reward component."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import check_shapes
from guerdon.objectives.kl import KlEstimator, kl_estimate


def kl_penalty(
    logp_old: Float[Tensor, "P G T"],
    logp_ref: Float[Tensor, "P G T"],
    mask: Bool[Tensor, "P G T"],
    *,
    estimator: KlEstimator = "k1",
) -> Float[Tensor, "P G"]:
    """Minus the estimated divergence from the reference, summed over a sample's steps.

    The divergence in the reward, as PPO and RLOO use it: r - beta * sum_t (logp_old - logp_ref) is this component with
    weight beta. In the reward k1 has the right gradient, which it has not in the loss.

    Args:
        logp_old: [P, G, T], log-probability of each step under the policy that sampled it, in nats.
        logp_ref: [P, G, T], under the reference.
        mask: [P, G, T], True = a live step.
        estimator: of the divergence per step, see `guerdon.objectives.kl.kl_estimate`.

    Returns:
        Rewards [P, G], in nats.

    Raises:
        ShapeError: an argument is not [P, G, T].
        RecipeError: the estimator is unknown.

    Gradient:
        None; the result is detached.

    Edge cases:
        Masked steps may hold anything, NaN included; a sample without live steps gets 0.

    Example:
        >>> import torch
        >>> kl_penalty(torch.tensor([[[-1.0, -1.0]]]), torch.tensor([[[-2.0, -1.5]]]), torch.ones(1, 1, 2).bool())
        tensor([[-1.5000]])

    Source:
        Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593; estimators by
        Schulman 2020, Approximating KL Divergence (note).
    """
    check_shapes("rewards.kl_penalty", mask=(mask, "P G T"), logp_old=(logp_old, "P G T"), logp_ref=(logp_ref, "P G T"))
    estimate = kl_estimate(logp_old.detach().where(mask, 0.0), logp_ref.detach().where(mask, 0.0), estimator)
    return -estimate.where(mask, 0.0).sum(-1)
