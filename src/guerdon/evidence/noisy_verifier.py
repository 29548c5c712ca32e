"""The claim for noisy verifiers: corrected rewards learn where uncorrected ones are held back by the verifier's errors."""

from __future__ import annotations

import inspect
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Generator, Tensor

from guerdon.advantages.group import grpo, reinforce, rloo
from guerdon.evidence.base import (
    Arm,
    Budget,
    Check,
    Evidence,
    Points,
    Results,
    Settings,
    Unit,
    at_least,
    at_most,
    compare,
    mean,
    sd,
    tuning_seeds,
)
from guerdon.evidence.cache import cache_folder, replace
from guerdon.evidence.sort_task import MAX_NEW_TOKENS, sort_run
from guerdon.language.policy import LanguagePolicy
from guerdon.language.tasks import Row, sort
from guerdon.objectives.policy_gradient import dapo
from guerdon.rewards import exact_answer
from guerdon.rewards.appeal import appeal
from guerdon.rewards.noise import noisy
from guerdon.shaping import backward_correction, forward_correction
from guerdon.shaping.noise_correction import backward_reward, correction_audit, flip_probabilities, forward_weight
from guerdon.signal import Signal
from guerdon.training.evaluation import evaluate
from guerdon.training.online import Online
from guerdon.training.optimisation import Optim
from guerdon.training.supervised import Supervised

SLUG = "noisy-verifier"
TITLE = "Verifiable yet noisy rewards"
PAPER = "Reinforcement Learning with Verifiable yet Noisy Rewards under Imperfect Verifiers, 2025, arXiv 2510.00915"
CLAIM = (
    "Correcting the policy gradient for the verifier's error rates recovers most of what its errors cost; with appeals "
    "that estimate the false-negative rate, 33.7 against 31.6 without on average over six sets of mathematics problems "
    "(1.5B)."
)

