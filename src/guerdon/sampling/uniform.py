"""Every prompt once per epoch, in random order."""

from __future__ import annotations

import torch
from torch import Tensor

from guerdon.sampling.base import Sampler

# spreads (seed, epoch) over the generator's seeds, so that neighbouring seeds do not share epochs
_STRIDE = 0x9E3779B97F4A7C15


class Uniform(Sampler):
    """Draw without replacement: an epoch is a permutation of the data that only the seed and the epoch's number decide.

    Args:
        shuffle: permute; otherwise the data's own order.

    Edge cases:
        A draw may cross the end of an epoch, and may then hold a prompt twice. Endless data is drawn in order: 0, 1,
        2, ...

    Example:
        >>> sampler = Uniform()
        >>> sampler.prepare(size=3, seed=0)
        >>> sorted(sampler.draw(3)), sorted(sampler.draw(3))
        ([0, 1, 2], [0, 1, 2])

    Source:
        Standard practice in stochastic optimisation (random reshuffling).
    """

    epoch: Tensor
    position: Tensor

    def __init__(self, *, shuffle: bool = True) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self._order: tuple[tuple[int, int, int], list[int]] | None = None

    def draw(self, count: int) -> list[int]:
        """The positions of the next `count` prompts of the epoch, and of following epochs if need be."""
        position = int(self.position)
        if self.size is None:
            self.position += count
            return list(range(position, position + count))
        drawn: list[int] = []
        while len(drawn) < count:
            part = self._permutation(int(self.epoch), self.size)[position : position + count - len(drawn)]
            drawn += part
            position += len(part)
            if position >= self.size:
                position = 0
                self.epoch += 1
        self.position.fill_(position)
        return drawn

    def _permutation(self, epoch: int, size: int) -> list[int]:
        if not self.shuffle:
            return list(range(size))
        key = (self.seed, epoch, size)
        if self._order is None or self._order[0] != key:
            generator = torch.Generator().manual_seed((self.seed * _STRIDE + epoch) % 2**63)
            self._order = (key, torch.randperm(size, generator=generator).tolist())
        return self._order[1]


uniform = Uniform
