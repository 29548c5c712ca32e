"""A language model of transformers, on this machine, as a judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from guerdon.errors import RecipeError
from guerdon.rewards.judges.asking import Answer, fits, write_answers
from guerdon.rewards.judges.base import SCALE, Match, Verdict
from guerdon.rewards.judges.question import SYSTEM, TEMPLATE, Question, as_verdict
from guerdon.rewards.judges.verdict import Parsing

CHOICE = """\
Task:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with A or B and nothing else.
"""


class LocalJudge:
    """Has a model write a verdict on every match, or compares the probabilities of the tokens that name the better one.

    Args:
        model: a folder, a name on the hub, or a model object.
        tokenizer: needed with a model object; None = the one beside the model.
        verdict: `text`: the model writes, and the JSON it ends with is read as for `chat`. `tokens`: nothing is
            written; the first sample gets 10 times the probability of the first label among the labels at the end of
            the question, which is one forward pass and cannot be malformed.
        template: the question, as for `chat`; None = one that fits `verdict`.
        system: the system message; empty = none. Without a chat template it stands before the question.
        rubric: criteria with levels, as for `chat`.
        parsing: of a written verdict: `strict` or `lenient`.
        labels: for `tokens`, what stands for the first and the second sample; each one token.
        tie_label: for `tokens`, what stands for a draw: its probability is shared; None = there is none.
        max_new_tokens: most tokens of a written verdict.
        temperature: of a written verdict; 0 = greedy.
        tries: how often a malformed verdict is written anew; has an effect at a temperature above 0 only.
        batch_size: matches at a time.
        dtype: of the weights.
        device: where it runs, such as cuda:1; None = where it is, which is the CPU for one that is loaded.
        seed: of written verdicts; a match is judged alike in whatever batch it comes.
        trust_remote_code: run model code that comes with the files.

    Raises:
        RecipeError: an option is out of its range, or a label is not one token.
        MissingExtraError: transformers is not installed.

    Edge cases:
        A match too long for the model has failed, the others go on. Weights are never trained, nor saved with a run.

    Source:
        ArenaRL, 2026, arXiv 2601.06487, for written verdicts; comparing token probabilities is common practice.
    """

    scale = SCALE

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any = None,
        verdict: Literal["text", "tokens"] = "text",
        template: str | None = None,
        system: str = SYSTEM,
        rubric: Mapping[str, Any] | None = None,
        parsing: Parsing = "lenient",
        labels: tuple[str, str] = ("A", "B"),
        tie_label: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        tries: int = 1,
        batch_size: int = 16,
        dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
        device: str | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        where = "judges.local"
        if verdict not in ("text", "tokens"):
            raise RecipeError(f"{where}.verdict: must be text or tokens; got {verdict!r}.")
        for name, value in (("batch_size", batch_size), ("tries", tries), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise RecipeError(f"{where}.{name}: must be 1 or more; got {value}.")
        if temperature < 0:
            raise RecipeError(f"{where}.temperature: must be 0 or more; got {temperature}.")
        usual = TEMPLATE if verdict == "text" else CHOICE
        template = usual if template is None else template
        self.question = Question(where, template=template, system=system, rubric=rubric, parsing=parsing)
        # imported here: a verdict by HTTP needs no transformers
        from guerdon.language.policy import LanguagePolicy

        self.policy = LanguagePolicy.load(
            model,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens if verdict == "text" else 1,
            temperature=temperature or 1.0,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        if device is not None:
            self.policy.to(device)
        self.policy.requires_grad_(False)
        self.verdict, self.greedy, self.seed = verdict, temperature == 0, seed
        self.tries = 1 if self.greedy else tries
        self.batch_size = batch_size if self.policy.backbone.ignores_padding else 1
        self.labels = [self._token(label, where) for label in (*labels, *([tie_label] if tie_label else []))]
        if verdict == "tokens" and len(set(self.labels)) < len(self.labels):
            raise RecipeError(f"{where}.labels: they must be different tokens; got {labels!r} and {tie_label!r}.")

    def _token(self, label: str, where: str) -> int:
        if self.verdict == "text":
            return 0
        ids = self.policy.tokenizer(label, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise RecipeError(f"{where}.labels: {label!r} must be one token of the model; it is {len(ids)}.")
        return ids[0]

    def __call__(self, matches: Sequence[Match]) -> list[Verdict]:
        """Judge every match.

        Args:
            matches: any number of them.

        Returns:
            One verdict per match, in order.

        Raises:
            DataError: the template names a column that the data does not have.
        """
        chat = getattr(self.policy.tokenizer, "chat_template", None) is not None
        ask = self.question.messages if chat else self.question.plain
        questions = [ask(match) for match in matches]
        if self.verdict == "tokens":
            return self._compare(questions)
        options = {"greedy": self.greedy, "seed": self.seed, "tries": self.tries, "batch_size": self.batch_size}
        return [
            as_verdict(answer) for answer in write_answers(self.policy, questions, self.question.verdict, **options)
        ]

    def _compare(self, questions: list[Any]) -> list[Verdict]:
        """Verdicts by the probabilities of the labels."""
        answers = [fits(self.policy, question) for question in questions]
        fitting = [k for k, answer in enumerate(answers) if not answer.why]
        for start in range(0, len(fitting), self.batch_size):
            chosen = fitting[start : start + self.batch_size]
            for k, answer in zip(chosen, self._by_tokens([questions[k] for k in chosen]), strict=True):
                answers[k] = answer
        return [as_verdict(answer) for answer in answers]

    def _by_tokens(self, questions: list[Any]) -> list[Answer]:
        import torch

        from guerdon.language.backbone import prompt_positions

        ids, mask = self.policy.encode(questions)
        padded = not bool(mask.all())
        backbone = self.policy.backbone
        with torch.inference_mode():
            reading = backbone.read(
                ids, mask if padded else None, prompt_positions(mask) if padded else None, last=True
            )
            chances = backbone.logits(reading)[:, 0, self.labels].double().softmax(-1).tolist()
        high = SCALE[1]
        shares = [chance[0] + (chance[2] / 2 if len(chance) > 2 else 0.0) for chance in chances]
        return [
            Answer(((high * share, high * (1 - share)), {}), 1)
            if math.isfinite(share)
            else Answer(None, 1, 1, "the probabilities are not finite")
            for share in shares
        ]


local = LocalJudge