FALSE_POSITIVE, FALSE_NEGATIVE = 0.1, 0.4  # of the training arms
# trained with a verifier that errs; `oracle` with one that does not
TRAINED = (
    "backward",
    "forward-ema",
    "forward",
    "uncorrected",
    "uncorrected-loo",
    "uncorrected-direct",
    "oracle",
)
# trained where there are two right answers and the key has one of them
KEYED = ("appealed", "recovered", "brittle")
RATES = (1e-4, 3e-4)
APPEAL = 0.25
SIZES: dict[Budget, dict[str, int]] = {
    "smoke": {"keyed": 10, "eval_size": 50},
    "full": {"trained": 50, "keyed": 40, "eval_size": 200},
}
ROLES = {
    "exact": "ablation",
    "backward": "method",
    "forward-ema": "method",
    "uncorrected": "baseline",
    "oracle": "ablation",
    "appealed": "method",
    "brittle": "baseline",
}


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Exact sums; training where the key has one of two answers; in full also training with injected errors."""
    sizes = SIZES[budget]
    units = [Unit("exact", seed) for seed in range(seeds)]
    arms = ("appealed",) if budget == "smoke" else (*TRAINED, *KEYED)
    for arm in arms:
        steps = sizes["keyed" if arm in KEYED else "trained"]
        common = {"eval_size": sizes["eval_size"]}
        if budget == "full":
            units += [
                Unit(arm, seed, {**common, "steps": steps // 2, "lr": rate}, "tune")
                for rate in RATES
                for seed in tuning_seeds(1)
            ]
        rate = (tuned or {}).get(arm, {"lr": RATES[-1]})["lr"]
        units += [Unit(arm, seed, {**common, "steps": steps, "lr": rate}) for seed in range(seeds)]
    return units


def tune(results: Results) -> dict[str, Settings]:
    """The learning rate with the best sampled accuracy."""
    return results.best("sampled_after", keep=("lr",))


def measure(unit: Unit) -> dict[str, Any]:
    """Sum exactly, or train."""
    if unit.arm == "exact":
        return exact(unit.seed)
    return keyed(unit) if unit.arm in KEYED else trained(unit)


# ---------------------------------------------------------------- sums over all arms of a bandit


def exact(seed: int) -> dict[str, Any]:
    """Expected updates of a small softmax policy: all arms, all errors of the verifier, all groups of two."""
    generator = Generator().manual_seed(seed)
    logits = torch.randn(4, generator=generator, dtype=torch.float64)
    right = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    probability = logits.softmax(-1)
    grads = torch.eye(4, dtype=torch.float64) - probability
    clean = (probability * right) @ grads
    errors = {"backward": 0.0, "forward": 0.0, "loo": 0.0}
    cosines = []
    for low, miss in itertools.product((0.0, 0.1, 0.3), (0.1, 0.2, 0.5)):
        # by verdict 0 or 1, then by arm
        chance = probability * torch.tensor(flip_probabilities(low, miss), dtype=torch.float64)[right.long()].T
        seen = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        back, forth = backward_reward(seen, low, miss)[0], forward_weight(seen, miss)[0]
        updates = {name: (value @ chance) @ grads for name, value in (("backward", back), ("forward", forth))}
        errors["backward"] = max(errors["backward"], (updates["backward"] - clean).abs().max().item())
        scaled = (1 - low - miss) * clean
        errors["forward"] = max(errors["forward"], (updates["forward"] - scaled).abs().max().item())
        cosines += [torch.cosine_similarity(update, clean, dim=0).item() for update in updates.values()]
        errors["loo"] = max(errors["loo"], (_pairs(chance, grads, low, miss) - clean).abs().max().item())
    return {
        "figures": {
            **{f"error_{name}": value for name, value in errors.items()},
            "direction_off": 1 - min(cosines),
            **_degenerate(generator),
        },
        "curves": _misjudged(probability, right, grads),
    }


def _pairs(chance: Tensor, grads: Tensor, low: float, miss: float) -> Tensor:
    """The expected update of groups of two with the leave-one-out baseline."""
    total = torch.zeros(4, dtype=torch.float64)
    cells = list(itertools.product((0, 1), range(4)))
    for (s, a), (t, b) in itertools.product(cells, repeat=2):
        rewards = backward_reward(torch.tensor([[float(s), float(t)]], dtype=torch.float64), low, miss)
        total += chance[s, a] * chance[t, b] * (rloo(rewards)[0] @ grads[[a, b]]) / 2
    return total


def _degenerate(generator: Generator) -> dict[str, float]:
    """The audit of corrected scores that are then z-scored in their group."""
    scores = (torch.rand(64, 8, generator=generator, dtype=torch.float64) < 0.4).double()
    mask = torch.ones(64, 8, 1, dtype=torch.bool)
    found = {}
    for name, values in (("backward", backward_reward(scores, 0.1, 0.4)), ("forward", forward_weight(scores, 0.4))):
        audit = correction_audit(grpo(values), grpo(scores), mask)
        found |= {f"z_score_{name}_max": audit.max, f"z_score_{name}_cosine": audit.cosine}
    kept = correction_audit(rloo(backward_reward(scores, 0.1, 0.4)), rloo(scores), mask)
    return found | {"loo_backward_mean": kept.mean}


def _misjudged(probability: Tensor, right: Tensor, grads: Tensor) -> dict[str, Points]:
    """Variance of the update of one sample over the false-negative rate that is assumed; the true one is 0.2."""
    chance = probability * torch.tensor(flip_probabilities(0.1, 0.2), dtype=torch.float64)[right.long()].T
    seen = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    curves: dict[str, Points] = {"variance_backward": [], "variance_forward": []}
    for assumed in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        for name, value in (
            ("backward", backward_reward(seen, 0.1, assumed)[0]),
            ("forward", forward_weight(seen, assumed)[0]),
        ):
            average = (value @ chance) @ grads
            square = ((value**2) @ chance) @ grads.square().sum(-1)
            curves[f"variance_{name}"].append((assumed, (square - average.square().sum()).item()))
    return curves


# ---------------------------------------------------------------- training with injected errors


def trained(unit: Unit) -> dict[str, Any]:
    """Train on the sort task with a verifier that is wrong at random; accuracy is without its errors."""
    arm = unit.arm
    rates: dict[str, Any] = {"false_positive_rate": FALSE_POSITIVE, "false_negative_rate": FALSE_NEGATIVE}
    verifier = exact_answer if arm == "oracle" else noisy(reward="exact_answer", seed=unit.seed, **rates)
    shaping: dict[str, list[Callable[..., Any]]] = {}
    if arm == "backward":
        shaping["correct"] = [backward_correction(**rates)]
    elif arm.startswith("forward"):
        baseline: Any = "ema" if arm == "forward-ema" else "none"
        shaping["correct"] = [forward_correction(false_negative_rate=FALSE_NEGATIVE, baseline=baseline)]
    advantages = {"backward": rloo, "uncorrected-loo": rloo, "uncorrected": grpo, "oracle": grpo}
    return sort_run(
        unit.seed,
        signal=Signal(rewards={"correct": verifier}, shaping=shaping, advantage=advantages.get(arm, reinforce)),
        objective=dapo,
        eval_every=max(int(unit.settings["steps"]) // 5, 1),
        **cast(dict[str, Any], unit.settings),
    )


# ---------------------------------------------------------------- two right answers, one in the key


class EitherWay(Sequence[Row]):
    """Digits to be sorted up or down, both right; `answer`, the key, has the one that a hash of the prompt picks."""

    def __init__(self, rows: Sequence[Row], salt: str) -> None:
        self.rows, self.salt = rows, salt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._turned(row) for row in self.rows[index]]
        return self._turned(self.rows[index])

    def _turned(self, row: Row) -> Row:
        up = row["answer"]
        down = blake2b(f"{self.salt} {row['prompt']}".encode(), digest_size=1).digest()[0] % 2 == 1
        key = up[::-1] if down else up
        completion = {"completion": key + sort.EOS} if "completion" in row else {}
        return {**row, "answer": key, "ascending": up, **completion}


def either(samples: Sequence[Sequence[str]], ascending: Sequence[str]) -> list[list[float]]:
    """1 for digits sorted up or down: the strong verifier."""
    return [[float(sample in (up, up[::-1])) for sample in group] for group, up in zip(samples, ascending, strict=True)]


def keyed(unit: Unit) -> dict[str, Any]:
    """Train where the cheap verifier knows one of two right answers, and some of its rejections are appealed."""
    settings, arm = unit.settings, unit.arm
    verifier: Any = exact_answer
    if arm != "brittle":
        verifier = appeal(
            reward="exact_answer",
            strong=either,
            appeal_probability=APPEAL,
            recover=arm == "recovered",
            seed=unit.seed,
        )
    signal = Signal(
        rewards={"correct": verifier},
        shaping={"correct": [forward_correction(baseline="ema")]} if arm == "appealed" else {},
        advantage=reinforce if arm == "appealed" else grpo,
        watch={"right": either},
    )
    policy = either_policy(unit.seed)
    held_out = EitherWay(sort.held_out_rows(int(settings["eval_size"])), "key")[:]
    curves: dict[str, Points] = {"either_greedy": [], "either_sampled": []}

    def test(step: int) -> None:
        found = evaluate(policy, held_out, Signal(rewards={"right": either})).metrics
        for mode in ("greedy", "sampled"):
            curves[f"either_{mode}"].append((float(step), found[f"eval/{mode}/right"]))

    test(0)
    steps = int(settings["steps"])
    loop = Online(
        policy,
        EitherWay(sort.train_rows(unit.seed), "key"),
        signal,
        dapo,
        prompts_per_step=32,
        group_size=8,
        optim=Optim(lr=float(settings["lr"]), betas=(0.9, 0.99)),
        steps=steps,
        seed=unit.seed,
    )
    right = missed = appeals = rejected = 0.0
    gaps: list[float] = []
    for step in range(1, steps + 1):
        result = loop.step()
        scores, truth = result.rollout.scores, result.rollout.extras["watched"][..., 0] == 1
        assert scores is not None
        # what the key says, also where an appeal changed the score
        found = exact_answer(result.rollout.samples, result.rollout.columns["answer"])
        accepted = torch.tensor([[cell is not None and cell[0] == 1 for cell in row] for row in found])
        # the true rate over the last 10 steps, which the running one looks back on
        keep = 0.9
        right = keep * right + truth.sum().item()
        missed = keep * missed + (truth & ~accepted).sum().item()
        rejected += (~accepted).sum().item()
        if arm != "brittle":
            appeals += result.metrics["appeals"]
            told = result.metrics["rewards_correct/false_negative_rate"]
            gaps.append(told - missed / max(right, 1.0))
            curves.setdefault("rate_estimated", []).append((float(step), told))
            curves.setdefault("rate_true", []).append((float(step), missed / max(right, 1.0)))
    test(steps)
    figures = {
        f"{mode}_{when}": curves[f"either_{mode}"][at][1]
        for mode in ("greedy", "sampled")
        for when, at in (("before", 0), ("after", -1))
    }
    figures |= {"rate_true": missed / max(right, 1.0), "appealed_share": appeals / max(rejected, 1.0)}
    if gaps:
        figures["rate_gap"] = mean([abs(gap) for gap in gaps[-10:]])
    return {"figures": figures, "curves": curves}


def either_policy(seed: int, steps: int = 100) -> LanguagePolicy:
    """A policy that has seen digits sorted up and down, kept in the cache."""
    policy = LanguagePolicy.load(sort.model(seed), tokenizer=sort.tokenizer(), max_new_tokens=MAX_NEW_TOKENS)
    source = inspect.getsource(sys.modules[EitherWay.__module__])
    key = blake2b(json.dumps([seed, steps, source]).encode(), digest_size=16).hexdigest()
    path = cache_folder() / "bases" / f"either-{key}.safetensors"
    try:
        weights = load(path.read_bytes())
    except (OSError, SafetensorError):
        loop = Supervised(
            policy,
            EitherWay(sort.demonstrations(seed), "demonstrations"),
            batch_size=128,
            optim=Optim(lr=2e-3, warmup_steps=50, weight_decay=0.01),
            steps=steps,
            seed=seed,
        )
        loop.run(steps)
        content = save({name: value.contiguous() for name, value in policy.model.state_dict().items()})
        replace(path, content)
        weights = load(content)
    policy.model.load_state_dict(weights)
    return policy


# ---------------------------------------------------------------- verdicts


def conclude(results: Results) -> Evidence:
    """Compare the arms."""
    names = ("exact", "appealed") if results.budget == "smoke" else ("exact", *TRAINED, *KEYED)
    arms: dict[str, Arm] = {name: results.arm(name, ROLES.get(name, "ablation")) for name in names}  # pyright: ignore[reportArgumentType]
    sums = arms["exact"].figures
    checks = [
        *(
            at_most(f"exact sums: {text}", sums[f"error_{name}"], 1e-10, kind="mechanism", what="largest error, mean")
            for name, text in (
                ("backward", "the backward update is the clean one"),
                ("forward", "the forward update is the clean one times 1 - f_p - f_n"),
                ("loo", "backward with the leave-one-out baseline is the clean one"),
            )
        ),
        at_most("exact sums: direction", sums["direction_off"], 1e-10, what="largest 1 - cosine, mean"),
        *(
            at_most(f"a z-score in the group cancels {name}", sums[f"z_score_{name}_max"], 1e-3, what="audit max, mean")
            for name in ("backward", "forward")
        ),
        at_least("leave one out keeps backward", sums["loo_backward_mean"], 0.05, what="audit mean, mean"),
        _flat(arms["exact"]),
        at_most(
            "appeals: the running rate is near the true one",
            arms["appealed"].figures["rate_gap"],
            0.05 if results.budget == "full" else 0.15,
            what="mean |estimate - truth| over the last 10 steps",
        ),
        _calls(arms["appealed"]),
    ]
    if results.budget == "full":
        checks += [*_recovers(arms), *_appeals_teach(arms)]
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        tuple(arms.values()),
        tuple(checks),
        NOTES,
        ("sampled_after", "greedy_after", "sampled", "rate_estimated", "rate_true", "either_sampled"),
    )


def _flat(arm: Arm) -> Check:
    """Growth of the update's variance when the false-negative rate is taken for 0.5 where it is 0.2."""

    def growth(curve: str) -> list[float]:
        return [dict(points)[0.5] / dict(points)[0.2] for points in arm.curves[curve]]

    backward, forward = growth("variance_backward"), growth("variance_forward")
    return Check(
        "a rate that is taken too high costs backward its variance, forward little",
        "variance at 0.5 over that at the true 0.2: backward >= 2, forward <= 1.5 (means)",
        mean(backward) >= 2 and mean(forward) <= 1.5,
        "mechanism",
        {"method": mean(forward), "baseline": mean(backward), "spread": sd(forward)},
    )


