"""Valid random values for every field of the road, by name; a member's inputs are made from its parameter names.

To bring a method under the batteries: list it in its stage's MEMBERS. If it names a field that is new, add one line to
FIELDS; if a field must be of a special kind for it, one to INPUTS; if it has options without default, add them to
OPTIONS; to run it with further options, add them to VARIANTS.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor


class Sizes(NamedTuple):
    """P prompts, G samples each, T steps, K components, M reference answers."""

    P: int = 3
    G: int = 4
    T: int = 5
    K: int = 2
    M: int = 3


class Draw:
    """Makes fields on demand, so that those that belong together (logp and logp_old) fit each other."""

    def __init__(self, sizes: Sizes, seed: int, special: Mapping[str, Maker]) -> None:
        self.sizes = sizes
        self.special = special
        self.generator = Generator().manual_seed(seed)
        self.made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.made:
            self.made[name] = self.special.get(name, FIELDS[name].make)(self)
        return self.made[name]

    def shape(self, letters: str) -> list[int]:
        known = {**self.sizes._asdict(), "B": self.sizes.P, "S": self.sizes.T + 1}
        return [known[letter] for letter in letters.split()]

    def normal(self, letters: str) -> Tensor:
        return torch.randn(self.shape(letters), dtype=torch.float64, generator=self.generator)

    def near(self, name: str, distance: float) -> Tensor:
        return self[name] + distance * self.normal("P G T")


Maker = Callable[[Draw], Any]


class Field(NamedTuple):
    """The letters of a field (of a list: its nesting) and how it is made."""

    letters: str
    make: Maker


def _mask(draw: Draw) -> Tensor:
    # prefixes of random lengths >= 1, and one hole: a masked step may also lie between live ones
    lengths = torch.randint(1, draw.sizes.T + 1, draw.shape("P G"), generator=draw.generator)
    mask = torch.arange(draw.sizes.T) < lengths.unsqueeze(-1)
    mask[0, 0] = True
    mask[0, 0, 1:-1:2] = False
    return mask


def _runs(draw: Draw) -> Tensor:
    """One run of live steps a sample, which may begin late."""
    mask = _mask(draw)
    mask[0, 0] = torch.arange(draw.sizes.T) > 0
    return mask


def _side(letters: str) -> dict[str, Maker]:
    """Log-probabilities of one side of pairs, with a mask whose last step is live in the first pair only."""

    def mask(draw: Draw) -> Tensor:
        live = draw.normal(letters) > -0.5
        live[:, 0] = True
        live[0, -1] = True
        live[1:, -1] = False
        return live

    return {
        "mask": mask,
        "logp": lambda d: -d.normal(letters).abs() - 0.1,
        "logp_ref": lambda d: -d.normal(letters).abs() - 0.1,
        "logp_guide": lambda d: -d.normal(letters).abs() - 0.1,
    }


def _sides() -> dict[str, Field]:
    both = (("chosen", "B T"), ("rejected", "B S"))
    found = {f"{name}_{side}": Field(of, make) for side, of in both for name, make in _side(of).items()}
    # after a prompt that holds a draft the samples have the same steps
    drafted = {name: field for name, field in found.items() if name.startswith("logp")}
    return found | {f"{name}_given_{of}": field for name, field in drafted.items() for of in ("chosen", "rejected")}


def _scores(draw: Draw) -> Tensor:
    return draw.normal("P G K")


def _words(draw: Draw, words: str) -> list[list[str]]:
    picks = torch.randint(len(words), draw.shape("P G"), generator=draw.generator).tolist()
    return [[words[pick] for pick in row] for row in picks]


FIELDS: dict[str, Field] = {
    **_sides(),
    "mean_length_chosen": Field("", lambda d: d["mask_chosen"].double().sum(-1).mean()),
    **{
        f"error{of}_{side}": Field("B", lambda d: d.normal("B").abs())
        for of in ("", "_ref")
        for side in ("chosen", "rejected")
    },
    "preference": Field("B", lambda d: d.normal("B").sigmoid()),
    "desirable": Field("P G", lambda d: d.normal("P G") > 0),
    "reference_point": Field("", lambda d: d.normal("P").abs().mean()),
    "mask": Field("P G T", _mask),
    "logp_old": Field("P G T", lambda d: -d.normal("P G T").abs() - 0.1),
    "logp": Field("P G T", lambda d: d.near("logp_old", 0.05)),
    "logp_ref": Field("P G T", lambda d: d.near("logp_old", 0.3)),
    "normaliser": Field("P G T", lambda d: d.normal("P G T")),
    "normaliser_ref": Field("P G T", lambda d: d.near("normaliser", 0.3)),
    "entropy": Field("P G T", lambda d: d.normal("P G T").abs()),
    "kl": Field("P G T", lambda d: d.normal("P G T").abs()),
    "kl_old": Field("P G T", lambda d: d.normal("P G T").abs()),
    "imitation": Field("P G", lambda d: d.normal("P G").abs()),
    "drift": Field("P G", lambda d: d.normal("P G").abs()),
    "values_old": Field("P G T", lambda d: d.normal("P G T")),
    "values": Field("P G T", lambda d: d.near("values_old", 0.05)),
    "step_scores": Field("P G T K", lambda d: d.normal("P G T K")),
    "returns": Field("P G T", lambda d: d.normal("P G T")),
    "rewards": Field("P G", lambda d: d.normal("P G")),
    "advantages": Field("P G", lambda d: d.normal("P G")),
    "scores": Field("P G K", _scores),
    "ref_scores": Field("P M", lambda d: d.normal("P M")),
    "ref_mask": Field("P M", lambda d: torch.arange(d.sizes.M) < 1 + torch.arange(d.sizes.P).unsqueeze(-1) % d.sizes.M),
    "shaped": Field("P G K", lambda d: d.normal("P G K")),
    "raw_scores": Field("P G K", lambda d: d.normal("P G K")),
    "watched": Field("P G K", lambda d: d.normal("P G K")),
    "score_names": Field("", lambda d: tuple(f"component{k}" for k in range(d.sizes.K))),
    "local_advantages": Field("P G", lambda d: d.normal("P G")),
    "global_advantages": Field("P G", lambda d: d.normal("P G")),
    "local_weight": Field("P G", lambda d: d.normal("P G").sigmoid()),
    "weights": Field("K", lambda d: d.normal("K").abs() + 0.1),
    "lengths": Field("P G", lambda d: d["mask"].sum(-1)),
    "truncated": Field("P G", lambda d: d.normal("P G") > 0.5),
    "outcomes": Field("P G", lambda d: _words(d, "abc")),
    "indices": Field("P", lambda d: list(range(d.sizes.P))),
    "prompts": Field("P", lambda d: [f"prompt {p}" for p in range(d.sizes.P)]),
    "samples": Field("P G", lambda d: _words(d, "xyz")),
}

# fields that must be of a special kind, by "stage.name"
INPUTS: dict[str, dict[str, Maker]] = {
    "advantages.gae_by_component": {"values": lambda d: d.normal("P G T K")},
    "advantages.value_anchored": {"rewards": lambda d: d.normal("P G").sigmoid()},
    "objectives.demonstration_value": {"mask": _runs},
    "objectives.real": {"rewards": lambda d: (d.normal("P G") > 0).double()},
    "shaping.backward_correction": {"scores": lambda d: (d.normal("P G K") > 0).double()},
    "shaping.forward_correction": {"scores": lambda d: (d.normal("P G K") > 0).double()},
    "shaping.sweet_spot": {"scores": lambda d: d.normal("P G K").sigmoid()},
}


def _letter_logp(prompts: Any, samples: Any, nats: float) -> Any:
    """What a model says that gives every letter the same log-probability, and those of the prompt's number more."""
    from guerdon.rewards.likelihood import SequenceLogp

    lengths = torch.tensor([[float(len(s)) for s in group] for group in samples])
    at = torch.tensor([[float(len(p))] for p in prompts])
    return SequenceLogp(-nats * lengths + at, lengths.long())


