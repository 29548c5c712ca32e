"""Generalised advantage estimation whose price of the divergence from the reference is steered towards a target."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from guerdon.advantages.gae import GaeOutput, gae
from guerdon.errors import RecipeError
from guerdon.objectives.kl import steered


class AdaptiveGae(nn.Module):
    """As `gae`, with a beta that rises while samples diverge more than wanted and falls while they diverge less.

    After each step beta is multiplied by 1 + e N / horizon, with e = clip(KL / target - 1, -0.2, 0.2), N samples, and KL the
    divergence summed over a sample's live steps, on average. Saved with a run.

    Args:
        gamma: discount per step.
        lam: weight of the future, see `gae`.
        beta: what the run starts with.
        target: divergence of a whole sample, in nats.
        horizon: samples over which beta changes by at most about a fifth.
        whiten: give the advantages of all live, scored steps mean 0 and std 1.
        eps: added to that std.

    Raises:
        RecipeError: beta, target or horizon is not above 0.

    Example:
        >>> stage = AdaptiveGae(beta=0.1, target=1.0, horizon=10.0)
        >>> stage.observe(torch.ones(1, 2, 3).bool(), torch.full((1, 2, 3), 5.0))
        >>> round(stage.beta.item(), 3)
        0.104

    Source:
        Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593, section 2.2; with the
        settings of Text2Grad, 2025, arXiv 2505.22338.
    """

    beta: Tensor
    kl: Tensor

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        lam: float = 0.95,
        beta: float = 0.2,
        target: float = 6.0,
        horizon: float = 10_000.0,
        whiten: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        for name, value in (("beta", beta), ("target", target), ("horizon", horizon)):
            if not value > 0:
                raise RecipeError(f"advantages.adaptive_gae.{name}: must be above 0; got {value}.")
        self.gamma, self.lam, self.target, self.horizon = gamma, lam, target, horizon
        self.whiten, self.eps = whiten, eps
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("kl", torch.tensor(torch.nan))

    def forward(
        self,
        rewards: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
        values: Float[Tensor, "P G T"],
        mask: Bool[Tensor, "P G T"],
        kl_old: Float[Tensor, "P G T"],
    ) -> GaeOutput:
        """Advantages and returns at the present beta.

        Args:
            rewards: [P, G] or [P, G, T].
            values: [P, G, T], the critic's.
            mask: [P, G, T], True = a live step.
            kl_old: [P, G, T], exact divergence of the sampling policy from the reference at each step, in nats.

        Returns:
            `advantages` and `returns`, [P, G, T]; see `gae`.

        Raises:
            ShapeError: an argument has another shape.
            ScoreError: a reward is infinite.
        """
        return gae(
            rewards,
            values,
            mask,
            kl_old=kl_old,
            gamma=self.gamma,
            lam=self.lam,
            beta=self.beta.item(),
            kl_estimator="exact",
            whiten=self.whiten,
            eps=self.eps,
        )

    @torch.no_grad()
    def observe(self, mask: Bool[Tensor, "P G T"], kl_old: Float[Tensor, "P G T"]) -> None:
        """Move beta by the divergence of a step's samples.

        Args:
            mask: [P, G, T], True = a live step.
            kl_old: [P, G, T], as in `forward`.
        """
        of_samples = kl_old.where(mask, 0.0).sum(-1)
        self.kl.copy_(of_samples.mean())
        self.beta.copy_(steered(self.beta, self.kl, self.target, of_samples.numel() / self.horizon))

    def metrics(self) -> dict[str, float]:
        """Beta for the next step, and the divergence of a sample in this one."""
        return {"beta": self.beta.item(), "kl": self.kl.item()}


adaptive_gae = AdaptiveGae
