"""Run by two processes: trains a sharded flow policy (FSDP2), and once more with a stop in the middle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from guerdon.advantages import grpo
from guerdon.errors import RecipeError
from guerdon.objectives import policy_gradient
from guerdon.signal import Signal
from guerdon.training import Online, Optim, checkpoint
from tests.diffusion.test_policy import CAPTIONS, policy
from tests.invariants.sharded import Sharding


class ShardingImages(Sharding):
    """The same for a U-Net: its blocks are sharded one by one."""

    def prepare(self, policy, optimizer):
        for block in [*policy.model.down_blocks, policy.model.mid_block, *policy.model.up_blocks]:
            fully_shard(block)
        fully_shard(policy)
        optimizer.param_groups[0]["params"] = list(policy.parameters())
        return policy, optimizer


def bright(samples):
    return [[image.mean().item() for image in group] for group in samples]


def make(accelerator: Accelerator | None, checkpoint: Path | None = None, ema: float | None = None) -> Online:
    made = policy(dtype="float64", steps=3)
    made.keep_reference()
    if checkpoint is not None:
        made.load_weights(checkpoint)

    def objective(logp, logp_old, advantages, mask, kl, *, beta=0.05):
        return policy_gradient(logp, logp_old, advantages, mask, kl=kl, beta=beta, kl_estimator="exact")

    signal = Signal(rewards={"bright": bright}, advantage=grpo)
    rows = [{"prompt": caption} for caption in CAPTIONS] * 2
    settings = {"prompts_per_step": 4, "group_size": 3, "passes": 2, "micro_batch": 1, "steps": 3}
    return Online(made, rows, signal, objective, optim=Optim(lr=3e-3, ema=ema), accelerator=accelerator, **settings)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    accelerator = ShardingImages(cpu=True)
    assert accelerator.num_processes == 2
    with pytest.raises(RecipeError, match=r"optim.ema: the weights are sharded over processes"):
        make(accelerator, ema=0.5)
    loop = make(accelerator)
    assert all(isinstance(p, DTensor) for p in loop.policy.parameters())
    loop.step()
    state, weights = loop.state(), checkpoint.weights(loop.policy)
    assert weights is not None
    half = folder / "half"
    if accelerator.is_main_process:
        loop.policy.save(half, state=weights)
    accelerator.wait_for_everyone()
    resumed = make(accelerator, half)
    resumed.load_state(state)
    for one in (loop, resumed):
        for _ in range(2):
            one.step()
    ours, theirs = checkpoint.weights(loop.policy), checkpoint.weights(resumed.policy)
    if accelerator.is_main_process:
        torch.save({"straight": ours, "resumed": theirs}, folder / "sharded.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
