"""The pathwise loop: follow a differentiable reward's gradient back through the sampler to the weights.

One step draws P prompts, samples G images each with a graph, scores them with rewards that keep it, and goes up the
gradient of the mean reward. Nothing is estimated from scores, so there are no advantages; what is chosen is how far back
through the denoising steps the gradient goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from guerdon.errors import BindingError, NumericsError, RecipeError, nearest
from guerdon.ledger import attribute
from guerdon.rollout import Rollout, join
from guerdon.signal import Signal
from guerdon.stages import call, signature
from guerdon.training.allocator import keep_freed_memory
from guerdon.training.loop import Loop, mix_seed
from guerdon.training.online import Clock, StepResult, check_sizes, describe
from guerdon.training.optimisation import Optim

TRUNCATIONS = ("full", "last", "uniform", "gaussian", "low_variance", "single")


class Cut(NamedTuple):
    """How a batch is differentiated.

    Attributes:
        first: the first step with a gradient.
        predict: the sample is what step `first` predicts, and the chain ends there.
        renoise: finished samples are noised again so many times, and only the last step has a gradient; 0 = not.
    """

    first: int
    predict: bool = False
    renoise: int = 0


@dataclass(frozen=True)
class Truncation:
    """How far back through the T denoising steps the gradient goes, drawn anew for each batch where it is random.

    With K steps of gradient the cut is b = T - K. Cutting is cheaper, biased, and keeps gradients from growing with the
    length of the chain; a random cut still reaches the early steps, which decide what the image shows.

    Attributes:
        kind: `full`, b = 0 (DRaFT); `last`, the last `k` steps (DRaFT-K); `uniform`, b uniform over 1 ... T - 1;
            `gaussian`, b the integer part of a normal number, drawn again while it is not in 1 ... T - 1; `low_variance`,
            the last step alone, averaged over `renoise` new noises a sample (DRaFT-LV); `single`, one step drawn from the
            last `share` of all, and the sample that it predicts (ReFL).
        k: steps of `last`.
        mean: of `gaussian`, as a share of T.
        std: of `gaussian`, as a share of T.
        renoise: noises of `low_variance`.
        share: of the steps that `single` draws from.

    Raises:
        RecipeError: an option is unknown or out of range.

    Example:
        >>> Truncation(kind="last", k=2).draw(8, seed=0)
        Cut(first=6, predict=False, renoise=0)

    Source:
        AlignProp: Aligning Text-to-Image Diffusion Models with Reward Backpropagation, arXiv 2310.03739 (`uniform` is the
        paper's, `gaussian` with 0.84 and 0.1 its code's: 42 and 5 of 50 steps); DRaFT, arXiv 2309.17400; ReFL, arXiv
        2304.05977.
    """

    kind: Literal["full", "last", "uniform", "gaussian", "low_variance", "single"] = "uniform"
    k: int = 1
    mean: float = 0.84
    std: float = 0.1
    renoise: int = 2
    share: float = 0.25

    def __post_init__(self) -> None:
        if self.kind not in TRUNCATIONS:
            raise RecipeError(
                f"pathwise.truncation must be one of {', '.join(TRUNCATIONS)}; got {self.kind!r}."
                f"{nearest(self.kind, TRUNCATIONS)}"
            )
        if self.k < 1 or self.renoise < 1:
            raise RecipeError(f"pathwise: k and renoise must be at least 1; got {self.k} and {self.renoise}.")
        if not (0 < self.mean < 1 and self.std > 0 and 0 < self.share <= 1):
            raise RecipeError(
                f"pathwise: cut_mean must be in (0, 1), cut_std above 0 and share in (0, 1]; got {self.mean}, {self.std} "
                f"and {self.share}."
            )

    def check(self, steps: int) -> None:
        """Check that a sampler of `steps` steps can be cut so.

        Raises:
            RecipeError: too many steps are asked for, or a random cut has nothing to choose from.
        """
        if self.kind == "last" and self.k > steps:
            raise RecipeError(f"pathwise.k = {self.k} steps of gradient are more than policy.steps = {steps}.")
        if self.kind in ("uniform", "gaussian") and steps < 2:
            raise RecipeError(
                f"pathwise.truncation = {self.kind} leaves at least one step without a gradient, and policy.steps is "
                f"{steps}. Use truncation: full."
            )

    def draw(self, steps: int, seed: int) -> Cut:
        """The cut of a batch; the same for the same seed."""
        self.check(steps)
        generator = np.random.default_rng(seed)
        if self.kind == "full":
            return Cut(0)
        if self.kind == "last":
            return Cut(steps - self.k)
        if self.kind == "uniform":
            return Cut(int(generator.integers(1, steps)))
        if self.kind == "low_variance":
            return Cut(steps - 1, renoise=self.renoise)
        if self.kind == "single":
            return Cut(
                int(generator.integers(min(math.ceil(steps * (1 - self.share)), steps - 1), steps)), predict=True
            )
        drawn = 0
        while not 1 <= drawn < steps:
            drawn = int(generator.normal(self.mean * steps, self.std * steps))
        return Cut(drawn)


class Pathwise(Loop):
    """Train a policy by the gradient of its samples' rewards.

    Minimises -`scale` times the mean reward, plus `beta` times the mean drift from the reference. Rewards name `images`
    [N, C, H, W] and give a tensor [N] with its graph; shapings and the weighting must keep it.

    Args:
        policy: with a method `pathwise`, as those of images have.
        rows: data rows; `prompt` is handed to the policy, the other columns to the stages.
        signal: its rewards, shapings and weighting; its advantage is not used.
        truncation: how far back the gradient goes.
        scale: multiplies the reward; with Adam it matters for clipping alone.
        beta: weight of the drift: the mean squared difference of the network's output from the reference's, over the
            steps with gradient.
        deterministic: sample without noise.
        checkpointing: compute each step's activations again in the backward pass, so that memory does not grow with the
            number of steps times the activations of one.
        skips: updates in a row whose gradient is not finite, and which are left out and counted, before the run is
            stopped.
        sampler: which prompts to draw; uniform without replacement by default.
        prompts_per_step: P, over all processes.
        group_size: G.
        micro_batch: prompts per forward pass and process; null = all.
        optim: optimiser settings.
        steps: length of the whole run, for the schedule.
        seed: of everything random in the loop.
        accelerator: processes, device and precision.

    Raises:
        RecipeError: sizes do not divide, the policy has no pathwise gradient, or the cut does not fit its steps.
        BindingError: a reward does not name `images`, or asks for a field that will not be there.

    Source:
        AlignProp: Aligning Text-to-Image Diffusion Models with Reward Backpropagation, arXiv 2310.03739.
    """

    def __init__(
        self,
        policy: Any,
        rows: Sequence[Mapping[str, Any]],
        signal: Signal,
        *,
        truncation: Truncation | None = None,
        scale: float = 1.0,
        beta: float = 0.0,
        deterministic: bool = False,
        checkpointing: bool = True,
        skips: int = 10,
        sampler: Any = None,
        prompts_per_step: int = 8,
        group_size: int = 1,
        micro_batch: int | None = None,
        optim: Optim | None = None,
        steps: int = 1000,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        accelerator = accelerator or Accelerator()
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        check_sizes(prompts_per_step, 1, accelerator.num_processes)
        if not hasattr(policy, "pathwise"):
            raise RecipeError(
                f"pathwise: {type(policy).__name__} has no gradient from samples to weights; only policies of images have."
            )
        self.truncation = truncation or Truncation()
        self.truncation.check(policy.max_steps)
        check_rewards(signal, rows[0])
        self.signal = signal.to(accelerator.device)
        self.scale, self.beta, self.micro_batch, self.skips = scale, beta, micro_batch, skips
        self.options = {"deterministic": deterministic, "checkpointing": checkpointing, "drift": beta > 0}
        self.prompts_per_step, self.group_size = prompts_per_step, group_size
        self.skipped_in_a_row = 0
        super().__init__(policy, rows, sampler=sampler, optim=optim, updates=steps, seed=seed, accelerator=accelerator)
        if self.sampler.draws_max != 1:
            raise RecipeError("sampling: a sampler that draws again until groups differ has no use in a pathwise loop.")

    def step(self) -> StepResult:
        """Make one step.

        Raises:
            ScoreError: a reward has no gradient, or failed and the signal says `stop`.
            NumericsError: too many updates in a row could not be made.
        """
        clock = Clock()
        cut = self.truncation.draw(self.policy.max_steps, mix_seed(self.seed, self.steps_done, 5))
        copies = max(cut.renoise, 1)
        count = self.prompts_per_step * self.group_size * copies
        indices = self.sampler.draw(self.prompts_per_step)
        share = len(indices) // self.processes
        block = range(self.rank * share, (self.rank + 1) * share)
        size = self.micro_batch or share
        loss, drift = torch.zeros(2, device=self.accelerator.device)
        parts = []
        for start in range(0, share, size):
            picked = block[start : start + size]
            with nullcontext() if start + size >= share else self.accelerator.no_sync(self.module):
                with clock("sample"):
                    found, rollout = self._samples([indices[i] for i in picked], picked, cut, copies)
                with clock("reward"):
                    scored = self.signal.weigh(self.signal.score_images(rollout, found.images))
                    total = self._loss(scored, found.drift)
                with clock("update"):
                    self.accelerator.backward(total * (self.processes / count))
            loss += total.detach().to(loss.dtype)
            drift += found.drift.detach().sum().to(drift.dtype)
            parts.append(scored.detach())
        loss, drift = self.sum_over_processes(torch.stack([loss, drift]))
        with clock("update"):
            update = self.apply_gradient(loss)
        self._count_skips(update.made, loss.item() / count, update.norm)
        self.steps_done += 1
        everything = self.gather(join(parts))
        self._observe(everything)
        attribution = attribute(everything)
        learned = {"loss": loss.item() / count, "lr": update.lr, "grad_norm": update.norm}
        metrics = {
            **describe(everything, attribution, tuple(self.signal.watch)),
            **learned,
            **({"drift": drift.item() / count} if self.beta else {}),
            "cut": float(cut.first),
            "skipped": float(not update.made),
            **{f"sampling/{name}": value for name, value in self.sampler.metrics().items()},
            **self.signal.metrics(),
            **clock.seconds(),
        }
        return StepResult(self.steps_done, metrics, everything, attribution)

    def _samples(self, indices: Sequence[int], places: Iterable[int], cut: Cut, copies: int) -> tuple[Any, Rollout]:
        """Images with a graph, and the record of them, in which a step with gradient is a live one."""
        rows = [self.rows[i] for i in indices]
        prompts = [row["prompt"] for row in rows]
        seeds = [mix_seed(self.seed, self.steps_done, 0, i) for i in places]
        found = self.policy.pathwise(
            prompts,
            self.group_size,
            seeds,
            cut=cut.first,
            predict=cut.predict,
            renoise=cut.renoise,
            module=self.module,
            **self.options,
        )
        group = self.group_size * copies
        mask = torch.zeros(len(rows), group, self.policy.max_steps, dtype=torch.bool, device=found.images.device)
        mask[..., cut.first : cut.first + 1 if cut.predict else None] = True
        pictures = found.images.detach().float().cpu().unflatten(0, (len(rows), group))
        rollout = Rollout(
            prompts=prompts,
            samples=[list(images) for images in pictures],
            mask=mask,
            logp_old=torch.zeros(mask.shape, device=mask.device),
            columns={name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"},
            indices=list(indices),
        )
        return found, rollout

    def _loss(self, scored: Rollout, drift: Tensor) -> Tensor:
        """Summed over samples; one that was dropped adds nothing but its drift."""
        rewards = scored.rewards
        assert rewards is not None
        if not rewards.requires_grad:
            raise RecipeError(
                "pathwise: shaping or weighting ended the gradient of the scores. Take a stage that is made of operations "
                "of torch alone."
            )
        gained = torch.where(rewards.isnan(), 0.0, rewards).sum()
        return self.beta * drift.sum() - self.scale * gained if self.beta else -self.scale * gained

    def _count_skips(self, made: bool, loss: float, norm: float) -> None:
        self.skipped_in_a_row = 0 if made else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > self.skips:
            raise NumericsError(
                f"pathwise step {self.steps_done + 1}: loss {loss:g}, gradient norm {norm:g}, as in the {self.skips} steps "
                "before: no update was made. Lower the learning rate or truncate the gradient, and look at the rewards."
            )

    def _observe(self, everything: Rollout) -> None:
        fields = everything.available() | {"step": self.steps_done}
        self.signal.observe(fields)
        if hasattr(self.sampler, "observe"):
            call(self.sampler, fields, method="observe")

    def modules(self) -> dict[str, nn.Module]:
        """Everything with state beside the policy, by name."""
        return {**super().modules(), "signal": self.signal}

    def facts(self) -> dict[str, Any]:
        """Plain numbers that belong to the state."""
        return {**super().facts(), "skipped_in_a_row": self.skipped_in_a_row}


def check_rewards(signal: Signal, columns: Iterable[str]) -> None:
    """Check that every reward can be differentiated by the images, and finds its fields.

    Raises:
        BindingError: naming the reward.
    """
    for name, reward in signal.rewards.items():
        if "images" not in signature(reward).fields:
            raise BindingError(
                f"rewards.{name}: with loop: pathwise a reward must name `images`, the tensor [N, C, H, W] to differentiate "
                f"by, and give a tensor [N] made of it; it names {', '.join(signature(reward).fields) or 'nothing'}."
            )
    signal.check({"prompts", "samples", "mask", "lengths", "indices", *columns})
