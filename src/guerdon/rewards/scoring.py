"""Calling reward functions and reading what they return.

A reward is a plain function. One that names `samples` gets P lists of G samples and columns of P entries; one that names
`completions` gets the flat form used by TRL (P * G completions, prompts and columns repeated), so that its reward
functions run here unchanged; one that names `images` gets them as a tensor [P * G, C, H, W], prompts and columns repeated
as well, and can also be trained on by its gradient (`differentiable_scores`). It may be a coroutine. It returns a number
for every sample, None where it does not apply, or pairs (score, answer); or a NamedTuple with `scores` and further fields.
Of these `step_scores` [P, G, T] say when a score is earned: they add up to it, and what they leave is earned at the end.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import ScoreError
from guerdon.rollout import Rollout
from guerdon.stages import call, signature

# fields that a reward has by naming them, and not because the rollout carries them
FLAT = {"completions": {"prompts", "completions", "completion_ids"}, "images": {"prompts", "images"}}


class Dropped(NamedTuple):
    """A score that could not be used: prompt and sample position, component and reason."""

    prompt: int
    sample: int
    name: str
    why: str


class Scores(NamedTuple):
    """What the rewards said.

    Attributes:
        scores: [P, G, K], NaN where a sample was not scored.
        outcomes: P lists of G extracted answers, from the first component that gives answers; else None.
        extras: further fields that rewards produced, name -> tensor or list with P first. `step_scores` is [P, G, T, K], 0
            for a component that has none; it is there if any component has.
        dropped: the bad scores that were left out (only with `on_bad_score="drop"`).
    """

    scores: Float[Tensor, "P G K"]
    outcomes: list[list[Any]] | None
    extras: dict[str, Any]
    dropped: list[Dropped]


def score(
    rewards: Mapping[str, Callable[..., Any]], rollout: Rollout, *, on_bad_score: Literal["stop", "drop"] = "stop"
) -> Scores:
    """Score every sample of a rollout with every reward.

    Args:
        rewards: component name -> reward function; coroutines run side by side.
        rollout: the samples, [P][G].
        on_bad_score: what to do when a reward raises or returns NaN, an infinity or something that is no number.
            `stop` raises; `drop` leaves the sample out of training, counts and names it.

    Returns:
        Scores of all components, in the order of `rewards`.

    Raises:
        ScoreError: naming the component, the prompt and the sample; always for results of the wrong length.
    """
    results: dict[str, Any] = {}
    for name, reward in rewards.items():
        try:
            results[name] = _call(reward, rollout)
        except Exception as error:  # any fault of a user's reward is reported with the sample that caused it
            results[name] = error
    results = _await_all(results)

    cells: list[Tensor] = []
    steps: list[Tensor | None] = []
    outcomes: list[list[Any]] | None = None
    extras: dict[str, Any] = {}
    dropped: list[Dropped] = []
    for name, result in results.items():
        faults: list[Dropped] = []
        if isinstance(result, Exception):
            table, answers, of_steps, faults = _piecewise(name, rewards[name], rollout, result)
        else:
            result, produced = _named(result)
            of_steps = _steps(produced.pop("step_scores", None), rollout, name)
            extras |= produced
            table, answers = _table(result, rollout, name)
        values, bad = _numbers(table, name)
        if of_steps is not None:
            bad += _bad_steps(of_steps, rollout, name)
            values = values.masked_fill(~of_steps.isfinite().all(-1), torch.nan)
            of_steps = of_steps.where(values.isfinite().unsqueeze(-1), 0.0)
        faults += bad
        if faults and on_bad_score == "stop":
            raise ScoreError(_complaint(faults, rollout)) from (result if isinstance(result, Exception) else None)
        dropped += faults
        cells.append(values.to(rollout.mask.device))
        steps.append(of_steps)
        if outcomes is None and answers is not None:
            outcomes = answers
    scores = (
        torch.stack(cells, dim=-1) if cells else torch.zeros(*rollout.mask.shape[:2], 0, device=rollout.mask.device)
    )
    if any(part is not None for part in steps):
        nothing = torch.zeros(rollout.mask.shape, dtype=scores.dtype)
        together = torch.stack([nothing if part is None else part for part in steps], dim=-1)
        extras["step_scores"] = together.to(rollout.mask.device)
    return Scores(scores, outcomes, extras, dropped)


def _steps(found: Any, rollout: Rollout, name: str) -> Tensor | None:
    """Step scores [P, G, T] as a tensor on the CPU, 0 where a step is not live."""
    if found is None:
        return None
    table = torch.as_tensor(found, dtype=torch.get_default_dtype()).detach().cpu()
    if table.shape != rollout.mask.shape:
        raise ScoreError(
            f"reward {name!r}: step_scores must be [P, G, T] = {list(rollout.mask.shape)}; got {list(table.shape)}."
        )
    return table.where(rollout.mask.cpu(), 0.0)


def _bad_steps(steps: Tensor, rollout: Rollout, name: str) -> list[Dropped]:
    return [
        Dropped(p, g, name, f"returned the step score {steps[p, g][~steps[p, g].isfinite()][0].item()!r}")
        for p, g in (~steps.isfinite().all(-1)).nonzero().tolist()
    ]


def differentiable_scores(
    rewards: Mapping[str, Callable[..., Any]],
    rollout: Rollout,
    images: Float[Tensor, "N C H W"],
    *,
    on_bad_score: Literal["stop", "drop"] = "stop",
) -> Scores:
    """Score images that have a graph, keeping it.

    Args:
        rewards: component name -> a function that names `images` and gives a tensor [N] (or [P, G]) made of them. Prompts
            and columns come repeated, one for each image.
        rollout: prompts, columns and samples [P][G] of the same images.
        images: [N, C, H, W], N = P G.
        on_bad_score: `drop` makes a score that is no finite number NaN, without gradient; `stop` raises.

    Returns:
        Scores of all components, in the order of `rewards`.

    Raises:
        ScoreError: a reward gives no tensor, one of another size, or one without a graph; or a score is not finite.

    Gradient:
        To the images, as the rewards have it.
    """
    size = rollout.mask.shape[:2]
    fields = {**_flat(rollout.available(), rollout), "images": images}
    cells, dropped = [], []
    for name, reward in rewards.items():
        found = call(reward, fields, f"reward {name!r}")
        if not isinstance(found, Tensor) or found.numel() != len(images):
            got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ScoreError(
                f"reward {name!r} must give a tensor with one score for each of the {len(images)} images; got {got}."
            )
        if images.requires_grad and not found.requires_grad:
            raise ScoreError(
                f"reward {name!r} gave scores without a gradient, so there is nothing to follow back to the weights. "
                "Compute it from `images` with operations of torch alone (no .item(), .detach(), .numpy() or no_grad), "
                "or learn from its numbers: loop: online."
            )
        found = found.view(size)
        for p, g in (~found.isfinite()).nonzero().tolist():
            dropped.append(Dropped(p, g, name, f"returned {found[p, g].item()!r}"))
        cells.append(torch.where(found.isfinite(), found, torch.nan))
    if dropped and on_bad_score == "stop":
        raise ScoreError(_complaint(dropped, rollout))
    return Scores(torch.stack(cells, -1), None, {}, dropped)


def _call(reward: Callable[..., Any], rollout: Rollout) -> Any:
    fields = rollout.available()
    named = signature(reward).fields
    if "completions" in named or "images" in named:
        fields = _flat(fields, rollout)
    if "images" in named:
        # images of one size; others, or samples that are none, are an error that names the reward
        fields["images"] = torch.stack([sample for group in rollout.samples for sample in group])
    return call(reward, fields)


def _flat(fields: dict[str, Any], rollout: Rollout) -> dict[str, Any]:
    """TRL's form: lists of P * G entries; messages in, messages out."""
    size = rollout.group_size

    def repeat(values: Any) -> list[Any]:
        return [value for value in values for _ in range(size)]

    completions = [sample for group in rollout.samples for sample in group]
    if rollout.prompts and isinstance(rollout.prompts[0], list):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    flat: dict[str, Any] = {name: repeat(column) for name, column in rollout.columns.items()}
    flat |= {"prompts": repeat(rollout.prompts), "completions": completions}
    if "completion_ids" in rollout.steps:
        ids, mask = rollout.steps["completion_ids"].flatten(0, 1), rollout.mask.flatten(0, 1)
        flat["completion_ids"] = [row[live].tolist() for row, live in zip(ids, mask, strict=True)]
    return flat


