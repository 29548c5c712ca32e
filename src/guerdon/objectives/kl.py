"""Estimates of the divergence from a reference, one number per step of a sample."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from guerdon.errors import BindingError, RecipeError, ShapeError, check_shapes

KlEstimator = Literal["k1", "k2", "k3"]
Divergence = Literal["k1", "k2", "k3", "exact"]

_LARGEST_EXPONENT = 20.0


def kl_estimate(
    logp: Float[Tensor, "*steps"], logp_ref: Float[Tensor, "*steps"], estimator: KlEstimator = "k3"
) -> Float[Tensor, "*steps"]:
    """Estimate KL(policy || reference) at steps that the policy sampled.

    With e = logp_ref - logp: k1 = -e, k2 = e^2 / 2, k3 = exp(e) - e - 1. As values k1 and k3 are unbiased, k3 is never
    negative; k2 is biased. As losses (samples held fixed) the expected gradient of k1 is 0, of k2 that of KL(policy ||
    reference), of k3 that of the other order, KL(reference || policy).

    Args:
        logp: any shape, log-probability of each step under the policy, in nats.
        logp_ref: the same shape, under the reference.
        estimator: which of the three.

    Returns:
        The estimate per step, in nats, same shape; nothing is masked.

    Raises:
        ShapeError: the shapes differ.
        RecipeError: the estimator is unknown.

    Gradient:
        To both arguments.

    Edge cases:
        k3 holds e at 20 from above, without gradient beyond, so that one improbable step does not overflow.

    Example:
        >>> import torch
        >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), "k2")
        tensor([0.1250])

    Source:
        Schulman 2020, Approximating KL Divergence (note).
    """
    if logp.shape != logp_ref.shape:
        raise ShapeError(
            f"objectives.kl_estimate: logp_ref must have the shape of logp, {list(logp.shape)}; "
            f"got {list(logp_ref.shape)}."
        )
    e = logp_ref - logp
    if estimator == "k1":
        return -e
    if estimator == "k2":
        return e.square() / 2
    if estimator == "k3":
        e = e.clamp(max=_LARGEST_EXPONENT)
        return e.exp() - e - 1
    raise RecipeError(f"the KL estimator must be k1, k2 or k3; got {estimator!r}.")


def steered(coefficient: Tensor, divergence: Tensor, target: float, rate: float) -> Tensor:
    """The weight of a divergence, moved towards keeping it at a target: times 1 + rate * clip(KL / target - 1, -0.2, 0.2).

    Example:
        >>> import torch
        >>> steered(torch.tensor(0.2), torch.tensor(3.0), target=1.0, rate=0.5)
        tensor(0.2200)
    """
    return coefficient * (1 + rate * (divergence / target - 1).clamp(-0.2, 0.2))


def step_divergence(
    where: str,
    logp: Tensor,
    logp_ref: Tensor | None,
    kl: Tensor | None,
    mask: Tensor,
    beta: float,
    estimator: Divergence,
) -> Tensor | None:
    """The divergence from the reference at live steps, 0 at masked ones, for an objective with the weight `beta`.

    Args:
        where: the objective that asks; it opens errors.
        logp: [P, G, T], 0 where masked.
        logp_ref: [P, G, T], for an estimate.
        kl: [P, G, T], for `exact`.
        mask: [P, G, T].
        beta: weight of the divergence; where it is not 0 the field must be there.
        estimator: how it is found.

    Returns:
        [P, G, T] with graph, or None where the field is not there and beta is 0.

    Raises:
        BindingError: the field is missing though beta is not 0.
        ShapeError: the field has another shape.
        RecipeError: the estimator is unknown.
    """
    field, name = (kl, "kl") if estimator == "exact" else (logp_ref, "logp_ref")
    if field is None:
        if beta:
            # language models have no closed form
            advice = "take kl_estimator: k3, or set beta: 0." if estimator == "exact" else "set beta: 0."
            raise BindingError(f"{where}: beta = {beta} needs the field {name}, which is not there; {advice}")
        return None
    check_shapes(where, mask=(mask, "P G T"), **{name: (field, "P G T")})
    if estimator == "exact":
        return field.where(mask, 0.0)
    return kl_estimate(logp, field.detach().where(mask, 0.0), estimator)
