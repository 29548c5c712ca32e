"""SRPO: one network learns from the same pairs to answer, and to improve an answer that it is shown.

Self-Improving Robust Preference Optimization, 2024, arXiv 2406.01660.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import DataError, RecipeError, check_shapes
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import Sides, check_beta, check_not_negative, log_ratios, pair_loss


def srpo(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_chosen_given_chosen: Float[Tensor, "B T"],
    logp_rejected_given_chosen: Float[Tensor, "B S"],
    logp_chosen_given_rejected: Float[Tensor, "B T"],
    logp_rejected_given_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    logp_ref_chosen_given_chosen: Float[Tensor, "B T"],
    logp_ref_rejected_given_chosen: Float[Tensor, "B S"],
    logp_ref_chosen_given_rejected: Float[Tensor, "B T"],
    logp_ref_rejected_given_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    preference: Float[Tensor, " B"] | Sequence[Any] | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.8,
    gen_scale: float = 1.0,
) -> Loss:
    """Learn to answer and to revise from the same pairs, towards an optimum that does not depend on where they came from.

    With R the log-ratio of policy to reference of an answer to the prompt, R(b|a) that of b as a revision of the draft a
    (the draft stands in the prompt, for policy and reference alike), w the chosen and l the rejected sample, a pair costs
    (1 - alpha) gen_scale L_gen + alpha L_imp, where

        L_imp = (1/2 - beta (R(w|l) - R(l|l)))^2 + (1/2 - beta (R(w|w) - R(l|w)))^2
        L_gen = (1 - beta (R(w|l) + R(w) - R(l|w) - R(l)))^2.

    Where the probability p that w is preferred is known, p - 1/2 and 2 p - 1 take the place of 1/2 and 1.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        logp_chosen_given_chosen: [B, T], of the chosen samples as revisions of themselves.
        logp_rejected_given_chosen: [B, S], of the rejected samples as revisions of the chosen ones.
        logp_chosen_given_rejected: [B, T], of the chosen samples as revisions of the rejected ones.
        logp_rejected_given_rejected: [B, S], of the rejected samples as revisions of themselves.
        logp_ref_chosen: [B, T], under the reference.
        logp_ref_rejected: [B, S], under the reference.
        logp_ref_chosen_given_chosen: [B, T], under the reference, with the same draft in the prompt; and so on.
        logp_ref_rejected_given_chosen: [B, S].
        logp_ref_chosen_given_rejected: [B, T].
        logp_ref_rejected_given_rejected: [B, S].
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        preference: [B], the probability that the chosen sample is preferred, from 0 to 1; 1/2 is a tie. None = 1.
        beta: price of leaving the reference; above 0.
        alpha: weight of learning to revise, against learning to answer; from 0 to 1. 1 leaves the answers to the prompt
            alone, 0 leaves both samples as revisions of themselves unused.
        gen_scale: multiplies L_gen. 0.25 is the form (1/2 - beta/2 (...))^2.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta (R(w|l) + R(w)) and beta (R(l|w) + R(l)), whose
        difference the loss takes for 2 p - 1. Metrics: `generative_loss` and `self_improvement_loss`, means over pairs of
        L_gen and L_imp.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        DataError: a preference is no number from 0 to 1.
        RecipeError: beta is not above 0; alpha is not in [0, 1]; gen_scale is negative.

    Gradient:
        To all six log-probabilities of the policy at live steps; the reference is detached.

    Edge cases:
        Log-probabilities are summed over steps, without normalisation by length. A side without live steps has
        log-probability 0. Masked steps may hold anything, NaN included. A pair of the same sample twice contradicts
        itself: leave it out, or give it the preference 1/2.

    Example:
        >>> zero, live = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2).bool()
        >>> loss = srpo(*[zero] * 12, live, live, alpha=0.8)
        >>> round(loss.total.item(), 4)
        0.6

    Source:
        Self-Improving Robust Preference Optimization, arXiv 2406.01660. Our reading; the losses and the default alpha are
        those of a public implementation.
    """
    where = "objectives.srpo"
    check_beta(where, beta)
    check_not_negative(where, gen_scale=gen_scale)
    if not 0 <= alpha <= 1:
        raise RecipeError(f"{where}: alpha must be from 0 to 1; got {alpha}.")
    masks = (mask_chosen, mask_rejected)
    answers = log_ratios(where, logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, *masks)
    of_chosen = log_ratios(
        f"{where} (the chosen sample as draft)",
        logp_chosen_given_chosen,
        logp_rejected_given_chosen,
        logp_ref_chosen_given_chosen,
        logp_ref_rejected_given_chosen,
        *masks,
    )
    of_rejected = log_ratios(
        f"{where} (the rejected sample as draft)",
        logp_chosen_given_rejected,
        logp_rejected_given_rejected,
        logp_ref_chosen_given_rejected,
        logp_ref_rejected_given_rejected,
        *masks,
    )
    given = None if preference is None else _preferences(where, preference, answers.chosen)
    terms = srpo_terms(answers, of_chosen, of_rejected, given, beta=beta)
    losses = (1 - alpha) * gen_scale * terms.generative + alpha * terms.self_improvement
    worth = Sides(answers.chosen + of_rejected.chosen, answers.rejected + of_chosen.rejected)
    loss = pair_loss(losses, worth.scaled(beta))
    count = loss.count.clamp(min=1)
    means = {f"{name}_loss": each.detach().sum() / count for name, each in terms._asdict().items()}
    return loss._replace(metrics=means)


class Terms(NamedTuple):
    """The two parts of the loss for each pair, [B]."""

    generative: Tensor
    self_improvement: Tensor


def srpo_terms(
    answers: Sides, of_chosen: Sides, of_rejected: Sides, preference: Tensor | None = None, *, beta: float = 0.1
) -> Terms:
    """L_gen and L_imp of each pair from its log-ratios.

    Args:
        answers: R(w) and R(l), each [B].
        of_chosen: R(w|w) and R(l|w): of both samples as revisions of the chosen one.
        of_rejected: R(w|l) and R(l|l).
        preference: [B], the probability that w is preferred; None = 1.
        beta: price of leaving the reference.

    Returns:
        Both parts, [B].

    Source:
        As `srpo`. Over pairs drawn independently from any distribution with full support, and with their true preferences,
        both parts are 0 exactly where the revising policy is proportional to reference x exp(p / beta), and the answering
        one to reference / the normaliser of that.
    """
    aim = 0.5 if preference is None else preference - 0.5
    improvement = (aim - beta * of_rejected.gap).square() + (aim - beta * of_chosen.gap).square()
    generation = 2 * aim - beta * (of_rejected.chosen + answers.chosen - of_chosen.rejected - answers.rejected)
    return Terms(generation.square(), improvement)


def _preferences(where: str, preference: Tensor | Sequence[Any], like: Tensor) -> Tensor:
    """As a tensor [B], checked."""
    if not isinstance(preference, Tensor):
        # a column may hold anything; what is no number fails below
        numbers = [value if isinstance(value, (int, float)) else math.nan for value in preference]
        preference = torch.tensor(numbers, dtype=like.dtype, device=like.device)
    check_shapes(where, logp_chosen=(like[:, None], "B T"), preference=(preference, "B"))
    wrong = ~((preference >= 0) & (preference <= 1))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise DataError(f"{where}: preference[{row}] must be a number from 0 to 1; got {preference[row].item():g}.")
    return preference.to(like.dtype)
