"""What a loop asks of a policy, in any domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from guerdon.rollout import Rollout


class PolicyOutput(NamedTuple):
    """What a policy says about steps that were taken: each [P, G, T], with gradient.

    Attributes:
        logp: log-probability of the step; 0 where masked.
        entropy: entropy of the distribution the step was drawn from, in nats; None where it has no closed form.
        values: a critic's estimate of what is still to come; None without a critic.
    """

    logp: Tensor
    entropy: Tensor | None
    values: Tensor | None


@runtime_checkable
class Policy(Protocol):
    """A module that can act and score its acts.

    All work with gradient goes through `__call__`, so that a wrapped policy (DDP, FSDP, DeepSpeed) works as well.
    """

    def __call__(self, *args: Any, kind: str = "log_prob", **kwargs: Any) -> Any:
        """`kind="log_prob"` (steps, mask) -> PolicyOutput; `kind="sample"` -> Rollout."""

    def sample(self, prompts: list[Any], group_size: int, seeds: list[int], greedy: bool = False) -> Rollout:
        """G samples for each prompt, without gradient; the same seed gives the same samples in any batch."""

    def reference_log_prob(self, rollout: Rollout) -> Tensor:
        """[P, G, T] under the reference policy, without gradient."""

    def save(self, folder: Path) -> None:
        """Write the policy in its hub's own format."""

    def demonstrations(self, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """Steps and mask [B, 1, T] of given acts, for supervised training."""
