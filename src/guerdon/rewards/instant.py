"""Rewards for every step of a sampler: what the sample would be worth if nothing random happened any more.

After each step the state is projected to a clean sample in one deterministic step, and the reward scores that. No critic
and no reward model of steps is needed; the price is one call of the reward for each step.
The dense reward of VGPO, 2025, arXiv 2512.12387.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import ShapeError, check_shapes
from guerdon.rewards.judges.base import resolve
from guerdon.rewards.scoring import score
from guerdon.rollout import Rollout


class InstantOutput(NamedTuple):
    """What the projections of P groups are worth.

    Attributes:
        scores: [P][G], that of the last projection, which is the sample itself; None or NaN where a step has none.
        step_rewards: [P, G, T], that of each projection.
    """

    scores: list[list[float | None]]
    step_rewards: Float[Tensor, "P G T"]


class Instant:
    """Score the clean sample that each step of a sample points to; the last one's score is the sample's.

    It gives the field `step_rewards`, which the advantage `value_anchored` reads. The policy must give `projections`:
    those of diffusion and flow do when a reward asks for them.

    Args:
        reward: a reward function, or as in a recipe: a name, {name: {option: value}} or `module:attribute`. It is called
            once, with all projections of a prompt as if they were its group; data columns that it names are handed to
            it.

    Raises:
        RecipeError: there is no such reward, or an option is wrong.

    Edge cases:
        A sample with a projection that the reward does not score is not scored; one on which it fails is a bad score,
        for which the recipe's `on_bad_score` decides. Two of these in one recipe share the field: the last one's is
        kept. Shaping and weighting act on `scores` only.

    Example:
        >>> def length(samples): return [[float(len(s)) for s in group] for group in samples]
        >>> found = Instant(reward=length)(["p"], [["abc", "b"]], [[["a", "abc"], ["", "b"]]])
        >>> found.scores, found.step_rewards.tolist()
        ([[3.0, 1.0]], [[[1.0, 3.0], [0.0, 1.0]]])

    Source:
        VGPO, 2025, arXiv 2512.12387, equation 9.
    """

    def __init__(self, *, reward: Any) -> None:
        self.reward = resolve(reward, "rewards.instant.reward", "rewards")

    def __call__(
        self,
        prompts: Sequence[Any],
        samples: Sequence[Sequence[Any]],
        projections: Sequence[Sequence[Sequence[Any]]] | Tensor,
        **columns: Any,
    ) -> InstantOutput:
        """Score every projection.

        Args:
            prompts: [P].
            samples: [P][G].
            projections: [P][G][T], lists or a tensor [P, G, T, ...]; [..., i] is the clean sample that the state after
                step i points to.
            **columns: lists of P: what else the data carries.

        Returns:
            `scores`, and `step_rewards` [P, G, T].

        Raises:
            ShapeError: the projections are not as many as samples, or differ in number.
        """
        groups = [[list(steps) for steps in group] for group in projections]
        lengths = {len(steps) for group in groups for steps in group}
        if [len(group) for group in groups] != [len(group) for group in samples] or len(lengths) != 1 or 0 in lengths:
            raise ShapeError(
                f"rewards.instant: projections must be [P][G][T] with the samples' P and G and one T; got "
                f"{[len(group) for group in groups]} samples with {sorted(lengths)} steps."
            )
        size, steps = len(samples[0]), lengths.pop()
        together = Rollout(
            prompts=list(prompts),
            samples=[[one for sample in group for one in sample] for group in groups],
            mask=torch.ones(len(groups), size * steps, 1, dtype=torch.bool),
            logp_old=torch.zeros(len(groups), size * steps, 1),
            columns={name: c for name, c in columns.items() if isinstance(c, list) and len(c) == len(prompts)},
        )
        found = score({"instant": self.reward}, together, on_bad_score="drop")
        step_rewards = found.scores[..., 0].reshape(-1, size, steps)
        bad = {(fault.prompt, fault.sample // steps) for fault in found.dropped}
        scores: list[list[float | None]] = []
        for p, group in enumerate(step_rewards):
            row: list[float | None] = []
            for g, values in enumerate(group):
                # a fault stays visible as NaN, which the signal reports; what is not scored is None
                missing = math.nan if (p, g) in bad else None
                row.append(missing if values.isnan().any() else values[-1].item())
            scores.append(row)
        return InstantOutput(scores, step_rewards)


def instant_rewards(
    latents: Float[Tensor, "P G T *D"],
    velocities: Float[Tensor, "P G T *D"],
    sigmas: Float[Tensor, " S"],
    reward: Callable[[Tensor], Tensor],
) -> Float[Tensor, "P G T"]:
    """Project every state of a rectified flow to sigma = 0 in one step, and score the result.

    xhat_i = x_{i+1} - sigma_{i+1} v(x_{i+1}, sigma_{i+1}), with v = dx / dsigma. A sampler has evaluated that velocity for
    its next step already. At the last step sigma is 0 and xhat is the sample.

    Args:
        latents: [P, G, T, ...], the state x_{i+1} after step i.
        velocities: [P, G, T, ...], the velocity there; the last one is not used and may hold anything.
        sigmas: [T + 1], from 1 to 0 in sampling order.
        reward: from [P, G, T, ...] to [P, G, T].

    Returns:
        [P, G, T], without gradient.

    Raises:
        ShapeError: sizes differ, or the reward's result is not [P, G, T].

    Example:
        >>> x, v = torch.tensor([[[[2.0], [3.0]]]]), torch.tensor([[[[1.0], [float("nan")]]]])
        >>> instant_rewards(x, v, torch.tensor([1.0, 0.5, 0.0]), lambda clean: clean.squeeze(-1))
        tensor([[[1.5000, 3.0000]]])

    Source:
        VGPO, 2025, arXiv 2512.12387, equation 9.
    """
    where = "rewards.instant"
    if latents.shape != velocities.shape or latents.ndim < 4 or sigmas.shape != (latents.shape[2] + 1,):
        raise ShapeError(
            f"{where}: latents and velocities must be [P, G, T, ...] and sigmas [T + 1]; got {list(latents.shape)}, "
            f"{list(velocities.shape)} and {list(sigmas.shape)}."
        )
    with torch.no_grad():
        sigma = sigmas[1:].reshape(-1, *(1 for _ in latents.shape[3:]))
        clean = (latents - sigma * velocities).where(sigma != 0, latents)
        found = reward(clean)
    check_shapes(where, latents=(latents.flatten(3)[..., 0], "P G T"), reward=(found, "P G T"))
    return found


instant = Instant
