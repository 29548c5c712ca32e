"""The optimiser of a loop: AdamW or SGD with a schedule, from plain settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Optim:
    """Settings of an optimiser.

    Attributes:
        name: `adamw` or `sgd`.
        lr: peak learning rate.
        lr_scale: multiplies it. Supervised training that preferences follow is better off with a fourth to a twentieth of
            the rate that is usual for it (see methods/implicit-reward).
        betas: AdamW's two decay rates; the first is SGD's momentum.
        eps: AdamW's eps.
        weight_decay: decoupled, on every trained parameter.
        schedule: what follows the warm-up: `constant`, or down over the run: `linear`, `cosine`.
        final_lr: where `linear` and `cosine` end, as a share of lr.
        warmup_steps: updates over which the rate rises linearly from 0.
        clip_norm: largest gradient norm; None = not clipped.
        ema: decay of an exponential moving average of the weights, which is then evaluated and saved as the result;
            None = none. See `guerdon.training.average.WeightAverage`.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-6
    lr_scale: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_lr: float = 0.0
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    ema: float | None = None

    def build(self, parameters: Iterable[nn.Parameter], updates: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Make the optimiser and its schedule.

        Args:
            parameters: those to train; the ones without `requires_grad` are left out.
            updates: optimiser updates of the whole run (not of one process), the schedule's length.
        """
        trained = [p for p in parameters if p.requires_grad]
        rate = self.lr * self.lr_scale
        if self.name == "adamw":
            # fused: one kernel an update instead of a dozen a parameter, on CPU as on GPU
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                trained, lr=rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
            )
        else:
            optimizer = torch.optim.SGD(trained, lr=rate, momentum=self.betas[0], weight_decay=self.weight_decay)

        def factor(update: int) -> float:
            if update < self.warmup_steps:
                return (update + 1) / self.warmup_steps
            progress = min((update - self.warmup_steps) / max(updates - self.warmup_steps, 1), 1.0)
            if self.schedule == "constant":
                return 1.0
            left = 1.0 - progress if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
            return self.final_lr + (1.0 - self.final_lr) * left

        return optimizer, LambdaLR(optimizer, factor)
