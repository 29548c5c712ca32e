"""A verifier made worse on purpose: known error rates, to see what they do to a run and what a correction brings.

The channel of Reinforcement Learning with Verifiable yet Noisy Rewards under Imperfect Verifiers, 2025,
arXiv 2510.00915.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from guerdon.errors import RecipeError, ScoreError
from guerdon.rewards.judges.base import resolve
from guerdon.rewards.nested import columns_of, draw, score_one
from guerdon.stages import call


class NoisyOutput(NamedTuple):
    """What a noisy verifier said.

    Attributes:
        scores: [P][G] pairs (score with errors, the verifier's answer), None where it did not score.
        flipped: [P] verdicts that were turned around.
    """

    scores: list[list[Any]]
    flipped: Int[Tensor, " P"]


def flip(
    scores: Float[Tensor, "P G"],
    draws: Float[Tensor, "P G"],
    false_positive_rate: float | Tensor,
    false_negative_rate: float | Tensor,
) -> Float[Tensor, "P G"]:
    """Verdicts sent through the channel: 1[u >= f_n] for a right sample, 1[u < f_p] for a wrong one.

    Args:
        scores: [P, G], 0 or 1; NaN = not scored, and stays so.
        draws: [P, G], u in [0, 1).
        false_positive_rate: f_p, a number or a tensor that broadcasts to [P, G].
        false_negative_rate: f_n, likewise.

    Example:
        >>> flip(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.5, 0.05, 0.5]]), 0.1, 0.2)
        tensor([[0., 1., 1., 0.]])
    """
    observed = torch.where(scores == 1, draws >= false_negative_rate, draws < false_positive_rate)
    return observed.to(scores.dtype).masked_fill(scores.isnan(), torch.nan)


class Noisy(nn.Module):
    """Another verifier's verdicts with errors: rejects right samples at one rate, accepts wrong ones at another.

    Name the verifier itself under `watch` to see the accuracy that the policy really has.

    Args:
        reward: the verifier, as in a recipe: a name, {name: {option: value}} or `module:attribute`; or a callable. Its
            scores must be 0 or 1.
        false_positive_rate: P(accepted | wrong), a number or the name of a data column with one per prompt.
        false_negative_rate: P(rejected | right), likewise.
        key: what decides an error. `draw`: every sample anew. `sample`: the same text for the same prompt is always
            judged alike, as by a checker that cannot read some forms. `answer`: the same for what the verifier took for
            the answer.
        seed: of the errors.

    Raises:
        RecipeError: a rate is outside [0, 1], key is unknown, or there is no such reward.

    Edge cases:
        A sample that the verifier does not score stays unscored. A held-out sample is judged with errors as well.

    Example:
        >>> stage = Noisy(reward="exact_answer", false_negative_rate=0.999)
        >>> stage(["p"], [["a", "b"]], answer=["a"])
        NoisyOutput(scores=[[(0.0, 'a'), (0.0, 'b')]], flipped=tensor([1]))

    Source:
        Reinforcement Learning with Verifiable yet Noisy Rewards under Imperfect Verifiers, arXiv 2510.00915 (rates 0.1
        and 0.2 in its synthetic runs); errors decided by a hash as in its test of noise that depends on the form.
    """

    def __init__(
        self,
        *,
        reward: Any,
        false_positive_rate: float | str = 0.0,
        false_negative_rate: float | str = 0.0,
        key: Literal["draw", "sample", "answer"] = "draw",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, rate in (("false_positive_rate", false_positive_rate), ("false_negative_rate", false_negative_rate)):
            if not isinstance(rate, str) and not 0 <= rate <= 1:
                raise RecipeError(f"rewards.noisy.{name}: must be from 0 to 1, or the name of a column; got {rate}.")
        if key not in ("draw", "sample", "answer"):
            raise RecipeError(f"rewards.noisy.key: must be draw, sample or answer; got {key!r}.")
        self.reward = resolve(reward, "rewards.noisy.reward", "rewards")
        self.false_positive_rate, self.false_negative_rate = false_positive_rate, false_negative_rate
        self.key, self.seed = key, seed
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]], **columns: Any) -> NoisyOutput:
        """Judge samples with errors; changes no state.

        Args:
            prompts: [P].
            samples: [P][G].
            **columns: lists of P, which the verifier and the rates may read.

        Returns:
            Scores with errors, and how many are wrong.

        Raises:
            ScoreError: the verifier gave a score that is neither 0 nor 1, or no answers where `key` needs them; or a
                rate's column is not there, or holds something else.
        """
        lists = columns_of(columns, len(prompts))
        found = score_one("reward of noisy", self.reward, prompts, samples, lists)
        clean = found.scores[..., 0].cpu()
        wrong = clean[(clean != 0) & (clean != 1) & ~clean.isnan()]
        if len(wrong):
            raise ScoreError(f"rewards.noisy: the verifier must give 0 or 1; got {wrong[0].item():g}.")
        if self.key == "answer" and found.outcomes is None:
            raise ScoreError("rewards.noisy: key 'answer' needs a verifier that returns pairs (score, answer).")
        answers = found.outcomes or [[None] * len(group) for group in samples]
        draws = [
            [draw("noisy", self.seed, *self._key(prompt, g, *pair)) for g, pair in enumerate(zip(*both, strict=True))]
            for prompt, *both in zip(prompts, samples, answers, strict=True)
        ]
        observed = flip(
            clean,
            torch.tensor(draws, dtype=torch.float64),
            self._rate("false_positive_rate", lists),
            self._rate("false_negative_rate", lists),
        )
        pairs: list[list[Any]] = [[None if value != value else value for value in row] for row in observed.tolist()]
        if found.outcomes is not None:
            both = zip(pairs, found.outcomes, strict=True)
            pairs = [[None if v is None else (v, a) for v, a in zip(*rows, strict=True)] for rows in both]
        return NoisyOutput(pairs, ((observed != clean) & ~clean.isnan()).sum(-1))

    def _key(self, prompt: Any, position: int, sample: Any, answer: Any) -> tuple[Any, ...]:
        if self.key == "draw":
            return int(self.updates), prompt, position, sample
        return prompt, (sample if self.key == "sample" else answer)

    def _rate(self, name: str, columns: Mapping[str, list[Any]]) -> float | Tensor:
        rate = getattr(self, name)
        if not isinstance(rate, str):
            return rate
        if rate not in columns:
            raise ScoreError(f"rewards.noisy.{name}: the data has no column {rate!r}. It has: {', '.join(columns)}.")
        values = columns[rate]
        if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values):
            raise ScoreError(
                f"rewards.noisy.{name}: column {rate!r} must hold numbers from 0 to 1; got {values!r:.80}."
            )
        return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)

    def observe(self, **fields: Any) -> None:
        """Count the update, so that the next one's errors are new; the verifier observes too if it has state."""
        self.updates += 1
        if hasattr(self.reward, "observe"):
            call(self.reward, fields, method="observe")


noisy = Noisy
