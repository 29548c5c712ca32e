"""What every objective returns, and what a policy returns to those that learn from samples as from examples."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """A sum and the number of things summed, so that parts of a batch add up to the whole.

    The loss to minimise is sum(total) / max(sum(count), 1) over all micro-batches and processes; its gradient does not
    depend on how the batch was cut.

    Attributes:
        total: scalar with graph; 0 when there is nothing to learn from.
        count: scalar without graph. It may depend on data (mask, rewards), never on the policy's log-probabilities.
        metrics: name -> detached scalar, for logging only.
        implicit: what the loss takes each example to be worth, detached, if it says so: [B, 2] (chosen, rejected), or
            [P, G]. The preference loop makes ranking accuracy, margins and histograms of it.
    """

    total: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    metrics: dict[str, Tensor]
    implicit: Tensor | None = None


class Imitation(NamedTuple):
    """What learning from each of a policy's samples as from an example would cost.

    Attributes:
        imitation: [P, G] with graph: minus the log-probability of a text, the denoising loss of an image.
        drift: [P, G] with graph: how far the policy has moved from its reference at the sample; None if not asked for.
    """

    imitation: Tensor
    drift: Tensor | None
