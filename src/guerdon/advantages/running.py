"""Group-centred rewards over a standard deviation that is remembered from step to step.

The std of one batch is noisy when batches are small; a running one keeps the size of the update comparable over time.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guerdon.advantages.centring import centre, check_finite, divide, warn_if_alone
from guerdon.errors import RecipeError, check_shapes


class RunningScale(nn.Module):
    """Rewards against the mean of their group, over a running standard deviation: A = (r - mean_g r) / (std + eps).

    The moments take a batch in with weight w: mean += w (m - mean), var = (1 - w) var + w v + w (1 - w) (m - mean)^2,
    where m and v are the batch's mean and variance (without Bessel's correction). w = 1 - momentum forgets
    exponentially; w = n / (all samples so far) is Welford's rule and forgets nothing. The first batch has w = 1.

    Args:
        momentum: weight of the past, in [0, 1); None keeps the moments of all samples ever seen.
        eps: added to the std, in the unit of the rewards.

    Raises:
        RecipeError: momentum is outside [0, 1).

    Edge cases:
        Until the first `observe` the std of the batch at hand is used. NaN rewards (not scored) are left out and get 0;
        constant groups and G = 1 (with a warning) get exactly 0.

    Example:
        >>> stage = RunningScale(eps=0.0)
        >>> stage.observe(torch.tensor([[0.0, 4.0]]))
        >>> stage(torch.tensor([[0.0, 1.0]]))
        tensor([[-0.2500,  0.2500]])

    Source:
        Welford 1962, Note on a Method for Calculating Corrected Sums of Squares; reward scaling by running moments is
        common practice.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, *, momentum: float | None = 0.99, eps: float = 1e-4) -> None:
        super().__init__()
        if momentum is not None and not 0.0 <= momentum < 1.0:
            raise RecipeError(f"advantages.running_scale: momentum must be in [0, 1) or None; got {momentum}.")
        self.momentum = momentum
        self.eps = eps
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        """Scale by the moments of what was observed so far; changes no state.

        Args:
            rewards: [P, G], NaN = not scored.

        Returns:
            Advantages [P, G], without gradient.

        Raises:
            ShapeError: rewards is not [P, G].
            ScoreError: a reward is infinite.
        """
        check_shapes("advantages.running_scale", rewards=(rewards, "P G"))
        check_finite("advantages.running_scale", "rewards", rewards)
        warn_if_alone("advantages.running_scale", rewards.shape[1])
        rewards = rewards.detach()
        variance = self.variance.to(rewards) if self.count > 0 else _moments(rewards)[1]
        return divide(centre(rewards)[0], variance.sqrt() + self.eps)

    @torch.no_grad()
    def observe(self, rewards: Float[Tensor, "P G"]) -> None:
        """Take the rewards of a finished step into the moments.

        Args:
            rewards: [P, G], NaN = not scored.
        """
        check_shapes("advantages.running_scale", rewards=(rewards, "P G"))
        mean, variance, n = _moments(rewards.detach())
        if n == 0:
            return
        if self.count == 0:
            weight = 1.0
        elif self.momentum is None:
            weight = n / (int(self.count) + n)
        else:
            weight = 1.0 - self.momentum
        shift = mean.to(self.mean) - self.mean
        self.variance += weight * (variance.to(self.mean) - self.variance) + weight * (1.0 - weight) * shift.square()
        self.mean += weight * shift
        self.count += n


running_scale = RunningScale


def _moments(rewards: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean, variance (without Bessel's correction) and number of the scored rewards."""
    centred, count = centre(rewards.flatten())
    n = int(count)
    return rewards.nansum() / max(n, 1), centred.square().sum() / max(n, 1), n
