"""Contrastive policy gradient (CoPG): a loss on scored groups of whole samples, wherever they came from.

The baseline of a sample is the regularised reward of an independent second sample of the same prompt. With it a policy
gradient is right on data of any origin: no importance weights, no clip, no critic.
Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion, 2024, arXiv
2406.19185.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import DataError, NumericsError, RecipeError, ScoreError, ShapeError, check_shapes
from guerdon.objectives.loss import Loss


class Contrast(NamedTuple):
    """What a group's samples say about one another.

    Attributes:
        objective: [P], to be maximised, with graph: the sum over pairs of l, over n - 1 for n valid samples.
        log_ratio: [P, G], log of policy over reference of the whole sample, in nats, with graph; 0 if not valid.
        regularised: [P, G], R - beta * log_ratio without graph, in the unit of the rewards; NaN if not valid.
        valid: bool [P, G], the samples that count.
    """

    objective: Float[Tensor, " P"]
    log_ratio: Float[Tensor, "P G"]
    regularised: Float[Tensor, "P G"]
    valid: Bool[Tensor, "P G"]


def copg(
    logp: Float[Tensor, "P G T"],
    logp_ref: Float[Tensor, "P G T"],
    rewards: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G T"],
    valid: Bool[Tensor, "P G"] | None = None,
    *,
    beta: float = 0.06,
) -> Loss:
    """Let the difference of two samples' log-ratios follow the difference of their rewards.

    With u the log-ratio of policy to reference of a whole sample (summed over its live steps, not averaged), a pair has
    l = (R_i - R_j) (u_i - u_j) - beta / 2 (u_i - u_j)^2, to be maximised; a group of n has the sum of l over its pairs,
    over n - 1. The loss is minus the mean over prompts. Its only optimum is the policy proportional to
    reference * exp(R / beta), whatever the samples were drawn from.

    Args:
        logp: [P, G, T], log-probability of each step under the policy, in nats.
        logp_ref: [P, G, T], under the frozen reference.
        rewards: [P, G], in any unit; NaN = not scored.
        mask: [P, G, T], True = a live step.
        valid: [P, G], False = leave the sample out (ragged groups); None = all that were scored count.
        beta: weight of the divergence from the reference, in units of the reward per nat. The paper's runs are stable
            from 0.03 to 0.1; smaller lets the reward collapse while the loss looks well.

    Returns:
        The loss; its count is the number of prompts with two valid samples. Metrics: `objective` (mean, minus the
        loss), `log_ratio` (mean u of a valid sample: on the policy's own samples an estimate of the divergence),
        `regularised_reward` (mean R - beta u), `left_out` (share of samples that do not count).

    Raises:
        ShapeError: an argument has another shape, or G is 1.
        RecipeError: beta is negative.
        ScoreError: a reward is infinite.
        DataError: a valid sample has no live step: its log-ratio would silently be 0.
        NumericsError: a log-probability of a live step is not finite, such as a sample that the reference cannot draw.

    Gradient:
        Through every logp, the baselines included; of a pair it is (D_beta) grad logp_i - (D_beta) grad logp_j with
        D_beta the difference of the regularised rewards R - beta u. In a group it is the leave-one-out advantage of
        the regularised reward, negated, for each sample.

    Edge cases:
        Masked steps may hold anything, NaN included. Equal rewards are not nothing: the two log-ratios are pulled
        together. A prompt with fewer than two valid samples is left out of the mean; without any the total is 0, with
        a graph. beta = 0 is allowed, warned of, and has no optimum. Log-probabilities are summed in single precision at
        least.

    Example:
        >>> logp = torch.zeros(1, 2, 1, requires_grad=True)
        >>> loss = copg(logp, logp.detach(), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, 1).bool(), beta=0.5)
        >>> loss.total.backward()
        >>> loss.count.item(), logp.grad.flatten().tolist()
        (1.0, [-1.0, 1.0])

    Source:
        Contrastive Policy Gradient, 2024, arXiv 2406.19185, equations 7 to 10. Groups of more than two, and leaving
        samples out, are our reading.
    """
    if beta == 0:
        warnings.warn("objectives.copg: beta = 0 has no optimum; the policy is held by nothing.", stacklevel=2)
    found = contrast(logp, logp_ref, rewards, mask, valid, beta=beta)
    counted = found.valid.sum(-1) >= 2
    count = counted.sum().to(found.objective.dtype)
    total = -found.objective.sum()
    used = found.valid & counted.unsqueeze(-1)
    samples = used.sum().clamp(min=1)
    metrics = {
        "objective": found.objective.detach().sum() / count.clamp(min=1),
        "log_ratio": found.log_ratio.detach().where(used, 0.0).sum() / samples,
        "regularised_reward": found.regularised.where(used, 0.0).sum() / samples,
        "left_out": 1 - used.to(found.objective.dtype).mean(),
    }
    return Loss(total, count, metrics)


def contrast(
    logp: Float[Tensor, "P G T"],
    logp_ref: Float[Tensor, "P G T"],
    rewards: Float[Tensor, "P G"],
    mask: Bool[Tensor, "P G T"],
    valid: Bool[Tensor, "P G"] | None = None,
    *,
    beta: float = 0.06,
) -> Contrast:
    """What `copg` is the mean of, prompt by prompt.

    Args:
        logp: [P, G, T], as for `copg`, and so are the others.
        logp_ref: [P, G, T].
        rewards: [P, G].
        mask: [P, G, T].
        valid: [P, G].
        beta: at least 0.

    Returns:
        The objective of every prompt, and the parts it is made of.

    Raises:
        ShapeError, RecipeError, ScoreError, DataError, NumericsError: as `copg`.

    Gradient:
        To logp only.
    """
    where = "objectives.copg"
    if not (beta >= 0 and math.isfinite(beta)):
        raise RecipeError(f"{where}: beta must be 0 or more; got {beta}.")
    sizes = check_shapes(
        where, mask=(mask, "P G T"), logp=(logp, "P G T"), logp_ref=(logp_ref, "P G T"), rewards=(rewards, "P G")
    )
    if sizes["G"] < 2:
        raise ShapeError(f"{where}: a contrast takes two samples of a prompt, G >= 2; got G = {sizes['G']}.")
    rewards = rewards.detach()
    if bool(rewards.isinf().any()):
        raise ScoreError(f"{where}: rewards must be finite; infinite at (prompt, sample) {_places(rewards.isinf())}.")
    scored = ~rewards.isnan()
    if valid is not None:
        check_shapes(where, mask=(mask, "P G T"), valid=(valid, "P G"))
        scored = scored & valid
    live = mask.any(-1)
    if bool((scored & ~live).any()) and bool(live.any()):
        raise DataError(
            f"{where}: no live step in (prompt, sample) {_places(scored & ~live)}: there is nothing to compare. Mask "
            "less, or set valid to False there."
        )
    scored = scored & live
    precise = torch.promote_types(logp.dtype, torch.float32)
    counted = mask & scored.unsqueeze(-1)
    # what does not count is replaced before any maths, so that it reaches neither value nor gradient
    log_ratio = (logp.where(counted, 0.0).to(precise) - logp_ref.detach().where(counted, 0.0).to(precise)).sum(-1)
    if not bool(log_ratio.isfinite().all()):
        raise NumericsError(
            f"{where}: the log-ratio to the reference is not finite at (prompt, sample) {_places(~log_ratio.isfinite())}. "
            "Every sample must be possible under the reference: leave those that are not out of the data."
        )
    rewards = rewards.to(precise).where(scored, 0.0)

    pairs = (scored.unsqueeze(2) & scored.unsqueeze(1)).triu(1)
    difference = rewards.unsqueeze(2) - rewards.unsqueeze(1)
    distance = log_ratio.unsqueeze(2) - log_ratio.unsqueeze(1)
    gain = (difference * distance - beta / 2 * distance.square()).where(pairs, 0.0)
    objective = gain.sum((1, 2)) / (scored.sum(-1) - 1).clamp(min=1)
    regularised = (rewards - beta * log_ratio.detach()).masked_fill(~scored, torch.nan)
    return Contrast(objective, log_ratio, regularised, scored)


def _places(wrong: Tensor) -> str:
    """The first few (prompt, sample) at which something is wrong."""
    found = [tuple(place) for place in wrong.nonzero().tolist()]
    return ", ".join(map(str, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