def _calls(arm: Arm) -> Check:
    shares = arm.figures["appealed_share"]
    return Check(
        "appeals cost what they should",
        f"share of the rejections that are appealed within {APPEAL} +- 0.03 (mean)",
        abs(mean(shares) - APPEAL) <= 0.03,
        "mechanism",
        {"method": mean(shares), "spread": sd(shares)},
    )


def _recovers(arms: Mapping[str, Arm]) -> list[Check]:
    plain, oracle = arms["uncorrected"], arms["oracle"]
    best = max(("backward", "forward-ema"), key=lambda name: arms[name].mean("sampled_after"))
    found = arms[best].figures["sampled_after"]
    controls = {
        "backward": ("uncorrected-loo", "the same baseline without a correction"),
        "forward-ema": ("uncorrected-direct", "its uncorrected control"),
    }
    checks = [
        compare(
            f"the better correction ({best}) above uncorrected GRPO, sampled",
            found,
            plain.figures["sampled_after"],
            margin=0.03,
        ),
        compare(
            f"and not above the verifier without errors ({best}), sampled",
            oracle.figures["sampled_after"],
            found,
            margin=-0.02,
        ),
    ]
    for name, (control, text) in controls.items():
        checks.append(
            compare(
                f"{name} against {text}, sampled",
                arms[name].figures["sampled_after"],
                arms[control].figures["sampled_after"],
                errors=2.0,
            )
        )
    return checks


