"""Constrained RLHF: a multiplier for each reward that holds it at, or above, the point beyond which it is no longer true.

Every reward of a mixture has a proxy point; more of the reward than that makes samples worse. Multipliers that follow how
far each reward is from its threshold weigh the rewards against staying near the reference.
Confronting Reward Model Overoptimization with Constrained RLHF, 2023, arXiv 2310.04373.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from guerdon.errors import RecipeError, ScoreError, ShapeError, check_shapes, nearest
from guerdon.weighting.weighted import WeightedOutput, weighted_sum

Mode = Literal["mu", "xi", "all"]
_WHERE = "weighting.lagrangian"


class Multipliers(nn.Module):
    """One multiplier a constraint, moved by gradient descent with momentum; buffers hold the whole state.

    Weights are sigmoid(mu) (modes `mu`, `all`) or tanh(xi) (mode `xi`). A step descends sum_k w_k(mu) c_k with the
    violation c_k = mean return - threshold held fixed: a reward above its threshold loses weight. Mode `all`, whose
    rewards must stay below their thresholds, has the opposite sign.

    Args:
        thresholds: theta, one a constraint, in the unit of its reward.
        mode: `mu` for at least theta, `xi` for exactly theta, `all` for at most theta.
        lr: learning rate.
        momentum: of the gradient, in [0, 1).
        max_grad_norm: the gradient over all multipliers is shortened to it.
        squash: bounded weights; False takes the multipliers themselves, held at 0 or above unless the mode is `xi`.
        start: of all multipliers; None = 0.5 without squashing, else one draw from normal(0, 0.01) by `seed`.
        seed: of that draw.

    Raises:
        RecipeError: a threshold is no finite number, or a setting is out of range.

    Example:
        >>> multipliers = Multipliers([0.5], start=0.0, momentum=0.0)
        >>> multipliers.step(torch.tensor([[1.0], [1.0]]))
        >>> multipliers.values
        tensor([-0.0125], dtype=torch.float64)

    Source:
        arXiv 2310.04373, equations 1 to 3 and the authors' code; mode `all` is our reading.
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        *,
        mode: Mode = "mu",
        lr: float = 0.1,
        momentum: float = 0.1,
        max_grad_norm: float = 0.5,
        squash: bool = True,
        start: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mode not in ("mu", "xi", "all"):
            raise RecipeError(f"{_WHERE}.mode: must be mu, xi or all; got {mode!r}.")
        if not lr > 0 or not 0 <= momentum < 1 or not max_grad_norm > 0:
            raise RecipeError(
                f"{_WHERE}: lr and max_grad_norm must be above 0 and momentum in [0, 1); got {lr}, {max_grad_norm} and "
                f"{momentum}."
            )
        limits = torch.tensor(list(thresholds), dtype=torch.float64)
        if not len(limits) or not limits.isfinite().all():
            raise RecipeError(
                f"{_WHERE}.thresholds: must be finite numbers, one for each reward that is held to one; got "
                f"{list(thresholds) or 'none'}. Such as {{NAME: 0.5}}."
            )
        if start is None:
            draw = 0.01 * torch.randn((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).item()
            start = draw if squash else 0.5
        self.mode, self.lr, self.momentum, self.max_grad_norm, self.squash = mode, lr, momentum, max_grad_norm, squash
        self.thresholds: Tensor
        self.values: Tensor
        self.velocity: Tensor
        self.started: Tensor
        self.register_buffer("thresholds", limits)
        self.register_buffer("values", torch.full_like(limits, start))
        self.register_buffer("velocity", torch.zeros_like(limits))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @property
    def weights(self) -> Float[Tensor, " K"]:
        """The weight of each constrained reward."""
        if not self.squash:
            return self.values
        return torch.tanh(self.values) if self.mode == "xi" else torch.sigmoid(self.values)

    @torch.no_grad()
    def step(self, returns: Float[Tensor, "B K"], counts: Tensor | None = None) -> None:
        """Move the multipliers by one batch.

        Args:
            returns: [B, K], each reward still to come; with a reward at the end that is the score of the sample. A row
                with a NaN is left out; with no row left nothing moves.
            counts: [B], how much each row counts; None = alike.

        Raises:
            ShapeError: returns does not fit the thresholds.
            ScoreError: a return is infinite; nothing has moved.
        """
        if returns.ndim != 2 or returns.shape[1] != len(self.thresholds):
            raise ShapeError(f"{_WHERE}: returns must be [B, K = {len(self.thresholds)}]; got {list(returns.shape)}.")
        if returns.isinf().any():
            raise ScoreError(f"{_WHERE}: a return is infinite; the multipliers were not moved.")
        used = ~returns.isnan().any(-1)
        shares = used.double() if counts is None else torch.where(used, counts.to(returns.device).double(), 0.0)
        if not shares.sum() > 0:
            return
        means = (returns.double().nan_to_num(nan=0.0) * shares.unsqueeze(-1)).sum(0) / shares.sum()
        violation = means.to(self.values) - self.thresholds
        if self.mode == "all":
            violation = -violation
        if not self.squash:
            slope = torch.ones_like(self.values)
        elif self.mode == "xi":
            slope = 1 - torch.tanh(self.values).square()
        else:
            slope = self.weights * (1 - self.weights)
        gradient = slope * violation
        gradient = gradient * (self.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
        self.velocity.copy_(torch.where(self.started, self.momentum * self.velocity + gradient, gradient))
        self.started.fill_(True)
        self.values -= self.lr * self.velocity
        if not self.squash and self.mode != "xi":
            self.values.clamp_(min=0.0)


def mix_advantages(
    advantages: Float[Tensor, "B K"],
    task_advantages: Float[Tensor, " B"],
    weights: Float[Tensor, " K"],
    *,
    mode: Mode = "mu",
    squash: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, " B"]:
    """A = (K - sum_k w_k) A_0 + sum_k w_k A_k, every stream first normalised over the batch.

    In a recipe `lagrangian` and `gae_by_component` do this, over the live steps of a batch.
    The weights sum to K with that of the task, whatever the multipliers. With tanh a weight may be negative: that reward
    is pushed down, and the task weighs more than K.

    Args:
        advantages: [B, K], of the constrained rewards.
        task_advantages: [B], of what is maximised subject to them: staying near the reference; in mode `all` the sum of
            the rewards less the divergence.
        weights: [K].
        mode: as in `Multipliers`; `all` subtracts the constrained streams.
        squash: weights are bounded; False: A = A_0 + sum_k w_k A_k.
        eps: added to the standard deviations (with Bessel's correction).

    Returns:
        Mixed advantages [B].

    Raises:
        ShapeError: shapes do not fit, or B < 2, for which there is no standard deviation.

    Edge cases:
        A constant stream is 0.

    Example:
        >>> mix_advantages(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0, 1.0]), torch.tensor([0.5]))
        tensor([-0.3536,  0.3536])

    Source:
        arXiv 2310.04373 and the authors' code. Their branch without squashing drops the first multiplier, which is not
        followed.
    """
    where = "weighting.mix_advantages"
    size = check_shapes(
        where, advantages=(advantages, "B K"), task_advantages=(task_advantages, "B"), weights=(weights, "K")
    )
    if size["B"] < 2:
        raise ShapeError(f"{where}: a batch of one has no standard deviation; got B = 1.")

    def normalised(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.std(0) + eps)

    sign = -1.0 if mode == "all" else 1.0
    rest = size["K"] - weights.sum() if squash else 1.0
    return rest * normalised(task_advantages) + sign * (weights * normalised(advantages)).sum(-1)


class Lagrangian(nn.Module):
    """Weights that hold rewards at their thresholds: mu-PPO, xi-PPO, All-PPO.

    The components with a threshold are constrained; the one without, such as `kl: kl_penalty`, is what is maximised
    subject to them and has weight K - sum_k w_k. Follow it with an advantage that normalises each component before it is
    weighed: `gae_by_component`, the method's own, with a value head for each; or `{normalise_then_sum: {whiten: false}}`,
    which normalises in groups and needs no critic, an adaptation.

    Args:
        thresholds: component name -> theta, in the unit of its score (after shaping).
        mode: `mu` at least theta (sigmoid), `xi` exactly theta (tanh), `all` at most theta: the free component gets the
            weight K - sum w, and so do all others besides theirs, less w_k (our reading).
        lr: learning rate of the multipliers.
        momentum: of their gradient, in [0, 1).
        max_grad_norm: their gradient is shortened to it.
        squash: bounded weights; False takes the multipliers themselves, held at 0 or above unless the mode is `xi`.
        start: of all multipliers; None = 0.5 without squashing, else one draw from normal(0, 0.01) by `seed`.
        seed: of that draw.
        average: the mean score is over `steps` (long samples count more, as in the authors' code) or `samples`.
        updates: multiplier steps a training step, each on an equal share of the prompts.

    Raises:
        RecipeError: a setting is out of range, or a threshold is for no component.
        ShapeError: scores is not [P, G, K].

    Edge cases:
        NaN scores are left out. A threshold that cannot be reached drives its weight to its bound and does no more harm.

    Example:
        >>> stage = Lagrangian(thresholds={"right": 0.5}, start=0.0)
        >>> stage(torch.tensor([[[1.0, -2.0]]]), ("right", "kl")).weights
        tensor([0.5000, 0.5000])

    Source:
        arXiv 2310.04373 and the authors' code; `all` is our reading.
    """

    def __init__(
        self,
        *,
        thresholds: dict[str, float],
        mode: Literal["mu", "xi", "all"] = "mu",
        lr: float = 0.1,
        momentum: float = 0.1,
        max_grad_norm: float = 0.5,
        squash: bool = True,
        start: float | None = None,
        seed: int = 0,
        average: Literal["steps", "samples"] = "steps",
        updates: int = 1,
    ) -> None:
        super().__init__()
        if average not in ("steps", "samples") or updates < 1:
            raise RecipeError(
                f"{_WHERE}: average must be steps or samples, updates at least 1; got {average}, {updates}."
            )
        self.names, self.average, self.updates = tuple(thresholds), average, updates
        self.multipliers = Multipliers(
            list(thresholds.values()),
            mode=mode,
            lr=lr,
            momentum=momentum,
            max_grad_norm=max_grad_norm,
            squash=squash,
            start=start,
            seed=seed,
        )
        self.means: Tensor
        self.register_buffer("means", torch.full_like(self.multipliers.thresholds, torch.nan))

    def forward(self, scores: Float[Tensor, "P G K"], score_names: Sequence[str]) -> WeightedOutput:
        """Weigh the components; changes no state.

        Args:
            scores: [P, G, K], NaN = not scored.
            score_names: the K names.

        Returns:
            `rewards` [P, G] and `weights` [K].
        """
        check_shapes(_WHERE, scores=(scores, "P G K"))
        places = self._places(score_names)
        own = self.multipliers.weights.to(scores)
        free = (len(places) - own.sum()) if self.multipliers.squash else own.new_ones(())
        weights = free.repeat(len(score_names))
        if self.multipliers.mode == "all":
            weights[places] = free - own
        else:
            weights[places] = own
        return WeightedOutput(weighted_sum(scores, weights), weights)

    @torch.no_grad()
    def observe(
        self,
        shaped: Float[Tensor, "P G K"],
        score_names: Sequence[str],
        lengths: Int[Tensor, "P G"],
    ) -> None:
        """Move the multipliers by the scores of a finished step.

        Args:
            shaped: [P, G, K], the scores that were weighed.
            score_names: the K names.
            lengths: [P, G], live steps of each sample.
        """
        own = shaped[..., self._places(score_names)]
        counts = lengths.double() if self.average == "steps" else torch.ones_like(lengths, dtype=torch.float64)
        for u in range(self.updates):
            part, share = own[u :: self.updates].flatten(0, 1), counts[u :: self.updates].flatten()
            self.multipliers.step(part, share)
        self.means.copy_(own.double().flatten(0, 1).nanmean(0))

    @property
    def satisfied(self) -> bool:
        """Whether the last step's mean scores lie within 5 % of all thresholds."""
        limits = self.multipliers.thresholds
        return bool(((self.means - limits).abs() <= 0.05 * limits.abs()).all())

    def metrics(self) -> dict[str, float]:
        """Multipliers by component, and whether the thresholds are met."""
        told = {f"multiplier/{n}": v for n, v in zip(self.names, self.multipliers.values.tolist(), strict=True)}
        return {**told, "satisfied": float(self.satisfied)}

    def _places(self, names: Sequence[str]) -> list[int]:
        for name in self.names:
            if name not in names:
                raise RecipeError(
                    f"{_WHERE}.thresholds: there is no component {name!r}.{nearest(name, names)} There are: "
                    f"{', '.join(names)}."
                )
        return [list(names).index(name) for name in self.names]


lagrangian = Lagrangian
