"""Advantages from the group alone: REINFORCE, RLOO, GRPO, Dr. GRPO and their scalings.

The mean of a prompt's other samples takes the place of a critic. In all of them a sample with a NaN reward was not
scored: it is left out of means and deviations and gets 0. A constant group (all scored rewards exactly equal) gets 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.advantages.centring import batch_deviation, centre, check_finite, deviation, divide, varies, warn_if_alone
from guerdon.errors import RecipeError, check_shapes


def group_advantages(
    rewards: Float[Tensor, "P G"],
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    bessel: bool = True,
) -> Float[Tensor, "P G"]:
    """Rewards against the mean of their group, divided by a deviation.

    A = (r - mean_g r) / (std + eps), where std is taken over the group, over the whole batch, or not at all. The
    group's std weighs very easy and very hard prompts up; the batch's does not.

    Args:
        rewards: [P, G], in any unit; NaN = not scored.
        scale: `group` divides by the group's std (GRPO), `batch` by the std of all P * G rewards, `none` by nothing
            (Dr. GRPO).
        eps: added to the std, in the unit of the rewards.
        bessel: std with Bessel's correction, n - 1 in place of n; Flow-GRPO's has none.

    Returns:
        Advantages [P, G]; with all samples scored every group sums to 0.

    Raises:
        ShapeError: rewards is not [P, G].
        ScoreError: a reward is infinite.
        RecipeError: scale is none of the three.

    Gradient:
        None; the result is detached from the rewards.

    Edge cases:
        A constant group, a group without any score and G = 1 (with a warning) give exactly 0.

    Example:
        >>> group_advantages(torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]]), eps=0.0)
        tensor([[-1.,  0.,  1.],
                [ 0.,  0.,  0.]])

    Source:
        Shao et al. 2024, DeepSeekMath, arXiv 2402.03300 (group); Liu et al. 2025, Understanding R1-Zero-Like Training,
        arXiv 2503.20783 (none); Liu et al. 2025, Flow-GRPO, arXiv 2505.05470 (batch, without Bessel's correction).
    """
    return _scaled("advantages.group_advantages", rewards, scale, eps, bessel)


def grpo(rewards: Float[Tensor, "P G"], *, eps: float = 1e-4) -> Float[Tensor, "P G"]:
    """The z-score of a reward within its group: A = (r - mean_g r) / (std_g r + eps).

    Args:
        rewards: [P, G], in any unit; NaN = not scored.
        eps: added to the group's std (Bessel's correction), in the unit of the rewards.

    Returns:
        Advantages [P, G], unchanged under r -> a r + b with a > 0, up to eps.

    Raises:
        ShapeError: rewards is not [P, G].
        ScoreError: a reward is infinite.

    Gradient:
        None; the result is detached from the rewards.

    Edge cases:
        A constant group, a group without any score and G = 1 (with a warning) give exactly 0.

    Example:
        >>> grpo(torch.tensor([[0.0, 1.0]])).round(decimals=4)
        tensor([[-0.7070,  0.7070]])

    Source:
        Shao et al. 2024, DeepSeekMath, arXiv 2402.03300.
    """
    return _scaled("advantages.grpo", rewards, "group", eps)


def dr_grpo(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """A reward minus the mean of its group: A = r - mean_g r.

    Unlike the z-score it does not weigh prompts by how nearly all, or none, of their samples are right.

    Args:
        rewards: [P, G], in any unit; NaN = not scored.

    Returns:
        Advantages [P, G], in the unit of the rewards.

    Raises:
        ShapeError: rewards is not [P, G].
        ScoreError: a reward is infinite.

    Gradient:
        None; the result is detached from the rewards.

    Edge cases:
        A constant group, a group without any score and G = 1 (with a warning) give exactly 0.

    Example:
        >>> dr_grpo(torch.tensor([[0.0, 1.0]]))
        tensor([[-0.5000,  0.5000]])

    Source:
        Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv 2503.20783.
    """
    return _scaled("advantages.dr_grpo", rewards, "none", 0.0)


def rloo(rewards: Float[Tensor, "P G"], *, normalise: bool = False, eps: float = 1e-4) -> Float[Tensor, "P G"]:
    """A reward minus the mean of the group's other samples (leave one out).

    A_g = r_g - (sum of r_h over h != g) / (G - 1) = G / (G - 1) * (r_g - mean r). The baseline does not depend on the
    sample itself, so the policy gradient stays unbiased.

    Args:
        rewards: [P, G], in any unit; NaN = not scored, and not counted in G.
        normalise: divide by the std of all advantages of the batch (their mean is 0 already), plus eps.
        eps: used with `normalise`, in the unit of the rewards.

    Returns:
        Advantages [P, G], in the unit of the rewards unless normalised.

    Raises:
        ShapeError: rewards is not [P, G].
        ScoreError: a reward is infinite.

    Gradient:
        None; the result is detached from the rewards.

    Edge cases:
        A constant group, a sample without a scored sibling and G = 1 (with a warning) give exactly 0.

    Example:
        >>> rloo(torch.tensor([[0.0, 1.0, 2.0]]))
        tensor([[-1.5000,  0.0000,  1.5000]])

    Source:
        Ahmadian et al. 2024, Back to Basics, arXiv 2402.14740.
    """
    check_shapes("advantages.rloo", rewards=(rewards, "P G"))
    check_finite("advantages.rloo", "rewards", rewards)
    warn_if_alone("advantages.rloo", rewards.shape[1])
    rewards = rewards.detach()
    centred, count = centre(rewards)
    advantages = centred * count / (count - 1).clamp(min=1)
    if normalise:
        scored = advantages.masked_fill(rewards.isnan(), torch.nan)
        advantages = divide(advantages, batch_deviation(scored) + eps)
    return advantages


def reinforce(
    rewards: Float[Tensor, "P G"], *, baseline: Literal["none", "batch"] | float = "none"
) -> Float[Tensor, "P G"]:
    """A reward minus a baseline that does not look at the group: A = r - b.

    Args:
        rewards: [P, G], in any unit; NaN = not scored.
        baseline: `none` is b = 0, `batch` the mean of all scored rewards of the batch, a number that constant.

    Returns:
        Advantages [P, G], in the unit of the rewards.

    Raises:
        ShapeError: rewards is not [P, G].
        ScoreError: a reward is infinite.
        RecipeError: baseline is a word other than the two.

    Gradient:
        None; the result is detached from the rewards.

    Edge cases:
        A sample that was not scored gets 0. A constant group is not 0: no group is looked at.

    Example:
        >>> reinforce(torch.tensor([[0.0, 1.0], [1.0, 2.0]]), baseline="batch")
        tensor([[-1.,  0.],
                [ 0.,  1.]])

    Source:
        Williams 1992, Simple Statistical Gradient-Following Algorithms; for language models Ahmadian et al. 2024, arXiv
        2402.14740.
    """
    check_shapes("advantages.reinforce", rewards=(rewards, "P G"))
    check_finite("advantages.reinforce", "rewards", rewards)
    if isinstance(baseline, str) and baseline not in ("none", "batch"):
        raise RecipeError(f"advantages.reinforce: baseline must be 'none', 'batch' or a number; got {baseline!r}.")
    rewards = rewards.detach()
    if baseline == "batch":
        centred, _ = centre(rewards.flatten())
        return centred.view_as(rewards)
    return (rewards - (0.0 if isinstance(baseline, str) else baseline)).nan_to_num(nan=0.0)


def normalise_then_sum(
    scores: Float[Tensor, "P G K"],
    weights: Float[Tensor, " K"] | Float[Tensor, "P G K"],
    *,
    eps: float = 1e-4,
    whiten: bool = True,
) -> Float[Tensor, "P G"]:
    """Z-score each component within its group, add them up with weights, z-score the sum over the batch.

    Summing first and normalising after lets the component with the largest spread decide; here each counts by its
    weight. With z_k = (s_k - mean_g s_k) / (std_g s_k + eps) and u = sum_k w_k z_k, A = (u - mean u) / (std u + eps).

    Args:
        scores: [P, G, K], each component in its own unit; NaN = not scored.
        weights: [K], or [P, G, K], without unit.
        eps: added to both stds.
        whiten: z-score the sum over the batch; False leaves A = u, as DanceGRPO does.

    Returns:
        Advantages [P, G].

    Raises:
        ShapeError: scores is not [P, G, K], or weights fit it neither as [K] nor as [P, G, K].
        ScoreError: a score is infinite.

    Gradient:
        None; the result is detached from scores and weights.

    Edge cases:
        A component that was not scored adds nothing to that sample. A sample with no score at all, a group in which no
        component varies and G = 1 (with a warning) get exactly 0.

    Example:
        >>> scores = torch.tensor([[[0.0, 0.0], [1.0, 100.0], [1.0, 0.0]]])
        >>> normalise_then_sum(scores, torch.ones(2)).round(decimals=2)
        tensor([[-1.,  1., -0.]])

    Source:
        Shao et al. 2024, arXiv 2402.03300, applied to each component; the order of the two steps is a common variant; Xue
        et al. 2025, DanceGRPO, arXiv 2505.07818 (without whitening).
    """
    where = "advantages.normalise_then_sum"
    letters = "P G K" if weights.ndim == 3 else "K"
    check_shapes(where, scores=(scores, "P G K"), weights=(weights, letters))
    check_finite(where, "scores", scores)
    warn_if_alone(where, scores.shape[1])
    by_component = scores.detach().transpose(1, 2)
    centred, count = centre(by_component)
    z = divide(centred, deviation(centred, count) + eps).transpose(1, 2)
    total = (z * weights.detach()).sum(-1)
    used = ~scores.isnan().all(-1) & varies(by_component).any(1)
    if not whiten:
        return total.where(used, 0.0)
    scored = total.masked_fill(scores.isnan().all(-1), torch.nan)
    return divide(total - scored.nanmean(), batch_deviation(scored) + eps).where(used, 0.0)


def _scaled(where: str, rewards: Tensor, scale: str, eps: float, bessel: bool = True) -> Tensor:
    check_shapes(where, rewards=(rewards, "P G"))
    check_finite(where, "rewards", rewards)
    warn_if_alone(where, rewards.shape[1])
    rewards = rewards.detach()
    centred, count = centre(rewards)
    if scale == "none":
        return centred
    if scale == "group":
        return divide(centred, deviation(centred, count, bessel) + eps)
    if scale == "batch":
        return divide(centred, batch_deviation(rewards, bessel) + eps)
    raise RecipeError(f"{where}: scale must be 'group', 'batch' or 'none'; got {scale!r}.")
