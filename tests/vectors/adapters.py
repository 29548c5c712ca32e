"""How each file of reference numbers is computed with the library: slug -> function from inputs to outputs.

Inputs are nested lists, numbers and strings; outputs are tensors, numbers, lists or dicts under the names of the file.
An adapter knows the names, never the cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guerdon.advantages import copo, dr_grpo, group_advantages, grpo, reinforce, rloo
from guerdon.objectives import copo_loss, policy_gradient, real
from guerdon.objectives.kl import kl_estimate
from guerdon.objectives.real import relative_scores
from guerdon.rewards.overlong import overlong
from guerdon.rewards.topologies import play
from guerdon.sampling import vade
from guerdon.sampling.mixed import mixed_groups
from guerdon.sampling.thompson import largest
from guerdon.sampling.vade import information_gain, mixed_probability

Values = dict[str, Any]


def tensor(value: Any) -> Tensor:
    """A float64 tensor of nested lists."""
    return torch.tensor(value, dtype=torch.float64)


def grpo_family(inputs: Values) -> Values:
    logp, logp_old, logp_ref = (tensor(inputs[name]) for name in ("logp", "logp_old", "logp_ref"))
    mask = tensor(inputs["mask"]).bool()
    rewards = tensor(inputs["rewards"])
    options = {"clip_low": inputs["eps_low"], "clip_high": inputs["eps_high"], "beta": inputs["beta"]}
    outputs: Values = {
        "advantages": {
            "grpo": grpo(rewards),
            "mean_only": dr_grpo(rewards),
            "rloo": rloo(rewards),
            "batch_scaled": group_advantages(rewards, scale="batch"),
            "reinforce": reinforce(rewards),
        },
        "overlong": overlong(
            torch.tensor(inputs["overlong_lengths"]), max_length=inputs["overlong_max"], cache=inputs["overlong_cache"]
        ),
        "keep_group": mixed_groups(rewards),
    }
    losses: dict[str, Values] = {
        "grpo": {"denominator": "per_sample"},
        "token_mean": {"denominator": "per_token"},
        "dr_grpo": {"denominator": "constant", "max_length": inputs["max_length"]},
        "gspo": {"denominator": "per_sample", "level": "sequence"},
    }
    for name, more in losses.items():
        variable = logp.clone().requires_grad_()
        result = policy_gradient(variable, logp_old, grpo(rewards), mask, logp_ref, **options, **more)
        loss = result.total / result.count.clamp(min=1)
        loss.backward()
        outputs |= {f"loss_{name}": loss, f"grad_{name}": variable.grad}
    for estimator in ("k1", "k2", "k3"):
        outputs[f"kl_{estimator}"] = kl_estimate(logp, logp_ref, estimator)
    return outputs


def consistency(inputs: Values) -> Values:
    options = {name: inputs[name] for name in ("gamma", "rho", "mode", "consistency_coefficient")}
    # the numbers were made with a small constant inside the logarithm of the entropy
    found = copo(tensor(inputs["rewards"]), inputs["answers"], log_eps=1e-8, **options)
    logp = tensor(inputs["logp"]).requires_grad_()
    loss = copo_loss(
        logp,
        tensor(inputs["logp_old"]),
        found.local_advantages,
        found.global_advantages,
        found.local_weight,
        tensor(inputs["mask"]).bool(),
        clip_low=inputs["eps_low"],
        clip_high=inputs["eps_high"],
    )
    mean = loss.total / loss.count
    mean.backward()
    return {
        "entropy": found.consistency_entropy,
        "global_reward": found.global_reward,
        "local_advantage": found.local_advantages,
        "global_advantage": found.global_advantages[:, 0],
        "local_weight": found.local_weight,
        "loss": mean,
        "grad": logp.grad,
    }


def labels(inputs: Values) -> Values:
    logp, logp_old, rewards = (tensor(inputs[name]) for name in ("logp", "logp_old", "rewards"))
    mask = tensor(inputs["mask"]).bool()
    outputs: Values = {"scores": relative_scores(logp, logp_old, mask)}
    for variant in ("real", "bce"):
        variable = logp.clone().requires_grad_()
        result = real(variable, logp_old, rewards, mask, tau=inputs["tau"], variant=variant)
        loss = result.total / result.count.clamp(min=1)
        loss.backward()
        outputs |= {f"loss_{variant}": loss, f"grad_{variant}": variable.grad}
    return outputs


def variance_aware(inputs: Values) -> Values:
    sampler = vade(**{name: inputs[name] for name in ("alpha0", "beta0", "decay_global", "decay_selected")})
    sampler.prepare(inputs["samples"], seed=0)
    steps = []
    for step in inputs["steps"]:
        gain = information_gain(np.array(step["draw"]))
        selected = largest(gain, inputs["batch"]).tolist()
        right = torch.arange(inputs["group"]) < torch.tensor(step["correct"])[:, None]
        sampler.observe(selected, right.double().unsqueeze(-1))
        state = {name: getattr(sampler, name) for name in ("alpha", "beta", "mean", "evidence")}
        steps.append({"gain": gain, "selected": selected, **state})
    grid = tensor(inputs["p_grid"])
    return {
        "steps": steps,
        "mixed_probability": mixed_probability(grid, inputs["group"]),
        "gain_grid": information_gain(grid),
    }


def tournaments(inputs: Values) -> Values:
    judge = inputs["judge"]
    outputs: Values = {}
    for topology in ("anchor", "round_robin", "single_elimination"):
        found = play(topology, len(judge), lambda pairs: [tuple(judge[i][j]) for i, j in pairs])
        outputs[f"advantages_{topology}"] = grpo(tensor([found.quantiles]), eps=1e-6)[0]
        outputs[f"comparisons_{topology}"] = found.comparisons
    return outputs


ADAPTERS: dict[str, Callable[[Values], Values]] = {
    "arena-rl": tournaments,
    "copo": consistency,
    "grpo-family": grpo_family,
    "real": labels,
    "vade": variance_aware,
}

# files whose numbers were made in single precision: relative and absolute tolerance
TOLERANCES: dict[str, float] = {"arena-rl": 1e-5}
