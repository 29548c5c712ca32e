"""Direct preference optimisation: a logistic loss on how much further the policy has moved towards the chosen sample.

R. Rafailov et al. 2023, Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv 2305.18290.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.errors import RecipeError, nearest
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import Sides, check_beta, check_smoothing, log_ratios, logistic, pair_loss

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


def dpo(
    logp_chosen: Float[Tensor, "B T"],
    logp_rejected: Float[Tensor, "B S"],
    logp_ref_chosen: Float[Tensor, "B T"],
    logp_ref_rejected: Float[Tensor, "B S"],
    mask_chosen: Bool[Tensor, "B T"],
    mask_rejected: Bool[Tensor, "B S"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    robust: bool = False,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> Loss:
    """Raise the chosen sample of each pair over the rejected one, both measured against a reference.

    With u = log policy - log reference of a whole sample and D = u_chosen - u_rejected, a pair costs
    -log sigmoid(beta D). The optimum is the policy whose KL-regularised reward the pairs were labelled with, if labels
    follow Bradley-Terry; beta u is that reward, up to a constant of the prompt. Without noise D grows without end.

    Args:
        logp_chosen: [B, T], log-probability of each step of the chosen samples under the policy, in nats.
        logp_rejected: [B, S], of the rejected ones.
        logp_ref_chosen: [B, T], under the reference.
        logp_ref_rejected: [B, S], under the reference.
        mask_chosen: [B, T], True = a live step.
        mask_rejected: [B, S].
        beta: price of leaving the reference; the reward's scale. Above 0.
        label_smoothing: eps, the share of labels taken to be wrong. The cost is then
            -(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D) (cDPO), which holds D at a finite value.
        robust: unbiased under labels that are flipped at the rate eps:
            (-(1 - eps) log sigmoid(beta D) + eps log sigmoid(-beta D)) / (1 - 2 eps) (robust DPO).
        divergence: between policy and reference: u becomes s(u) with s = u (`reverse_kl`), -exp(-u) (`forward_kl`),
            log sigmoid(u) (`js`) or (exp((alpha - 1) u) - 1) / (alpha - 1) (`alpha`; u where alpha is 1).
        alpha: of the alpha-divergence; not read otherwise.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is beta s(u) of the chosen and the rejected sample.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: a log-probability of a live step is not finite.
        RecipeError: beta is not above 0; label_smoothing is outside [0, 0.5], or [0, 0.5) with `robust`; the divergence
            is unknown.

    Gradient:
        To logp_chosen and logp_rejected at live steps, -beta sigmoid(-beta D) on each step of the chosen sample and the
        opposite on the rejected one (eps = 0, reverse KL). The reference is detached.

    Edge cases:
        A side without live steps has log-probability 0. Masked steps may hold anything, NaN included. T and S may differ.

    Example:
        >>> zero, live = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2).bool()
        >>> loss = dpo(zero, zero, zero, zero, live, live)
        >>> round(loss.total.item(), 4)
        0.6931

    Source:
        Direct Preference Optimization, arXiv 2305.18290; label smoothing: a note on DPO with noisy preferences (cDPO),
        2023; Provably Robust DPO, arXiv 2403.00409. The divergences are those of f-DPO.
    """
    where = "objectives.dpo"
    check_beta(where, beta)
    check_smoothing(where, label_smoothing, half=not robust)
    masks = (mask_chosen, mask_rejected)
    ratios = log_ratios(where, logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, *masks)
    rewards = Sides(*(_link(where, u, divergence, alpha) for u in ratios)).scaled(beta)
    if robust:
        eps = label_smoothing
        losses = ((1 - eps) * logistic(rewards.gap) - eps * logistic(-rewards.gap)) / (1 - 2 * eps)
    else:
        losses = logistic(rewards.gap, label_smoothing)
    return pair_loss(losses, rewards)


def _link(where: str, ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """What takes the place of the log-ratio under another divergence."""
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 1):
        return ratio
    if divergence == "forward_kl":
        return -torch.exp(-ratio)
    if divergence == "js":
        return torch.nn.functional.logsigmoid(ratio)
    if divergence == "alpha":
        # less its value at 0, which cancels between the sides and keeps digits near alpha = 1
        return torch.expm1((alpha - 1) * ratio) / (alpha - 1)
    known = ("reverse_kl", "forward_kl", "js", "alpha")
    raise RecipeError(
        f"{where}: divergence must be one of {', '.join(known)}; got {divergence!r}.{nearest(divergence, known)}"
    )