def _await_all(results: dict[str, Any]) -> dict[str, Any]:
    waiting = {name: value for name, value in results.items() if inspect.isawaitable(value)}
    if not waiting:
        return results

    async def gather() -> list[Any]:
        return await asyncio.gather(*(_guard(value) for value in waiting.values()))

    answers: list[Any] = []
    # in a thread of its own, so that it also works where an event loop already runs (a notebook)
    worker = threading.Thread(target=lambda: answers.extend(asyncio.run(gather())))
    worker.start()
    worker.join()
    return results | dict(zip(waiting, answers, strict=True))


async def _guard(value: Awaitable[Any]) -> Any:
    try:
        return await value
    except Exception as error:  # handed back as a value: one failing reward must not cancel the others
        return error


def _piecewise(
    name: str, reward: Callable[..., Any], rollout: Rollout, error: Exception
) -> tuple[list[list[Any]], list[list[Any]] | None, Tensor | None, list[Dropped]]:
    """A reward raised on the whole batch: score prompt by prompt, and find the samples that it cannot score."""
    table: list[list[Any]] = []
    answers: list[list[Any]] = []
    faults: list[Dropped] = []
    found_answers = False
    steps: dict[int, Tensor] = {}
    for p in range(len(rollout)):
        one = rollout.select([p])
        try:
            result, produced = _named(_resolve(_call(reward, one)))
            rows, extracted = _table(result, one, name)
            of_steps = _steps(produced.get("step_scores"), one, name)
            if of_steps is not None:
                steps[p] = of_steps[0]
            table += rows
            answers += extracted or [[None] * rollout.group_size]
            found_answers |= extracted is not None
        except ScoreError:
            raise
        except Exception as reason:  # the same reward, now on one prompt: its fault is recorded below
            table.append([None] * rollout.group_size)
            answers.append([None] * rollout.group_size)
            guilty = [g for g in range(rollout.group_size) if _raises(reward, one, g)]
            for g in guilty or range(rollout.group_size):
                faults.append(Dropped(p, g, name, f"{type(reason).__name__}: {reason}"))
            if guilty:  # the group could not be scored as a whole, so its other samples have no score either
                others = [g for g in range(rollout.group_size) if g not in guilty]
                faults += [Dropped(p, g, name, "another sample of its group could not be scored") for g in others]
    if not faults:
        # each prompt alone is fine, the batch is not: nothing can be blamed on a sample
        raise ScoreError(
            f"reward {name!r} raised {type(error).__name__}: {error}. It scores every prompt alone but not the batch "
            "together; check how it combines prompts."
        ) from error
    nothing = torch.zeros(rollout.mask.shape[1:], dtype=torch.get_default_dtype())
    together = torch.stack([steps.get(p, nothing) for p in range(len(rollout))]) if steps else None
    return table, answers if found_answers else None, together, faults


