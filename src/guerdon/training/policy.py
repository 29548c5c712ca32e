"""What a loop asks of a policy, in any domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from guerdon.objectives.loss import Imitation, Loss
from guerdon.rollout import Rollout


@runtime_checkable
class PolicyOutput(Protocol):
    """What a policy says about steps that were taken: each [P, G, T], with gradient, 0 where masked."""

    @property
    def logp(self) -> Tensor:
        """Log-probability of the step."""
        ...

    @property
    def entropy(self) -> Tensor | None:
        """Entropy of the distribution the step was drawn from, in nats; None where it has no closed form."""
        ...

    @property
    def values(self) -> Tensor | None:
        """A critic's estimate of what is still to come, [P, G, T, K] of one with K > 1 heads; None without a critic."""
        ...

    @property
    def kl(self) -> Tensor | None:
        """Exact divergence from the reference, in nats, with gradient; None where it has no closed form or is not asked for."""
        ...


@runtime_checkable
class Policy(Protocol):
    """An `nn.Module` that acts and scores its acts.

    `module` is what accelerate wrapped the policy into (DDP, FSDP, DeepSpeed): work that needs the weights goes through
    it. `fields` names what its rollouts carry in `extras`. A loop sets `exact_kl` where its objective asks for the
    divergence in closed form; a policy that has none ignores it. It sets `keep_projections` where a reward asks for the
    field `projections`: [P][G][T], the clean sample that the state after each step points to. A policy that can make them
    then names them in `fields`. Likewise `keep_offsets` and the field `offsets`, [P, G, T, 2]: the part (from, to) of the
    sample that each step wrote. A policy may have a method `divergence(rollout, module=)` as `reference_log_prob`: the exact
    divergence [P, G, T] from the reference over all that each step could have drawn, which stages read as `kl_old`.
    """

    fields: tuple[str, ...]
    has_critic: bool
    max_steps: int

    def sample(
        self, prompts: Sequence[Any], group_size: int, seeds: Sequence[int], *, greedy: bool = False, module: Any = None
    ) -> Rollout:
        """G samples for each prompt, without gradient; the same seed gives the same samples in any batch."""
        ...

    def log_prob(self, rollout: Rollout, *, module: Callable[..., Any] | None = None) -> PolicyOutput:
        """Score the steps of a rollout, with gradient."""
        ...

    def reference_log_prob(self, rollout: Rollout, *, module: Callable[..., Any] | None = None) -> Tensor:
        """[P, G, T] under the reference policy, without gradient."""
        ...

    def reference_sample(
        self, prompts: Sequence[Any], group_size: int, seeds: Sequence[int], *, module: Any = None
    ) -> Rollout:
        """Samples as `sample` makes them, from the reference policy."""
        ...

    def keep_reference(self) -> None:
        """Make the policy as it is now the reference."""
        ...

    def demonstrations(self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Rollout:
        """Given acts as a rollout [B, 1, T], for supervised training; what is drawn for a row follows from its seed."""
        ...

    def imitation_loss(self, given: Rollout, *, module: Callable[..., Any] | None = None) -> Loss:
        """The loss of learning from demonstrations; its count is the number of live steps of `given`."""
        ...

    def imitation(
        self, rollout: Rollout, seeds: Sequence[int], *, drift: bool = False, module: Callable[..., Any] | None = None
    ) -> Imitation:
        """What learning from each sample of a rollout as from an example would cost, with gradient; a seed a prompt."""
        ...

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the policy in its hub's own format; `state` holds whole tensors where its own are shards."""
        ...

    def load_weights(self, folder: Path) -> None:
        """Put back what `save` wrote; called before the policy is wrapped or sharded."""
        ...
