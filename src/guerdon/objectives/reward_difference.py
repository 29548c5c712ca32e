"""Proximal reward difference prediction (PRDP): a regression on pairs of samples of the same prompt.

The policy's log-ratios to the reference predict how two samples' rewards differ. What a prompt adds to all of its
rewards cancels, so that prompts need no baseline, however many there are and however rarely each is seen.
F. Deng et al. 2024, PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models,
arXiv 2402.08714.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import NumericsError, RecipeError, ScoreError, ShapeError, check_shapes
from guerdon.objectives.loss import Loss

Reduction = Literal["sum", "mean"]
CLIPS: dict[str, float] = {"sum": 0.1, "mean": 1e-4}


class RewardPairs(NamedTuple):
    """All pairs (a, b), a < b, of every group; N = G (G - 1) / 2, ordered (0, 1), (0, 2), ..., (1, 2), ...

    Attributes:
        unclipped: [P, N], squared residual, with graph.
        clipped: [P, N], the same with every step's log-ratio held near the old one's, with graph.
        residual: [P, N], predicted minus wanted difference, in nats, with graph.
        wanted: [P, N], (r_a - r_b) / beta.
        kept: bool [P, N], both rewards are finite; the other parts are 0 where not.
    """

    unclipped: Float[Tensor, "P N"]
    clipped: Float[Tensor, "P N"]
    residual: Float[Tensor, "P N"]
    wanted: Float[Tensor, "P N"]
    kept: Bool[Tensor, "P N"]


def prdp(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    logp_ref: Float[Tensor, "P G T"],
    rewards: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G T"],
    *,
    beta: float = 0.1,
    clip: float | None = None,
    logp_reduction: Reduction = "sum",
) -> Loss:
    """Fit the difference of two samples' log-ratios to the difference of their rewards over beta.

    The policy that maximises E[r] - beta KL(policy || reference) has log(policy / reference) = r / beta - log Z(prompt).
    With u_a = sum over live steps of logp - logp_ref, every pair of a group costs
    l = (u_a - u_b - (r_a - r_b) / beta)^2. In a second residual every step's logp is held within logp_old +- clip; the
    larger of the two squares counts, so that a pair cannot gain by leaving the neighbourhood of the policy that sampled
    it. The loss is the mean over pairs. It takes the place of advantage and ratio; `passes` of 1 to 4 are usual.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_old: [P, G, T], under the policy that sampled the steps.
        logp_ref: [P, G, T], under the frozen reference.
        rewards: [P, G], in any unit; a pair with one that is not finite (NaN = not scored) is left out.
        mask: [P, G, T], True = a live step.
        beta: weight of the divergence in the goal, in units of the reward per nat. The spread of r / beta in a group
            should be 1 to 10 nats.
        clip: how far a step's logp may lie from logp_old, in nats; infinity = no bound. None = 0.1 for summed
            log-probabilities, 1e-4 for mean ones.
        logp_reduction: what the policy's log-probability of a step with many dimensions is: their `sum`, which the
            theory asks for and tokens have, or their `mean`, which divides beta by the number of dimensions.

    Returns:
        The loss; its count is the number of pairs. Metrics: `clip_share` (pairs whose clipped square is the larger),
        `implicit_reward_accuracy` (pairs that the policy orders as their rewards do), `residual` (mean size, in nats),
        `log_ratio` (mean u of a sample: on fresh samples an estimate of the divergence from the reference),
        `pairs_dropped` (share left out).

    Raises:
        ShapeError: an argument has another shape, or G is 1.
        RecipeError: an option is out of its range.
        NumericsError: a log-probability of a live step is not finite.

    Gradient:
        To logp only. Where the clipped square is the larger, steps beyond the bound get none from that pair.

    Edge cases:
        Masked steps may hold anything, NaN included; a sample without live steps has u = 0. Equal rewards are a target
        like any other: the two log-ratios are pulled together. Where no pair is left the total and the count are 0.

    Example:
        >>> logp = torch.zeros(1, 2, 1, requires_grad=True)
        >>> same = logp.detach()
        >>> loss = prdp(logp, same, same, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, 1).bool(), beta=0.5)
        >>> loss.total.backward()
        >>> loss.total.item(), logp.grad.flatten().tolist()
        (4.0, [-4.0, 4.0])

    Source:
        Deng et al. 2024, PRDP, arXiv 2402.08714. The clip per step, its size, `beta` = 0.1 and the mask are our
        reading.
    """
    where = "objectives.prdp"
    pairs = reward_pairs(logp, logp_old, logp_ref, rewards, mask, beta=beta, clip=clip, logp_reduction=logp_reduction)
    # at a tie, which is every pair that nothing was held back in, the whole gradient is that of the plain square
    worse = pairs.clipped > pairs.unclipped
    cost = pairs.clipped.where(worse, pairs.unclipped)
    total = cost.where(pairs.kept, 0.0).sum()
    if not torch.isfinite(total):
        raise NumericsError(
            f"{where}: a log-probability of a live step is not finite, or its square overflows. Lower the learning "
            "rate, or look at the precision of the policy."
        )
    count = pairs.kept.sum()
    precise = torch.promote_types(logp.dtype, torch.float32)

    def share(values: Tensor) -> Tensor:
        return values.detach().to(precise).where(pairs.kept, 0.0).sum() / count.clamp(min=1)

    predicted = pairs.residual + pairs.wanted
    log_ratio = (logp.detach().where(mask, 0.0) - logp_ref.where(mask, 0.0)).sum(-1)
    metrics = {
        "clip_share": share(worse),
        "implicit_reward_accuracy": share(predicted.sign() == pairs.wanted.sign()),
        "residual": share(pairs.residual.abs()),
        "log_ratio": log_ratio.mean(),
        "pairs_dropped": 1 - pairs.kept.to(precise).mean(),
    }
    return Loss(total, count.to(precise), metrics)


def reward_pairs(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    logp_ref: Float[Tensor, "P G T"],
    rewards: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G T"],
    *,
    beta: float = 0.1,
    clip: float | None = None,
    logp_reduction: Reduction = "sum",
) -> RewardPairs:
    """The squares that `prdp` is the mean of, pair by pair.

    Args:
        logp: [P, G, T], as for `prdp`, and so are the others.
        logp_old: [P, G, T].
        logp_ref: [P, G, T].
        rewards: [P, G].
        mask: [P, G, T].
        beta: above 0.
        clip: at least 0.
        logp_reduction: decides the default of clip.

    Returns:
        The pairs.

    Raises:
        ShapeError: an argument has another shape, or G is 1.
        RecipeError: an option is out of its range.

    Gradient:
        To logp only.
    """
    where = "objectives.prdp"
    clip = _checked(where, beta, clip, logp_reduction)
    per_step = "P G T"
    sizes = check_shapes(
        where,
        mask=(mask, per_step),
        logp=(logp, per_step),
        logp_old=(logp_old, per_step),
        logp_ref=(logp_ref, per_step),
        rewards=(rewards, "P G"),
    )
    if sizes["G"] < 2:
        raise ShapeError(f"{where}: a pair takes two samples of a prompt, G >= 2; got G = {sizes['G']}.")
    # masked steps are replaced before any maths, so that what they hold reaches neither value nor gradient
    logp = logp.where(mask, 0.0)
    old, reference = (other.detach().where(mask, 0.0) for other in (logp_old, logp_ref))
    held = logp.clamp(old - clip, old + clip)
    first, second = torch.triu_indices(sizes["G"], sizes["G"], 1, device=logp.device)

    rewards = rewards.detach()
    finite = rewards.isfinite()
    kept = finite[:, first] & finite[:, second]
    # rewards are subtracted before anything else: what a prompt adds to all of them is gone without a rounding error
    wanted = (rewards[:, first] - rewards[:, second]).where(kept, 0.0) / beta

    def residual(log_probability: Tensor) -> Tensor:
        ratio = (log_probability - reference).sum(-1)
        return (ratio[:, first] - ratio[:, second] - wanted).where(kept, 0.0)

    plain = residual(logp)
    return RewardPairs(plain.square(), residual(held).square(), plain, wanted, kept)


def prdp_coefficients(
    logp: Float[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"],
    logp_ref: Float[Tensor, "P G T"],
    rewards: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G T"],
    *,
    beta: float = 0.1,
    clip: float | None = None,
    logp_reduction: Reduction = "sum",
) -> Float[Tensor, "P G T"]:
    """The derivative of the mean loss by each step's log-probability, for a gradient with one step in memory.

    A denoiser's activations of all steps need not be kept: find logp of all steps without gradient, take these
    coefficients c, then go through the steps again, one at a time, and let c * logp of the step flow back. The sum of
    those gradients is that of the loss.

    Args:
        logp: [P, G, T], as for `prdp`, and so are the others; no graph is needed.
        logp_old: [P, G, T].
        logp_ref: [P, G, T].
        rewards: [P, G].
        mask: [P, G, T].
        beta: above 0.
        clip: at least 0.
        logp_reduction: decides the default of clip.

    Returns:
        [P, G, T] without graph, exactly 0 at masked steps.

    Raises:
        ShapeError: an argument has another shape, or G is 1.
        RecipeError: an option is out of its range.
        ScoreError: no pair has two finite rewards.
        NumericsError: a log-probability of a live step is not finite.

    Example:
        >>> zero = torch.zeros(1, 2, 1)
        >>> prdp_coefficients(zero, zero, zero, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, 1).bool(), beta=1.0)
        tensor([[[-2.],
                 [ 2.]]])

    Source:
        Follows from the loss of arXiv 2402.08714; ours.
    """
    with torch.enable_grad():
        variable = logp.detach().requires_grad_()
        loss = prdp(variable, logp_old, logp_ref, rewards, mask, beta=beta, clip=clip, logp_reduction=logp_reduction)
        if not loss.count:
            raise ScoreError("objectives.prdp: no pair has two finite rewards, so there is nothing to learn from.")
        (coefficients,) = torch.autograd.grad(loss.total / loss.count, variable)
    return coefficients


def _checked(where: str, beta: float, clip: float | None, logp_reduction: str) -> float:
    """The bound that is meant."""
    if not (beta > 0 and math.isfinite(beta)):
        raise RecipeError(f"{where}: beta must be above 0; got {beta}.")
    if logp_reduction not in CLIPS:
        raise RecipeError(f"{where}: logp_reduction must be sum or mean; got {logp_reduction!r}.")
    if clip is None:
        return CLIPS[logp_reduction]
    if not clip >= 0:
        raise RecipeError(f"{where}: clip must be >= 0, or .inf for no bound; got {clip}.")
    return clip