# what members without defaults need, by "stage.name"; naming an option here states that it is required by design
OPTIONS: dict[str, dict[str, Any]] = {
    "objectives.dr_grpo": {"max_length": 7},
    "rewards.appeal": {"reward": "exact_answer", "strong": "exact_answer"},
    "rewards.composition": {"formula": "same", "of": {"same": "exact_answer"}},
    "rewards.density_ratio": {
        "strong": functools.partial(_letter_logp, nats=1.0),
        "weak": functools.partial(_letter_logp, nats=2.5),
    },
    "rewards.instant": {"reward": "exact_answer"},
    "rewards.noisy": {"reward": "exact_answer"},
    "rewards.overlong": {"max_length": 5, "cache": 2},
    "rewards.regex": {"pattern": r"\d+"},
    "rewards.spans": {"critic": {"program": {"function": "guerdon.language.tasks.sort:critique"}}},
    "rewards.tournament": {"judge": {"pointwise": {"reward": "exact_answer"}}},
    "rewards.win_rate": {"judge": {"pointwise": {"reward": "exact_answer"}}},
    "shaping.backward_correction": {"false_positive_rate": 0.1, "false_negative_rate": 0.2},
    "shaping.ceil": {"c": 0.5},
    "shaping.distance": {"target": 0.3},
    "shaping.saturated": {"threshold": 0.3},
    "weighting.expression": {"formula": "g1 + 0.5 * g2"},
    "weighting.lagrangian": {"thresholds": {"component0": 0.2}},
    "weighting.proxy_point_search": {"box": {"component0": [-0.5, 0.5]}},
    "shaping.forward_correction": {"false_negative_rate": 0.2},
}

