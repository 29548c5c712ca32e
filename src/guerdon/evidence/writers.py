"""Small autoregressive policies, one a unit and all in one tensor, so that a claim of many arms and seeds takes seconds.

A policy has one table a prompt: logits by place plus logits by the token before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Writers:
    """U policies for P prompts, which write texts of T tokens out of V.

    Args:
        seeds: of each unit's draws.
        prompts: P.
        length: T, the longest text.
        tokens: V.
        end: the token that ends a text; None = all have T tokens.
    """

    def __init__(self, seeds: Sequence[int], *, prompts: int, length: int, tokens: int, end: int | None = None) -> None:
        self.draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.prompts, self.length, self.tokens, self.end = prompts, length, tokens, end
        self.tables = torch.zeros(len(seeds), prompts, length + tokens + 1, tokens)
        self.first, self.second = torch.zeros_like(self.tables), torch.zeros_like(self.tables)
        self.updates = 0

    def write(self, group: int) -> Tensor:
        """Samples [U, P, G, T]."""
        noise = torch.stack(
            [torch.rand(self.prompts, group, self.length, self.tokens, generator=draw) for draw in self.draws]
        )
        noise = -(-noise.clamp(min=1e-12).log()).log()
        after = self.tables[:, :, self.length :]
        last, out = torch.full(noise.shape[:3], self.tokens), []
        for t in range(self.length):
            logits = self.tables[:, :, t].unsqueeze(2) + _rows(after, last)
            last = (logits + noise[..., t, :]).argmax(-1)
            out.append(last)
        return torch.stack(out, -1)

    def live(self, texts: Tensor) -> Tensor:
        """[U, P, G, T], False after the end of a text."""
        if self.end is None:
            return torch.ones_like(texts, dtype=torch.bool)
        ends = texts == self.end
        return ends.cumsum(-1) - ends.long() == 0

    def logp(self, texts: Tensor, tables: Tensor | None = None) -> Tensor:
        """Log-probability [U, P, G, T] of each token, under other tables where these are given."""
        tables = self.tables if tables is None else tables
        before = torch.cat([torch.full_like(texts[..., :1], self.tokens), texts[..., :-1]], -1)
        after = _rows(tables[:, :, self.length :], before.flatten(2)).view(*texts.shape, self.tokens)
        logits = tables[:, :, : self.length].unsqueeze(2) + after
        return logits.log_softmax(-1).gather(-1, texts.unsqueeze(-1)).squeeze(-1)

    def gradients(
        self, texts: Tensor, advantages: Sequence[Tensor], units: Sequence[int] | None = None
    ) -> list[Tensor]:
        """For each [U, P, G] or [U, P, G, T] of advantages the gradient of a policy gradient per token, without a clip.

        `units` says whose texts and advantages these are; None = everybody's.
        """
        leaf = (self.tables if units is None else self.tables[list(units)]).detach().requires_grad_()
        live = self.live(texts)
        each = self.logp(texts, leaf) * live
        of_unit = live.sum((1, 2, 3))
        by_step = (own if own.ndim == 4 else own.unsqueeze(-1) for own in advantages)
        losses = [-((own * each).sum((1, 2, 3)) / of_unit).sum() for own in by_step]
        return [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses]

    def step(self, gradient: Tensor, rates: Tensor, adam: Tensor | None = None) -> None:
        """Adam, or plain descent for the units of which `adam` [U] is False, at rates [U]."""
        self.updates += 1
        self.first.lerp_(gradient, 0.1)
        self.second.lerp_(gradient.square(), 0.001)
        scaled = self.first / (1 - 0.9**self.updates) / ((self.second / (1 - 0.999**self.updates)).sqrt() + 1e-8)
        self.tables -= _wide(rates) * (scaled if adam is None else torch.where(_wide(adam), scaled, gradient))


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _rows(tables: Tensor, index: Tensor) -> Tensor:
    """The row of each token: tables [U, P, V + 1, V] at index [U, P, N] give [U, P, N, V]."""
    return tables.gather(2, index.unsqueeze(-1).expand(*index.shape, tables.shape[-1]))
