"""Rewards against what the same prompt earned before: DDPO's statistics per prompt.

With few samples a prompt in each batch, a prompt's own mean is noisy; the last rewards it got, over several batches, say
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guerdon.advantages.centring import check_finite
from guerdon.errors import RecipeError, check_shapes


class PromptTracker(nn.Module):
    """The z-score of a reward among the last rewards of its prompt: A = (r - mean) / (std + eps).

    Each prompt has a queue of its last `size` rewards, the batch at hand included. Where the queue holds fewer than
    `min_count` of them, mean and std of the whole batch are taken instead. The std has no Bessel's correction.

    Args:
        size: rewards remembered for each prompt.
        min_count: rewards a queue must hold to be used, at most `size`.
        eps: added to the std, in the unit of the rewards.

    Raises:
        RecipeError: a number is out of range.

    Edge cases:
        Prompts are told apart by their position in the data (`indices`). NaN rewards (not scored) are not remembered
        and get 0. A constant group is not 0: it is compared with the past; a constant past gives 0. G = 1 is allowed.

    Example:
        >>> stage = PromptTracker(size=4, min_count=3, eps=0.0)
        >>> stage.observe(torch.tensor([[0.0, 2.0]]), [7])
        >>> stage(torch.tensor([[4.0, 2.0]]), [7]).round(decimals=3)
        tensor([[1.4140, 0.0000]])

    Source:
        Black et al. 2023, Training Diffusion Models with Reinforcement Learning, arXiv 2305.13301, and the authors'
        code.
    """

    keys: Tensor
    rewards: Tensor
    counts: Tensor

    def __init__(self, *, size: int = 16, min_count: int = 16, eps: float = 1e-6) -> None:
        super().__init__()
        where = "advantages.prompt_tracker"
        if size < 1:
            raise RecipeError(f"{where}: size must be at least 1; got {size}.")
        if not 1 <= min_count <= size:
            raise RecipeError(f"{where}: min_count must be between 1 and size = {size}; got {min_count}.")
        self.size, self.min_count, self.eps = size, min_count, eps
        # one row a prompt that was seen: its position, its rewards from oldest to newest at the right end, how many
        self.register_buffer("keys", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("rewards", torch.zeros(0, size, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    def forward(self, rewards: Float[Tensor, "P G"], indices: Sequence[int]) -> Float[Tensor, "P G"]:
        """Compare with the queues as they will be after this batch; changes no state.

        Args:
            rewards: [P, G], NaN = not scored.
            indices: P positions of the prompts in the data; one may occur twice.

        Returns:
            Advantages [P, G], without gradient.

        Raises:
            ShapeError: rewards is not [P, G].
            ScoreError: a reward is infinite.
        """
        check_shapes("advantages.prompt_tracker", rewards=(rewards, "P G"))
        check_finite("advantages.prompt_tracker", "rewards", rewards)
        rewards = rewards.detach()
        queues = self._queues(rewards, indices)
        batch = rewards[~rewards.isnan()]
        advantages = torch.zeros_like(rewards)
        for p, index in enumerate(indices):
            queue = queues[index]
            past = queue.to(rewards) if len(queue) >= self.min_count else batch
            if len(past) and past.amin() < past.amax():  # compared, as the std of equal numbers need not be 0
                advantages[p] = (rewards[p] - past.mean()) / (past.std(unbiased=False) + self.eps)
        return advantages.nan_to_num(nan=0.0)

    @torch.no_grad()
    def observe(self, rewards: Float[Tensor, "P G"], indices: Sequence[int]) -> None:
        """Take the rewards of a finished step into the queues.

        Args:
            rewards: [P, G], NaN = not scored.
            indices: P positions of the prompts in the data.
        """
        check_shapes("advantages.prompt_tracker", rewards=(rewards, "P G"))
        for index, queue in self._queues(rewards.detach(), indices).items():
            place = (self.keys == index).nonzero()
            if not len(place):
                self.keys = torch.cat([self.keys, self.keys.new_tensor([index])])
                self.rewards = torch.cat([self.rewards, self.rewards.new_zeros(1, self.size)])
                self.counts = torch.cat([self.counts, self.counts.new_zeros(1)])
                place = self.keys.new_tensor([[len(self.keys) - 1]])
            row = int(place[0])
            if len(queue):
                self.rewards[row, -len(queue) :] = queue.to(self.rewards)
            self.counts[row] = len(queue)

    def _queues(self, rewards: Tensor, indices: Sequence[int]) -> dict[int, Tensor]:
        """For each prompt of the batch its last rewards with those of the batch at the end."""
        queues: dict[int, Tensor] = {}
        known = {int(key): row for row, key in enumerate(self.keys)}
        for row, index in zip(rewards.double(), indices, strict=True):
            if index not in queues:
                place = known.get(index)
                count = 0 if place is None else int(self.counts[place])
                queues[index] = (
                    row.new_zeros(0) if place is None else self.rewards[place, self.size - count :].to(row.device)
                )
            queues[index] = torch.cat([queues[index], row[~row.isnan()]])[-self.size :]
        return queues

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **more: Any) -> None:
        # as many prompts as were seen, which a new stage cannot know
        for name in ("keys", "rewards", "counts"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


prompt_tracker = PromptTracker
