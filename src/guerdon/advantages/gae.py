"""Generalised advantage estimation: an advantage per step from a critic's values."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.advantages.centring import batch_deviation, check_finite
from guerdon.errors import BindingError, RecipeError, check_shapes
from guerdon.rollout import last_step


class GaeOutput(NamedTuple):
    """Advantages [P, G, T], and the returns [P, G, T] that a critic is fitted to; both 0 at masked steps."""

    advantages: Float[Tensor, "P G T"]
    returns: Float[Tensor, "P G T"]


def gae(
    rewards: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
    values: Float[Tensor, "P G T"],
    mask: Bool[Tensor, "P G T"],
    logp_old: Float[Tensor, "P G T"] | None = None,
    logp_ref: Float[Tensor, "P G T"] | None = None,
    kl_old: Float[Tensor, "P G T"] | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    beta: float = 0.0,
    kl_estimator: Literal["k1", "exact"] = "k1",
    whiten: bool = True,
    eps: float = 1e-8,
) -> GaeOutput:
    """Exponentially weighted sum of temporal differences along a sample's own steps.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where t + 1 is the next live step and V
    after the last one is 0. Returns are A + V, before whitening.

    Args:
        rewards: [P, G], paid at the sample's last live step, or [P, G, T] per step; NaN = not scored.
        values: [P, G, T], the critic's value before each step, in the unit of the rewards.
        mask: [P, G, T], True = a live step; masked steps are skipped wherever they are.
        logp_old: [P, G, T] log-probabilities of the sampling policy, needed when beta > 0.
        logp_ref: [P, G, T] log-probabilities of the reference, needed when beta > 0.
        kl_old: [P, G, T] divergence of the sampling policy from the reference at each step, over all that could be drawn;
            needed in place of both when beta > 0 and kl_estimator is `exact`.
        gamma: discount per step.
        lam: weight of the future; 0 is one-step temporal difference, 1 the whole return minus the value.
        beta: subtracts beta * (logp_old - logp_ref) from each step's reward.
        kl_estimator: `k1`, that difference; `exact`, its expectation `kl_old`, which has no noise of the draw.
        whiten: give the advantages of all live, scored steps mean 0 and std 1 (Bessel's correction).
        eps: added to that std.

    Returns:
        `advantages` and `returns`, [P, G, T].

    Raises:
        ShapeError: an argument has another shape.
        ScoreError: a reward is infinite.
        BindingError: beta > 0 without the fields of its divergence.
        RecipeError: the estimator is unknown.

    Gradient:
        None; both results are detached from all arguments.

    Edge cases:
        A sample that was not scored (NaN in its rewards) has advantage 0 and returns equal to its values, and is left
        out of the whitening; so is a sample without a live step. Equal advantages everywhere are whitened to 0.

    Example:
        >>> out = gae(torch.tensor([[1.0]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2).bool(), lam=0.5, whiten=False)
        >>> out.advantages
        tensor([[[0.5000, 1.0000]]])

    Source:
        Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation, arXiv
        1506.02438; with the penalty in the reward as in Schulman et al. 2017, arXiv 1707.06347, and later work on
        language models.
    """
    where = "advantages.gae"
    letters = "P G T" if rewards.ndim == 3 else "P G"
    check_shapes(where, values=(values, "P G T"), mask=(mask, "P G T"), rewards=(rewards, letters))
    rewards = rewards.detach() if rewards.ndim == 2 else rewards.detach().where(mask, 0.0)
    check_finite(where, "rewards", rewards)
    if rewards.ndim == 2:
        rewards = rewards.unsqueeze(-1).where(last_step(mask), 0.0)
    scored = ~rewards.isnan().any(-1, keepdim=True)
    rewards, values = rewards.nan_to_num(nan=0.0), values.detach().where(mask, 0.0)
    if beta > 0:
        penalty = _divergence(mask, logp_old, logp_ref, kl_old, beta, kl_estimator)
        rewards = rewards - beta * penalty.detach().where(mask, 0.0)

    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[..., 0])
    for t in range(mask.shape[-1] - 1, -1, -1):
        live = mask[..., t]
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        next_advantage = (delta + gamma * lam * next_advantage).where(live, next_advantage)
        next_value = values[..., t].where(live, next_value)
        advantages[..., t] = next_advantage
    used = mask & scored
    advantages = advantages.where(used, 0.0)
    returns = advantages + values
    if whiten:
        advantages = _whiten(advantages, used, eps)
    return GaeOutput(advantages, returns)


def _divergence(
    mask: Tensor, logp_old: Tensor | None, logp_ref: Tensor | None, kl_old: Tensor | None, beta: float, estimator: str
) -> Tensor:
    where = "advantages.gae"
    if estimator == "exact":
        if kl_old is None:
            raise BindingError(f"{where}: beta = {beta} with kl_estimator: exact needs kl_old; use k1 to do without.")
        check_shapes(where, mask=(mask, "P G T"), kl_old=(kl_old, "P G T"))
        return kl_old
    if estimator != "k1":
        raise RecipeError(f"{where}.kl_estimator: must be k1 or exact; got {estimator!r}.")
    if logp_old is None or logp_ref is None:
        raise BindingError(f"{where}: beta = {beta} needs logp_old and logp_ref; set beta: 0 to do without.")
    check_shapes(where, mask=(mask, "P G T"), logp_old=(logp_old, "P G T"), logp_ref=(logp_ref, "P G T"))
    return logp_old - logp_ref


def _whiten(advantages: Tensor, used: Tensor, eps: float) -> Tensor:
    live = advantages.masked_fill(~used, torch.nan)
    deviation = batch_deviation(live)
    if deviation == 0:
        return torch.zeros_like(advantages)
    return ((live - live.nanmean()) / (deviation + eps)).where(used, 0.0)