# further settings under which a member must keep its contract
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "advantages.copo": [
        *({"mode": mode} for mode in ("soft", "soft_with_forced", "dead_only", "zero_only", "global")),
        {"consistency_coefficient": True, "gamma": 5.0, "rho": 1.0, "global_coefficient": 0.1},
    ],
    "advantages.group_advantages": [{"scale": "batch"}, {"scale": "none"}, {"scale": "batch", "bessel": False}],
    "advantages.normalise_then_sum": [{"whiten": False}],
    "advantages.prompt_tracker": [{"size": 6, "min_count": 2}, {"size": 8, "min_count": 4, "eps": 0.1}],
    "advantages.rloo": [{"normalise": True}],
    "advantages.reinforce": [{"baseline": "batch"}, {"baseline": 0.5}],
    "advantages.running_scale": [{"momentum": None}],
    "advantages.value_anchored": [
        {"gamma": 1.0, "k": 0.3, "first_n": None, "use_step_weights": False},
        {"absolute": "abs", "mix": "convex", "omega_max": 1.5, "first_n": 2},
        {"shift_to_nonnegative": True, "gamma": 0.0},
    ],
    "advantages.adaptive_gae": [{"target": 1.0, "horizon": 10.0}],
    "advantages.gae_by_component": [{"normalise": False}],
    "advantages.gae": [
        {"beta": 0.1, "kl_estimator": "exact"},
        {"beta": 0.1, "gamma": 0.9},
        {"whiten": False, "lam": 1.0},
    ],
    "objectives.policy_gradient": [
        {"denominator": "per_token", "beta": 0.1, "entropy_bonus": 0.01},
        {"denominator": "constant", "max_length": 9, "beta": 0.1, "kl_estimator": "k2"},
        {"level": "sequence", "mask_truncated": True},
        {"level": "sequence_token", "clip_high": 0.28, "kl_estimator": "k1", "beta": 0.1},
        {"clip_low": None, "clip_high": None},
        {"ratio_max": 2.0, "dual_clip": 3.0},
        {"advantage_clip": 0.5, "beta": 0.1, "kl_estimator": "exact"},
    ],
    "objectives.copo_loss": [
        {"beta": 0.1, "dual_clip": None},
        {"denominator": "per_token", "clip_high": 0.28},
        {"denominator": "constant", "max_length": 9, "clip_low": None, "clip_high": None},
    ],
    "objectives.copg": [{"beta": 0.5}, {"beta": 3.0}],
    "objectives.aot": [{"paired": False, "label_smoothing": 0.1}],
    "objectives.cpo": [{"loss_type": "hinge"}, {"loss_type": "ipo", "nll_weight": 0.5}, {"label_smoothing": 0.1}],
    "objectives.demonstration": [
        *({"divergence": name} for name in ("total_variation", "hellinger", "reverse_kl", "jensen_shannon")),
        {"level": "sequence"},
        {"level": "sequence", "divergence": "hellinger", "beta": 0.5, "clamp_positive": True},
    ],
    "objectives.demonstration_value": [
        *({"divergence": name} for name in ("total_variation", "hellinger", "reverse_kl", "jensen_shannon")),
        {"centre": False, "beta": 0.5, "denominator": "per_sample", "clamp_positive": True},
    ],
    "objectives.dpo": [
        {"label_smoothing": 0.2},
        {"label_smoothing": 0.2, "robust": True},
        *({"divergence": name, "beta": 0.5} for name in ("forward_kl", "js", "alpha")),
    ],
    "objectives.ipo": [{"average_log_prob": False}],
    "objectives.kto": [{"desirable_weight": 1.5, "undesirable_weight": 0.5}],
    "objectives.simpo": [
        {"loss_type": "hinge", "gamma_beta_ratio": 0.0},
        {"sft_weight": 0.5, "alpha": 0.2, "label_smoothing": 0.1},
        {"length_normalised": False},
    ],
    "objectives.srpo": [
        {"beta": 1.0, "alpha": 0.3, "gen_scale": 0.25},
        {"alpha": 0.0},
        {"alpha": 1.0},
    ],
    "objectives.tgdpo": [
        {"alpha": 3.0, "beta": 1.0},
        {"alpha": 3.0, "beta": 1.0, "min_weight": 0.1, "plain_end": True, "sft_weight": 0.5},
    ],
    "objectives.dpok": [{"importance": True, "clip": 0.2, "alpha": 2.0}, {"beta": 0.0}],
    "objectives.reward_weighted": [
        {"weighting": "exponential", "largest": 3.0, "beta": 0.5},
        {"weighting": "sparse", "threshold": -0.5},
    ],
    "objectives.gspo": [{"level": "sequence_token"}],
    "objectives.prdp": [{"beta": 0.5, "clip": float("inf")}, {"clip": 0.02, "logp_reduction": "mean"}],
    "objectives.ppo": [{"value_clip": None, "entropy_bonus": 0.01}],
    "objectives.real": [
        {"variant": "bce"},
        {"variant": "product", "tau": 0.05},
        {"threshold": (0.2, 0.8), "tau": 0.05},
        {"quantile": 0.3},
    ],
    "rewards.density_ratio": [{"normalise": "mean"}, {"domains": "default", "domain": "safety", "seed": 3}],
    "sampling.dynamic": [{"component": "component1", "max_draws": 3}],
    "sampling.uniform": [{"shuffle": False}],
    "sampling.vade": [
        {"gain": "variance", "fractional": True, "component": "component1"},
        {"gain": "mixed", "decay_global": 1.0, "decay_selected": 0.0, "pool": 50},
    ],
    "shaping.backward_correction": [{"scale": "ema", "threshold": 0.5}],
    "shaping.forward_correction": [
        {"baseline": "ema", "scale": "ema"},
        {"baseline": 0.1, "scale": "informedness", "false_positive_rate": 0.1},
    ],
    "shaping.clip": [{"width": 0.5}],
    "shaping.length_penalty": [{"limit": 2, "per_token": 0.1}],
    "shaping.log_sigmoid_centred": [{"quantile": 0.5}],
    "shaping.par": [{"k": 3.0}],
    "shaping.sgfc": [{"k": 3.0, "shift": 1.0}],
    "shaping.sigmoid": [{"k": 2.0}],
    "shaping.sweet_spot": [
        {"top": "inclusive", "amplification": 2.0, "alpha": 2.0},
        {"zones": 2, "tiers": [0.0, 0.9, 1.0]},
    ],
    "weighting.expression": [{"formula": "g1 * (2 - g2) / (1 + g1 * g1)"}],
    "weighting.gradient_alignment": [{"weights": {"component0": 0.25, "component1": 0.75}, "mu": 0.5}],
    "weighting.hypervolume": [{"weights": [0.25, 0.75], "apply_to": "reward"}, {"maximise": {"component0": False}}],
    "weighting.lagrangian": [
        {"mode": "xi", "average": "samples"},
        {"mode": "all", "updates": 2},
        {"squash": False},
    ],
    "weighting.tri_factor": [
        {"floors": {"component0": 0.0}, "severity": {"component0": 2.0}, "alpha": 0.0, "eta": 0.5},
        {"sign": {"component1": -1}, "floors": {"component1": 0.1}, "lam": 0.0},
    ],
    "weighting.linear": [{"weights": {"component0": 0.5, "component1": -2.0}}, {"weights": [1.0, 0.0]}],
}


