"""Reference answers: what the policy that training starts from answers to each prompt, scored once and kept.

A stage that names the field `ref_scores` reads the scores of these answers: [P, M] for a shaping, those of its own
component. A stage with a method `calibrate` gets those of a set of prompts once, before the first update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from guerdon.errors import DataError, RecipeError
from guerdon.rewards.scoring import score
from guerdon.signal import Signal
from guerdon.training.loop import mix_seed


class References(nn.Module):
    """Scores of M reference answers for every prompt that has been met, by a key of the prompt's data row.

    Buffers hold the whole state, so a checkpoint carries the answers' scores along.

    Args:
        samples: M, answers a prompt.
        components: K.

    Example:
        >>> kept = References(2, 1)
        >>> kept.add([7], torch.tensor([[[1.0], [3.0]]]))
        >>> kept.missing([7, 9]), kept.of([7, 7]).shape
        ([9], torch.Size([2, 2, 1]))
    """

    keys: Tensor
    scores: Tensor

    def __init__(self, samples: int, components: int) -> None:
        super().__init__()
        self.samples = samples
        self.register_buffer("keys", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("scores", torch.zeros(0, samples, components, dtype=torch.float64))
        self.places: dict[int, int] = {}

    def missing(self, keys: Sequence[int]) -> list[int]:
        """The keys that have no scores yet, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self.places]

    def add(self, keys: Sequence[int], scores: Tensor) -> None:
        """Keep the scores [n, M, K] of n new prompts."""
        for key in keys:
            self.places[key] = len(self.places)
        self.keys = torch.cat([self.keys, torch.tensor(list(keys), dtype=torch.int64, device=self.keys.device)])
        self.scores = torch.cat([self.scores, scores.to(self.scores)])

    def of(self, keys: Sequence[int]) -> Tensor:
        """Scores [P, M, K] of prompts that are there."""
        rows = torch.tensor([self.places[key] for key in keys], dtype=torch.int64, device=self.scores.device)
        return self.scores[rows]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **more: Any) -> None:
        # as many prompts as were met, which new references cannot know
        for name in ("keys", "scores"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)
        self.places = {int(key): place for place, key in enumerate(self.keys)}


@torch.no_grad()
def answer_scores(
    policy: Any, rows: Sequence[Mapping[str, Any]], signal: Signal, samples: int, *, seed: int, module: Any = None
) -> Tensor:
    """Scores [P, M, K] of M answers of the reference policy to each row's prompt.

    Args:
        policy: whose reference answers; `keep_reference()` was called.
        rows: data rows; the answers depend on a row's own content, never on the other rows.
        signal: whose rewards are called; its `on_bad_score` holds here too.
        samples: M.
        seed: of the answers.
        module: what accelerate wrapped the policy into, if anything.

    Raises:
        ScoreError: a reward failed and the signal says `stop`.
    """
    prompts, seeds = [row["prompt"] for row in rows], [mix_seed(seed, row_key(row) % 2**63, 5) for row in rows]
    rollout = policy.reference_sample(prompts, samples, seeds, module=module)
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    # these are the reference's own samples, so its log-probabilities are those they were sampled with
    rollout = rollout.update({"columns": columns, "logp_ref": rollout.logp_old})
    return score(signal.rewards, rollout, on_bad_score=signal.on_bad_score).scores


class Reference:
    """What a loop knows of its reference policy's answers.

    Args:
        policy, signal, seed, module: as in `answer_scores`.
        samples: M, answers a prompt.
        prompts: prompts of the set that stages are calibrated on.
        rank, processes: this process, of so many; new prompts are shared out.
    """

    def __init__(
        self,
        policy: Any,
        signal: Signal,
        *,
        samples: int,
        prompts: int,
        seed: int,
        module: Any = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if samples < 1 or prompts < 1:
            raise RecipeError(f"reference: samples and prompts must be at least 1; got {samples} and {prompts}.")
        self.policy, self.signal, self.seed, self.module = policy, signal, seed, module
        self.prompts, self.rank, self.processes = prompts, rank, processes
        self.kept = References(samples, len(signal.rewards)).to(next(iter(policy.parameters())).device)

    def scores(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Reference scores [P, M, K] of rows; answers to new prompts are sampled. All processes ask for the same rows."""
        if rows and "ref_scores" in rows[0]:
            return given_scores([row["ref_scores"] for row in rows], self.signal.score_names)
        keys = [row_key(row) for row in rows]
        new = self.kept.missing(keys)
        if new:
            by_key = dict(zip(keys, rows, strict=True))
            # every process takes part in every round, so that sharded models stay in step
            mine = new[self.rank :: self.processes] or new[:1]
            found = answer_scores(
                self.policy, [by_key[key] for key in mine], self.signal, self.kept.samples,
                seed=self.seed, module=self.module,
            )  # fmt: skip
            parts = [(mine, found.cpu())] if self.processes == 1 else gather_object([(mine, found.cpu())])
            scored = {key: row for names, table in parts for key, row in zip(names, table, strict=True)}
            self.kept.add(new, torch.stack([scored[key] for key in new]))
        return self.kept.of(keys)

    def calibrate(self, rows: Sequence[Mapping[str, Any]], count: int | None) -> None:
        """Give the stages that are calibrated once the scores of a set of prompts, spread evenly over the data."""
        stages = self.signal.uncalibrated()
        if stages:
            size = self.prompts if count is None else min(self.prompts, count)
            step = 1 if count is None else max(1, count // size)
            self.signal.calibrate(self.scores([rows[i * step] for i in range(size)]))


def row_key(row: Mapping[str, Any]) -> int:
    """A 64-bit key of a data row: the same row has the same key wherever it stands.

    Example:
        >>> row_key({"prompt": "a", "answer": 1}) == row_key({"answer": 1, "prompt": "a"})
        True
    """
    text = repr(sorted(row.items()))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def given_scores(column: Sequence[Any], names: Sequence[str]) -> Tensor:
    """Reference scores [P, M, K] that came with the data; a missing one is NaN.

    Args:
        column: P entries: numbers of the only component, or component name -> numbers.
        names: the K components.

    Raises:
        DataError: an entry lacks a component, or is not made of numbers.

    Example:
        >>> given_scores([[1.0, 2.0], [3.0]], ("right",)).squeeze(-1)
        tensor([[1., 2.],
                [3., nan]], dtype=torch.float64)
    """
    rows = []
    for p, entry in enumerate(column):
        named = entry if isinstance(entry, Mapping) else {names[0]: entry}
        if lacking := [name for name in names if name not in named]:
            raise DataError(
                f"ref_scores: row {p} has none for {lacking[0]!r}. With several rewards give a mapping: name -> scores."
            )
        try:
            rows.append([torch.tensor(list(named[name]), dtype=torch.float64) for name in names])
        except (TypeError, ValueError) as error:
            raise DataError(f"ref_scores: row {p} must hold lists of numbers; got {entry!r:.80}.") from error
    longest = max(len(part) for row in rows for part in row)
    filled = torch.full((len(rows), longest, len(names)), torch.nan, dtype=torch.float64)
    for p, row in enumerate(rows):
        for k, part in enumerate(row):
            filled[p, : len(part), k] = part
    return filled
