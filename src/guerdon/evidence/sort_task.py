"""The job that most claims about language models are tested on: sort digits, after a short supervised start.

The task, the policy and the loops are those that `guerdon train sort` uses.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load, save

from guerdon import __version__
from guerdon.errors import require
from guerdon.evidence.base import Points
from guerdon.evidence.cache import cache_folder, replace
from guerdon.language.policy import LanguagePolicy
from guerdon.language.tasks import sort
from guerdon.rewards import exact_answer
from guerdon.signal import Signal
from guerdon.stages import wants
from guerdon.training.evaluation import evaluate
from guerdon.training.online import Online, StepResult
from guerdon.training.optimisation import Optim
from guerdon.training.supervised import Supervised

MAX_NEW_TOKENS = sort.LONGEST + 1  # the digits and the end
_WINDOW = 10  # steps averaged in a point of a training curve
_FOLLOWED = ("reward", "constant_groups", "entropy", "ratio_max", "clip_share", "truncated")  # of the loop's metrics


def base_policy(
    seed: int, *, steps: int = 70, batch_size: int = 128, lr: float = 2e-3, warmup_steps: int = 50, **settings: Any
) -> LanguagePolicy:
    """The policy after its supervised start: trained once for its settings, then read from the cache.

    70 steps end at partial competence on purpose (about half of the greedy answers right); 50 leave nearly all groups
    wrong, 120 most of them right.

    Args:
        seed: of the weights and of the demonstrations.
        steps: supervised steps; 0 = untrained.
        batch_size: fresh demonstrations a step.
        lr: peak learning rate of AdamW, weight decay 0.01.
        warmup_steps: over which it rises.
        **settings: of `LanguagePolicy.load`: temperature, critic, ...
    """
    require("transformers", "language")
    policy = LanguagePolicy.load(
        sort.model(seed), tokenizer=sort.tokenizer(), **{"max_new_tokens": MAX_NEW_TOKENS, **settings}
    )
    recipe = {"seed": seed, "steps": steps, "batch_size": batch_size, "lr": lr, "warmup_steps": warmup_steps}
    if steps == 0:
        return policy
    code = hashlib.sha256(inspect.getsource(sort).encode()).hexdigest()
    key = hashlib.sha256(json.dumps([recipe, code, __version__], sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder() / "bases" / f"sort-{key}.safetensors"
    weights = _kept(path)
    if weights is None:
        optim = Optim(lr=lr, warmup_steps=warmup_steps, weight_decay=0.01)
        loop = Supervised(policy, sort.demonstrations(seed), batch_size=batch_size, optim=optim, steps=steps, seed=seed)
        loop.run(steps)
        content = save({name: value.contiguous() for name, value in policy.model.state_dict().items()})
        # the hash comes first: a file without its hash is trained again, a file with another's is refused
        replace(path.with_suffix(".sha256"), hashlib.sha256(content).hexdigest().encode())
        replace(path, content)
        weights = load(content)
    policy.model.load_state_dict(weights)
    return policy


def _kept(path: Path) -> dict[str, torch.Tensor] | None:
    """Weights in the cache, if they are whole."""
    try:
        content, expected = path.read_bytes(), path.with_suffix(".sha256").read_text()
    except FileNotFoundError:
        return None
    if hashlib.sha256(content).hexdigest() != expected:
        warnings.warn(f"{path} is damaged (its hash differs); it is trained again.", stacklevel=3)
        return None
    return load(content)


def accuracy(policy: LanguagePolicy, *, size: int = 400, samples: int = 1) -> dict[str, float]:
    """Share of right answers to held-out prompts, `greedy` and `sampled` at the policy's temperature.

    Args:
        policy: to be tested.
        size: held-out prompts; always the same ones.
        samples: a prompt, for `sampled`.
    """
    found = evaluate(
        policy, sort.held_out_rows(size), Signal(rewards={"correct": exact_answer}), samples=samples
    ).metrics
    return {mode: found[f"eval/{mode}/correct"] for mode in ("greedy", "sampled")}


def sort_run(
    seed: int,
    *,
    signal: Signal,
    objective: Callable[..., Any],
    sampler: Any = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    warm_steps: int = 70,
    steps: int = 200,
    prompts: int = 32,
    group_size: int = 8,
    lr: float = 3e-4,
    passes: int = 1,
    mini_batches: int = 1,
    old_logp: Literal["sampler", "recompute"] = "sampler",
    temperature: float = 1.0,
    optim: Mapping[str, Any] | None = None,
    eval_every: int = 0,
    eval_at: Sequence[int] = (),
    eval_size: int = 400,
    eval_samples: int = 1,
    on_step: Callable[[StepResult], Mapping[str, float] | None] | None = None,
) -> dict[str, Any]:
    """Train the sort policy with one method, as a user of the library would.

    Args:
        seed: of the base, the prompts and the samples.
        signal: a new one for each run; stages with state must not be shared.
        objective: the loss.
        sampler: which prompts to draw; by default fresh ones in order.
        rows: training rows; by default the task's endless ones, `prompt`, `answer`, `length`.
        warm_steps: supervised steps of the base.
        steps: of the online loop.
        prompts: P.
        group_size: G.
        lr: constant learning rate of AdamW, betas (0.9, 0.99), gradient norm clipped at 1.
        passes: over each rollout.
        mini_batches: updates per pass.
        old_logp: as in `Online`.
        temperature: of sampling and training.
        optim: further settings of `Optim`, in place of those above.
        eval_every: steps between evaluations on held-out prompts; 0 = only before and after.
        eval_at: further steps after which to evaluate.
        eval_size: held-out prompts.
        eval_samples: samples a held-out prompt.
        on_step: called with every `StepResult`; the numbers it returns are added to the curves under their names.

    Returns:
        What `measure` returns. Figures: `greedy_before`, `sampled_before`, `greedy_after`, `sampled_after` (share of
        right answers, whatever the training reward was), `greedy_gain`, `sampled_gain`; means over all steps of
        `reward`, `constant_groups`, `mixed_groups` (shares of the groups trained on), `entropy` (nats), `truncated`
        (share of samples), `ratio_max` (of new to old probability) and `clip_share` where the objective tells, and of
        what `on_step` returned; means over the last 10 steps, `reward_last` and `entropy_last`; `rollouts`, samples
        drawn; `seconds`, CPU of the loop without base and evaluations. Curves over steps: `greedy`, `sampled` where
        evaluated; each of the means as means over 10 steps.

    Example:
        >>> from guerdon.advantages import grpo
        >>> from guerdon.objectives import dapo
        >>> signal = Signal(rewards={"correct": exact_answer}, advantage=grpo)
        >>> small = {"warm_steps": 2, "steps": 1, "prompts": 2, "group_size": 2, "eval_size": 4}
        >>> found = sort_run(0, signal=signal, objective=dapo, **small)
        >>> found["figures"]["rollouts"], [step for step, _ in found["curves"]["sampled"]]
        (4.0, [0.0, 1.0])
    """
    policy = base_policy(seed, steps=warm_steps, temperature=temperature)
    if signal.value_heads:
        policy.add_critic(signal.value_heads)
    if signal.needs_reference or wants(objective, "logp_ref"):
        policy.keep_reference()
    curves: dict[str, Points] = {"greedy": [], "sampled": []}

    def test(step: int) -> None:
        for mode, share in accuracy(policy, size=eval_size, samples=eval_samples).items():
            curves[mode].append((float(step), share))

    test(0)
    settings: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.99), **(optim or {})}
    seconds = -time.process_time()
    loop = Online(
        policy,
        sort.train_rows(seed) if rows is None else rows,
        signal,
        objective,
        sampler=sampler,
        prompts_per_step=prompts,
        group_size=group_size,
        passes=passes,
        mini_batches=mini_batches,
        old_logp=old_logp,
        optim=Optim(**settings),
        steps=steps,
        seed=seed,
    )
    history: dict[str, list[float]] = {}
    rollouts = 0.0
    for step in range(1, steps + 1):
        result = loop.step()
        rollouts += result.metrics["draws"] * prompts * group_size
        numbers = {name: result.metrics[name] for name in _FOLLOWED if name in result.metrics}
        numbers["mixed_groups"] = 1.0 - numbers["constant_groups"]
        if on_step is not None:
            numbers |= on_step(result) or {}
        for name, value in numbers.items():
            history.setdefault(name, []).append(float(value))
        if step == steps or step in eval_at or (eval_every and step % eval_every == 0):
            seconds += time.process_time()
            test(step)
            seconds -= time.process_time()
    seconds += time.process_time()
    figures = {f"{mode}_{when}": curves[mode][at][1] for mode in curves for when, at in (("before", 0), ("after", -1))}
    figures |= {f"{mode}_gain": figures[f"{mode}_after"] - figures[f"{mode}_before"] for mode in ("greedy", "sampled")}
    figures |= {name: _mean(values) for name, values in history.items()}
    figures |= {f"{name}_last": _mean(history[name][-_WINDOW:]) for name in ("reward", "entropy") if name in history}
    figures |= {"rollouts": rollouts, "seconds": seconds}
    return {"figures": figures, "curves": curves | {name: _thin(values) for name, values in history.items()}}


def _mean(values: Sequence[float]) -> float:
    """Over the values that are there: a step may have no group, and so no figure."""
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def _thin(values: Sequence[float]) -> Points:
    """Means over windows of steps, each at the middle of its window."""
    parts = [values[i : i + _WINDOW] for i in range(0, len(values), _WINDOW)]
    return [(i * _WINDOW + (len(part) + 1) / 2, _mean(part)) for i, part in enumerate(parts)]
