"""Scoring a policy on held-out prompts, without learning from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from guerdon.errors import RecipeError
from guerdon.inference.revision import revise
from guerdon.rollout import Rollout, join
from guerdon.signal import Signal
from guerdon.training.loop import mix_seed


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        metrics: `eval/greedy/<component>`, `eval/sampled/<component>`, `eval/revised_<k>/<component>`: mean raw score.
        rollouts: mode -> the samples with their scores, [P][1] or [P][samples].
    """

    metrics: dict[str, float]
    rollouts: dict[str, Rollout]


@torch.no_grad()
def evaluate(
    policy: Any,
    rows: Sequence[Mapping[str, Any]],
    signal: Signal,
    *,
    greedy: bool = True,
    samples: int = 1,
    revisions: int = 0,
    batch: int = 512,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    module: Any = None,
) -> Evaluation:
    """Mean score of every component on held-out rows.

    Args:
        policy: see `guerdon.training.policy.Policy`.
        rows: held-out data rows; shared out over the processes.
        signal: whose rewards (and watched rewards) are called.
        greedy: take the most likely step everywhere, once a prompt.
        samples: samples a prompt at the policy's temperature; 0 = none.
        revisions: times the policy revises these samples, which are scored after each; see `inference.revise`.
        batch: prompts sampled at a time and process.
        seed: of the samples; the same seed gives the same samples from the same policy.
        accelerator: the processes to share the work.
        module: what accelerate wrapped the policy into, if anything.

    Returns:
        The same metrics on every process; nothing where there are no rows.

    Raises:
        ScoreError: a reward failed and the signal says `stop`.
        RecipeError: revisions are asked for, and a reward reads the reference's log-probabilities.
    """
    if not len(rows):
        return Evaluation({}, {})
    if signal.needs("offsets"):
        policy.keep_offsets = True
    if revisions and signal.needs("logp_ref"):
        raise RecipeError(
            "evaluation.revisions: a reward reads logp_ref, which revisions have not: their prompts hold drafts. Use 0."
        )
    chain = ["sampled", *(f"revised_{k}" for k in range(1, revisions + 1))]
    modes = ([(["greedy"], 1)] if greedy else []) + ([(chain, samples)] if samples else [])
    metrics: dict[str, float] = {}
    rollouts: dict[str, Rollout] = {}
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for names, size in modes:
        parts: dict[str, list[Rollout]] = {name: [] for name in names}
        for chunk in _chunks(len(rows), batch * processes):
            # every process takes part in every round, so that sharded models stay in step
            mine = chunk[rank::processes] or chunk[:1]
            picked = [rows[i] for i in mine]
            prompts = [row["prompt"] for row in picked]
            seeds = [mix_seed(seed, i, 1) for i in mine]
            options = {"revisions": len(names) - 1, "group_size": size, "greedy": names == ["greedy"]}
            for name, rollout in zip(names, revise(policy, prompts, seeds, **options, module=module), strict=True):
                if signal.needs("logp_ref"):
                    rollout = rollout.update({"logp_ref": policy.reference_log_prob(rollout, module=module)})
                columns = {name: [row.get(name) for row in picked] for name in picked[0] if name != "prompt"}
                rollout = rollout.update({"columns": columns, "indices": list(mine), "steps": {}})
                parts[name].append(signal.score(rollout))
        for mode, scored in parts.items():
            found = join(scored)
            if processes > 1:
                found = join(gather_object([found.to("cpu")]))
                first = {index: position for position, index in reversed(list(enumerate(found.indices)))}
                found = found.select([first[i] for i in range(len(rows))])
            rollouts[mode] = found
            metrics |= _means(mode, found, signal)
    return Evaluation(metrics, rollouts)


def _means(mode: str, found: Rollout, signal: Signal) -> dict[str, float]:
    assert found.scores is not None
    watched = found.extras.get("watched")
    means = {name: found.scores[..., k].nanmean().item() for k, name in enumerate(found.score_names)}
    means |= {name: watched[..., k].nanmean().item() for k, name in enumerate(signal.watch) if watched is not None}
    # a reward of that name keeps it
    means.setdefault("length", found.mask.sum(-1).float().mean().item())
    return {f"eval/{mode}/{name}": mean for name, mean in means.items()}


def _chunks(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
