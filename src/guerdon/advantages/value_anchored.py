"""Value-anchored advantages (VGPO): a value for every step, compared with the group's and anchored by its own size.

Rewards per step become values along the sample; a step's value is z-scored within the group at that step, its absolute
size is added so that a group in which all are alike keeps a signal, and steps weigh by their share of the sample's value.
Anchoring Values in Temporal and Group Dimensions for Flow Matching Model Alignment, 2025, arXiv 2512.12387. The algebraic
form of the anchored advantage is our reading.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from guerdon.advantages.centring import centre, check_finite, deviation, divide, varies
from guerdon.errors import RecipeError, ScoreError, check_shapes

Absolute = Literal["signed", "abs"]
Mix = Literal["additive", "convex"]

_TOLD = 16  # steps whose figures are logged


class ValueAnchoredOutput(NamedTuple):
    """Advantages, the values they come from, and the weights of the steps; all [P, G, T], 0 at masked steps."""

    advantages: Float[Tensor, "P G T"]
    action_values: Float[Tensor, "P G T"]
    step_weights: Float[Tensor, "P G T"]


class ValueAnchored(nn.Module):
    """An advantage per step from values per step: A = omega * ((Q - mean_g Q) / (std_g Q + eps) + k Q).

    With R_i the reward of step i: Q_i = R_i + gamma Q_{i+1}; omega_i = Q_i / (mean of Q over the sample's live steps),
    whose mean is 1; mean and std (no Bessel's correction) are over the group's samples at step i; the term k Q stands in
    the first `first_n` steps. The loss is `policy_gradient`, with `advantage_clip` 5 for image models.

    Rewards per step come from the reward `instant`, where the policy tells what its samples look like after each step.
    Without them the one reward of a sample is paid at its end: Q_i = gamma^(live steps still to come) * r; after its end
    a sample keeps Q = r, so that samples of different lengths can be compared (our reading). Then gamma = 1, k = 0 is
    `group_advantages` with `bessel: false`, at every step.

    Args:
        gamma: discount per step, in [0, 1].
        k: weight of the absolute term, per unit of reward.
        first_n: steps that have the absolute term; None = all.
        eps: added to the std, in the unit of the values.
        use_step_weights: multiply by omega; needs rewards that are not negative.
        omega_max: largest omega; None = no bound. With sparse rewards omega reaches the number of steps.
        eps_w: a sample whose mean value is smaller than this in size has omega = 1.
        absolute: the absolute term is Q (`signed`), or its size (`abs`).
        mix: `additive` adds k Q of the sample, `convex` adds k times the group's mean of Q.
        shift_to_nonnegative: where a reward is negative, subtract the batch's smallest from all.

    Raises:
        RecipeError: an option is out of its range.

    Edge cases:
        A sample that was not scored (NaN in rewards [P, G]) gets 0 and is left out of its group. A constant group does
        not get 0, but omega k Q in the first steps; it gets exactly 0 where Q is 0. Masked steps get 0 and are left out
        of omega's mean, but what they earn enters Q. G = 1 leaves the absolute term alone.

    Example:
        >>> stage = ValueAnchored(gamma=0.0, k=0.5, first_n=1, eps=0.0, use_step_weights=False)
        >>> stage(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), torch.ones(1, 2, 2).bool()).advantages
        tensor([[[-0.5000,  0.0000],
                 [ 2.5000,  0.0000]]])

    Source:
        VGPO, 2025, arXiv 2512.12387, as its public reviews describe it. The form of A, gamma, k, the population std and
        omega per sample are our reading.
    """

    def __init__(
        self,
        *,
        gamma: float = 0.95,
        k: float = 0.05,
        first_n: int | None = 5,
        eps: float = 1e-4,
        use_step_weights: bool = True,
        omega_max: float | None = None,
        eps_w: float = 1e-6,
        absolute: Absolute = "signed",
        mix: Mix = "additive",
        shift_to_nonnegative: bool = False,
    ) -> None:
        super().__init__()
        where = "advantages.value_anchored"
        if not 0 <= gamma <= 1:
            raise RecipeError(f"{where}: gamma must be from 0 to 1; got {gamma}.")
        for name, value in (("k", k), ("eps", eps), ("eps_w", eps_w), ("first_n", first_n)):
            if value is not None and not value >= 0:
                raise RecipeError(f"{where}: {name} must be >= 0; got {value}.")
        if omega_max is not None and not omega_max >= 1:
            raise RecipeError(f"{where}: omega_max must be >= 1, the mean of omega, or null; got {omega_max}.")
        _check_forms(where, absolute, mix)
        self.gamma, self.k, self.first_n, self.eps = gamma, k, first_n, eps
        self.use_step_weights, self.omega_max, self.eps_w = use_step_weights, omega_max, eps_w
        self.absolute: Absolute = absolute
        self.mix: Mix = mix
        self.shift_to_nonnegative = shift_to_nonnegative
        self._told: dict[str, float] = {}

    def forward(
        self,
        rewards: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
        mask: Bool[Tensor, "P G T"],
        step_rewards: Float[Tensor, "P G T"] | None = None,
    ) -> ValueAnchoredOutput:
        """Values, weights and advantages of every step; changes no state but the figures that are logged.

        Args:
            rewards: [P, G], one of each sample, NaN = not scored; or [P, G, T], one of each step, masked ones included.
            mask: [P, G, T], True = a live step.
            step_rewards: [P, G, T], as the reward `instant` gives them, masked steps included; where they are there,
                rewards [P, G] only say which samples were scored.

        Returns:
            `advantages`, `action_values` and `step_weights`, [P, G, T], without gradient, 0 at masked steps.

        Raises:
            ShapeError: an argument has another shape.
            ScoreError: a reward of a scored sample is not finite, or negative while steps are weighed.
        """
        where = "advantages.value_anchored"
        letters = "P G T" if rewards.ndim == 3 else "P G"
        check_shapes(where, mask=(mask, "P G T"), rewards=(rewards, letters))
        scored = ~rewards.isnan() if rewards.ndim == 2 else mask.new_ones(mask.shape[:2])
        name, used = "rewards", rewards.detach()
        if step_rewards is not None:
            check_shapes(where, mask=(mask, "P G T"), step_rewards=(step_rewards, "P G T"))
            name, used = "step_rewards", step_rewards.detach()
        used = self._usable(where, name, used, scored)

        if used.ndim == 2:
            to_come = mask.sum(-1, keepdim=True) - mask.cumsum(-1)
            values = used.unsqueeze(-1) * self.gamma ** to_come.to(used.dtype)
        else:
            values = action_values(used, self.gamma)
        omega = torch.ones_like(values)
        if self.use_step_weights:
            omega = step_weights(values, mask, eps_w=self.eps_w, omega_max=self.omega_max)
        options = {"k": self.k, "first_n": self.first_n, "eps": self.eps}
        known = values.masked_fill(~scored.unsqueeze(-1), torch.nan)
        advantages = adae(known, omega, **options, absolute=self.absolute, mix=self.mix)  # pyright: ignore[reportArgumentType]
        live = mask & scored.unsqueeze(-1)
        advantages, values, omega = (part.where(live, 0.0) for part in (advantages, values, omega))
        self._told = _figures(advantages, omega, known, live)
        return ValueAnchoredOutput(advantages, values, omega)

    def metrics(self) -> dict[str, float]:
        """Of the last call: size of the advantage and weight of each of the first steps; groups of equal values."""
        return dict(self._told)

    def _usable(self, where: str, name: str, rewards: Tensor, scored: Tensor) -> Tensor:
        """Finite rewards, 0 where not scored, that step weights can be made of."""
        known = scored if rewards.ndim == 2 else scored.unsqueeze(-1).expand_as(rewards)
        if rewards.ndim == 2:
            check_finite(where, name, rewards)
        bad = (known & ~rewards.isfinite()).nonzero()
        if len(bad):
            at = bad[0].tolist()
            raise ScoreError(
                f"{where}: {name}{at} is {rewards[tuple(at)].item():g}; prompt {at[0]}, sample {at[1]} has no reward for "
                f"step {at[2]}. A sample needs one for every step, or none at all (NaN in rewards [P, G])."
            )
        rewards = rewards.where(known, 0.0)
        lowest = rewards.amin() if rewards.numel() else rewards.new_zeros(())
        if lowest >= 0 or not (self.use_step_weights or self.shift_to_nonnegative):
            return rewards
        if not self.shift_to_nonnegative:
            raise ScoreError(
                f"{where}: a reward is negative ({lowest.item():g}), and a step's share of a value of mixed sign means "
                "nothing. Set use_step_weights: false, or shift_to_nonnegative: true, or shape the reward."
            )
        return (rewards - lowest).where(known, 0.0)


def action_values(rewards: Float[Tensor, "*batch T"], gamma: float) -> Float[Tensor, "*batch T"]:
    """Discounted rewards from each step on: Q_i = R_i + gamma Q_{i+1}.

    Args:
        rewards: [..., T].
        gamma: discount per step.

    Returns:
        [..., T].

    Example:
        >>> action_values(torch.tensor([1.0, 0.0, 4.0]), 0.5)
        tensor([2., 2., 4.])
    """
    values = rewards.clone()
    for i in range(rewards.shape[-1] - 2, -1, -1):
        values[..., i] += gamma * values[..., i + 1]
    return values


def step_weights(
    values: Float[Tensor, "*batch T"],
    mask: Bool[Tensor, "*batch T"] | None = None,
    *,
    eps_w: float = 1e-6,
    omega_max: float | None = None,
) -> Float[Tensor, "*batch T"]:
    """A step's share of its sample's value: omega_i = Q_i / mean over live steps of Q.

    Args:
        values: [..., T], not negative.
        mask: [..., T], the steps that count for the mean; None = all.
        eps_w: a mean smaller than this in size gives 1 for all steps.
        omega_max: largest weight; None = no bound.

    Returns:
        [..., T]; the mean over live steps is 1 where no bound is met.

    Example:
        >>> step_weights(torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
        tensor([[2., 1., 0.],
                [1., 1., 1.]])
    """
    live = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    mean = values.where(live, 0.0).sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
    small = mean.abs() < eps_w
    omega = (values / mean.where(~small, 1.0)).where(~small, 1.0)
    return omega if omega_max is None else omega.clamp(max=omega_max)


def adae(
    values: Float[Tensor, "P G T"],
    weights: Float[Tensor, "P G T"],
    *,
    k: float = 0.05,
    first_n: int | None = 5,
    eps: float = 1e-4,
    absolute: Absolute = "signed",
    mix: Mix = "additive",
) -> Float[Tensor, "P G T"]:
    """A step's value against its group and by its own size: omega * ((Q - mean_g Q) / (std_g Q + eps) + k Q).

    With alpha = k std_g Q this is omega * ((1 + alpha) Q - mean_g Q) / std_g Q, in a form that stays finite as the std
    goes to 0, where omega k Q is left. `convex` has k mean_g Q in place of k Q: that is ((1 - alpha)(Q - mean_g Q) + alpha
    Q) / std_g Q.

    Args:
        values: [P, G, T]; NaN = not scored, left out of its group.
        weights: [P, G, T], omega.
        k: weight of the absolute term.
        first_n: steps that have it; None = all.
        eps: added to the std.
        absolute: `signed` Q, or its size (`abs`).
        mix: `additive` or `convex`.

    Returns:
        [P, G, T], 0 where not scored.

    Raises:
        ShapeError: the shapes differ.
        RecipeError: absolute or mix is unknown.

    Gradient:
        To values and weights; the stage that uses it detaches them.

    Source:
        Equations 11 to 13 of arXiv 2512.12387, in our reading.
    """
    where = "advantages.value_anchored"
    check_shapes(where, values=(values, "P G T"), weights=(weights, "P G T"))
    _check_forms(where, absolute, mix)
    by_step = values.transpose(1, 2)
    centred, count = centre(by_step)
    relative = divide(centred, deviation(centred, count, bessel=False) + eps).transpose(1, 2)
    scored = ~values.isnan()
    size = values.nan_to_num(nan=0.0)
    if absolute == "abs":
        size = size.abs()
    if mix == "convex":
        size = (size.sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)).expand_as(values)
    steps = torch.arange(values.shape[-1], device=values.device)
    anchor = (k * size).where(steps < (len(steps) if first_n is None else first_n), 0.0)
    return (weights * (relative + anchor)).where(scored, 0.0)


def _figures(advantages: Tensor, omega: Tensor, values: Tensor, live: Tensor) -> dict[str, float]:
    """What is logged: means over live samples, step by step; share of the groups in which all values are equal."""
    count = live.sum((0, 1)).clamp(min=1)
    size, weight = (part.sum((0, 1)) / count for part in (advantages.abs(), omega))
    there = live.any(1)
    equal = ~varies(values.masked_fill(~live, torch.nan).transpose(1, 2)).squeeze(-1) & there
    told = {"equal_values": (equal.sum() / there.sum().clamp(min=1)).item()}
    for i in range(min(live.shape[-1], _TOLD)):
        told |= {f"size_{i}": size[i].item(), f"omega_{i}": weight[i].item()}
    return told


def _check_forms(where: str, absolute: str, mix: str) -> None:
    if absolute not in ("signed", "abs"):
        raise RecipeError(f"{where}: absolute must be signed or abs; got {absolute!r}.")
    if mix not in ("additive", "convex"):
        raise RecipeError(f"{where}: mix must be additive or convex; got {mix!r}.")


value_anchored = ValueAnchored
