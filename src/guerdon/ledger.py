"""The ledger: for every sample and component what was scored, what became of it, and what it moved.

The advantage of a sample is split over the components of its reward. Within a group the advantage is (for every
group-relative method) a straight line of the reward, so component k contributes slope * (w_k s_k - its group mean); what
is left (an offset between groups, a rank, a bend) stands in `remainder`. Contributions and remainder add up to the
advantage that was optimised, exactly, for every method.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.rollout import Rollout
from guerdon.sampling.mixed import mixed_groups


class Attribution(NamedTuple):
    """Where advantages came from.

    Attributes:
        contributions: [P, G, K] part of the advantage that each component moved.
        remainder: [P, G] what is no component's own: `contributions.sum(-1) + remainder` is the advantage.
        advantages: [P, G], summed over live steps for a method with one advantage per step.
        constant: [P] whether all scored samples of the group have exactly the same reward.
    """

    contributions: Float[Tensor, "P G K"]
    remainder: Float[Tensor, "P G"]
    advantages: Float[Tensor, "P G"]
    constant: Bool[Tensor, " P"]


@torch.no_grad()
def attribute(rollout: Rollout) -> Attribution:
    """Split the advantages of a rollout over its reward components.

    A stage that knows better says so by producing a field `contributions` [P, G, K].

    Args:
        rollout: with `rewards` and, as `Signal` leaves them, the extras `shaped` and `weights`.

    Returns:
        The attribution; without an advantage stage (an objective that reads rewards), rewards are attributed instead.
    """
    shaped, weights = rollout.extras["shaped"], rollout.extras["weights"]
    rewards = rollout.rewards
    assert rewards is not None
    if rewards.ndim == 3:
        rewards = torch.where(rollout.mask, rewards, 0).sum(-1)
    advantages = rewards if rollout.advantages is None else rollout.advantages
    if advantages.ndim == 3:
        advantages = torch.where(rollout.mask, advantages, 0).sum(-1)
    advantages = advantages.nan_to_num(0.0)
    constant = ~mixed_groups(rewards)
    if "contributions" in rollout.extras:
        contributions = rollout.extras["contributions"]
    else:
        scored = ~rewards.isnan()
        deviation = _centred(rewards, scored)
        slope = (deviation * advantages).sum(-1) / deviation.square().sum(-1)
        slope = slope.masked_fill(constant, 0.0).nan_to_num(0.0)
        parts = (shaped * weights).nan_to_num(0.0)
        contributions = slope[:, None, None] * _centred(parts, scored[..., None])
    return Attribution(contributions, advantages - contributions.sum(-1), advantages, constant)


def _centred(values: Tensor, scored: Tensor) -> Tensor:
    kept = torch.where(scored, values, 0.0)
    return torch.where(scored, kept - kept.sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1), 0.0)


def entry(step: int, rollout: Rollout, attribution: Attribution) -> dict[str, Any]:
    """One step of the ledger as plain lists, the form of a line of `ledger.jsonl`; null where nothing was scored."""
    dropped = rollout.extras.get("dropped", [])
    return {
        "step": step,
        "prompt_index": rollout.indices or list(range(len(rollout))),
        "components": list(rollout.score_names),
        "raw": _lists(rollout.scores),
        "shaped": _lists(rollout.extras["shaped"]),
        "weights": _lists(_once(rollout.extras["weights"])),
        "contributions": _lists(attribution.contributions),
        "remainder": _lists(attribution.remainder),
        "advantages": _lists(attribution.advantages),
        "constant": attribution.constant.tolist(),
        "dropped": [[p, fault.sample, fault.name, fault.why] for p, faults in enumerate(dropped) for fault in faults],
    }


def _once(weights: Tensor) -> Tensor:
    """Weights [K] where they are the same for every sample."""
    first = weights[0, 0]
    return first if bool((weights == first).all()) else weights


def _lists(tensor: Tensor | None) -> Any:
    assert tensor is not None
    # seven digits after the point: a line stays short, and sums still agree to single precision
    rounded = tensor.double().round(decimals=7)
    values = rounded.tolist()
    return values if bool(rounded.isfinite().all()) else _without_nan(values)


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return value if value == value and abs(value) != float("inf") else None
