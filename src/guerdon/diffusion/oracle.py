"""Oracles of the bundled image tasks: small classifiers that say whether a picture is what its caption asks for.

Two oracles that differ in their seed saw different pictures and started elsewhere. One can be the reward, and the other
the judge that no training ever looks at: a reward that rises while the judge does not is being gamed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from guerdon.cache import digest, weights
from guerdon.diffusion.tasks import Task, find
from guerdon.errors import RecipeError, check_shapes, nearest
from guerdon.metrics import frechet_distance, vendi_score

FEATURES = 64
# how an oracle is trained; part of the name under which it is kept
RECIPE = {"steps": 400, "batch_size": 128, "lr": 4e-3, "noise": 0.025, "channels": [32, 32, 64]}

Says = Literal["log_probability", "probability", "right"]


class Oracle(nn.Module):
    """Three convolutions and a layer of 64 features before the classes: about 95 thousand weights for `shapes`.

    Args:
        channels: of the images.
        size: height and width of the images, in pixels.
        classes: how many there are.
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (size // 4) ** 2, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N 64"]:
        """What the classes are told from.

        Args:
            images: [N, C, H, W], in [0, 1].

        Gradient:
            To the images.
        """
        return self.body(2 * images - 1)

    def forward(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N classes"]:
        """Logits of the classes.

        Args:
            images: [N, C, H, W], in [0, 1].

        Gradient:
            To the images: a pathwise loop can climb it.
        """
        return self.head(self.features(images))


@functools.lru_cache(maxsize=8)
def oracle(task: str, seed: int = 0) -> Oracle:
    """The oracle of a bundled task: trained once (about 20 CPU seconds), then read from the cache.

    Args:
        task: a bundled image task.
        seed: of the weights, the pictures and the noise.

    Returns:
        The network in evaluation mode, its weights frozen. The same object for the same arguments.

    Raises:
        UnknownNameError: there is no such task.
    """
    known = find(task)
    network = Oracle(known.channels, known.size, len(known.captions)).requires_grad_(False).eval()
    first = {"image": known.draw(torch.arange(len(known.captions)), torch.Generator().manual_seed(seed))}
    recipe = {"task": task, "seed": seed, "start": digest(first), **RECIPE}
    what = f"training the oracle {seed} of {task}, once"
    network.load_state_dict(weights("oracles", f"{task}-{seed}", recipe, lambda: _train(known, seed), what))
    return network


@torch.enable_grad()  # it is often asked for where no gradient is wanted
def _train(task: Task, seed: int) -> dict[str, Tensor]:
    """Train on fresh pictures of random classes with a little noise."""
    generator = torch.Generator().manual_seed(7919 * seed + 17)  # not the seeds that policies are trained with
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7919 * seed + 17)
        network = Oracle(task.channels, task.size, len(task.captions))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RECIPE["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, RECIPE["steps"])
    for _ in range(RECIPE["steps"]):
        labels = torch.randint(len(task.captions), (RECIPE["batch_size"],), generator=generator)
        images = task.draw(labels, generator)
        strength = RECIPE["noise"] * torch.rand(len(images), 1, 1, 1, generator=generator)
        noisy = images + strength * torch.randn(images.shape, generator=generator)
        loss = functional.cross_entropy(network(noisy), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.state_dict()


class OracleScore:
    """A reward: what an oracle says about a picture and the class that was asked for.

    It gives pairs (score, answer), the answer being the caption of the likeliest class, so that stages which compare a
    group's answers (`copo`) have something to compare.

    Args:
        task: the bundled image task whose oracle it is.
        seed: of the oracle. Take one seed for the reward and another for the judge under `watch`.
        says: `log_probability` of the class, in nats, at most 0 (smooth, and never quite satisfied); its `probability`;
            or `right`, 1 where the class is the likeliest, else 0.
        lowest: log-probabilities are held above it, so that one hopeless picture does not decide an update.

    Raises:
        RecipeError: an option is unknown.
        UnknownNameError: there is no such task.

    Edge cases:
        The oracle is trained, or read from the cache, when the first picture is scored.
    """

    def __init__(self, *, task: str, seed: int = 0, says: Says = "log_probability", lowest: float = -10.0) -> None:
        if says not in ("log_probability", "probability", "right"):
            known = ("log_probability", "probability", "right")
            raise RecipeError(
                f"diffusion.oracle_score: says must be one of {', '.join(known)}; got {says!r}.{nearest(says, known)}"
            )
        find(task)
        self.task, self.seed, self.says, self.lowest = task, seed, says, lowest

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sequence[Tensor]], label: Sequence[int]) -> list[list[tuple[float, str]]]:
        """Pairs (score, caption of the likeliest class) [P][G] of P groups of pictures [C, H, W] in [0, 1].

        Args:
            samples: [P][G] pictures.
            label: [P], the class that was asked for.
        """
        logits = _run(self.task, self.seed, [image for group in samples for image in group])
        wanted = torch.tensor([one for one, group in zip(label, samples, strict=True) for _ in group])
        wanted, found = wanted.to(logits.device), logits.argmax(-1)
        if self.says == "right":
            scores = (found == wanted).float()
        else:
            scores = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].clamp(min=self.lowest)
            scores = scores.exp() if self.says == "probability" else scores
        captions = find(self.task).captions
        pairs = iter([(score, captions[k]) for score, k in zip(scores.tolist(), found.tolist(), strict=True)])
        return [list(itertools.islice(pairs, len(group))) for group in samples]


