"""Centring and scaling that leave unscored samples out and know a constant group by exact equality."""

from __future__ import annotations

import warnings

from torch import Tensor

from guerdon.errors import ScoreError


def check_finite(where: str, name: str, values: Tensor) -> None:
    """Raise on an infinite value; NaN means that a sample was not scored and is allowed."""
    bad = values.isinf().nonzero()
    if len(bad):
        raise ScoreError(
            f"{where}: {name}{bad[0].tolist()} is infinite, and so would be the mean of its group. "
            "Return None (or NaN) for a sample that cannot be scored."
        )


def warn_if_alone(where: str, group_size: int) -> None:
    """Warn that a group of one sample has nothing to be compared with."""
    if group_size == 1:
        warnings.warn(
            f"{where}: with one sample per prompt (G = 1) every advantage is 0. Use group_size >= 2, or an advantage "
            "that needs no group (reinforce, gae).",
            UserWarning,
            stacklevel=4,
        )


def centre(values: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the group's mean along the last dimension.

    Args:
        values: [..., G], NaN where a sample was not scored.

    Returns:
        The centred values [..., G], exactly 0 where unscored and in constant groups, and the number of scored samples
        [..., 1].
    """
    scored = ~values.isnan()
    count = scored.sum(-1, keepdim=True)
    mean = values.nansum(-1, keepdim=True) / count.clamp(min=1)
    return (values - mean).where(scored & varies(values), 0.0), count


def varies(values: Tensor) -> Tensor:
    """Whether two scored samples of a group differ, [..., 1]; compared, as the std of equal numbers need not be 0."""
    scored = ~values.isnan()
    low = values.where(scored, float("inf")).amin(-1, keepdim=True)
    high = values.where(scored, -float("inf")).amax(-1, keepdim=True)
    return high > low


def deviation(centred: Tensor, count: Tensor, bessel: bool = True) -> Tensor:
    """Standard deviation of centred values (0 where unscored), [..., 1]; n - 1 in place of n with Bessel's correction."""
    return (centred.square().sum(-1, keepdim=True) / (count - int(bessel)).clamp(min=1)).sqrt()


def batch_deviation(values: Tensor, bessel: bool = True) -> Tensor:
    """Standard deviation over all scored entries, a scalar; 0 if there are fewer than two."""
    centred, count = centre(values.flatten())
    return deviation(centred, count, bessel).squeeze(-1)


def divide(centred: Tensor, scale: Tensor) -> Tensor:
    """centred / scale, with 0 / 0 = 0, so that a constant group stays 0 whatever is added to its deviation."""
    return (centred / scale).where(centred != 0, 0.0)
