"""Reward-weighted regression: learn from one's own samples as from examples, the better ones the more.

It needs no log-probability of steps, only the loss by which the policy learns from examples: for diffusion and flow the
denoising loss of the finished image, for language minus its log-probability.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import BindingError, RecipeError, check_shapes, nearest
from guerdon.objectives.loss import Loss

Weighting = Literal["softmax", "exponential", "sparse"]


def reward_weighted(
    rewards: Float[Tensor, "P G"],
    imitation: Float[Tensor, "P G"],
    drift: Float[Tensor, "P G"] | None = None,
    *,
    weighting: Weighting = "softmax",
    temperature: float = 1.0,
    threshold: float = 0.0,
    largest: float | None = None,
    beta: float = 0.0,
) -> Loss:
    """The imitation loss of each sample, weighed by a rising function of its reward.

    l = sum_g w_g imitation_g, the mean over prompts. `softmax`: w = softmax over the group of r / temperature, so that
    the weights of a group sum to 1; a high temperature is plain fine-tuning on own samples, a low one keeps the best
    sample only. `exponential`: w = exp(r / temperature) / G. `sparse`: w = 1[r > threshold] / G. To each is added beta
    times the drift from the reference, which keeps an online policy from collapsing onto the best sample.

    Args:
        rewards: [P, G], in any unit; NaN = not scored.
        imitation: [P, G], the loss of learning from each sample, with graph.
        drift: [P, G], mean squared difference of the policy's and the reference's outputs at the same noisy samples,
            with graph; needed when beta > 0.
        weighting: how a reward becomes a weight.
        temperature: in the unit of the rewards, above 0.
        threshold: in the unit of the rewards, for `sparse`.
        largest: weights are held below it; None = no bound.
        beta: weight of the drift.

    Returns:
        The loss; count is P. Metrics: `imitation`, its mean over samples; `effective_samples`, (sum w)^2 / sum w^2 over
        the batch, divided by P (how many samples of a group count); `weight_max`; `drift` where it is given.

    Raises:
        ShapeError: an argument is not [P, G].
        BindingError: beta > 0 without drift.
        RecipeError: an option is unknown or out of range.

    Gradient:
        To imitation and drift only.

    Edge cases:
        A sample that was not scored has weight 0; a group without any scored sample adds nothing and counts. With
        `sparse`, so does a group without a sample above the threshold.

    Example:
        >>> imitation = torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> loss = reward_weighted(torch.tensor([[0.0, 0.0]]), imitation)
        >>> (loss.total / loss.count).item()
        2.0

    Source:
        Peters and Schaal 2007, Reinforcement Learning by Reward-weighted Regression; for diffusion Lee et al. 2023,
        arXiv 2302.12192, and Black et al. 2023, arXiv 2305.13301 (softmax, sparse); Fan et al. 2025, Online
        Reward-Weighted Fine-Tuning of Flow Matching with Wasserstein Regularization, arXiv 2502.06061 (exponential with
        drift).
    """
    where = "objectives.reward_weighted"
    if weighting not in ("softmax", "exponential", "sparse"):
        known = ("softmax", "exponential", "sparse")
        raise RecipeError(
            f"{where}: weighting must be one of {', '.join(known)}; got {weighting!r}.{nearest(weighting, known)}"
        )
    if not temperature > 0:
        raise RecipeError(f"{where}: temperature must be above 0; got {temperature}.")
    sizes = check_shapes(where, rewards=(rewards, "P G"), imitation=(imitation, "P G"))
    weights = _weights(rewards.detach(), weighting, temperature, threshold)
    weights = weights if largest is None else weights.clamp(max=largest)
    total = (weights * imitation.where(weights > 0, 0.0)).sum()
    samples = max(rewards.numel(), 1)
    metrics = {
        "imitation": imitation.detach().sum() / samples,
        "effective_samples": weights.sum().square()
        / weights.square().sum().clamp(min=torch.finfo(weights.dtype).tiny)
        / max(sizes["P"], 1),
        "weight_max": torch.cat([weights.new_zeros(1), weights.flatten()]).amax(),
    }
    if drift is not None:
        check_shapes(where, rewards=(rewards, "P G"), drift=(drift, "P G"))
        metrics["drift"] = drift.detach().sum() / samples
        total = total + beta * drift.sum() / sizes["G"]
    elif beta:
        raise BindingError(f"{where}: beta = {beta} needs the field drift, which is not there; set beta: 0.")
    count = torch.tensor(float(sizes["P"]), dtype=torch.promote_types(imitation.dtype, torch.float32))
    return Loss(total, count.to(imitation.device), metrics)


def _weights(rewards: Tensor, weighting: Weighting, temperature: float, threshold: float) -> Tensor:
    """[P, G], 0 where a sample was not scored."""
    scored = ~rewards.isnan()
    if weighting == "sparse":
        return (rewards > threshold).to(rewards.dtype) / rewards.shape[1]
    if weighting == "exponential":
        return (rewards / temperature).exp().where(scored, 0.0) / rewards.shape[1]
    held = (rewards / temperature).where(scored, -torch.inf)
    return held.softmax(-1).where(scored, 0.0)
