"""What the runner asks for models of feedback: a model to train and records to train it on, from the settings of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guerdon.errors import DataError, RecipeError
from guerdon.language.data import read_rows, require_columns
from guerdon.language.domain import Data, bundled, held_out_part
from guerdon.language.policy import LanguagePolicy
from guerdon.language.rows import Faults, Rows
from guerdon.language.tasks import TASKS, find
from guerdon.rewards.critics.base import Response
from guerdon.rewards.critics.local import NOTE
from guerdon.rewards.critics.question import LEARNED, Question
from guerdon.rewards.critics.records import OWN, REQUIRED, record_marks, target
from guerdon.rewards.critics.token_classifier import TokenClassifier
from guerdon.rollout import Rollout

_ROWS = 128  # read at a time


class GenerativeCritic(LanguagePolicy):
    """A language model that learns to write the feedback of a record, and then the label of every word.

    What it has learnt is asked for by the critic `local`, with the same question, which is saved beside the model.
    """

    question: Question

    def demonstrations(self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None = None) -> Rollout:
        """Records as a rollout [B, 1, T]: the question about a response, and what is to be written.

        Args:
            rows: see `guerdon.rewards.critics.records`.
            seeds: not used: nothing is drawn.

        Raises:
            DataError: naming the record that cannot be used.
        """
        questions = []
        for row in rows:
            columns = {name: value for name, value in row.items() if name not in OWN}
            questions.append(self.question.asked(self.tokenizer, Response(row["prompt"], row["response"], columns)))
        return self.pack(questions, [[target(row, f"record {i}")] for i, row in enumerate(rows)])

    def save(self, folder: str | Path, state: Any = None) -> None:
        """As a language policy is saved, with the question beside it."""
        super().save(folder, state)
        note = {"template": self.question.template, "system": self.question.system}
        Path(folder, NOTE).write_text(json.dumps(note, ensure_ascii=False, indent=1), encoding="utf-8")


def build_policy(settings: Any, *, base: Path | None = None, seed: int = 0) -> Any:
    """The model of a recipe, without adapters.

    Args:
        settings: the recipe's `policy` section.
        base: not used: there is no warm start.
        seed: of new weights: a bundled model's, or a head's.

    Raises:
        RecipeError: a setting is of the other form, or the model cannot be loaded.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # a run shows one display, its own
    task = find(settings.model) if settings.model in TASKS else None
    if settings.form == "classifier":
        for name in ("template", "lora", "gradient_checkpointing"):
            if getattr(settings, name):
                raise RecipeError(f"policy.{name}: this is a setting of form: generative; the form here is classifier.")
        if task is None:
            return TokenClassifier.load(settings.model, new_head=True, dtype=settings.dtype, seed=seed)
        return TokenClassifier.load(
            task.model(seed).config, tokenizer=task.tokenizer(), dtype=settings.dtype, seed=seed
        )
    options = {"dtype": settings.dtype, "gradient_checkpointing": settings.gradient_checkpointing, "max_new_tokens": 1}
    if task is None:
        made = GenerativeCritic.load(settings.model, **options)
    else:
        made = GenerativeCritic.load(task.model(seed), tokenizer=task.tokenizer(), **options)
    assert isinstance(made, GenerativeCritic)
    made.question = Question("policy", template=settings.template or LEARNED, system="")
    return made


def add_adapters(policy: Any, settings: Any) -> None:
    """Give a generative model the adapters that the recipe asks for."""
    if settings.lora is not None:
        policy.add_adapters(**vars(settings.lora))


def policy_fields() -> tuple[str, ...]:
    """Nothing: these models do not sample."""
    return ()


def load_data(source: str, *, loop: str, evaluation: Any, seed: int) -> Data:
    """Records of feedback: a bundled task's, or a file's with its last rows held out.

    Args:
        source: a bundled task that has feedback, or a path.
        loop: `supervised`.
        evaluation: the recipe's section; `data` names a file of its own, `size` how many rows are held out.
        seed: of a bundled task's rows.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    task = bundled(source)
    if task is not None:
        if task.feedback is None:
            having = ", ".join(name for name in TASKS if find(name).feedback is not None)
            raise DataError(f"data: the task {source!r} has no feedback. Tasks that have: {having}.")
        loaded = Data(task.feedback(seed), task.held_out_feedback(evaluation.size))
    else:
        loaded = held_out_part(_records(read_rows(source)), evaluation)
    if evaluation.data is not None:
        rows = _records(read_rows(evaluation.data))
        loaded = loaded._replace(held_out=rows[: evaluation.size])
    return loaded


def _records(rows: Rows) -> Rows:
    """Rows of which every one is a record; all faults are reported together."""
    require_columns(rows, REQUIRED)
    if not {"good_spans", "poor_spans", "spans", "marks"} & set(rows.columns):
        raise DataError(
            f"{rows.name}: these are no records of feedback: there is neither good_spans nor poor_spans, spans or marks. "
            "Make them with: guerdon annotate DATA --critic NAME"
        )
    faults = Faults(rows.name)
    for start in range(0, len(rows), _ROWS):
        for position, row in enumerate(rows[start : start + _ROWS], start):
            try:
                record_marks(row, "")
            except DataError as error:
                faults.add(rows.where(position), str(error).removeprefix(": "))
    faults.check("A record has prompt, response, and good_spans and poor_spans, lists of phrases of the response.")
    return rows


def demonstrations(source: str, seed: int) -> Any:
    """There is no warm start for these models.

    Raises:
        RecipeError: always.
    """
    raise RecipeError("warm_start: a model of feedback learns from its records alone; leave warm_start out.")
