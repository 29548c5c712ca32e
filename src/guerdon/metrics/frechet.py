"""The Frechet distance of two sets of samples, by the mean and the covariance of their features."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import ShapeError, check_shapes


def frechet_distance(first: Float[Tensor, "N D"], second: Float[Tensor, "M D"]) -> float:
    """How far apart two sets lie, if the features of each were Gaussian.

    d = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Wasserstein-2 distance of the two Gaussians. It depends
    on the features and on the number of samples: two small sets of the same source are apart as well, so a distance
    means something only beside that of two real sets of the same sizes.

    Args:
        first: [N, D], features of one set, N >= 2.
        second: [M, D], of the other, M >= 2.

    Returns:
        The distance, in squared units of the features, at least 0; computed in float64.

    Raises:
        ShapeError: the sets have different D, or fewer than two samples.

    Gradient:
        None.

    Edge cases:
        Fewer samples than D give singular covariances, which is allowed.

    Example:
        >>> features = torch.tensor([[0.0], [2.0]])
        >>> frechet_distance(features, features + 3.0)
        9.0

    Source:
        Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500.
    """
    where = "metrics.frechet_distance"
    check_shapes(where, first=(first, "N D"), second=(second, "M D"))
    if min(len(first), len(second)) < 2:
        raise ShapeError(f"{where}: at least two samples are needed on each side; got {len(first)} and {len(second)}.")
    x, y = first.detach().double(), second.detach().double()
    a, b = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(x.shape[1], -1)
    # tr (A B)^(1/2) is that of the symmetric A^(1/2) B A^(1/2)
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross
    return max(distance.item(), 0.0)
