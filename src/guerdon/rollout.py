"""The records that travel the road: `Rollout` (samples in groups) and `Pairs` (one preferred over another).

Letters: P prompts, G samples a prompt (the group), T steps, K reward components, B pairs. A step is a token, a denoising
step or an environment step: whatever has a log-probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import ShapeError, check_shapes

_NESTED = ("columns", "extras", "steps")
_TENSORS = {
    "mask": "P G T",
    "logp_old": "P G T",
    "logp_ref": "P G T",
    "values": "P G T",
    "scores": "P G K",
}


@dataclass
class Rollout:
    """What a policy did with a batch of prompts, and what that was worth so far.

    Attributes:
        prompts: P prompts (texts, message lists, conditions, initial states).
        samples: P lists of G samples (texts, images, episodes).
        steps: what the policy needs to score the same steps again; every tensor has P as its first dimension.
        mask: bool [P, G, T], True where a step is live.
        logp_old: [P, G, T] log-probability of each step under the policy that sampled it.
        logp_ref: [P, G, T] under the reference policy, when a stage asks for it.
        values: [P, G, T] of a critic, when there is one; [P, G, T, K] of one with a head for each component.
        scores: [P, G, K] raw score of every component; NaN where a sample was not scored.
        score_names: the K names.
        outcomes: P lists of G extracted answers (or None), when a reward gives them.
        rewards: [P, G], or [P, G, T] for a reward per step.
        advantages: [P, G] or [P, G, T].
        columns: what else each prompt's data row carried: name -> list of P.
        extras: what else the policy or a stage produced: name -> tensor with P first, or list of P.
        indices: position of each prompt in the data, P integers.
    """

    prompts: list[Any]
    samples: list[list[Any]]
    mask: Bool[Tensor, "P G T"]
    logp_old: Float[Tensor, "P G T"]
    steps: dict[str, Tensor] = field(default_factory=dict)
    logp_ref: Float[Tensor, "P G T"] | None = None
    values: Float[Tensor, "P G T"] | Float[Tensor, "P G T K"] | None = None
    scores: Float[Tensor, "P G K"] | None = None
    score_names: tuple[str, ...] = ()
    outcomes: list[list[Any]] | None = None
    rewards: Float[Tensor, "P G"] | Float[Tensor, "P G T"] | None = None
    advantages: Float[Tensor, "P G"] | Float[Tensor, "P G T"] | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    indices: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def group_size(self) -> int:
        """G, the samples of one prompt."""
        return self.mask.shape[1]

    def validate(self) -> Rollout:
        """Check that all parts agree on P, G, T and K.

        Returns:
            The rollout itself.

        Raises:
            ShapeError: naming the part, its letters and the size found.
        """
        named = {
            name: (getattr(self, name), shape) for name, shape in _TENSORS.items() if getattr(self, name) is not None
        }
        if self.values is not None and self.values.ndim == 4:
            named["values"] = (self.values, "P G T K")
        size = check_shapes("rollout", **named)
        for name in ("rewards", "advantages"):
            value = getattr(self, name)
            if value is not None:
                check_shapes(
                    "rollout", mask=(self.mask, "P G T"), **{name: (value, "P G T" if value.ndim == 3 else "P G")}
                )
        if self.mask.dtype != torch.bool:
            raise ShapeError(f"rollout: mask must be bool; got {self.mask.dtype}. Use mask.bool().")
        lists = {
            "prompts": self.prompts,
            "samples": self.samples,
            **{f"columns[{n!r}]": c for n, c in self.columns.items()},
        }
        lists |= {f"steps[{n!r}]": s for n, s in self.steps.items()}
        lists |= {f"extras[{n!r}]": e for n, e in self.extras.items()}
        if self.outcomes is not None:
            lists["outcomes"] = self.outcomes
        for name, value in lists.items():
            if len(value) != size["P"]:
                raise ShapeError(f"rollout: {name} must have one entry per prompt (P = {size['P']}); got {len(value)}.")
        for p, group in enumerate(self.samples):
            if len(group) != size["G"]:
                raise ShapeError(
                    f"rollout: samples[{p}] must hold the whole group (G = {size['G']}); got {len(group)}. "
                    "Every prompt needs the same number of samples."
                )
        if self.scores is not None and len(self.score_names) != size["K"]:
            raise ShapeError(f"rollout: score_names must have K = {size['K']} names; got {len(self.score_names)}.")
        return self

    def available(self) -> dict[str, Any]:
        """Every field a stage can ask for by name: parts, derived quantities, extras and data columns."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NESTED}
        named = {name: value for name, value in named.items() if value is not None}
        named["lengths"] = self.mask.sum(-1)
        return {**self.columns, **self.extras, **named}

    def update(self, produced: dict[str, Any]) -> Rollout:
        """A copy with the fields that a stage produced; names that are not its own parts go to `extras`."""
        own = {f.name for f in fields(self)}
        parts = {name: value for name, value in produced.items() if name in own}
        extras = {name: value for name, value in produced.items() if name not in own}
        return replace(self, **parts, extras={**self.extras, **extras})

    def select(self, prompts: slice | Sequence[int]) -> Rollout:
        """The rollout of some of the prompts, groups kept whole.

        Args:
            prompts: a slice, or positions of the prompts.
        """
        positions = list(range(len(self)))[prompts] if isinstance(prompts, slice) else list(prompts)
        whole = positions == list(range(len(self)))

        def take(value: Any) -> Any:
            if whole or value is None:
                return value
            if isinstance(value, Tensor):
                return (
                    value[prompts]
                    if isinstance(prompts, slice)
                    else value[torch.tensor(positions, dtype=torch.long, device=value.device)]
                )
            return [value[i] for i in positions] if value else value

        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        taken = {name: take(value) for name, value in parts.items() if name not in (*_NESTED, "score_names")}
        nested = {name: {k: take(v) for k, v in parts[name].items()} for name in _NESTED}
        return replace(self, **taken, **nested)

    def trim(self) -> Rollout:
        """Cut trailing steps that are live in no sample."""
        live = self.mask.any(0).any(0).nonzero()
        length = int(live[-1]) + 1 if len(live) else 1
        full = self.mask.shape[2]
        if length == full:
            return self

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[:3] == self.mask.shape:
                return value[:, :, :length]
            return value

        parts = {
            f.name: cut(getattr(self, f.name)) for f in fields(self) if f.name not in _NESTED and f.name != "scores"
        }
        nested = {name: {k: cut(v) for k, v in getattr(self, name).items()} for name in ("extras", "steps")}
        return replace(self, **parts, **nested)

    def extend(self, length: int) -> Rollout:
        """Pad every [P, G, T] part with masked steps up to `length` of them."""
        shape = self.mask.shape
        if shape[2] == length:
            return self

        def pad(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim < 3 or value.shape[:3] != shape:
                return value
            return torch.nn.functional.pad(value, [0, 0] * (value.ndim - 3) + [0, length - shape[2]])

        parts = {
            f.name: pad(getattr(self, f.name)) for f in fields(self) if f.name not in _NESTED and f.name != "scores"
        }
        nested = {name: {k: pad(v) for k, v in getattr(self, name).items()} for name in ("extras", "steps")}
        return replace(self, **parts, **nested)

    def to(self, device: torch.device | str) -> Rollout:
        """A copy with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def detach(self) -> Rollout:
        """A copy whose tensors have no graph."""
        return self._map(lambda tensor: tensor.detach())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Rollout:
        def apply(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        parts = {f.name: apply(getattr(self, f.name)) for f in fields(self) if f.name not in _NESTED}
        nested = {name: {k: apply(v) for k, v in getattr(self, name).items()} for name in ("extras", "steps")}
        return replace(self, **parts, **nested)


def last_step(mask: Bool[Tensor, "P G T"]) -> Bool[Tensor, "P G T"]:
    """True at each sample's last live step.

    Example:
        >>> last_step(torch.tensor([[[True, True, False], [False, False, False]]])).tolist()
        [[[False, True, False], [False, False, False]]]
    """
    still_to_come = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (still_to_come == 1)


def paid_by_step(
    rewards: Float[Tensor, "P G"], paid: Float[Tensor, "P G T"], mask: Bool[Tensor, "P G T"]
) -> Float[Tensor, "P G T"]:
    """Rewards of steps that add up to those of samples: what was paid on the way, and the rest at the last live step.

    Example:
        >>> paid_by_step(torch.tensor([[3.0]]), torch.tensor([[[0.5, 0.0]]]), torch.ones(1, 1, 2).bool())
        tensor([[[0.5000, 2.5000]]])
    """
    paid = paid.where(mask, 0.0)
    return paid + (rewards - paid.sum(-1)).unsqueeze(-1).where(last_step(mask), 0.0)


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """Put rollouts of the same group size one after the other, padding steps to the longest.

    Raises:
        ShapeError: there is none, they differ in group size, or they do not carry the same fields.
    """
    if not rollouts:
        raise ShapeError("rollout.join: at least one rollout is needed; got none.")
    first = rollouts[0]
    if len(rollouts) == 1:
        return first
    sizes = {r.group_size for r in rollouts}
    if len(sizes) > 1:
        raise ShapeError(f"rollout.join: all rollouts must have the same group size G; got {sorted(sizes)}.")
    longest = max(r.mask.shape[2] for r in rollouts)
    rollouts = [r.extend(longest) for r in rollouts]

    def stack(name: str, values: list[Any]) -> Any:
        if all(value is None for value in values):
            return None
        if any(value is None for value in values):
            raise ShapeError(f"rollout.join: {name} is there in some of the rollouts only.")
        if isinstance(values[0], Tensor):
            return torch.cat(_align(values))
        return [entry for value in values for entry in value]

    parts = {}
    for f in fields(first):
        values = [getattr(r, f.name) for r in rollouts]
        if f.name == "score_names":
            parts[f.name] = first.score_names
        elif f.name in _NESTED:
            names = set(values[0])
            if any(set(value) != names for value in values):
                raise ShapeError(f"rollout.join: the rollouts carry different {f.name}: {[sorted(v) for v in values]}.")
            parts[f.name] = {name: stack(name, [value[name] for value in values]) for name in values[0]}
        else:
            parts[f.name] = stack(f.name, values)
    return Rollout(**parts)


def beside(first: Rollout, second: Rollout) -> Rollout:
    """Two rollouts of the same prompts as one with larger groups: the samples of the first, then those of the second.

    Raises:
        ShapeError: they are not of the same prompts, or do not carry the same fields.
    """
    if first.prompts != second.prompts:
        raise ShapeError("rollout.beside: both rollouts must be of the same prompts.")
    longest = max(first.mask.shape[2], second.mask.shape[2])
    first, second = first.extend(longest), second.extend(longest)
    size = first.mask.shape[:2]

    def stack(name: str, left: Any, right: Any, *, step: bool = False) -> Any:
        if (left is None) != (right is None):
            raise ShapeError(f"rollout.beside: {name} is there in one of the rollouts only.")
        if not isinstance(left, Tensor):
            return left
        # what belongs to a sample is set side by side, what belongs to a prompt (as its tokens [P, S]) is the same
        of_samples = left.ndim > 2 or (left.shape == size and not step)
        return torch.cat([left, right], 1) if of_samples else left

    parts: dict[str, Any] = {
        f.name: stack(f.name, getattr(first, f.name), getattr(second, f.name))
        for f in fields(first)
        if f.name not in _NESTED
    }
    for name in ("steps", "extras"):
        left, right = getattr(first, name), getattr(second, name)
        if set(left) != set(right):
            raise ShapeError(f"rollout.beside: the rollouts carry different {name}: {sorted(left)}, {sorted(right)}.")
        parts[name] = {key: stack(key, left[key], right[key], step=name == "steps") for key in left}
    parts["samples"] = [a + b for a, b in zip(first.samples, second.samples, strict=True)]
    return Rollout(**parts, columns=first.columns)


def _align(values: list[Tensor]) -> list[Tensor]:
    """Prompts [P, S] are padded on the left, each batch to its own width."""
    if values[0].ndim != 2 or len({v.shape[1] for v in values}) == 1:
        return values
    width = max(v.shape[1] for v in values)
    return [torch.nn.functional.pad(v, [width - v.shape[1], 0]) for v in values]


@dataclass
class Pairs:
    """Preferences: for each of B prompts a chosen and a rejected sample, with log-probabilities per step.

    Attributes:
        logp_chosen, logp_rejected: [B, T] under the policy that is trained.
        mask_chosen, mask_rejected: bool [B, T].
        logp_ref_chosen, logp_ref_rejected: [B, T] under the reference, when an objective asks for it.
        columns: what else each row carried: name -> list of B.
    """

    logp_chosen: Float[Tensor, "B T"]
    logp_rejected: Float[Tensor, "B S"]
    mask_chosen: Bool[Tensor, "B T"]
    mask_rejected: Bool[Tensor, "B S"]
    logp_ref_chosen: Float[Tensor, "B T"] | None = None
    logp_ref_rejected: Float[Tensor, "B S"] | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.mask_chosen.shape[0]

    def validate(self) -> Pairs:
        """Check that all parts agree.

        Raises:
            ShapeError: naming the part, its letters and the size found.
        """
        shapes = {"chosen": "B T", "rejected": "B S"}
        named = {
            f"{name}_{side}": (getattr(self, f"{name}_{side}"), shape)
            for side, shape in shapes.items()
            for name in ("mask", "logp", "logp_ref")
            if getattr(self, f"{name}_{side}") is not None
        }
        size = check_shapes("pairs", **named)
        for name, column in self.columns.items():
            if len(column) != size["B"]:
                raise ShapeError(f"pairs: columns[{name!r}] must have B = {size['B']} entries; got {len(column)}.")
        return self
