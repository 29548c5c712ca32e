"""ReNO: optimise the initial noise of a sample for its rewards, with the generator's weights as they are.

A one-step generator is a differentiable function of its noise, so a reward of the image can be climbed by the noise
itself. What keeps the noise plausible is the density of its norm, which for d standard normal numbers lies close to
sqrt(d - 1); what is returned is the best iterate, not the last.

ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization, arXiv 2406.04312.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guerdon.errors import RecipeError, ScoreError, ShapeError, nearest

Generator = Callable[[Tensor], Tensor]  # noise [N, ...] -> images [N, ...]
Reward = Callable[[Tensor], Tensor]  # images [N, ...] -> scores [N], higher is better
OPTIMISERS = ("sgd", "adam", "lbfgs")


class NoiseSearch(NamedTuple):
    """What a search found, and how it went. I iterations, N samples, K rewards.

    Attributes:
        images: [N, ...], of the best noise.
        noise: [N, ...], the best noise.
        initial: [N, ...], the images of the first noise.
        best: [N], the iteration of the best, from 0; 0 where no iterate had a finite loss.
        loss: [I, N], reward loss at each iteration, without the norm's term; NaN after a sample was stopped.
        scores: [I, N, K], of each reward at each iteration.
        norm: [I, N], of the noise at each iteration.
        stopped: [N], whether a loss or gradient that was not finite ended the search of a sample.
        names: the K rewards.
    """

    images: Tensor
    noise: Tensor
    initial: Tensor
    best: Int[Tensor, " N"]
    loss: Float[Tensor, "I N"]
    scores: Float[Tensor, "I N K"]
    norm: Float[Tensor, "I N"]
    stopped: Bool[Tensor, " N"]
    names: tuple[str, ...]


def norm_penalty(noise: Float[Tensor, "N ..."]) -> Float[Tensor, " N"]:
    """Minus the log-density of the norm of d standard normal numbers, up to a constant.

    penalty = ||noise||^2 / 2 - (d - 1) log ||noise||, least at ||noise|| = sqrt(d - 1).

    Args:
        noise: [N, ...], d numbers a sample, in any precision: the norm is taken in float32 at least.

    Returns:
        [N].

    Raises:
        ShapeError: the noise of a sample is zero, whose logarithm there is not.

    Gradient:
        (1 - (d - 1) / ||noise||^2) noise: inwards above sqrt(d - 1), outwards below, and never across.

    Example:
        >>> norm_penalty(torch.ones(1, 4))  # 4 / 2 - 3 log 2
        tensor([-0.0794])

    Source:
        arXiv 2406.04312.
    """
    flat = noise.flatten(1)
    square = flat.to(torch.promote_types(flat.dtype, torch.float32)).square().sum(1)
    if bool((square == 0).any()):
        raise ShapeError("inference.norm_penalty: the noise of a sample is zero throughout; draw it from N(0, 1).")
    return square / 2 - (flat.shape[1] - 1) / 2 * square.log()


def optimise_noise(
    generator: Generator,
    noise: Float[Tensor, "N ..."],
    rewards: Mapping[str, Reward],
    *,
    weights: Mapping[str, float] | None = None,
    offsets: Mapping[str, float] | None = None,
    iterations: int = 50,
    lr: float = 5.0,
    momentum: float = 0.9,
    nesterov: bool = True,
    grad_clip: float | None = 0.1,
    norm_weight: float = 0.01,
    optimiser: Literal["sgd", "adam", "lbfgs"] = "sgd",
    on_iteration: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> NoiseSearch:
    """Search for noise whose images the rewards like.

    Minimises, for each sample alone, sum_k w_k (offset_k - R_k(G(noise))) + norm_weight * norm_penalty(noise). The
    gradient of a sample is clipped by its own norm, g <- g min(1, grad_clip / (||g|| + 1e-6)), and applied with momentum
    (torch's form): v <- momentum v + g, noise <- noise - lr (g + momentum v). Of all iterates the one with the least
    reward loss is returned; the norm's term has no say in that. The last iteration is only looked at, so n iterations are
    n images and n - 1 updates.

    Args:
        generator: noise [N, ...] -> images [N, ...], the same for the same noise, each sample for itself. Its weights are
            left alone.
        noise: [N, ...], where to start: standard normal. It is optimised in float32 at least, and handed to the generator
            in its own precision.
        rewards: name -> images [N, ...] -> scores [N], higher is better, with a gradient.
        weights: of the rewards by name, 0 or more; None = 1 each. A reward with weight 0 is recorded, not climbed.
        offsets: added to the losses, which are then offset - score; they change no gradient. None = 0.
        iterations: n.
        lr: learning rate.
        momentum: of `sgd`.
        nesterov: whether `sgd` looks ahead.
        grad_clip: largest norm of a sample's gradient; None = not clipped. Not used by `lbfgs`, whose line search needs
            the gradient as it is.
        norm_weight: of the penalty; 0 = none.
        optimiser: `sgd`; `adam` (eps 1e-2); or `lbfgs` (10 inner iterations an update, history of 3, strong Wolfe line
            search), for one sample at a time.
        on_iteration: called with the number of the iteration, the noise, the images and the reward losses [N].

    Returns:
        The best images and noise, and the search's course.

    Raises:
        RecipeError: an option is out of range, or no reward has a weight.
        ScoreError: a reward has no gradient, or does not give one score an image.
        ShapeError: the noise of a sample is zero; or `lbfgs` with several samples.

    Gradient:
        None leaves this function.

    Edge cases:
        A sample whose loss or gradient is not finite keeps its best so far and is left where it is.
        One iteration gives the first image.

    Example:
        >>> start = torch.tensor([[3.0, 4.0]])
        >>> found = optimise_noise(lambda z: z, start, {"right": lambda x: x[:, 0]}, iterations=3, norm_weight=0.0)
        >>> found.best.item(), found.images[0, 1].item()
        (2, 4.0)

    Source:
        arXiv 2406.04312; momentum, offsets, and that the last iteration is not applied are its code's. Norm, clip and
        momentum of each sample for itself, so that results do not depend on the batch, are ours.
    """
    scale = _checked_weights(rewards, weights)
    _check(iterations, lr, momentum, grad_clip, norm_weight, optimiser, len(noise))
    shift = _by_name(offsets or {}, rewards, "offsets", 0.0)
    x = noise.detach().to(torch.promote_types(noise.dtype, torch.float32)).clone().requires_grad_(True)
    mover = _Mover(x, lr, momentum, nesterov, optimiser)

    def losses(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = generator(at.to(noise.dtype))
        scores = torch.stack([_scores(name, reward, images) for name, reward in rewards.items()], 1)
        used = scores[:, scale > 0]
        return images, scores, ((shift[scale > 0].to(scores) - used) * scale[scale > 0].to(scores)).sum(1)

    def total(at: Tensor) -> Tensor:
        loss = losses(at)[2].sum()
        return loss + norm_weight * norm_penalty(at).sum() if norm_weight else loss

    stopped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    course: dict[str, list[Tensor]] = {"loss": [], "scores": [], "norm": []}
    best: Any = None
    for i in range(iterations):
        with torch.enable_grad():
            images, scores, loss = losses(x)
            whole = loss + norm_weight * norm_penalty(x) if norm_weight else loss
        seen = loss.detach().masked_fill(stopped, torch.nan)
        if on_iteration is not None:
            on_iteration(i, x.detach().clone(), images.detach(), seen)
        course["loss"].append(seen)
        course["scores"].append(scores.detach())
        course["norm"].append(x.detach().flatten(1).norm(dim=1))
        best = _better(best, i, x.detach(), images.detach(), seen)
        stopped = stopped | ~whole.detach().isfinite()
        if i == iterations - 1 or bool(stopped.all()):
            break
        if optimiser == "lbfgs":
            before = x.detach().clone()
            mover.search(lambda: total(x))
            failed = ~x.detach().flatten(1).isfinite().all(1)
            _put_back(x, before, failed)
        else:
            (gradient,) = torch.autograd.grad(whole.sum(), x)
            failed = ~gradient.flatten(1).isfinite().all(1)
            mover.move(_clipped(gradient, grad_clip), frozen=stopped | failed)
        stopped = stopped | failed
    _, kept, pictures, number, initial = best
    return NoiseSearch(
        pictures,
        kept.to(noise.dtype),
        initial,
        number,
        torch.stack(course["loss"]),
        torch.stack(course["scores"]),
        torch.stack(course["norm"]),
        stopped,
        tuple(rewards),
    )


def _better(best: Any, i: int, x: Tensor, images: Tensor, loss: Tensor) -> Any:
    """The least loss so far with its noise, images and iteration, and the first images."""
    if best is None:
        return (
            loss.nan_to_num(torch.inf, torch.inf),
            x.clone(),
            images,
            torch.zeros_like(loss, dtype=torch.long),
            images,
        )
    least, kept, pictures, number, initial = best
    wins = loss < least  # NaN never wins

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(wins.view(-1, *([1] * (new.ndim - 1))), new, old)

    return choose(loss, least), choose(x, kept), choose(images, pictures), number.masked_fill(wins, i), initial


class _Mover:
    """An optimiser of noise in which no sample has to do with another."""

    def __init__(self, x: Tensor, lr: float, momentum: float, nesterov: bool, kind: str) -> None:
        self.x = x
        if kind == "sgd":
            self.own: torch.optim.Optimizer = torch.optim.SGD(
                [x], lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0
            )
        elif kind == "adam":
            self.own = torch.optim.Adam([x], lr=lr, eps=1e-2)
        else:
            self.own = torch.optim.LBFGS([x], lr=lr, max_iter=10, history_size=3, line_search_fn="strong_wolfe")

    def move(self, gradient: Tensor, frozen: Tensor) -> None:
        before = self.x.detach().clone()
        self.x.grad = torch.where(_wide(frozen, gradient), 0.0, gradient)
        self.own.step()
        _put_back(self.x, before, frozen)  # momentum would carry a frozen sample on

    def search(self, total: Callable[[], Tensor]) -> None:
        def closure() -> float:
            with torch.enable_grad():
                loss = total()
            (self.x.grad,) = torch.autograd.grad(loss, self.x)
            return loss.item()

        self.own.step(closure)


@torch.no_grad()
def _put_back(x: Tensor, before: Tensor, rows: Tensor) -> None:
    x.copy_(torch.where(_wide(rows, x), before, x))


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *([1] * (like.ndim - 1)))


def _clipped(gradient: Tensor, limit: float | None) -> Tensor:
    if limit is None:
        return gradient
    norm = gradient.flatten(1).norm(dim=1)
    return gradient * _wide((limit / (norm + 1e-6)).clamp(max=1.0), gradient)


def _scores(name: str, reward: Reward, images: Tensor) -> Tensor:
    found = reward(images)
    if not isinstance(found, Tensor) or found.shape != (len(images),):
        got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ScoreError(
            f"inference.optimise_noise: reward {name!r} must give a tensor with one score for each of the {len(images)} "
            f"images; got {got}."
        )
    if torch.is_grad_enabled() and not found.requires_grad:
        raise ScoreError(
            f"inference.optimise_noise: the scores of reward {name!r} have no gradient to the noise. Reward and generator "
            "must be made of operations of torch, without no_grad or .detach()."
        )
    return found


def _by_name(values: Mapping[str, float], rewards: Mapping[str, Any], what: str, default: float) -> Tensor:
    for name in values:
        if name not in rewards:
            raise RecipeError(
                f"inference.optimise_noise: {what} names {name!r}, and there is no such reward.{nearest(name, rewards)} "
                f"There are: {', '.join(rewards) or 'none'}."
            )
    return torch.tensor([float(values.get(name, default)) for name in rewards])


def _checked_weights(rewards: Mapping[str, Any], weights: Mapping[str, float] | None) -> Tensor:
    scale = _by_name(weights or {}, rewards, "weights", 1.0)
    if bool((scale < 0).any()):
        raise RecipeError(f"inference.optimise_noise: weights must be 0 or more; got {scale.tolist()}.")
    if not bool((scale > 0).any()):
        raise RecipeError("inference.optimise_noise: at least one reward with a weight above 0 is needed.")
    return scale


def _check(
    iterations: int,
    lr: float,
    momentum: float,
    grad_clip: float | None,
    norm_weight: float,
    optimiser: str,
    count: int,
) -> None:
    if optimiser not in OPTIMISERS:
        raise RecipeError(
            f"inference.optimise_noise: optimiser must be one of {', '.join(OPTIMISERS)}; got {optimiser!r}."
            f"{nearest(optimiser, OPTIMISERS)}"
        )
    if iterations < 1:
        raise RecipeError(f"inference.optimise_noise: iterations must be at least 1; got {iterations}.")
    if not (lr > 0 and 0 <= momentum < 1 and norm_weight >= 0 and (grad_clip is None or grad_clip > 0)):
        raise RecipeError(
            "inference.optimise_noise: lr and grad_clip must be above 0, momentum in [0, 1) and norm_weight 0 or more; got "
            f"{lr}, {grad_clip}, {momentum} and {norm_weight}."
        )
    if optimiser == "lbfgs" and count != 1:
        raise ShapeError(
            f"inference.optimise_noise: lbfgs takes one sample at a time, as its line search would tie them together; got "
            f"{count}. Call it once a sample, or use sgd."
        )


@torch.no_grad()
def best_of_n(
    generator: Generator,
    noises: Float[Tensor, "I N ..."],
    rewards: Mapping[str, Reward],
    *,
    weights: Mapping[str, float] | None = None,
) -> NoiseSearch:
    """The baseline with as many forward passes: of n random noises a sample, the one whose image the rewards like best.

    Args:
        generator: as for `optimise_noise`.
        noises: [n, N, ...].
        rewards: as for `optimise_noise`; they need no gradient.
        weights: of the rewards by name; None = 1 each.

    Returns:
        As `optimise_noise` does, the first of the noises being the initial one.

    Raises:
        RecipeError: no reward has a weight.
        ScoreError: a reward does not give one score an image.
    """
    scale = _checked_weights(rewards, weights)
    best: Any = None
    course: dict[str, list[Tensor]] = {"loss": [], "scores": [], "norm": []}
    for i, noise in enumerate(noises):
        images = generator(noise)
        scores = torch.stack([_scores(name, reward, images) for name, reward in rewards.items()], 1)
        loss = -(scores[:, scale > 0] * scale[scale > 0].to(scores)).sum(1)
        course["loss"].append(loss)
        course["scores"].append(scores)
        course["norm"].append(noise.flatten(1).norm(dim=1))
        best = _better(best, i, noise, images, loss)
    _, kept, pictures, number, initial = best
    stopped = torch.zeros(noises.shape[1], dtype=torch.bool)
    stacked = {name: torch.stack(values) for name, values in course.items()}
    return NoiseSearch(pictures, kept, initial, number, **stacked, stopped=stopped, names=tuple(rewards))