def make(sizes: Sizes | None = None, seed: int = 0, special: Mapping[str, Maker] | None = None) -> dict[str, Any]:
    """Every known field, of fitting sizes; `special` makers take the place of the usual ones."""
    draw = Draw(sizes or Sizes(), seed, special or {})
    return {name: draw[name] for name in FIELDS}


def letters(name: str, value: Any) -> list[str]:
    """The letters of a field as it is; `rewards`, `advantages` and `scores` may have more or fewer than usual."""
    known = FIELDS[name].letters.split()
    if isinstance(value, Tensor) and value.ndim != len(known):
        return ["P", "G", "T"][: value.ndim]
    return known


def permute_samples(fields: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """The same fields with the samples of every group in another order."""
    found = {}
    for name, value in fields.items():
        if letters(name, value)[:2] != ["P", "G"]:
            found[name] = value
        elif isinstance(value, Tensor):
            found[name] = value[:, order].clone()
        else:
            found[name] = [[row[g] for g in order] for row in value]
    return found


def select_prompts(fields: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The fields of some prompts."""
    found = {}
    for name, value in fields.items():
        if letters(name, value)[:1] not in (["P"], ["B"]):
            found[name] = value
        else:
            found[name] = value[rows].clone() if isinstance(value, Tensor) else [value[p] for p in rows]
    return found


def poison_masked(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with NaN at every masked step."""
    masks = {("P", "G", "T"): "mask", ("B", "T"): "mask_chosen", ("B", "S"): "mask_rejected"}
    found = {}
    for name, value in fields.items():
        mask = (
            masks.get(tuple(letters(name, value))) if isinstance(value, Tensor) and value.is_floating_point() else None
        )
        if mask is None:
            found[name] = value
        else:
            dead = ~fields[mask]
            found[name] = value.masked_fill(dead.view(*dead.shape, *[1] * (value.ndim - dead.ndim)), math.nan)
    return found


def copy(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields that share no tensor with the given ones."""
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in fields.items()}
