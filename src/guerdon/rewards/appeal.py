"""A cheap verifier with appeals: some of its rejections go to a stronger one, which tells how often it is wrong.

Reinforcement Learning with Verifiable yet Noisy Rewards under Imperfect Verifiers, 2025, arXiv 2510.00915.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from guerdon.errors import RecipeError, ScoreError
from guerdon.rewards.judges.base import resolve
from guerdon.rewards.nested import columns_of, draw, score_one
from guerdon.stages import call


class AppealOutput(NamedTuple):
    """What a verifier with appeals said.

    Attributes:
        scores: [P][G] pairs (score, answer of the cheap verifier), None where it did not score.
        false_negative_rate: [P], the estimate with this batch in it, the same for all; 0 while there is none.
        accepted: [P] samples that the cheap verifier accepted.
        appeals: [P] rejections that were shown to the strong verifier: its calls.
        overturned: [P] of these, found to be right.
    """

    scores: list[list[Any]]
    false_negative_rate: Float[Tensor, " P"]
    accepted: Int[Tensor, " P"]
    appeals: Int[Tensor, " P"]
    overturned: Int[Tensor, " P"]


def false_negative_rate(
    accepted: int,
    overturned: int,
    *,
    appeal_probability: float,
    pseudo_alpha: float = 1e-5,
    pseudo_beta: float = 1e-5,
    rho_max: float = 0.95,
) -> float | None:
    """The share of right samples that the cheap verifier rejects, from one batch.

    Each rejection is appealed with probability q, so N = overturned / q is on average the number of false negatives
    (Horvitz-Thompson), and the rate (N + alpha) / (N + accepted + alpha + beta), held below rho_max.

    Args:
        accepted: samples that the cheap verifier accepted; they are taken to be right.
        overturned: appealed rejections that the strong verifier accepted.
        appeal_probability: q.
        pseudo_alpha: added to the false negatives.
        pseudo_beta: added to the accepted.
        rho_max: largest rate that one batch may say; with few accepted samples a lucky appeal says too much.

    Returns:
        The rate; None if nothing was accepted or overturned.

    Example:
        >>> round(false_negative_rate(30, 2, appeal_probability=0.2), 4)
        0.25
        >>> false_negative_rate(0, 0, appeal_probability=0.2) is None
        True
    """
    missed = overturned / appeal_probability
    if missed + accepted == 0:
        return None
    return min((missed + pseudo_alpha) / (missed + accepted + pseudo_alpha + pseudo_beta), rho_max)


class Appeal(nn.Module):
    """The verdicts of a cheap verifier, with a running estimate of its false-negative rate by appeals.

    Each rejected sample is shown to the strong verifier with a small probability; all appeals of a step are one call.
    The estimate is the field `false_negative_rate`, which `shaping: forward_correction` reads when its own option is
    not set. `accepted`, `appeals` and `overturned` are logged as counts, the running rate as a metric.

    Args:
        reward: the cheap verifier, as in a recipe: a name, {name: {option: value}} or `module:attribute`; or a
            callable.
        strong: the strong one, likewise; a score of 0.5 or more overturns a rejection.
        appeal_probability: q, above 0 and at most 1; the strong verifier is called for this share of the rejections.
        ema_decay: of the running rate, per update.
        pseudo_alpha: as in `false_negative_rate`.
        pseudo_beta: likewise.
        rho_max: likewise.
        recover: give overturned samples the score 1. For training on appeals alone; with a correction the estimate does
            the work, and correcting recovered scores would count them twice.
        seed: of which samples are appealed.

    Raises:
        RecipeError: an option is out of its range, or there is no such reward.

    Edge cases:
        Without a rejection nothing is appealed, and the batch still counts. A batch with nothing accepted or
        overturned is left out. An appeal that the strong verifier does not score overturns nothing. Samples that the
        cheap verifier does not score are left out. Held-out samples are appealed as well, but do not count. There can
        be one such reward in a recipe, as it fills fields of fixed names.

    Example:
        >>> careful = {"exact_answer": {"ignore_case": True}}
        >>> stage = Appeal(reward="exact_answer", strong=careful, appeal_probability=1.0)
        >>> found = stage(["p"], [["a", "A", "b"]], answer=["a"])
        >>> found.scores[0], found.overturned.tolist(), found.false_negative_rate.round(decimals=3).tolist()
        ([(1.0, 'a'), (0.0, 'A'), (0.0, 'b')], [1], [0.5])

    Source:
        Reinforcement Learning with Verifiable yet Noisy Rewards under Imperfect Verifiers, arXiv 2510.00915. The first
        estimate as a start, leaving out empty batches, rho_max, and `recover` off by default are our reading.
    """

    def __init__(
        self,
        *,
        reward: Any,
        strong: Any,
        appeal_probability: float = 0.1,
        ema_decay: float = 0.9,
        pseudo_alpha: float = 1e-5,
        pseudo_beta: float = 1e-5,
        rho_max: float = 0.95,
        recover: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < appeal_probability <= 1:
            raise RecipeError(
                f"rewards.appeal.appeal_probability: must be above 0 and at most 1; got {appeal_probability}. Without "
                "appeals use the verifier itself."
            )
        if not 0 <= ema_decay < 1 or not 0 < rho_max < 1 or not min(pseudo_alpha, pseudo_beta) >= 0:
            raise RecipeError(
                "rewards.appeal: ema_decay must be in [0, 1), rho_max in (0, 1) and the pseudo-counts at least 0; got "
                f"{ema_decay}, {rho_max}, {pseudo_alpha}, {pseudo_beta}."
            )
        self.reward = resolve(reward, "rewards.appeal.reward", "rewards")
        self.strong = resolve(strong, "rewards.appeal.strong", "rewards")
        self.appeal_probability, self.ema_decay = appeal_probability, ema_decay
        self.pseudo_alpha, self.pseudo_beta, self.rho_max = pseudo_alpha, pseudo_beta, rho_max
        self.recover, self.seed = recover, seed
        self.rate: Tensor
        self.estimated: Tensor
        self.updates: Tensor
        self.appeals_made: Tensor
        self.appeals_won: Tensor
        self.register_buffer("rate", torch.zeros((), dtype=torch.float64))
        for name in ("estimated", "updates", "appeals_made", "appeals_won"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def forward(self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]], **columns: Any) -> AppealOutput:
        """Judge samples and make the appeals; changes no state.

        Args:
            prompts: [P].
            samples: [P][G].
            **columns: lists of P, which the verifiers may read.

        Returns:
            Scores, the estimate and the counts.

        Raises:
            ScoreError: a verifier failed, or the cheap one gave a score that is neither 0 nor 1.
        """
        lists = columns_of(columns, len(prompts))
        found = score_one("reward of appeal", self.reward, prompts, samples, lists)
        scores = found.scores[..., 0].cpu().clone()
        accepted = (scores == 1).sum(-1)
        other = scores[(scores != 0) & (scores != 1) & ~scores.isnan()]
        if len(other):
            raise ScoreError(f"rewards.appeal: the cheap verifier must give 0 or 1; got {other[0].item():g}.")
        chosen = [
            (p, g)
            for p, g in (scores == 0).nonzero().tolist()
            if draw("appeal", self.seed, int(self.updates), prompts[p], g, samples[p][g]) < self.appeal_probability
        ]
        right = self._appeal(chosen, prompts, samples, lists)
        appeals, overturned = torch.zeros(2, len(prompts), dtype=torch.int64)
        for (p, g), won in zip(chosen, right, strict=True):
            appeals[p] += 1
            overturned[p] += won
            if won and self.recover:
                scores[p, g] = 1.0
        rate = self._blended(int(accepted.sum()), int(overturned.sum()))
        pairs: list[list[Any]] = [[None if value != value else value for value in row] for row in scores.tolist()]
        if found.outcomes is not None:
            both = zip(pairs, found.outcomes, strict=True)
            pairs = [[None if v is None else (v, a) for v, a in zip(*rows, strict=True)] for rows in both]
        known = torch.full((len(prompts),), rate, dtype=torch.get_default_dtype())
        return AppealOutput(pairs, known, accepted, appeals, overturned)

    def _appeal(
        self,
        chosen: list[tuple[int, int]],
        prompts: Sequence[Any],
        samples: Sequence[Sequence[Any]],
        columns: dict[str, list[Any]],
    ) -> list[bool]:
        if not chosen:
            return []
        found = score_one(
            "strong verifier of appeal",
            self.strong,
            [prompts[p] for p, _ in chosen],
            [[samples[p][g]] for p, g in chosen],
            {name: [column[p] for p, _ in chosen] for name, column in columns.items()},
        )
        return (found.scores[:, 0, 0] >= 0.5).tolist()

    def _blended(self, accepted: int, overturned: int) -> float:
        """The running rate as it will be once a batch is in it."""
        found = false_negative_rate(
            accepted,
            overturned,
            appeal_probability=self.appeal_probability,
            pseudo_alpha=self.pseudo_alpha,
            pseudo_beta=self.pseudo_beta,
            rho_max=self.rho_max,
        )
        before = self.rate.item()
        if found is None or self.estimated == 0:
            return before if found is None else found
        return self.ema_decay * before + (1 - self.ema_decay) * found

    def observe(
        self,
        accepted: Int[Tensor, " P"],
        appeals: Int[Tensor, " P"],
        overturned: Int[Tensor, " P"],
        **fields: Any,
    ) -> None:
        """Take the counts of a finished step into the running rate.

        Args:
            accepted: [P].
            appeals: [P].
            overturned: [P].
            **fields: everything else there is, for verifiers with state.
        """
        counts = int(accepted.sum()), int(overturned.sum())
        self.rate.fill_(self._blended(*counts))
        self.estimated += int(sum(counts) > 0)
        self.updates += 1
        self.appeals_made += appeals.sum().to(self.appeals_made)
        self.appeals_won += overturned.sum().to(self.appeals_won)
        for verifier in (self.reward, self.strong):
            if hasattr(verifier, "observe"):
                call(verifier, {**fields, "accepted": accepted, "appeals": appeals}, method="observe")

    def metrics(self) -> dict[str, float]:
        """The running rate and the appeals so far."""
        made, won = float(self.appeals_made), float(self.appeals_won)
        return {"false_negative_rate": self.rate.item(), "appeals_total": made, "overturned_total": won}


appeal = Appeal