class OracleLikeness:
    """The same as `oracle_score` with a gradient to the pictures: for a pathwise loop, or to optimise noise.

    Args:
        task: the bundled image task whose oracle it is.
        seed: of the oracle.
        says: `log_probability` of the class, in nats, or its `probability`.

    Raises:
        RecipeError: an option is unknown.
        UnknownNameError: there is no such task.
    """

    def __init__(
        self, *, task: str, seed: int = 0, says: Literal["log_probability", "probability"] = "log_probability"
    ) -> None:
        known = ("log_probability", "probability")
        if says not in known:
            raise RecipeError(
                f"diffusion.oracle_likeness: says must be one of {', '.join(known)}; got {says!r}.{nearest(says, known)}"
            )
        find(task)
        self.task, self.seed, self.says = task, seed, says

    def __call__(self, images: Float[Tensor, "N C H W"], label: Sequence[int]) -> Float[Tensor, " N"]:
        """Scores of pictures in [0, 1], each against the label of its prompt.

        Args:
            images: [N, C, H, W].
            label: N, the class that was asked for.

        Gradient:
            To the images.
        """
        logits = _on(images.device, self.task, self.seed)(images.float())
        wanted = torch.as_tensor(list(label), device=logits.device)
        scores = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
        return scores.exp() if self.says == "probability" else scores


def _run(task: str, seed: int, images: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(images)).float()
    return _on(stacked.device, task, seed)(stacked)


def _on(device: torch.device, task: str, seed: int) -> Oracle:
    return oracle(task, seed).to(device)


class Quality(NamedTuple):
    """What an oracle finds in a set of pictures.

    Attributes:
        accuracy: share whose likeliest class is the label.
        distance: Frechet distance from as many real pictures of the same labels, in the oracle's 64 features.
        diversity: see `oracle_diversity`, over the pictures of a class, mean over the classes.
    """

    accuracy: float
    distance: float
    diversity: float


@torch.no_grad()
def quality(
    task: str, images: Float[Tensor, "N C H W"], labels: Int[Tensor, " N"], *, seed: int = 1, real_seed: int = 0
) -> Quality:
    """Judge pictures with an oracle.

    Args:
        task: the bundled image task.
        images: [N, C, H, W], in [0, 1].
        labels: [N], the class that was asked for.
        seed: of the oracle; by default the held-out judge.
        real_seed: of the real pictures that they are compared with.

    Returns:
        Accuracy, Frechet distance, diversity. The distance falls with N even for real pictures: compare with that of
        real ones, `quality(task, find(task).held_out(labels, generator), labels)`.

    Raises:
        ShapeError: the arguments do not fit.
    """
    check_shapes("diffusion.quality", images=(images, "N C H W"), labels=(labels, "N"))
    network = _on(images.device, task, seed)
    real = find(task).held_out(labels.cpu(), torch.Generator().manual_seed(real_seed + 1_000_003)).to(images.device)
    found = network.features(images)
    accuracy = (network.head(found).argmax(-1) == labels).float().mean().item()
    kinds = [vendi_score(found[labels == label] - _middle(task, seed)[label].to(found)) for label in labels.unique()]
    return Quality(accuracy, frechet_distance(found, network.features(real)), sum(kinds) / len(kinds))


@functools.lru_cache(maxsize=8)
def _middle(task: str, seed: int) -> Tensor:
    """The mean features [classes, 64] of 64 real pictures of each class."""
    known = find(task)
    labels = torch.arange(len(known.captions)).repeat_interleave(64)
    images = known.draw(labels, torch.Generator().manual_seed(2_000_003))
    network = oracle(task, seed)
    with torch.no_grad():
        features = network.features(images.to(next(network.parameters()).device))
    return features.unflatten(0, (-1, 64)).mean(1).cpu()


class OracleDiversity:
    """A score of a whole group: how many different pictures of what was asked for there are in it.

    It is the Vendi score of an oracle's features less the mean features of real pictures of the class: how many
    directions there are in which the pictures differ from the usual one. To be watched beside a reward: an update that
    only makes samples alike shows here first.

    Args:
        task: the bundled image task whose oracle it is.
        seed: of the oracle; by default the judge.

    Raises:
        UnknownNameError: there is no such task.

    Edge cases:
        Every sample of a group gets the group's score. A group of one is not scored.
    """

    def __init__(self, *, task: str, seed: int = 1) -> None:
        find(task)
        self.task, self.seed = task, seed

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sequence[Tensor]], label: Sequence[int]) -> list[list[float | None]]:
        """Scores [P][G], in [1, G], of P groups of pictures [C, H, W] in [0, 1]."""
        scores: list[list[float | None]] = []
        for group, one in zip(samples, label, strict=True):
            if len(group) == 1:
                scores.append([None])
                continue
            images = torch.stack(list(group)).float()
            features = _on(images.device, self.task, self.seed).features(images)
            scores.append([vendi_score(features - _middle(self.task, self.seed)[one].to(features))] * len(group))
        return scores


# their names in a recipe
oracle_score, oracle_likeness, oracle_diversity = OracleScore, OracleLikeness, OracleDiversity

__all__ = ["Oracle", "Quality", "oracle", "oracle_diversity", "oracle_likeness", "oracle_score", "quality"]