def _raises(reward: Callable[..., Any], one: Rollout, g: int) -> bool:
    single = Rollout(
        prompts=one.prompts,
        samples=[[one.samples[0][g]]],
        mask=one.mask[:, g : g + 1],
        logp_old=one.logp_old[:, g : g + 1],
        columns=one.columns,
        extras={
            # what a policy says of each sample, such as `offsets`, is cut to this one
            name: value[:, g : g + 1] if isinstance(value, Tensor) and value.shape[:2] == one.mask.shape[:2] else value
            for name, value in one.extras.items()
        },
        indices=one.indices,
    )
    try:
        _resolve(_call(reward, single))
    except Exception:  # the question asked is whether it raises
        return True
    return False


def _resolve(value: Any) -> Any:
    result = _await_all({"": value})[""]
    if isinstance(result, Exception):
        raise result
    return result


def _named(result: Any) -> tuple[Any, dict[str, Any]]:
    """The scores of a result, and what else a NamedTuple holds beside them."""
    if not (hasattr(result, "_fields") and "scores" in result._fields):
        return result, {}
    produced = result._asdict()
    return produced.pop("scores"), produced


def _table(result: Any, rollout: Rollout, name: str) -> tuple[list[list[Any]], list[list[Any]] | None]:
    """Read P rows of G cells out of a nested or a flat result; split (score, answer) pairs."""
    count, size = len(rollout), rollout.group_size
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise ScoreError(
            f"reward {name!r} must return a list with one entry per sample; got {type(result).__name__} {result!r:.80}."
        )
    rows = [row.tolist() if hasattr(row, "tolist") and getattr(row, "ndim", 0) else row for row in result]
    if len(rows) == count and all(isinstance(row, list) for row in rows):
        for p, row in enumerate(rows):
            if len(row) != size:
                raise ScoreError(
                    f"reward {name!r} returned {len(row)} scores for prompt {p}; its group has {size} samples."
                )
    elif len(rows) == count * size and not any(isinstance(row, list) for row in rows):
        rows = [rows[p * size : (p + 1) * size] for p in range(count)]
    else:
        raise ScoreError(
            f"reward {name!r} returned {len(rows)} entries; expected {count * size} (one per sample, P = {count} prompts "
            f"x G = {size}) or {count} lists of {size}."
        )
    paired = [[isinstance(cell, tuple) and len(cell) == 2 for cell in row] for row in rows]
    if not any(any(row) for row in paired):
        return rows, None
    answers = [
        [cell[1] if pair else None for cell, pair in zip(*both, strict=True)] for both in zip(rows, paired, strict=True)
    ]
    scores = [
        [cell[0] if pair else cell for cell, pair in zip(*both, strict=True)] for both in zip(rows, paired, strict=True)
    ]
    return scores, answers


