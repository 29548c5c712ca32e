"""The divergences themselves, f of a ratio of probabilities, and a minimiser: what losses made of them are compared with."""

from __future__ import annotations

import torch

OTHERS = ["pearson", "hellinger", "reverse_kl", "jensen_shannon"]
F = {
    "pearson": lambda t: (t - 1) ** 2,
    "hellinger": lambda t: (t.sqrt() - 1) ** 2,
    "reverse_kl": lambda t: t * t.log(),
    "jensen_shannon": lambda t: -(t + 1) * ((1 + t) / 2).log() + t * t.log(),
}


def minimise(loss, start):
    point = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [point], max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        search.zero_grad()
        value = loss(point)
        value.backward()
        return value

    search.step(closure)
    return point.detach(), loss(point).item()
