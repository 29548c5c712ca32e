"""A language model of transformers, on this machine, as a critic: one that is asked, or one that was trained to criticise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from guerdon.errors import RecipeError
from guerdon.rewards.critics.base import Response
from guerdon.rewards.critics.feedback import Feedback
from guerdon.rewards.critics.question import SYSTEM, TEMPLATE, Question, as_feedback
from guerdon.rewards.judges.asking import write_answers

NOTE = "critic.json"  # beside a model that was trained to criticise: how it is asked


class LocalCritic:
    """Has a model write feedback on every response.

    A folder that the recipe `span-reward` has written holds how its model is asked; template and system are then taken from
    there unless they are given.

    Args:
        model: a folder, a name on the hub, or a model object.
        tokenizer: needed with a model object; None = the one beside the model.
        template: the question, as for `chat`; None = the model's own, or the usual one.
        system: the system message; without a chat template it stands before the question; None = likewise.
        spans_max: most phrases of each kind that are asked for; None = any number.
        repair: read what is no JSON but a literal of Python.
        max_new_tokens: most tokens of a reply.
        temperature: 0 = greedy.
        tries: how often a reply that cannot be read is written anew; has an effect at a temperature above 0 only.
        batch_size: responses at a time.
        dtype: of the weights.
        device: where it runs, such as cuda:1; None = where it is, which is the CPU for one that is loaded.
        seed: of what is written; a response is criticised alike in whatever batch it comes.
        trust_remote_code: run model code that comes with the files.

    Raises:
        RecipeError: an option is out of its range, or the model cannot be loaded.
        MissingExtraError: transformers is not installed.

    Edge cases:
        A response too long for the model has failed, the others go on. Weights are never trained, nor saved with a run.

    Source:
        The reward model of Text2Grad, 2025, arXiv 2505.22338. Its replies are the greedy ones; the authors search with three
        beams.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any = None,
        template: str | None = None,
        system: str | None = None,
        spans_max: int | None = None,
        repair: bool = True,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        tries: int = 1,
        batch_size: int = 16,
        dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
        device: str | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        where = "critics.local"
        for name, value in (("batch_size", batch_size), ("tries", tries), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise RecipeError(f"{where}.{name}: must be 1 or more; got {value}.")
        if temperature < 0:
            raise RecipeError(f"{where}.temperature: must be 0 or more; got {temperature}.")
        kept = read_note(model)
        self.question = Question(
            where,
            template=kept.get("template", TEMPLATE) if template is None else template,
            system=kept.get("system", SYSTEM) if system is None else system,
            spans_max=spans_max,
            repair=repair,
        )
        # imported here: feedback by HTTP needs no transformers
        from guerdon.language.policy import LanguagePolicy

        self.policy = LanguagePolicy.load(
            model,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature or 1.0,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        if device is not None:
            self.policy.to(device)
        self.policy.requires_grad_(False)
        size = batch_size if self.policy.backbone.ignores_padding else 1
        self.options: dict[str, Any] = {"greedy": temperature == 0, "seed": seed, "tries": tries, "batch_size": size}

    def __call__(self, responses: Sequence[Response]) -> list[Feedback]:
        """Criticise every response.

        Args:
            responses: any number of them.

        Returns:
            One feedback per response, in order; those that have failed say why.

        Raises:
            DataError: the template names a column that the data does not have.
        """
        questions = [self.question.asked(self.policy.tokenizer, response) for response in responses]
        return [as_feedback(a) for a in write_answers(self.policy, questions, self.question.read, **self.options)]


def read_note(model: Any) -> dict[str, str]:
    """How the model of a folder is asked; empty where nothing says so.

    Raises:
        RecipeError: the note cannot be read.
    """
    path = Path(model, NOTE) if isinstance(model, (str, Path)) else None
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(found[name]) for name in ("template", "system")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"critics.local.model: {path} does not say how the model is asked: {error}.") from error


local = LocalCritic
