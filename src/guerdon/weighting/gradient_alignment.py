"""Weights that follow the gradients: a reward whose gradient agrees with all the others' gains weight.

Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting, 2025, arXiv 2509.11452.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guerdon.errors import NumericsError, RecipeError, check_shapes
from guerdon.weighting.simplex import Weights, shares
from guerdon.weighting.weighted import WeightedOutput, weighted_sum


def influence(gradients: Float[Tensor, "K D"]) -> Float[Tensor, " K"]:
    """How far a step along all gradients together improves each objective: I_k = <g_k, sum_j g_j>.

    Args:
        gradients: [K, D], one objective a row.

    Returns:
        [K]; they add up to |sum_k g_k|^2.

    Example:
        >>> influence(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([2., 3.])
    """
    check_shapes("weighting.influence", gradients=(gradients, "K D"))
    return gradients @ gradients.sum(0)


def exponentiated_update(
    weights: Float[Tensor, " K"], influence: Float[Tensor, " K"], *, lr: float, mu: float
) -> Float[Tensor, " K"]:
    """w_k exp(lr I_k / mu), divided by their sum; a weight of 0 stays 0.

    Args:
        weights: [K], adding up to 1.
        influence: [K].
        lr: the learning rate of the policy.
        mu: the larger, the slower.

    Returns:
        [K], adding up to 1; may be exactly 1 for one of them.

    Example:
        >>> exponentiated_update(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), lr=1.0, mu=1.0)
        tensor([0.7311, 0.2689])
    """
    return (weights.log() + lr * influence / mu).softmax(-1)


def gradient_gram(losses: Sequence[Tensor], parameters: Sequence[Tensor], *, blocks: int = 1) -> Float[Tensor, "K K"]:
    """Inner products of the gradients of K losses, <g_j, g_k>, in double precision.

    Args:
        losses: K scalars of one graph, which is kept.
        parameters: what the gradients are by.
        blocks: parts of the parameters that are gone through one after the other: K gradients of one part are held at
            a time, for a backward pass of each loss and part.

    Returns:
        [K, K]; the influences are its row sums.
    """
    gram = torch.zeros(len(losses), len(losses), dtype=torch.float64)
    for start in range(blocks):
        part = list(parameters[start::blocks])
        if part:
            found = [torch.autograd.grad(loss, part, retain_graph=True, allow_unused=True) for loss in losses]
            gram += inner_products([list(grads) for grads in found]).to(gram)
    return gram


def inner_products(gradients: Sequence[Sequence[Tensor | None]]) -> Float[Tensor, "K K"]:
    """<g_j, g_k> of K gradients that are lists of tensors in the same order; None is a tensor of zeros."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for of_one in zip(*gradients, strict=True):
        there = [k for k, grad in enumerate(of_one) if grad is not None]
        if there:
            flat = torch.stack([grad.detach().flatten() for grad in of_one if grad is not None]).double()
            products[torch.tensor(there)[:, None], torch.tensor(there)] += (flat @ flat.T).cpu()
    return products


