"""DeepSpeed, whose engines do backward pass, clipping and step themselves: what a loop does otherwise with one.

Checkpoints have the same form as without: whole tensors for each weight, so that a run can go on with or without DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from guerdon.errors import CheckpointError, NumericsError, RecipeError


def used(accelerator: Accelerator) -> bool:
    """Whether accelerate was launched with a DeepSpeed configuration."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check(accelerator: Accelerator) -> None:
    """Refuse what the loops cannot use, before a model is loaded.

    Raises:
        RecipeError: a stage of ZeRO other than 1 and 2.
    """
    stage = _plugin(accelerator).zero_stage if used(accelerator) else 1
    if stage not in (1, 2):
        raise RecipeError(
            f"DeepSpeed: zero_stage is {stage}; it must be 1 or 2. Stage 0 is plain data parallelism, for which no DeepSpeed is "
            "needed. Stage 3 divides single weights, and log-probabilities read the output embedding whole: use FSDP."
        )


def settle(accelerator: Accelerator, clip_norm: float | None) -> None:
    """Fill in what accelerate reads from data loaders, which there are none of, and what the recipe says.

    Batch sizes have no meaning to the engine here: the loop divides by its own counts and says itself which micro-batch is
    the last one.

    Raises:
        RecipeError: a stage of ZeRO other than 1 and 2.
    """
    check(accelerator)
    config = _plugin(accelerator).deepspeed_config
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": accelerator.num_processes,
        "gradient_clipping": clip_norm or 0.0,
    }


def backward(engine: Any, loss: Tensor, last: bool) -> None:
    """Add a micro-batch's gradient; with the last one the processes exchange theirs."""
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    engine.backward(loss, scale_wrt_gas=False)
    if not last:
        engine.step()  # counts the micro-batch, moves nothing


def step(engine: Any) -> tuple[float, bool]:
    """Clip and move the weights; the gradient's norm before clipping, and whether they were moved.

    Raises:
        NumericsError: they were moved along a gradient that is not finite, which only fp16 looks at beforehand.
    """
    engine.step()
    norm, made = float(engine.get_global_grad_norm()), bool(engine.was_step_applied())
    if made and not math.isfinite(norm):
        raise NumericsError(
            f"gradient norm {norm:g}, and DeepSpeed has made the update: the weights are lost. Resume from the last checkpoint, "
            "with a lower learning rate."
        )
    return norm, made


def optimizer_state(optimizer: Any, trained: Sequence[nn.Parameter]) -> dict[str, Any]:
    """`torch.optim.Optimizer.state_dict()` of an optimiser whose state is divided; all processes take part."""
    from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

    inner, entries = _inner(optimizer), {}
    held = next(iter(inner.state.values()), {})
    names = [name for name, value in held.items() if isinstance(value, Tensor) and value.dim() > 0]
    for index, parameter in enumerate(trained):
        if held:
            entries[index] = {name: safe_get_full_optimizer_state(parameter, name) for name in names}
            entries[index] |= {name: torch.as_tensor(held[name]) for name in held if name not in names}
    groups = [{**group, "params": list(range(len(trained)))} for group in inner.param_groups]
    return {"state": entries, "param_groups": groups}


def load_optimizer_state(optimizer: Any, trained: Sequence[nn.Parameter], found: dict[str, Any]) -> None:
    """Put back what `optimizer_state`, or an optimiser in one piece, has told.

    Raises:
        CheckpointError: it is of other weights.
    """
    from deepspeed.utils import safe_set_full_optimizer_state  # pyright: ignore[reportMissingImports]

    inner, entries = _inner(optimizer), found["state"]
    if entries and len(entries) != len(trained):
        raise CheckpointError(f"the checkpoint has the optimiser's state for {len(entries)} weights of {len(trained)}.")
    for group in inner.param_groups:
        group |= {name: value for name, value in found["param_groups"][0].items() if name != "params"}
    if not entries:
        return
    first = entries[0]
    names = [name for name, value in first.items() if value.dim() > 0]
    for part in _parts(inner.param_groups):
        inner.state[part] = {name: torch.zeros_like(part) for name in names}
        inner.state[part] |= {name: first[name].clone() for name in first if name not in names}
    # it joins weights and their state after its first step; what is put back comes before that
    _zero(optimizer)._lazy_init_hp_params_optimizer_state()
    for index, parameter in enumerate(trained):
        for name in names:
            safe_set_full_optimizer_state(parameter, entries[index][name].to(parameter.device), name)


def _plugin(accelerator: Accelerator) -> Any:
    return accelerator.state.deepspeed_plugin


def _zero(optimizer: Any) -> Any:
    """ZeRO's optimiser under accelerate's wrapper."""
    return optimizer.optimizer


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimiser under the wrappers of accelerate and ZeRO."""
    while not isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD):
        optimizer = optimizer.optimizer
    return optimizer


def _parts(groups: Iterable[dict[str, Any]]) -> Iterable[Tensor]:
    return (part for group in groups for part in group["params"])
