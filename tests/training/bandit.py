"""A policy that is neither a language nor an image model: a table of logits. It holds the loops to knowing no domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from guerdon.objectives.loss import Imitation, Loss
from guerdon.rollout import Rollout


class Output(NamedTuple):
    logp: Tensor
    entropy: Tensor
    values: Tensor | None
    kl: Tensor | None = None


class BanditPolicy(nn.Module):
    """For prompt i, up to `length` independent draws from softmax(table[i]); arm 0 ends the sample."""

    fields = ("truncated",)

    def __init__(self, prompts: int = 6, arms: int = 4, length: int = 3, critic: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(prompts, arms, generator=generator, dtype=torch.float64) * 0.1)
        self.value = nn.Parameter(torch.zeros(prompts, dtype=torch.float64)) if critic else None
        self.has_critic = critic
        self.max_steps = length
        self.reference: Tensor | None = None

    def log_prob(self, rollout: Rollout, *, module: Any = None) -> Output:
        return (module or self)(rollout.steps, rollout.mask)

    def reference_log_prob(self, rollout: Rollout, *, module: Any = None) -> Tensor:
        return (module or self)(rollout.steps, rollout.mask, kind="reference")

    def forward(self, steps: dict[str, Tensor], mask: Tensor, kind: str = "log_prob") -> Any:
        table = self.table if kind == "log_prob" else self.reference
        assert table is not None
        logp_all = table.log_softmax(-1)[steps["state"]]  # [P, A]
        arms = steps["arms"]
        logp = logp_all[:, None, None, :].expand(*arms.shape, -1).gather(-1, arms[..., None]).squeeze(-1)
        logp = torch.where(mask, logp, 0.0)
        if kind == "reference":
            return logp.detach()
        entropy = -(logp_all.exp() * logp_all).sum(-1)[:, None, None].expand_as(logp)
        values = None if self.value is None else self.value[steps["state"]][:, None, None].expand_as(logp)
        return Output(logp, entropy, values)

    @torch.no_grad()
    def sample(
        self, prompts: list[int], group_size: int, seeds: list[int], *, greedy: bool = False, module: Any = None
    ) -> Rollout:
        states = torch.tensor(prompts)
        draws = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            probabilities = self.table[prompt].softmax(-1)
            if greedy:
                draws.append(probabilities.argmax().expand(group_size, self.max_steps))
            else:
                generator = torch.Generator().manual_seed(seed)
                flat = torch.multinomial(probabilities, group_size * self.max_steps, True, generator=generator)
                draws.append(flat.view(group_size, self.max_steps))
        arms = torch.stack(draws)
        ended = (arms == 0).cumsum(-1)
        mask = (ended - (arms == 0).long()) == 0
        steps = {"state": states, "arms": arms}
        found = self(steps, mask)
        samples = [
            [row[live].tolist() for row, live in zip(*pair, strict=True)] for pair in zip(arms, mask, strict=True)
        ]
        extras = {"truncated": ~(ended > 0).any(-1)}
        return Rollout(list(prompts), samples, mask, found.logp, steps, values=found.values, extras=extras)

    def reference_sample(self, prompts: list[int], group_size: int, seeds: list[int], *, module: Any = None) -> Rollout:
        assert self.reference is not None
        own = self.table.data
        self.table.data = self.reference
        found = self.sample(prompts, group_size, seeds, module=module)
        self.table.data = own
        return found

    def keep_reference(self) -> None:
        self.reference = self.table.detach().clone()

    def imitation_loss(self, given: Rollout, *, module: Any = None) -> Loss:
        return Loss(-self.log_prob(given, module=module).logp.sum(), given.mask.sum().double(), {})

    def imitation(self, rollout: Rollout, seeds: list[int], *, drift: bool = False, module: Any = None) -> Imitation:
        logp = self.log_prob(rollout, module=module).logp
        if not drift:
            return Imitation(-logp.sum(-1), None)
        return Imitation(-logp.sum(-1), (logp - self.reference_log_prob(rollout, module=module)).square().mean(-1))

    def demonstrations(self, rows: list[dict[str, Any]], seeds: list[int] | None = None) -> Rollout:
        arms = torch.tensor([[row["completion"]] for row in rows])
        prompts = [row["prompt"] for row in rows]
        steps = {"state": torch.tensor(prompts), "arms": arms}
        return Rollout(
            prompts, [[row["completion"]] for row in rows], torch.ones_like(arms).bool(), torch.zeros(arms.shape), steps
        )

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        folder.mkdir(parents=True)
        whole = self.state_dict() if state is None else state
        save_file({name: value.detach().clone() for name, value in whole.items()}, folder / "table.safetensors")

    def load_weights(self, folder: Path) -> None:
        self.load_state_dict(load_file(folder / "table.safetensors"))


def rows(count: int = 6) -> list[dict[str, Any]]:
    return [{"prompt": i, "best": 1 + i % 3} for i in range(count)]


def best_arm(samples: list[list[list[int]]], best: list[int]) -> list[list[float]]:
    """The share of draws that hit the prompt's best arm."""
    return [[sum(a == b for a in draw) / len(draw) for draw in group] for group, b in zip(samples, best, strict=True)]
