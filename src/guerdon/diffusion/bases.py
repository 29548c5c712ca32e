"""Trained bases of the bundled image tasks: made once by their recipe, then read from the user's cache folder.

`shapes/full` draws what it is asked for; `shapes/short` has seen a fifth of that and is right a little more often than not,
which leaves room for a reward. So it is with `digits`. Shapes are drawn by flows, digits by diffusion models (v-prediction,
scaled linear betas, whose last time keeps enough of the image for DDIM with few steps).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from guerdon.cache import digest, weights, weights_path
from guerdon.diffusion.tasks import TASKS, find
from guerdon.errors import UnknownNameError, nearest

Kind = Literal["diffusion", "flow"]


@dataclass(frozen=True)
class Base:
    """How a base is trained; all of it decides the name under which its weights are kept.

    Attributes:
        task: the bundled image task.
        kind: `flow` or `diffusion`.
        steps: updates, over which the learning rate falls.
        batch_size: fresh images an update.
        optim: settings of `guerdon.training.optimisation.Optim`.
        condition_dropout: share of examples without a class, for guidance.
    """

    task: str
    kind: Kind
    steps: int
    batch_size: int = 64
    optim: dict[str, Any] = field(
        default_factory=lambda: {
            "lr": 2e-3,
            "betas": [0.9, 0.99],
            "schedule": "cosine",
            "final_lr": 0.05,
            "warmup_steps": 50,
            "clip_norm": 1.0,
            "ema": 0.995,
        }
    )
    condition_dropout: float = 0.1


BASES = {
    "shapes/full": Base("shapes", "flow", 2000),
    "shapes/short": Base("shapes", "flow", 400),
    "digits/full": Base("digits", "diffusion", 400),
    "digits/short": Base("digits", "diffusion", 60),
}


def scheduler(kind: Kind) -> Any:
    """The scheduler of diffusers that goes with a bundled network, `flow` or `diffusion`."""
    if kind == "flow":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler()
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def untrained(task: str, kind: Kind, *, seed: int = 0, **settings: Any) -> Any:
    """A bundled task's policy before any training.

    Args:
        task: a bundled image task.
        kind: `flow` or `diffusion`.
        seed: of the weights.
        **settings: of `DenoisingPolicy.load`.
    """
    from guerdon.diffusion.policy import DenoisingPolicy

    known = find(task)
    parts = (known.model(seed), scheduler(kind))
    return DenoisingPolicy.load(parts, captions=known.captions, patch=known.patch, kind=kind, **settings)


def base(name: str, *, seed: int = 0, kind: Kind | None = None, **settings: Any) -> Any:
    """A policy with the weights of a trained base.

    Args:
        name: `shapes/full`, `shapes/short`, `digits/full` or `digits/short`.
        seed: of its weights, images, noise and times.
        kind: train it as `flow` or `diffusion` in place of its usual kind.
        **settings: of `DenoisingPolicy.load`: steps, guidance, noise_level, ...

    Returns:
        The policy. Where the cache does not hold its weights they are trained first, which takes about 50 ms of CPU an
        update; a damaged file is found by its hash and made again, with a warning.

    Raises:
        UnknownNameError: there is no such base.
    """
    if name not in BASES:
        raise UnknownNameError(
            f"diffusion.bases: there is no base {name!r}.{nearest(name, BASES)} There are: {', '.join(BASES)}."
        )
    recipe = BASES[name] if kind is None else Base(**{**vars(BASES[name]), "kind": kind})
    policy = untrained(recipe.task, recipe.kind, seed=seed, **settings)
    what = f"training the base {name} ({recipe.kind}, seed {seed}, {recipe.steps} updates), once"
    facts, made = _facts(recipe, seed), lambda: _train(recipe, seed)
    policy.model.load_state_dict(weights("bases", _stem(name, recipe, seed), facts, made, what))
    return policy


def kept(name: str, *, seed: int = 0) -> bool:
    """Whether the cache holds a base already."""
    return weights_path("bases", _stem(name, BASES[name], seed), _facts(BASES[name], seed)).exists()


def _stem(name: str, recipe: Base, seed: int) -> str:
    return f"{name.replace('/', '-')}-{recipe.kind}-{seed}"


def _facts(recipe: Base, seed: int) -> dict[str, Any]:
    """What decides the weights: the recipe, and what it starts from."""
    task = find(recipe.task)
    first = {**task.model(seed).state_dict(), "image": task.demonstrations(seed)[0]["image"]}
    return {**asdict(recipe), "seed": seed, "start": digest(first)}


def _train(recipe: Base, seed: int) -> dict[str, Tensor]:
    """The weights that the supervised loop makes of the recipe."""
    import torch

    from guerdon.training.optimisation import Optim
    from guerdon.training.supervised import Supervised

    optim = Optim(**{**recipe.optim, "betas": tuple(recipe.optim["betas"])})
    with torch.enable_grad():
        policy = untrained(recipe.task, recipe.kind, seed=seed, condition_dropout=recipe.condition_dropout)
        rows = find(recipe.task).demonstrations(seed)
        loop = Supervised(policy, rows, batch_size=recipe.batch_size, optim=optim, steps=recipe.steps, seed=seed)
        loop.run(recipe.steps)
        loop.finish()
    return policy.model.state_dict()


def bundled_models() -> list[str]:
    """What `policy.model` can name: untrained networks and trained bases."""
    return [*TASKS, *BASES]
