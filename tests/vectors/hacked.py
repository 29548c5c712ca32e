"""Adapters of the files on rewards that are many or hacked: par, constrained-rlhf, quark-medical."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guerdon import shaping
from guerdon.weighting import tri_factor
from guerdon.weighting.lagrangian import Multipliers, mix_advantages
from guerdon.weighting.nelder_mead import NelderMead

Values = dict[str, Any]


def tensor(value: Any) -> Tensor:
    """A float64 tensor of nested lists."""
    return torch.tensor(value, dtype=torch.float64)


def shaped_rewards(inputs: Values) -> Values:
    """Every map over all batches in order; a batch is one prompt a sample, so that each has its own references."""
    batches = [
        {"scores": tensor(r)[:, None], "ref_scores": tensor(m), "lengths": torch.tensor(n)[:, None]}
        for r, m, n in zip(inputs["rewards"], inputs["ref_rewards"], inputs["lengths"], strict=True)
    ]

    def over(function: Callable[..., Tensor], *names: str) -> list[Tensor]:
        return [function(*(batch[name] for name in names)).squeeze(1) for batch in batches]

    def running(stage: Any) -> list[Tensor]:
        found = []
        for batch in batches:
            found.append(stage(batch["scores"]).squeeze(1))
            stage.observe(batch["scores"])
        return found

    def penalised(scores: Tensor, ref_scores: Tensor, lengths: Tensor) -> Tensor:
        return shaping.par(shaping.length_penalty(scores, lengths), ref_scores)

    both = ("scores", "ref_scores")
    return {
        "par": over(shaping.par, *both),
        "par_k2": over(partial(shaping.par, k=2.0), *both),
        "par_k3": over(partial(shaping.par, k=3.0), *both),
        "par_ref1": over(lambda scores, ref_scores: shaping.par(scores, ref_scores[:, :1]), *both),
        "tanh_centered": over(shaping.tanh_centred, *both),
        "fittedpoly_centered": over(shaping.poly_centred, *both),
        "sgfc": over(partial(shaping.sgfc, k=3.0), *both),
        "sgfc_k1": over(shaping.sgfc, *both),
        "sigmoid": over(shaping.sigmoid, "scores"),
        "tanh": over(shaping.tanh, "scores"),
        "fittedpoly": over(shaping.poly, "scores"),
        "centered": over(shaping.centred, *both),
        "ceil3": over(partial(shaping.ceil, c=3.0), "scores"),
        "lsc": over(shaping.log_sigmoid_centred, *both),
        "meanstd": running(shaping.mean_std()),
        "clip": running(shaping.clip()),
        "minmax": running(shaping.min_max()),
        "length_penalty_then_par": over(penalised, *both, "lengths"),
    }


def constrained(inputs: Values) -> Values:
    """Mixed advantages, multipliers over a few batches, the search, or the saturated reward."""
    kind = inputs["kind"]
    if kind == "mix":
        streams, values = tensor(inputs["advantages"]), tensor(inputs["multipliers"])
        squashed = torch.tanh(values) if inputs["mode"] == "xi" else torch.sigmoid(values)
        mixed = mix_advantages(streams, tensor(inputs["kl_advantages"]), squashed, mode=inputs["mode"])
        return {"weights": squashed, "kl_weight": len(squashed) - squashed.sum(), "mixed": mixed}
    if kind == "multipliers":
        options = {name: inputs[name] for name in ("mode", "lr", "momentum", "max_grad_norm")}
        stage = Multipliers(inputs["thresholds"], **options)
        stage.values.copy_(tensor(inputs["multipliers"]))
        found: Values = {"multipliers": [], "weights": []}
        for batch in inputs["returns"]:
            stage.step(tensor(batch))
            found["multipliers"].append(stage.values.tolist())
            found["weights"].append(stage.weights.tolist())
        return found
    if kind == "nelder_mead":
        settings = {name: inputs[name] for name in ("alpha", "gamma", "rho", "sigma")}
        search = NelderMead(inputs["simplex"], tolerance=inputs["tol"], cache=inputs["cache_tol"], **settings)
        search.minimise(lambda x: _bowl(x, inputs), inputs["n_iter"])
        return {
            "steps": search.steps,
            "simplex": [point for _, point in search.simplex],
            "best_value": search.simplex[0][0],
            "evaluated": [point for point, _ in search.evaluated],
        }
    scores = tensor(inputs["scores"])
    parts = [shaping.saturated(scores[:, k : k + 1], threshold=t) for k, t in enumerate(inputs["thresholds"])]
    return {"reward": torch.cat(parts, dim=1).sum(-1)}


def _bowl(x: list[float], inputs: Values) -> float:
    shifted = [a - b for a, b in zip(x, inputs["centre"], strict=True)]
    if len(x) == 2:
        c, s = math.cos(inputs["rotation"]), math.sin(inputs["rotation"])
        shifted = [c * shifted[0] - s * shifted[1], s * shifted[0] + c * shifted[1]]
    return sum((a / b) ** 2 for a, b in zip(shifted, inputs["scale"], strict=True))


def tri_factors(inputs: Values) -> Values:
    """Normalisation by a frozen reference, then three factors, over all batches in order."""
    size = len(inputs["sign"])
    names = [f"component{k}" for k in range(size)]
    norms = [shaping.reference_frozen(sign=int(s), bound=inputs["clip"], eps=inputs["eps"]) for s in inputs["sign"]]
    for k, norm in enumerate(norms):
        norm.calibrate(tensor(inputs["reference_scores"])[:, k])

    def named(values: list[Any]) -> dict[str, Any]:
        return dict(zip(names, values, strict=True))

    stage = tri_factor(
        base=named(inputs["base_weights"]),
        severity=named(inputs["severity"]),
        floors=named(inputs["floors"]),
        sign=named([int(s) for s in inputs["sign"]]),
        target=named(inputs["target"]),
        **{name: inputs[name] for name in ("alpha", "kappa", "lam", "decay", "eta")},
    )
    moments = torch.stack([norm.moments for norm in norms])
    found: Values = {"reference_mean": moments[:, 0], "reference_std": moments[:, 1]}
    found |= {name: [] for name in ("z", "weakness", "risk", "redundancy", "weights", "rewards")}
    for batch in inputs["batches"]:
        raw = tensor(batch).unsqueeze(1)
        z = torch.stack([norm(raw[..., k]) for k, norm in enumerate(norms)], dim=-1)
        rewards, weights = stage(z, names, raw)
        stage.observe(z, names, raw)
        factors = stage.factors(stage.averages, names)
        row = (z.squeeze(1), *factors, weights, rewards.squeeze(1))
        for name, value in zip(list(found)[2:], row, strict=True):
            found[name].append(value.tolist())
    return found