def _appeals_teach(arms: Mapping[str, Arm]) -> list[Check]:
    plain = arms["brittle"].figures["sampled_after"]
    return [
        compare(
            "appeals and correction above the key alone, sampled",
            arms["appealed"].figures["sampled_after"],
            plain,
            margin=0.05,
        ),
        compare(
            "recovered appeals above the key alone, sampled",
            arms["recovered"].figures["sampled_after"],
            plain,
            margin=0.05,
        ),
    ]


NOTES = (
    f"Training with injected errors: sort task, 0.1 M weights, 32 prompts with 8 samples a step; the verifier accepts "
    f"{FALSE_POSITIVE:.0%} of the wrong and rejects {FALSE_NEGATIVE:.0%} of the right samples at random. Accuracy is "
    "measured without these errors. Learning rates tuned on one other seed in half as many steps, two for every arm.",
    "uncorrected and oracle are z-scored (GRPO); uncorrected-loo and uncorrected-direct are the controls of backward and "
    "forward with the same baseline. With the same rates for all prompts backward is its control with a longer step, and "
    "forward is its control with another baseline, so a difference to the control is not to be expected; what differs "
    "from GRPO is that nothing is divided by the group's deviation.",
    f"Appeals: the digits may be sorted up or down, the key has one of the two, picked by a hash of the prompt. "
    f"{APPEAL:.0%} of the rejections are appealed to a verifier that knows both. The true rate is that of the "
    "last steps, weighed as the running rate weighs them.",
    "Variances are exact, of the update of one sample on a bandit, with errors at 0.1 and 0.2.",
)
