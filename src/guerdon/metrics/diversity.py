"""How many different samples there are in a set: the Vendi score."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import RecipeError, ShapeError, check_shapes


def vendi_score(features: Float[Tensor, "N D"], *, normalise: bool = True, order: float = 1.0) -> float:
    """The effective number of different samples: the exponential of the entropy of a similarity matrix's eigenvalues.

    With K = X X^T / N and eigenvalues l that sum to 1, the score is exp(-sum l log l) (Renyi's entropy for other
    orders). N equal samples score 1, N orthogonal ones N. Of X X^T [N, N] and X^T X [D, D], which have the same
    eigenvalues other than 0, the smaller one is used.

    Args:
        features: [N, D], one row a sample, such as the features of a network.
        normalise: bring rows to length 1 first (cosine similarity); otherwise they must have length 1.
        order: of the entropy; 1 = Shannon's, smaller ones weigh rare kinds up, infinity counts by the commonest kind.

    Returns:
        The score, in [1, min(N, D)] where rows have length 1; computed in float64.

    Raises:
        ShapeError: features is not [N, D], or is empty.
        RecipeError: order is negative.

    Gradient:
        None.

    Edge cases:
        A row of zeros has no direction: with `normalise` it is left as it is, and adds nothing. Order 0 counts the
        eigenvalues above 1e-12 of the largest; what lies below is
        rounding and is left out for every order.

    Example:
        >>> round(vendi_score(torch.eye(3)), 6), round(vendi_score(torch.ones(5, 2)), 6)
        (3.0, 1.0)

    Source:
        Friedman and Dieng 2022, The Vendi Score, arXiv 2210.02410; other orders: Pasarkar and Dieng 2023, arXiv
        2310.12952.
    """
    where = "metrics.vendi_score"
    sizes = check_shapes(where, features=(features, "N D"))
    if not sizes["N"] or not sizes["D"]:
        raise ShapeError(f"{where}: features must have samples and dimensions; got {list(features.shape)}.")
    if order < 0:
        raise RecipeError(f"{where}: order must be >= 0; got {order}.")
    x = features.detach().double()
    if normalise:
        lengths = x.norm(dim=1, keepdim=True)
        x = x / lengths.where(lengths > 0, 1.0)
    gram = x.T @ x if sizes["D"] < sizes["N"] else x @ x.T
    share = torch.linalg.eigvalsh(gram / sizes["N"])
    share = share[share > 1e-12 * share.amax().clamp(min=1e-300)]
    if not len(share):
        return 0.0  # only rows of zeros
    if order == 1.0:
        entropy = -(share * share.log()).sum()
    elif order == float("inf"):
        entropy = -share.amax().log()
    else:
        entropy = share.pow(order).sum().log() / (1 - order)
    return entropy.exp().item()
