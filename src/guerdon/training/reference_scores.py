"""Log-probabilities under the reference, computed once before training and kept on disk, so that no second model is held."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from guerdon import cache
from guerdon.errors import DataError
from guerdon.rollout import Rollout

Pack = Callable[[Any, Sequence[Mapping[str, Any]]], Rollout]


class ReferenceScores:
    """What a policy said about every sample of some rows, by the row's position.

    The file's name is a hash of the weights, the tokens of all samples and the temperature; its content is checked
    against a hash of its own whenever it is read.

    Args:
        policy: as it is now it is the reference; with adapters, the model without them.
        rows: every row that will be asked for.
        pack: (policy, rows) -> their rollout, unscored; the same samples in the same order as in training.
        batch: rows scored at a time and process.
        accelerator: the processes that share the work.

    """

    def __init__(
        self,
        policy: Any,
        rows: Sequence[Mapping[str, Any]],
        pack: Pack,
        *,
        batch: int = 32,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.policy, self.rows, self.pack, self.batch = policy, rows, pack, batch
        recipe = {
            "weights": _weights(policy),
            "samples": self._samples(),
            "temperature": getattr(policy, "temperature", 1.0),
        }
        self.path = cache.weights_path("reference", "logp", recipe)
        shared: list[Tensor] | None = None
        if accelerator is not None and accelerator.num_processes > 1:
            missing = gather_object([not self.path.exists()])
            if any(missing):
                rank, count = accelerator.process_index, accelerator.num_processes
                found = gather_object([(i, row) for i, row in self._score(range(rank, len(rows), count))])
                shared = [row for _, row in sorted(found, key=lambda pair: pair[0])]
        what = f"scoring {len(rows):,} rows under the reference" if len(rows) > 2000 and shared is None else ""
        found = cache.weights("reference", "logp", recipe, lambda: self._table(shared), what)
        self.values, self.lengths = found["logp"], found["lengths"]
        self.starts = [0, *self.lengths.sum(1).cumsum(0).tolist()]

    def of(self, positions: Sequence[int], like: Rollout) -> Tensor:
        """Log-probabilities [P, G, T] of the rows at these positions, 0 where a step is not live.

        Args:
            positions: of the rows.
            like: the same rows, packed; where a row has several prompts they stand together.

        Raises:
            DataError: the samples have other lengths than when they were scored.
        """
        parts = []
        for position, mask in zip(positions, _by_row(like.mask.cpu(), len(positions)), strict=True):
            if not torch.equal(self.lengths[position], mask.sum(-1).to(self.lengths.dtype)):
                raise DataError(
                    f"reference scores: row {position} is not the one that was scored. Remove {self.path} and start again."
                )
            parts.append(self.values[self.starts[position] : self.starts[position + 1]])
        found = torch.cat(parts).to(like.mask.device)
        return found.new_zeros(like.mask.shape).masked_scatter(like.mask, found)

    def _samples(self) -> str:
        """A hash of the tokens of every sample."""
        digest = hashlib.sha256()
        for start in range(0, len(self.rows), 512):
            packed = self.pack(self.policy, self.rows[start : start + 512])
            for name, value in sorted(packed.steps.items()):
                # the padding of a batch is no part of it
                kept = {"prompt_ids": packed.steps.get("prompt_mask"), "completion_ids": packed.mask}.get(name)
                if kept is not None:
                    digest.update(value[kept].cpu().to(torch.int64).numpy().tobytes())
                    digest.update(kept.sum(-1).cpu().to(torch.int64).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def _score(self, positions: range) -> list[tuple[int, Tensor]]:
        """(position, log-probabilities of its live steps, end to end)."""
        found = []
        for start in range(0, len(positions), self.batch):
            part = positions[start : start + self.batch]
            packed = self.pack(self.policy, [self.rows[i] for i in part])
            logp, masks = (_by_row(x, len(part)) for x in (self.policy.start_log_prob(packed), packed.mask))
            found += [(i, row[mask].cpu()) for i, row, mask in zip(part, logp, masks, strict=True)]
        return found

    def _table(self, scored: list[Tensor] | None) -> dict[str, Tensor]:
        if scored is None:
            scored = [row for _, row in self._score(range(len(self.rows)))]
        lengths = []
        for start in range(0, len(self.rows), 512):
            rows = self.rows[start : start + 512]
            lengths.append(_by_row(self.pack(self.policy, rows).mask, len(rows)).sum(-1).cpu())
        return {"logp": torch.cat(scored), "lengths": torch.cat(lengths).to(torch.int32)}


def _by_row(steps: Tensor, rows: int) -> Tensor:
    """[P, G, T] as [rows, samples of a row, T]."""
    return steps.unflatten(0, (rows, -1)).flatten(1, 2)


def _weights(policy: Any) -> str:
    """A hash of the reference's weights: those that adapters do not own."""
    digest = hashlib.sha256()
    for name, value in sorted(policy.state_dict().items()):
        if "lora_" not in name and not name.startswith("critic."):
            digest.update(cache.digest({name: value.detach().cpu().contiguous()}).encode())
    return digest.hexdigest()
