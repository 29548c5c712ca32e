"""An exponential moving average of the weights, which is smoother than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from guerdon.errors import RecipeError
from guerdon.training.checkpoint import sharded


class WeightAverage(nn.Module):
    """The average a <- d a + (1 - d) w of the trained weights w, taken after every update.

    d = min(decay, (1 + n) / (10 + n)) after n updates, so that the beginning is forgotten fast. The average is state of
    the loop: `state_dict` holds all of it, and a resumed run goes on with it.

    Args:
        parameters: the trained weights; they are read, and written by `applied` and `copy_to_weights` only.
        decay: in (0, 1).

    Raises:
        RecipeError: decay is out of range, or the weights are sharded over processes.

    Example:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> average = WeightAverage([weight], decay=0.9)
        >>> weight.data.fill_(1.0)
        tensor([1.])
        >>> average.update()
        >>> with average.applied():
        ...     print(round(weight.item(), 4))
        0.9
        >>> weight.item()
        1.0

    Source:
        Polyak and Juditsky 1992, Acceleration of Stochastic Approximation by Averaging; the rising decay is common
        practice for diffusion models.
    """

    updates: Tensor

    def __init__(self, parameters: Iterable[nn.Parameter], *, decay: float) -> None:
        super().__init__()
        if not 0.0 < decay < 1.0:
            raise RecipeError(f"optim.ema: must be above 0 and below 1; got {decay}.")
        # in a tuple, so that the weights are not taken for state of the average
        self._weights: tuple[list[Tensor]] = (list(parameters),)
        if any(sharded(weight) for weight in self._weights[0]):
            raise RecipeError("optim.ema: the weights are sharded over processes, which an average cannot follow yet.")
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        for i, weight in enumerate(self._weights[0]):
            self.register_buffer(f"weight_{i}", weight.detach().clone())

    def _averages(self) -> list[Tensor]:
        return [self.get_buffer(f"weight_{i}") for i in range(len(self._weights[0]))]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in as they are now."""
        n = int(self.updates)
        share = 1.0 - min(self.decay, (1 + n) / (10 + n))
        for average, weight in zip(self._averages(), self._weights[0], strict=True):
            average.lerp_(weight, share)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the policy has the averaged weights."""
        live = [weight.detach().clone() for weight in self._weights[0]]
        self.copy_to_weights()
        try:
            yield
        finally:
            self._write(live)

    def copy_to_weights(self) -> None:
        """Give the policy the averaged weights for good."""
        self._write(self._averages())

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights[0], values, strict=True):
            weight.copy_(value)
