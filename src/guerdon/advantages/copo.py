"""Consistency-aware advantages (COPO): prompts are compared with one another where the samples of one prompt agree.

A group whose samples are all right or all wrong has no advantage within itself. Here it gets one from its prompt's
mean reward against those of the batch's other prompts, and a gate decides sample by sample how much of each counts.
J. Han et al. 2025, COPO: Consistency-Aware Policy Optimization, arXiv 2508.04138.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.advantages.centring import centre, check_finite, deviation, divide
from guerdon.errors import RecipeError, ScoreError, ShapeError, check_shapes, nearest

Mode = Literal["soft_with_zero", "soft", "soft_with_forced", "dead_only", "zero_only", "global", "local"]


class CopoOutput(NamedTuple):
    """What `copo` finds; all of it constant for the update.

    Attributes:
        advantages: [P, G], local_weight * local + (1 - local_weight) * global: what one on-policy update follows.
        local_advantages: [P, G], against the other samples of the prompt.
        global_advantages: [P, G], the prompt against the other prompts; the same for its scored samples, else 0.
        local_weight: [P, G], in [0, 1].
        consistency_entropy: [P], of the answers of a prompt, in bits.
        global_reward: [P], what prompts are compared by; NaN for a prompt without a scored sample.
    """

    advantages: Float[Tensor, "P G"]
    local_advantages: Float[Tensor, "P G"]
    global_advantages: Float[Tensor, "P G"]
    local_weight: Float[Tensor, "P G"]
    consistency_entropy: Float[Tensor, " P"]
    global_reward: Float[Tensor, " P"]


def copo(
    rewards: Float[Tensor, "P G"],
    outcomes: Sequence[Sequence[Any]],
    *,
    mode: Mode = "soft_with_zero",
    gamma: float = 20.0,
    rho: float = 1.5,
    consistency_coefficient: bool = False,
    global_coefficient: float = 1.0,
    eps: float = 1e-6,
    log_eps: float = 0.0,
) -> CopoOutput:
    """A sample against its group and its prompt against the batch, blended by how far the group's answers agree.

    With H the entropy of a prompt's answers in bits, acc its mean reward and R = acc:

    local = (r - acc) / (std_g r + eps), global = (R - mean_p R) / (std_p R + eps), both stds with Bessel's correction,
    weight of the local one w = sigmoid(gamma * (H - rho)) * [r != 0].

    Answers that differ (large H) leave a sample to its group; agreement, and a reward of 0, to the batch. Meant for
    rewards that are 0 or 1 and for many prompts a step; all prompts of a batch must be given at once. `copo_loss` is
    the objective that clips the two parts apart. Another objective uses the blend `advantages`, which comes to the
    same while the policy has not moved.

    Args:
        rewards: [P, G], 1 = right, 0 = wrong; NaN = not scored.
        outcomes: [P][G], the answer of every sample, hashable; equal answers agree. None = no answer was found, and
            all of these of a prompt count as one answer.
        mode: the local weight. `soft_with_zero` is the method, as above. `soft` leaves [r != 0] out,
            `soft_with_forced` puts [local != 0] in its place. `dead_only` is [local != 0], `zero_only` is [r != 0],
            `global` 0 and `local` 1 (GRPO).
        gamma: steepness of the gate, per bit.
        rho: bits of disagreement at which both parts count alike; it must be below log2 G for the gate to open.
        consistency_coefficient: take R = acc * (1 - lambda * H) with lambda = (1 - 1/G) / log2 G, so that a prompt
            whose answers agree is worth more; the factor is 1 at H = 0 and 1/G where all answers differ.
        global_coefficient: factor of the global advantages, >= 0.
        eps: added to both stds, in the unit of the rewards.
        log_eps: added to every frequency inside the logarithm of H. The authors' code has 1e-8, which moves H by less
            than 1e-7; 0 makes H of a unanimous group exactly 0.

    Returns:
        The blended advantages with all they are made of.

    Raises:
        ShapeError: rewards is not [P, G] with G >= 2, or outcomes not [P][G].
        ScoreError: a reward is infinite, or an answer cannot be hashed.
        RecipeError: mode is unknown, gamma is not above 0, or global_coefficient is below 0.

    Gradient:
        None; all results are detached.

    Edge cases:
        A constant group has local advantage 0; a single prompt, and prompts of equal R, global advantage 0. A sample
        that was not scored is left out of acc and H and gets 0 everywhere. In a mixed group above the batch's mean a
        wrong sample has a positive advantage: it is pushed up with its prompt.

    Example:
        >>> out = copo(torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), [["7", "7"], ["3", None], ["5", "6"]])
        >>> out.advantages.round(decimals=2)
        tensor([[ 1.,  1.],
                [-1., -1.],
                [ 0.,  0.]])
        >>> out.consistency_entropy
        tensor([0., 1., 1.])

    Source:
        Han et al. 2025, COPO: Consistency-Aware Policy Optimization, arXiv 2508.04138; the modes, log_eps and
        consistency_coefficient as in the authors' code. Leaving out what was not scored is our reading.
    """
    where = "advantages.copo"
    _check(where, rewards, outcomes, mode, gamma, global_coefficient)
    rewards = rewards.detach()
    scored = ~rewards.isnan()

    entropy = rewards.new_tensor(_entropies(where, outcomes, scored.tolist(), log_eps))
    accuracy = rewards.nanmean(-1)
    global_reward = accuracy
    if consistency_coefficient:
        count = scored.sum(-1).to(rewards.dtype)
        slope = (1 - 1 / count) / count.log2()
        global_reward = accuracy * (1 - entropy * slope.where(count > 1, 0.0))

    local = _z_score(rewards, eps)
    across = _z_score(global_reward, eps).unsqueeze(-1).where(scored, 0.0) * global_coefficient

    gate = torch.sigmoid(gamma * (entropy - rho)).unsqueeze(-1).expand_as(rewards)
    right, alive = rewards != 0, local != 0
    one = torch.ones_like(rewards)
    weight = {
        "soft_with_zero": gate * right,
        "soft": gate,
        "soft_with_forced": gate * alive,
        "dead_only": one * alive,
        "zero_only": one * right,
        "global": one * 0,
        "local": one,
    }[mode].where(scored, 0.0)
    return CopoOutput(weight * local + (1 - weight) * across, local, across, weight, entropy, global_reward)


def _z_score(values: Tensor, eps: float) -> Tensor:
    centred, count = centre(values)
    return divide(centred, deviation(centred, count) + eps)


def _entropies(
    where: str, outcomes: Sequence[Sequence[Any]], scored: Sequence[Sequence[bool]], log_eps: float
) -> list[float]:
    """Entropy of the answers of every prompt in bits, over its scored samples."""
    entropies = []
    for p, (answers, live) in enumerate(zip(outcomes, scored, strict=True)):
        kept = [answer for answer, used in zip(answers, live, strict=True) if used]
        try:
            counts = Counter(kept)
        except TypeError:
            raise ScoreError(
                f"{where}: outcomes[{p}] holds an answer that cannot be hashed, and so not be compared: {kept!r:.80}. "
                "Return answers as text, numbers or tuples."
            ) from None
        # sorted, so that equal patterns of agreement give bitwise equal entropies
        shares = [count / len(kept) for count in sorted(counts.values())]
        entropies.append(0.0 - sum(share * math.log2(share + log_eps) for share in shares))
    return entropies


def _check(
    where: str,
    rewards: Tensor,
    outcomes: Sequence[Sequence[Any]],
    mode: str,
    gamma: float,
    global_coefficient: float,
) -> None:
    sizes = check_shapes(where, rewards=(rewards, "P G"))
    if sizes["G"] < 2:
        raise ShapeError(
            f"{where}: rewards must be [P, G] with G >= 2, as one answer cannot agree with itself; got "
            f"{list(rewards.shape)}. Raise group_size."
        )
    found = [len(answers) for answers in outcomes]
    if found != [sizes["G"]] * sizes["P"]:
        raise ShapeError(
            f"{where}: outcomes must be P = {sizes['P']} lists of G = {sizes['G']} answers; got {len(found)} lists"
            f"{f' of {sorted(set(found))}' if found else ''}."
        )
    check_finite(where, "rewards", rewards)
    if mode not in get_args(Mode):
        known = get_args(Mode)
        raise RecipeError(f"{where}: mode must be one of {', '.join(known)}; got {mode!r}.{nearest(mode, known)}")
    if not gamma > 0:
        raise RecipeError(f"{where}: gamma must be above 0; got {gamma}.")
    if not global_coefficient >= 0:
        raise RecipeError(f"{where}: global_coefficient must be >= 0; got {global_coefficient}.")
