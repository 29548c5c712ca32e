"""The shared harness for preference losses: the topics task, whose true quality no loss sees, from a supervised start."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from guerdon import cache
from guerdon.language.policy import LanguagePolicy
from guerdon.language.preferences import Singles
from guerdon.language.tasks import Task, topics
from guerdon.objectives.dpo import dpo
from guerdon.signal import Signal
from guerdon.training.evaluation import evaluate
from guerdon.training.forms import form_of
from guerdon.training.optimisation import Optim
from guerdon.training.preference import Preference, needs_reference
from guerdon.training.supervised import Supervised

MAX_NEW_TOKENS = 16
HELD_OUT_PAIRS = 1000


def base_policy(seed: int, *, steps: int = 300, length: int | None = None, task: Task = topics.TASK) -> LanguagePolicy:
    """The policy after `steps` supervised steps of 64 demonstrations: trained once, then read from the cache.

    Args:
        seed: of its weights and of the demonstrations.
        steps: supervised steps.
        length: letters of every sample; None = it ends when it likes.
        task: with the model of `topics`, and demonstrations of its own.
    """
    policy = LanguagePolicy.load(
        topics.model(seed),
        tokenizer=topics.tokenizer(),
        max_new_tokens=length or MAX_NEW_TOKENS,
        min_new_tokens=length or 0,
    )

    def make() -> dict[str, torch.Tensor]:
        optim = Optim(lr=3e-3, warmup_steps=20, weight_decay=0.01)
        Supervised(policy, task.demonstrations(seed), batch_size=64, optim=optim, steps=steps, seed=seed).run(steps)
        return policy.model.state_dict()

    policy.model.load_state_dict(cache.weights("bases", task.name, {"seed": seed, "steps": steps}, make))
    return policy


def guide_policy(
    seed: int, *, base_steps: int, steps: int, lr: float, batch_size: int = 64, length: int | None = None
) -> LanguagePolicy:
    """The base after `steps` of DPO on the pairs of `seed`, which other losses may be guided by; cached like the base."""
    policy = base_policy(seed, steps=base_steps, length=length)

    def make() -> dict[str, torch.Tensor]:
        policy.keep_reference()
        loop = Preference(
            policy,
            topics.pairs(seed, length=length),
            dpo,
            batch_size=batch_size,
            optim=Optim(lr=lr),
            steps=steps,
            seed=seed,
        )
        for _ in range(steps):
            loop.step()
        return policy.model.state_dict()

    key = {"seed": seed, "base_steps": base_steps, "steps": steps, "lr": lr, "batch_size": batch_size}
    key |= {} if length is None else {"length": length}
    policy.model.load_state_dict(cache.weights("guides", "topics", key, make))
    return policy


def topics_run(
    seed: int,
    objective: Callable[..., Any],
    *,
    steps: int = 200,
    batch_size: int = 64,
    lr: float = 1e-3,
    length_bias: float = 0.0,
    prompts: int = 400,
    base_steps: int = 300,
    guide_steps: int = 0,
    guide_lr: float = 5e-4,
    length: int | None = None,
) -> dict[str, Any]:
    """Train the base with one loss, as a user of the library would.

    Args:
        seed: of the base, the pairs and their order.
        objective: the loss.
        steps: updates.
        batch_size: pairs an update.
        lr: constant learning rate of AdamW.
        length_bias: of the labels, for training and held-out pairs alike.
        prompts: held-out prompts that are sampled.
        base_steps: supervised steps of the base.
        guide_steps: steps of DPO that made the guide of a loss that reads one; 0 = there is none.
        guide_lr: learning rate of those.
        length: letters of every answer, in pairs and samples; None = they vary.

    Returns:
        What `measure` returns. Figures: `quality_before`, `quality`, `quality_gain` (true, of samples), `win_rate` against
        the base, `length`, `length_before` (letters and end), `accuracy` (implicit rewards on held-out pairs),
        `likelihood_accuracy` (by mean log-probability), `length_correlation` (of the difference in length with that in
        mean log-probability), `seconds` (CPU of the loop). Curve: `accuracy` in training.
    """
    policy = base_policy(seed, steps=base_steps, length=length)
    rows = topics.held_out_rows(prompts)
    signal = Signal(rewards={"quality": topics.quality})
    test = partial(evaluate, policy, rows, signal, greedy=False)
    before = test()
    if needs_reference(objective):
        policy.keep_reference()
    unpaired = form_of(objective).kind == "unpaired"
    guides = {}
    if guide_steps:
        guides["guide"] = guide_policy(seed, base_steps=base_steps, steps=guide_steps, lr=guide_lr, length=length)
    pairs = topics.pairs(seed, length_bias=length_bias, length=length)
    held_out = topics.held_out_pairs(HELD_OUT_PAIRS, length_bias=length_bias, length=length)
    loop = Preference(
        policy,
        Singles(pairs) if unpaired else pairs,
        objective,
        batch_size=2 * batch_size if unpaired else batch_size,
        guides=guides,
        optim=Optim(lr=lr),
        steps=steps,
        seed=seed,
    )
    seconds, curve = -time.process_time(), []
    for step in range(1, steps + 1):
        metrics = loop.step()
        if step % 10 == 0 or step == steps:
            curve.append((float(step), metrics["accuracy"]))
    seconds += time.process_time()
    judged = loop.evaluate(Singles(held_out) if unpaired else held_out).metrics
    after = test()
    old, new = (found.rollouts["sampled"].scores for found in (before, after))
    assert old is not None
    assert new is not None
    wins = ((new > old).float() + 0.5 * (new == old).float()).mean().item()
    figures = {
        "quality_before": before.metrics["eval/sampled/quality"],
        "quality": after.metrics["eval/sampled/quality"],
        "quality_gain": after.metrics["eval/sampled/quality"] - before.metrics["eval/sampled/quality"],
        "win_rate": wins,
        "length_before": before.metrics["eval/sampled/length"],
        "length": after.metrics["eval/sampled/length"],
        "accuracy": judged["eval/accuracy"],
        "seconds": seconds,
    }
    for name in ("likelihood_accuracy", "length_correlation"):
        if f"eval/{name}" in judged:
            figures[name] = judged[f"eval/{name}"]
    return {"figures": figures, "curves": {"accuracy": curve}}
