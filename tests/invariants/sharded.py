"""Run by two processes: trains a sharded policy (FSDP2) and prints its weights' distance from a policy in one piece."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from guerdon.advantages import grpo
from guerdon.language.policy import LanguagePolicy
from guerdon.objectives import policy_gradient
from guerdon.signal import Signal
from guerdon.training import Online, Optim, checkpoint


class Sharding(Accelerator):
    """Does on the CPU what accelerate does with `fsdp_version: 2` on accelerators, where alone it offers FSDP."""

    def prepare(self, policy, optimizer):
        for layer in policy.backbone.causal.model.layers:
            fully_shard(layer)
        fully_shard(policy)
        optimizer.param_groups[0]["params"] = list(
            policy.parameters()
        )  # the shards have taken the place of the weights
        return policy, optimizer

    def no_sync(self, module):
        from contextlib import nullcontext

        return nullcontext()

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        return checkpoint.whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


def letters(samples):
    return [[float(len(set(sample))) for sample in group] for group in samples]


def make(folder: Path, accelerator: Accelerator | None, checkpoint: Path | None = None) -> Online:
    policy = LanguagePolicy.load(str(folder), max_new_tokens=6, dtype="float64")
    policy.keep_reference()
    if checkpoint is not None:
        policy.load_weights(checkpoint)
    rows = [{"prompt": f"{i}{(3 * i) % 10}="} for i in range(8)]
    signal = Signal(rewards={"letters": letters}, advantage=grpo)

    def objective(logp, logp_old, advantages, mask, logp_ref):
        return policy_gradient(logp, logp_old, advantages, mask, logp_ref, beta=0.05)

    settings = {"prompts_per_step": 4, "group_size": 4, "passes": 2, "micro_batch": 1, "steps": 4}
    return Online(policy, rows, signal, objective, optim=Optim(lr=3e-3), accelerator=accelerator, **settings)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    accelerator = Sharding(cpu=True)
    assert accelerator.num_processes == 2
    loop = make(folder, accelerator)
    assert all(isinstance(p, DTensor) for p in loop.policy.parameters())
    for _ in range(2):
        loop.step()
    # half of the run: save, load into a new policy, go on
    state, weights = loop.state(), checkpoint.weights(loop.policy)
    assert weights is not None
    half = folder.parent / "half"
    if accelerator.is_main_process:
        loop.policy.save(half, state=weights)
    accelerator.wait_for_everyone()
    resumed = make(folder, accelerator, half)
    resumed.load_state(state)
    for one in (loop, resumed):
        for _ in range(2):
            one.step()
    ours, theirs = checkpoint.weights(loop.policy), checkpoint.weights(resumed.policy)
    if accelerator.is_main_process:
        torch.save({"straight": ours, "resumed": theirs}, folder.parent / "sharded.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