def _numbers(table: list[list[Any]], name: str) -> tuple[Tensor, list[Dropped]]:
    bad: list[Dropped] = []
    values: list[list[float]] = []
    for p, row in enumerate(table):
        numeric = []
        for g, cell in enumerate(row):
            number = math.nan
            if cell is not None:
                if hasattr(cell, "item"):
                    cell = cell.item()
                if isinstance(cell, numbers.Real):
                    number = float(cell)
                if not math.isfinite(number):
                    bad.append(Dropped(p, g, name, f"returned {cell!r:.60}"))
                    number = math.nan
            numeric.append(number)
        values.append(numeric)
    return torch.tensor(values, dtype=torch.get_default_dtype()), bad


def _complaint(faults: list[Dropped], rollout: Rollout) -> str:
    first = faults[0]
    sample = rollout.samples[first.prompt][first.sample]
    shown = f" (sample: {sample!r:.120})" if isinstance(sample, str) else ""
    row = f", data row {rollout.indices[first.prompt]}" if rollout.indices else ""
    more = f" {len(faults) - 1} more of this step fared likewise." if len(faults) > 1 else ""
    return (
        f"reward {first.name!r} {'' if first.why.startswith('returned') else 'raised '}{first.why} for prompt {first.prompt}, "
        f"sample {first.sample}{row}{shown}.{more} Mend the reward, or set on_bad_score: drop to leave such samples out."
    )