class GradientAlignment(nn.Module):
    """The weighted sum of the scores, with weights that grow by the influence of each reward's own policy gradient.

    Each step the loop finds the gradient g_k of the loss with advantages from reward k alone, for all k. With I_k = <g_k,
    sum_j g_j> the weights become w_k exp(lr I_k / mu), divided by their sum, and the step is made with them.

    Args:
        weights: where they start: component name -> share, or K shares in order, adding up to 1; None = equal.
        mu: against the learning rate: lr / mu times the influence is the exponent. The paper's 1e-5 is for a learning
            rate of 1e-6; keep the ratio near 0.1, above 1 one reward soon takes all the weight.
        accumulate: steps over which influences are averaged before the weights change.
        clip_norm: each g_k is shortened to this norm; None = not. The reference has 1.
        floor: no weight falls below this share; 0 = none.
        parameters: regular expression on the names of the parameters that gradients are taken by; None = all that are
            trained. The reference takes layers 10 to 25: r"layers\\.(1\\d|2[0-5])\\.".

    Raises:
        RecipeError: an option is out of its range.

    Edge cases:
        A weight that is 0 stays 0, and is warned of. Zero gradients leave the weights as they are. Clipping and division
        by a std make the whole gradient differ from the weighted sum of the g_k: `mixed_norm` beside `grad_norm` tells.
        Costs one forward pass and K backward passes a step, and K copies of the chosen gradients.

    Example:
        >>> stage = GradientAlignment(mu=1.0, clip_norm=None)
        >>> stage.adapt(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 1.0, ("right", "short"))
        >>> stage.weights
        tensor([0.7311, 0.2689], dtype=torch.float64)

    Source:
        Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting, 2025, arXiv 2509.11452, and the
        authors' code.
    """

    weights: Tensor
    gathered: Tensor
    count: Tensor

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        mu: float = 1e-5,
        accumulate: int = 1,
        clip_norm: float | None = 1.0,
        floor: float = 0.0,
        parameters: str | None = None,
    ) -> None:
        super().__init__()
        where = "weighting.gradient_alignment"
        if not mu > 0:
            raise RecipeError(f"{where}: mu must be above 0; got {mu}.")
        if accumulate < 1:
            raise RecipeError(f"{where}: accumulate must be 1 or more; got {accumulate}.")
        if clip_norm is not None and not clip_norm > 0:
            raise RecipeError(f"{where}: clip_norm must be above 0, or null; got {clip_norm}.")
        if not 0 <= floor < 1:
            raise RecipeError(f"{where}: floor must be in [0, 1); got {floor}.")
        try:
            self.pattern = re.compile(parameters or "")
        except re.error as error:
            raise RecipeError(f"{where}: parameters is no regular expression: {error}.") from None
        values = list(weights.values() if isinstance(weights, Mapping) else weights or ())
        if any(value == 0 for value in values):
            warnings.warn(f"{where}: a weight of 0 stays 0 whatever its gradient says.", stacklevel=2)
        self.given: Weights = weights
        self.mu, self.accumulate, self.clip_norm, self.floor = mu, accumulate, clip_norm, floor
        self.told: dict[str, float] = {}
        for name in ("weights", "gathered"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, scores: Float[Tensor, "P G K"], score_names: Sequence[str] = ()) -> WeightedOutput:
        """Weigh the scores; changes no state.

        Args:
            scores: [P, G, K], NaN = not scored.
            score_names: the K component names; needed when weights go by name.

        Returns:
            `rewards` [P, G] and `weights` [K].
        """
        size = check_shapes("weighting.gradient_alignment", scores=(scores, "P G K"))["K"]
        weights = self._weights(size, score_names).to(scores)
        return WeightedOutput(weighted_sum(scores, weights), weights)

    @torch.no_grad()
    def adapt(self, gram: Float[Tensor, "K K"], lr: float, score_names: Sequence[str] = ()) -> None:
        """Change the weights by the gradients of this step; called before the step's rewards are weighed.

        Args:
            gram: [K, K], inner products of the gradients of each component's own loss.
            lr: the learning rate now.
            score_names: the K component names.

        Raises:
            ShapeError: gram is not square.
            NumericsError: a gradient is not finite.
        """
        size = check_shapes("weighting.gradient_alignment", gram=(gram, "K K"))["K"]
        gram = gram.detach().double().to(self.weights.device)
        if not bool(gram.isfinite().all()):
            raise NumericsError("weighting.gradient_alignment: the gradient of a component's own loss is not finite.")
        weights = self._weights(size, score_names)
        norms = gram.diagonal().clamp(min=0).sqrt()
        mixed = float((weights @ gram @ weights).clamp(min=0).sqrt())
        if self.clip_norm is not None:
            shrink = (self.clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
            gram = gram * shrink[:, None] * shrink
        names = list(score_names) or [str(k) for k in range(size)]
        self.told = {"mixed_norm": mixed, **{f"norm/{n}": float(v) for n, v in zip(names, norms, strict=True)}}
        self.told |= {f"influence/{n}": float(v) for n, v in zip(names, gram.sum(-1), strict=True)}
        self.gathered = (self.gathered if len(self.gathered) else torch.zeros_like(weights)) + gram.sum(-1)
        self.count += 1
        if self.count >= self.accumulate:
            weights = exponentiated_update(weights, self.gathered / self.count, lr=lr, mu=self.mu)
            self.gathered, self.count = torch.zeros_like(weights), torch.zeros_like(self.count)
            if self.floor:
                weights = torch.where(weights > 0, weights.clamp(min=self.floor), 0.0)
                weights = weights / weights.sum()
        self.weights = weights

    def metrics(self) -> dict[str, float]:
        """Of the last step: `norm/<name>` and `influence/<name>` of each component, `mixed_norm` of sum_k w_k g_k."""
        return dict(self.told)

    def _weights(self, size: int, names: Sequence[str]) -> Tensor:
        if len(self.weights):
            if len(self.weights) != size:
                raise RecipeError(
                    f"weighting.gradient_alignment: there are {len(self.weights)} weights; got {size} scores."
                )
            return self.weights
        return shares("weighting.gradient_alignment", self.given, names, size).to(self.weights.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **more: Any) -> None:
        for name in ("weights", "gathered"):  # as many as there are components, which a new stage cannot know
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


gradient_alignment = GradientAlignment
