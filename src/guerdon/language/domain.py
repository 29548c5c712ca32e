"""What the runner asks of the language domain: a policy and data rows, from the settings of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guerdon.errors import DataError, RecipeError, nearest
from guerdon.language.held_out import split_by_prompt
from guerdon.language.tasks import TASKS, Task


class Data(NamedTuple):
    """Rows to train on and rows held out; the second may be empty."""

    train: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]


def policy_fields() -> tuple[str, ...]:
    """What a policy of this domain can give beside the fields of every rollout, known before one is loaded."""
    from guerdon.language.policy import LanguagePolicy

    return LanguagePolicy.fields


def build_policy(settings: Any, *, base: Path | None = None, seed: int = 0) -> Any:
    """The policy of a recipe, without adapters.

    Args:
        settings: the recipe's `policy` section.
        base: a saved model to start from in place of `settings.model` (after a warm start).
        seed: of the weights of a bundled model.
    """
    from transformers.utils import logging

    from guerdon.language.policy import LanguagePolicy
    from guerdon.language.tasks import find

    logging.disable_progress_bar()  # a run shows one display, its own
    options = {
        name: getattr(settings, name)
        for name in ("max_new_tokens", "temperature", "top_p", "top_k", "dtype", "gradient_checkpointing", "revision")
    }
    task = find(settings.model) if settings.model in TASKS else None
    if base is not None:
        return _in_memory_of_its_own(LanguagePolicy.load(str(base), **options))
    if task is not None:
        return LanguagePolicy.load(task.model(seed), tokenizer=task.tokenizer(), **options)
    return LanguagePolicy.load(settings.model, **options)


def _in_memory_of_its_own(policy: Any) -> Any:
    """A policy whose weights begin where those of a fresh model do, not where they lie in a mapped file.

    Products are rounded differently there, and a run that is begun again after its warm start must give the same numbers.
    """
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone()
    return policy


def add_adapters(policy: Any, settings: Any) -> None:
    """Give the policy the adapters that the recipe asks for."""
    if settings.lora is not None:
        policy.add_adapters(**vars(settings.lora))


def load_data(source: str, *, loop: str, evaluation: Any, seed: int) -> Data:
    """The rows of a recipe: a bundled task's, or a file's with its last rows held out.

    Args:
        source: a bundled task, or a path.
        loop: `online` needs `prompt`; `supervised` needs `prompt` and `completion`.
        evaluation: the recipe's section; `data` names a file of its own, `size` how many rows are held out, `share` a share
            of the training prompts to hold out instead.
        seed: of a bundled task's rows.

    Raises:
        DataError: the file cannot be read or lacks a column.
    """
    from guerdon.language.data import read_rows, require_columns

    wanted = ["prompt"] if loop == "online" else ["prompt", "completion"]
    task = bundled(source)
    if task is not None:
        train = task.train_rows(seed) if loop == "online" else task.demonstrations(seed)
        held_out = task.held_out_rows(evaluation.size)
    else:
        rows = read_rows(source)
        require_columns(rows, wanted)
        train, held_out = held_out_part(rows, evaluation)
    if evaluation.data is not None:
        rows = read_rows(evaluation.data)
        require_columns(rows, wanted)
        held_out = Part(rows, 0, min(evaluation.size, len(rows)))
    return with_share(Data(train, held_out), evaluation)


def with_share(data: Data, evaluation: Any) -> Data:
    """The rows, with a share of the training prompts held out in place of what was, where the recipe asks for it."""
    if evaluation.share is None:
        return data
    return Data(*split_by_prompt(data.train, evaluation.share, evaluation.size))


def bundled(source: str) -> Task | None:
    """The bundled task of that name; None for a path.

    Raises:
        DataError: it is neither.
    """
    from guerdon.language.tasks import find

    if source in TASKS:
        return find(source)
    if not Path(source.split(":")[0]).exists():
        raise DataError(
            f"data: {source!r} is neither a file nor a bundled task.{nearest(source, TASKS)} "
            f"Bundled tasks: {', '.join(TASKS)}."
        )
    return None


def held_out_part(rows: Sequence[Mapping[str, Any]], evaluation: Any) -> Data:
    """The last rows are held out: known beforehand, and the same on every machine."""
    count = 0 if evaluation.data is not None else min(evaluation.size, len(rows) // 5)
    return Data(Part(rows, 0, len(rows) - count), Part(rows, len(rows) - count, len(rows)))


def load_preferences(source: str, form: str, *, evaluation: Any, seed: int) -> Data:
    """The rows of a preference recipe: a bundled task's, or a file's with its last rows held out.

    Args:
        source: a bundled task that has pairs, or a path.
        form: `paired` or `unpaired`; see `guerdon.language.preferences.preference_rows`.
        evaluation: the recipe's section; `data` names a file of its own, `size` how many rows are held out.
        seed: of a bundled task's rows.

    Raises:
        DataError: the file cannot be read, or rows are malformed.
    """
    from guerdon.language.data import read_rows
    from guerdon.language.preferences import Singles, preference_rows
    from guerdon.language.tasks import find

    task = bundled(source)
    if task is not None:
        if task.pairs is None:
            with_pairs = ", ".join(name for name in TASKS if find(name).pairs is not None)
            raise DataError(f"data: the task {source!r} has no pairs. Tasks that have: {with_pairs}.")
        train, held_out = task.pairs(seed), task.held_out_pairs(evaluation.size)
        if form == "unpaired":
            train, held_out = Singles(train), Singles(held_out)
        loaded = Data(train, held_out)
    else:
        loaded = held_out_part(preference_rows(read_rows(source), form), evaluation)
    if evaluation.data is not None:
        rows = preference_rows(read_rows(evaluation.data), form)
        loaded = loaded._replace(held_out=Part(rows, 0, min(evaluation.size, len(rows))))
    return with_share(loaded, evaluation)


def measured_rows(source: str, held_out: Sequence[Mapping[str, Any]], evaluation: Any) -> Sequence[Mapping[str, Any]]:
    """Rows whose prompts are sampled to be scored: a bundled task's own held-out rows, or those of the held-out pairs."""
    task = bundled(source) if evaluation.data is None else None
    return held_out if task is None else task.held_out_rows(evaluation.size)


def demonstrations(source: str, seed: int) -> Sequence[Mapping[str, Any]]:
    """Rows with `prompt` and `completion` for a warm start: a task's own for that, else demonstrations; of pairs, the chosen.

    Raises:
        RecipeError: the data has none.
    """
    from guerdon.language.data import read_rows, require_columns
    from guerdon.language.preferences import Converted, preference_rows
    from guerdon.language.tasks import find

    if source in TASKS:
        task = find(source)
        return (task.pretraining or task.demonstrations)(seed)
    rows = read_rows(source)
    if "chosen" in rows.columns and "completion" not in rows.columns:
        return Converted(preference_rows(rows, "paired"), lambda row: {**row, "completion": row["chosen"]})
    try:
        require_columns(rows, ["prompt", "completion"])
    except DataError as error:
        raise RecipeError(f"warm_start: the data must have demonstrations: {error}") from error
    return rows


class Part(Sequence[Mapping[str, Any]]):
    """A stretch of rows that are not copied."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], start: int, stop: int) -> None:
        self.rows, self.start, self.stop = rows, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.rows[self.start + index % len(self)]
