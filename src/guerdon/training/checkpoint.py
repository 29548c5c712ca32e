"""Checkpoints that survive a kill: written under another name, checked by hash, then renamed.

A checkpoint is a folder `step-N` with the policy in its hub's own format (`policy/`), every other tensor in
`training.safetensors` and every plain number in `state.json`, which also holds the size and SHA-256 of each file. Nothing
is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from guerdon.errors import CheckpointError


class LoopState(NamedTuple):
    """What a loop needs to go on, beside its policy: tensors by name, and plain numbers."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes; the module of such tensors is slow to import, so it is not, to ask."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded over processes, in one piece on each; all processes must ask for it."""
    return cast(Any, tensor).full_tensor() if sharded(tensor) else tensor


def weights(policy: nn.Module) -> dict[str, Tensor] | None:
    """The state of a sharded policy with whole tensors on the CPU; None for one that is not sharded."""
    if not any(sharded(parameter) for parameter in policy.parameters()):
        return None
    return {name: whole(value.detach()).cpu() for name, value in policy.state_dict().items()}


def collect(modules: Mapping[str, nn.Module], found: Mapping[str, Any], schedule: LambdaLR) -> LoopState:
    """Copy state to the CPU; where it is sharded, all processes take part.

    Args:
        modules: by name.
        found: the optimiser's `state_dict()`.
        schedule: of its learning rate.
    """
    tensors = {f"{prefix}.{k}": v for prefix, module in modules.items() for k, v in module.state_dict().items()}
    for index, entries in found["state"].items():
        tensors |= {f"optimizer.{index}.{name}": whole(torch.as_tensor(value)) for name, value in entries.items()}
    copies = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
    numbers = {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"}
    return LoopState(copies, {"schedule": numbers, "param_groups": found["param_groups"]})


def restore(
    state: LoopState,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    load: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Put back what `collect` gathered, shards included.

    Args:
        state: what it gathered.
        modules, optimizer, schedule: those it goes into.
        load: in place of the optimiser's own `load_state_dict`; gets whole tensors.

    Raises:
        CheckpointError: the state is of other stages or another optimiser than the ones given.
    """
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in state.tensors.items():
        prefix, _, rest = name.partition(".")
        grouped[prefix][rest] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = defaultdict(dict)
    try:
        for name, value in grouped["optimizer"].items():
            index, _, key = name.partition(".")
            entries[int(index)][key] = value if load else _like(value, parameters[int(index)])
        for prefix, module in modules.items():
            module.load_state_dict(grouped[prefix])
        (load or optimizer.load_state_dict)({"state": dict(entries), "param_groups": state.facts["param_groups"]})
        # the functions themselves are not saved, they follow from the recipe
        schedule.load_state_dict({**state.facts["schedule"], "lr_lambdas": [None] * len(schedule.lr_lambdas)})
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"the checkpoint does not fit this recipe: {error}") from error


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as the parameter it belongs to."""
    if not sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    like = cast(Any, parameter)
    return distribute_tensor(value.to(parameter.device), like.device_mesh, like.placements)


def write(run: Path, step: int, state: LoopState, save_policy: Callable[[Path], None], keep: int) -> Path:
    """Write `checkpoints/step-N` and delete the oldest beyond `keep`.

    Args:
        run: the run directory.
        step: N.
        state: from `collect`, with the loop's own facts added.
        save_policy: writes the policy into the folder it is given.
        keep: how many checkpoints to retain; 0 = all.

    Raises:
        CheckpointError: it could not be written (no space, no right); the checkpoints before it are untouched.
    """
    folder = run / "checkpoints"
    final, draft = folder / f"step-{step}", folder / f".step-{step}.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_policy(draft / "policy")
        _save_tensors({**state.tensors, **_generators()}, draft / "training.safetensors")
        files = {str(p.relative_to(draft)): _fingerprint(p) for p in sorted(draft.rglob("*")) if p.is_file()}
        record = {**state.facts, "step": step, "python_random": random.getstate(), "files": files}
        (draft / "state.json").write_text(json.dumps(record))
        for path in draft.rglob("*"):
            _sync(path)
        _sync(draft)
        if final.exists():
            shutil.rmtree(final)
        draft.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}. Earlier checkpoints are untouched. "
            f"Free some space or set run.directory elsewhere, then: guerdon resume {run}"
        ) from error
    if keep > 0:
        for old in list_steps(run)[:-keep]:
            shutil.rmtree(folder / f"step-{old}")
    return final


def list_steps(run: Path) -> list[int]:
    """The steps of the finished checkpoints, rising."""
    folder = run / "checkpoints"
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name)))


def read(run: Path, step: int | None = None) -> tuple[Path, LoopState]:
    """Read a checkpoint back, checking every file against its hash.

    Args:
        run: the run directory.
        step: which one; None = the newest.

    Returns:
        Its folder and its state. The generators of torch, numpy and Python are set to where they were.

    Raises:
        CheckpointError: there is none, or a file is missing or damaged.
    """
    steps = list_steps(run)
    if not steps or (step is not None and step not in steps):
        there = f" There are: {', '.join(f'step-{s}' for s in steps)}." if steps else ""
        raise CheckpointError(f"{run}: no checkpoint{'' if step is None else f' of step {step}'} to go on from.{there}")
    step = steps[-1] if step is None else step
    folder = run / "checkpoints" / f"step-{step}"
    earlier = [s for s in steps if s < step]
    advice = (
        f"Go on from an earlier one: guerdon resume {run} --from-step {earlier[-1]}"
        if earlier
        else ("There is no earlier one: start the run again.")
    )
    try:
        facts = json.loads((folder / "state.json").read_text())
        for name, wanted in facts.pop("files").items():
            if _fingerprint(folder / name) != wanted:
                raise CheckpointError(
                    f"checkpoint {folder}: {name} is damaged: its hash is not the one written. {advice}"
                )
        tensors = load_file(folder / "training.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}. {advice}") from error
    _set_generators(tensors, facts.pop("python_random"))
    return folder, LoopState({k: v for k, v in tensors.items() if not k.startswith("generator.")}, facts)


def _generators() -> dict[str, Tensor]:
    _, keys, position, *_ = np.random.get_state(legacy=True)
    state = {
        "generator.torch": torch.get_rng_state(),
        "generator.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "generator.numpy_position": torch.tensor(position),
    }
    if torch.cuda.is_available():
        state |= {f"generator.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _set_generators(tensors: Mapping[str, Tensor], python: Any) -> None:
    torch.set_rng_state(tensors["generator.torch"])
    keys = tensors["generator.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(tensors["generator.numpy_position"]), 0, 0.0))
    random.setstate((python[0], tuple(python[1]), python[2]))
    cuda = [tensors[k] for k in sorted(tensors) if k.startswith("generator.cuda.")]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as handle:
        return [path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()]


def _sync(path: Path) -> None:
    """Have the system put a file or folder on the disk, so that the rename cannot come before the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
