"""Run by two processes: trains a policy in a DeepSpeed engine and keeps its weights, of a straight and of a resumed run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from guerdon.advantages import grpo
from guerdon.language.policy import LanguagePolicy
from guerdon.objectives import policy_gradient
from guerdon.signal import Signal
from guerdon.training import Online, Optim, checkpoint
from tests.invariants.sharded import letters


def accelerated(stage: int) -> Accelerator:
    """An accelerator of two processes on the CPU, where accelerate itself offers DeepSpeed for one only."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    os.environ["ACCELERATE_USE_CPU"] = "false"
    AcceleratorState._reset_state(reset_partial_state=False)
    state = PartialState(cpu=True)
    state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))


def make(folder: Path, accelerator: Accelerator | None, weights: Path | None = None) -> Online:
    policy = LanguagePolicy.load(str(folder), max_new_tokens=6, dtype="float32")
    policy.keep_reference()
    if weights is not None:
        policy.load_weights(weights)
    rows = [{"prompt": f"{i}{(3 * i) % 10}="} for i in range(8)]
    signal = Signal(rewards={"letters": letters}, advantage=grpo)

    def objective(logp, logp_old, advantages, mask, logp_ref):
        return policy_gradient(logp, logp_old, advantages, mask, logp_ref, beta=0.05)

    settings = {"prompts_per_step": 4, "group_size": 4, "passes": 2, "micro_batch": 1, "steps": 4}
    # a large eps, so that Adam does not magnify the rounding of gradients near zero
    optim = Optim(lr=3e-3, eps=1e-3, schedule="linear", clip_norm=0.5)
    return Online(policy, rows, signal, objective, optim=optim, accelerator=accelerator, **settings)


def main(folder: Path, stage: int) -> None:
    torch.manual_seed(0)
    accelerator = accelerated(stage)
    assert accelerator.num_processes == 2
    loop = make(folder, accelerator)
    assert type(loop.module).__name__ == "DeepSpeedEngine"
    assert loop.module.zero_optimization_stage() == stage
    norms = [loop.step().metrics["grad_norm"] for _ in range(2)]
    # half of the run: save, load into a new policy, go on
    state, half = loop.state(), folder.parent / f"half-{stage}"
    found = checkpoint.weights(loop.policy)
    if accelerator.is_main_process:
        loop.policy.save(half, state=found)
    accelerator.wait_for_everyone()
    resumed = make(folder, accelerator, half)
    resumed.load_state(state)
    for one in (loop, resumed):
        for _ in range(2):
            found_norm = one.step().metrics["grad_norm"]
            norms += [found_norm] if one is loop else []
    ends = [checkpoint.weights(one.policy) or one.policy.state_dict() for one in (loop, resumed)]
    if accelerator.is_main_process:
        record = {"straight": ends[0], "resumed": ends[1], "norms": norms, "state": state.tensors}
        torch.save(record, folder.parent / f"zero-{stage}.pt")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
