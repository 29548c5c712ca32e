"""Diffusion-DPO: DPO for denoisers, with denoising errors in place of log-probabilities.

Diffusion Model Alignment Using Direct Preference Optimization, arXiv 2311.12908.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from guerdon.errors import NumericsError, check_shapes
from guerdon.objectives.loss import Loss
from guerdon.objectives.pairs import Sides, check_beta, pair_loss


def diffusion_dpo(
    error_chosen: Float[Tensor, " B"],
    error_rejected: Float[Tensor, " B"],
    error_ref_chosen: Float[Tensor, " B"],
    error_ref_rejected: Float[Tensor, " B"],
    *,
    beta: float = 5000.0,
) -> Loss:
    """Denoise the preferred image of each pair better than the reference does, and the other one worse.

    With m the mean squared denoising error of an image and z = -(beta / 2) ((m_chosen - m_rejected) - (the same of the
    reference)), a pair costs -log sigmoid(z). Both images of a pair share time and noise, and so do policy and reference.

    Args:
        error_chosen: [B], squared error of the policy's prediction for the preferred image, the mean over its values.
        error_rejected: [B], for the other image.
        error_ref_chosen: [B], of the reference.
        error_ref_rejected: [B], of the reference.
        beta: price of leaving the reference, above 0. It multiplies a mean; the paper's, which multiplies a sum, is this
            one over the number of values of an image.

    Returns:
        The loss over pairs; count is B. `implicit` [B, 2] is -(beta / 2) (m - m_ref) of either image.
        Metrics: `implicit_accuracy`, the share of pairs with z > 0.

    Raises:
        ShapeError: an argument has another shape.
        NumericsError: an error is not finite.
        RecipeError: beta is not above 0.

    Gradient:
        To error_chosen, (beta / 2) sigmoid(-z), and to error_rejected, the opposite; the reference is detached.

    Edge cases:
        The same image on both sides gives z = 0.

    Example:
        >>> error = torch.ones(1, requires_grad=True)
        >>> round(diffusion_dpo(error, error, error, error).total.item(), 4)
        0.6931

    Source:
        Diffusion Model Alignment Using Direct Preference Optimization, arXiv 2311.12908.
    """
    where = "objectives.diffusion_dpo"
    check_beta(where, beta)
    named = {
        "error_chosen": error_chosen,
        "error_rejected": error_rejected,
        "error_ref_chosen": error_ref_chosen.detach(),
        "error_ref_rejected": error_ref_rejected.detach(),
    }
    check_shapes(where, **{name: (value, "B") for name, value in named.items()})
    for name, value in named.items():
        if not value.isfinite().all():
            raise NumericsError(f"{where}: {name} is not finite. Lower the learning rate, or look at the data.")
    chosen, rejected = error_chosen - named["error_ref_chosen"], error_rejected - named["error_ref_rejected"]
    z = -(beta / 2) * (chosen - rejected)
    loss = pair_loss(softplus(-z), Sides(chosen, rejected).scaled(-beta / 2))
    return loss._replace(metrics={"implicit_accuracy": (z.detach() > 0).to(torch.float32).mean()})
