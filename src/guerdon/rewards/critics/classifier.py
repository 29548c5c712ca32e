"""A learned model of feedback as a critic: a token classifier that was trained on records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from guerdon.errors import DataError, RecipeError
from guerdon.rewards.critics.base import Response
from guerdon.rewards.critics.feedback import Feedback


class ClassifierCritic:
    """Labels the characters of every response in one forward pass, without writing a critique.

    Args:
        model: a folder that the recipe `span-reward` has written, a name on the hub, or a `TokenClassifier`.
        continuous: give each character the probability of good less that of poor; the reward `spans` then needs
            `continuous: true` as well. By default the likeliest label.
        batch_size: responses at a time.
        dtype: of the weights.
        device: where it runs, such as cuda:1; None = where it is, which is the CPU for one that is loaded.
        trust_remote_code: run model code that comes with the files.

    Raises:
        RecipeError: an option is out of its range, or the model is no token classifier of three labels.
        MissingExtraError: transformers is not installed.

    Edge cases:
        A response that is too long or cannot be encoded has failed, the others go on. Weights are never trained, nor saved
        with a run.

    Source:
        Our variant of the reward model of Text2Grad, 2025, arXiv 2505.22338, which writes the labels of words as text; see
        `local` for that one.
    """

    def __init__(
        self,
        *,
        model: Any,
        continuous: bool = False,
        batch_size: int = 64,
        dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if batch_size < 1:
            raise RecipeError(f"critics.classifier.batch_size: must be 1 or more; got {batch_size}.")
        # imported here: other critics need no transformers
        from guerdon.rewards.critics.token_classifier import TokenClassifier

        given = isinstance(model, TokenClassifier)
        self.model: Any = (
            model if given else TokenClassifier.load(model, dtype=dtype, trust_remote_code=trust_remote_code)
        )
        if device is not None:
            self.model.to(device)
        self.model.requires_grad_(False)
        self.continuous, self.batch_size = continuous, batch_size

    def __call__(self, responses: Sequence[Response]) -> list[Feedback]:
        """Label every response.

        Args:
            responses: any number of them.

        Returns:
            One feedback per response, in order, with `marks`.
        """
        found: list[Feedback] = []
        for start in range(0, len(responses), self.batch_size):
            found += self._labelled(responses[start : start + self.batch_size])
        return found

    def _labelled(self, responses: Sequence[Response]) -> list[Feedback]:
        prompts, texts = [one.prompt for one in responses], [one.text for one in responses]
        try:
            marks = self.model.marks(prompts, texts, continuous=self.continuous)
        except DataError as error:
            if len(responses) > 1:
                return [feedback for one in responses for feedback in self._labelled([one])]
            return [Feedback(why=str(error))]
        return [Feedback(marks=tuple(own), calls=1) for own in marks]


classifier = ClassifierCritic
