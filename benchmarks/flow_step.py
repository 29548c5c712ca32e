"""One Flow-GRPO step on the shapes network, by guerdon or by the published loop: sample, score, learn, log.

    OMP_NUM_THREADS=1 python benchmarks/flow_step.py --who guerdon
    OMP_NUM_THREADS=1 python benchmarks/flow_step.py --who loop

`loop` is the arithmetic of the released step loops (DDPO's and Flow-GRPO's), written here from their equations: a pass
without gradient over all denoising steps that keeps states and log-probabilities, advantages, then for each step but the last
one forward and one backward pass over all samples, gradients being summed, and one update. Both sides start from the same
weights and take the same steps with the same loss; the random numbers differ. `--channels-last` gives the loop the layout of
memory that guerdon gives to networks made of convolutions.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

CLIP, ADVANTAGE_CLIP, BETAS = 1e-4, 5.0, (0.9, 0.999)


@dataclass(frozen=True)
class Work:
    """The step."""

    who: str = field(default="guerdon", metadata={"choices": ["guerdon", "loop"]})
    channels_last: bool = False
    prompts: int = 8
    group: int = 8
    denoising_steps: int = 10
    noise_level: float = 0.7
    lr: float = 3e-4
    steps: int = 20
    warmup: int = 3
    seed: int = 0

    @property
    def total(self) -> int:
        return self.steps + self.warmup


def red(samples: Any) -> list[list[float]]:
    """The reward: how red a picture is."""
    return [[(image[0].mean() - image[1:].mean()).item() for image in group] for group in samples]


class Book:
    """What is noted on the way through a run."""

    def __init__(self, work: Work) -> None:
        self.work, self.laps, self.phases = work, common.Laps(), common.Phases()
        self.rewards: list[float] = []

    def step(self, reward: float) -> None:
        self.laps.lap()
        self.rewards.append(reward)
        self.phases.running = len(self.rewards) >= self.work.warmup

    def figures(self, model: dict[str, float]) -> dict[str, Any]:
        return {
            "model": model,
            "step": self.laps.figures(self.work.warmup),
            "phases_cpu_s": self.phases.per(self.work.steps),
            "rss_peak_mib": common.memory_mib("VmHWM"),
            "rewards": [round(reward, 4) for reward in self.rewards],
            "reward_last": sum(self.rewards[-3:]) / 3,
        }


def run_guerdon(work: Work, book: Book) -> dict[str, float]:
    from functools import partial

    from guerdon.advantages import group_advantages
    from guerdon.diffusion.bases import untrained
    from guerdon.diffusion.tasks import find
    from guerdon.objectives.policy_gradient import policy_gradient
    from guerdon.signal import Signal
    from guerdon.training import Online, Optim
    from guerdon.training.records import Records

    policy = untrained(
        "shapes", "flow", seed=work.seed, steps=work.denoising_steps, noise_level=work.noise_level, spacing="even"
    )
    start = common.fingerprint(policy.model)
    loop = Online(
        policy,
        find("shapes").prompt_rows(),
        Signal(rewards={"red": red}, advantage=partial(group_advantages, scale="batch", bessel=False)),
        partial(policy_gradient, clip_low=CLIP, clip_high=CLIP, advantage_clip=ADVANTAGE_CLIP),
        prompts_per_step=work.prompts,
        group_size=work.group,
        optim=Optim(lr=work.lr, betas=BETAS, clip_norm=1.0),
        steps=work.total,
        seed=work.seed,
    )
    book.phases.wrap(policy, "sample", "sample")
    book.phases.wrap(policy, "log_prob", "forward")
    book.phases.wrap(loop.accelerator, "backward", "backward")
    with tempfile.TemporaryDirectory() as folder:
        records = Records(Path(folder), enabled=True)
        book.laps.start()
        for _ in range(work.total):
            result = loop.step()
            records.step(result, 0.0, samples=False)
            book.step(result.metrics["score/red"])
        records.close()
    return start


def run_loop(work: Work, book: Book) -> dict[str, float]:
    import torch
    from torch.nn.functional import pixel_shuffle

    from guerdon.diffusion.tasks import find

    torch.manual_seed(work.seed)
    task = find("shapes")
    network: Any = task.model(work.seed).eval()
    start = common.fingerprint(network)
    layout = torch.channels_last if work.channels_last else torch.contiguous_format
    network.to(memory_format=layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=work.lr, betas=BETAS, weight_decay=0.0)
    count, length = work.prompts * work.group, work.denoising_steps
    sigmas = torch.linspace(1, 0, length + 1).tolist()
    rows = task.prompt_rows()

    def step_with_logprob(labels: Any, x: Any, i: int, x_next: Any = None) -> tuple[Any, Any]:
        """Mean and spread of step i, a draw of it if none is given, and its log-probability."""
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        times = torch.full((len(x),), 1000 * sigma)
        v = network(x.to(memory_format=layout), times, class_labels=labels, return_dict=False)[0].float()
        s = work.noise_level * (sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) ** 0.5
        mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        std = torch.tensor(s * (-dt) ** 0.5)
        if x_next is None:
            x_next = mean + std * torch.randn(x.shape)
        logp = -((x_next.detach() - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * torch.log(2 * torch.tensor(torch.pi))
        return x_next, logp.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def sample(labels: Any) -> tuple[Any, Any]:
        x = torch.randn(count, 12, 8, 8)
        states, logps = [x], []
        for i in range(length - 1):
            x, logp = step_with_logprob(labels, x, i)
            states.append(x)
            logps.append(logp)
        times = torch.full((count,), 1000 * sigmas[-2])
        v = network(x.to(memory_format=layout), times, class_labels=labels, return_dict=False)[0].float()
        states.append(x - v * sigmas[-2])
        return torch.stack(states, 1), torch.stack(logps, 1)

    timed = {"sample": sample, "forward": step_with_logprob, "backward": lambda loss: loss.backward()}
    phases: Any = type("Phase", (), {name: staticmethod(function) for name, function in timed.items()})
    for name in timed:
        book.phases.wrap(phases, name, name)
    book.laps.start()
    for number in range(work.total):
        first = number * work.prompts
        chosen = [rows[(first + p) % len(rows)]["label"] for p in range(work.prompts)]
        labels = torch.tensor(chosen).repeat_interleave(work.group)
        states, logp_old = phases.sample(labels)
        images = ((pixel_shuffle(states[:, -1], 2) + 1) / 2).clamp(0, 1)
        rewards = torch.tensor(red([list(group) for group in images.unflatten(0, (work.prompts, work.group))]))
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(unbiased=False) + 1e-4)).flatten()
        advantages = advantages.clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
        told: dict[str, list[float]] = {"loss": [], "approx_kl": [], "clipped": []}
        for i in range(length - 1):
            _, logp = phases.forward(labels, states[:, i], i, states[:, i + 1])
            ratio = torch.exp(logp - logp_old[:, i])
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean() / (length - 1)
            phases.backward(loss)
            told["loss"].append(loss.item())
            told["approx_kl"].append(0.5 * (logp - logp_old[:, i]).square().mean().item())
            told["clipped"].append(((ratio - 1).abs() > CLIP).float().mean().item())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        book.step(rewards.mean().item())
    return start


def main() -> None:
    common.quiet()
    work, target = common.settings(Work, __doc__)
    book = Book(work)
    begin = time.process_time()
    model = {"guerdon": run_guerdon, "loop": run_loop}[work.who](work, book)
    figures = book.figures(model)
    common.report(work, {**figures, "process_cpu_s": time.process_time() - begin}, target)


if __name__ == "__main__":
    main()
