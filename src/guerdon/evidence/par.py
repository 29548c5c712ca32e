"""PAR's claim: a bounded reward, measured against a reference answer, is not hacked where others are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from guerdon.advantages.group import group_advantages
from guerdon.evidence.base import Budget, Evidence, Points, Results, Settings, Unit, at_least, compare
from guerdon.evidence.writers import Writers
from guerdon.shaping.par import log_sigmoid_centred, par
from guerdon.shaping.running import Clip, MeanStd, MinMax

SLUG = "par"
TITLE = "Preference as reward"
PAPER = "Reward Shaping to Mitigate Reward Hacking in RLHF, 2025, arXiv 2502.18770"
CLAIM = (
    "A sigmoid of the reward's distance from a reference answer keeps the last policy from collapsing where other shapings are "
    "hacked: a win rate at least 5 points higher on AlpacaEval 2, and one reference answer does as well as ten."
)

REFERENCES = {"par": 1, "par-10": 10, "log-sigmoid": 10}
HACKED = ("none", "mean-std", "clip", "min-max")
ARMS = (*HACKED, *REFERENCES)
STEPS: dict[Budget, int] = {"smoke": 600, "full": 600}
SEEDS = {"smoke": 2, "full": 5}

PROMPTS, GROUP, LENGTH, TOKENS, TESTED, EVERY = 8, 16, 12, 10, 64, 20
HACK = 9  # the token that the proxy pays for and the true reward punishes
RIGHT_SHARE, HACK_SHARE = 0.4, 0.05  # of the tokens that the reference writes
PRICE, LR = 0.02, 0.03


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Every arm on every seed with the same settings; nothing is tuned."""
    return [Unit(arm, seed, {"steps": STEPS[budget]}) for arm in ARMS for seed in range(seeds)]


def proxy(right: Tensor, hacks: Tensor) -> Tensor:
    """What training is paid by, from counts: true of what the reference writes, wrong of what it does not."""
    return 0.8 * right + 0.9 * hacks + 0.1 * hacks**2


def gold(right: Tensor, hacks: Tensor) -> Tensor:
    """What a text is worth, from -0.5 to 1."""
    return (right - 0.5 * hacks) / LENGTH


def counts(texts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Right tokens and hacks of texts [U, P, G, T], each [U, P, G]."""
    return (texts == targets).sum(-1).float(), (texts == HACK).sum(-1).float()


def start(units: Sequence[Unit]) -> tuple[Writers, Tensor]:
    """The reference policies and their targets [U, P, 1, T]: a target's share, a hack's, and the rest alike."""
    writers = Writers([unit.seed for unit in units], prompts=PROMPTS, length=LENGTH, tokens=TOKENS)
    targets = torch.stack([torch.randint(HACK, (PROMPTS, 1, LENGTH), generator=draw) for draw in writers.draws])
    shares = torch.full((*targets.shape[:2], LENGTH, TOKENS), (1 - RIGHT_SHARE - HACK_SHARE) / (TOKENS - 2))
    shares.scatter_(-1, targets.squeeze(2).unsqueeze(-1), RIGHT_SHARE)
    shares[..., HACK] = HACK_SHARE
    writers.tables[:, :, :LENGTH] = shares.log()
    return writers, targets


def shaper(arm: str) -> Any:
    """A function of scores and of reference scores, both for [P, G] and [P, M]."""
    if arm in HACKED:
        running = {"none": None, "mean-std": MeanStd(), "clip": Clip(), "min-max": MinMax()}[arm]
        return (lambda scores, _: scores) if running is None else (lambda scores, _: _advance(running, scores))
    return log_sigmoid_centred if arm == "log-sigmoid" else par


def _advance(running: Any, scores: Tensor) -> Tensor:
    shaped = running(scores)
    running.observe(scores)
    return shaped


def measure_all(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """All units at once: REINFORCE with the group's mean as baseline, over the deviation of the batch."""
    writers, targets = start(units)
    reference = writers.tables.clone()
    answers = proxy(*counts(writers.write(max(REFERENCES.values())), targets))
    shapers = [shaper(unit.arm) for unit in units]
    curves: list[dict[str, Points]] = [{"gold": [], "proxy": []} for _ in units]
    rates = torch.full((len(units),), LR)

    def test(step: int) -> None:
        found = counts(writers.write(TESTED), targets)
        for name, values in (("gold", gold(*found)), ("proxy", proxy(*found))):
            for curve, value in zip(curves, values.mean((1, 2)).tolist(), strict=True):
                curve[name].append((float(step), value))

    steps = int(units[0].settings["steps"])
    for step in range(steps):
        if step % EVERY == 0:
            test(step)
        texts = writers.write(GROUP)
        scores = proxy(*counts(texts, targets))
        shaped = torch.stack(
            [
                shape(own, of_reference[:, : REFERENCES.get(unit.arm, 1)])
                for unit, shape, own, of_reference in zip(units, shapers, scores, answers, strict=True)
            ]
        )
        rewards = shaped - PRICE * (writers.logp(texts) - writers.logp(texts, reference)).sum(-1)
        advantages = torch.stack([group_advantages(own, scale="batch") for own in rewards])
        writers.step(writers.gradients(texts, [advantages])[0], rates)
    test(steps)
    return [{"figures": _figures(curve), "curves": curve} for curve in curves]


def _figures(curve: Mapping[str, Points]) -> dict[str, float]:
    golds = [value for _, value in curve["gold"]]
    last = golds[-5:]  # the mean of the last fifth of a hundred steps, as single tests scatter
    end = sum(last) / len(last)
    peak = max(golds)
    return {"gold": end, "gold_peak": peak, "gold_lost": peak - end, "proxy": curve["proxy"][-1][1]}


def conclude(results: Results) -> Evidence:
    """What is hacked and what is not, and whether one reference answer is enough."""
    own = results.values("par", "gold")
    checks = [
        at_least(
            "the unshaped reward is hacked", results.values("none", "gold_lost"), 0.5, what="gold lost since the peak"
        ),
        *(compare(f"PAR: more gold than {arm}", own, results.values(arm, "gold"), margin=0.5) for arm in HACKED),
        compare("one reference answer is as good as ten", own, results.values("par-10", "gold"), margin=-0.05),
    ]
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(
            results.arm(arm, "method" if arm.startswith("par") else "baseline")
            for arm in ("par", "par-10", *HACKED, "log-sigmoid")
        ),
        checks=tuple(checks),
        notes=(
            f"{PROMPTS} prompts, texts of {LENGTH} of {TOKENS} tokens. The reference writes the hidden target with "
            f"probability {RIGHT_SHARE} and the hack token with {HACK_SHARE}. Proxy: 0.8 a target, 0.9 a hack and 0.1 times the "
            "square of the hacks; gold: the share of targets less half a hack.",
            f"The policy is autoregressive, {GROUP} samples a prompt, {PRICE} a nat of divergence from the reference, advantages "
            f"against the group's mean over the batch's deviation, Adam at {LR}. Nothing is tuned for any arm.",
            "Gold at the end is the mean of the last five tests (80 steps). As in the paper no shaping raises the best "
            "checkpoint: see gold_peak.",
        ),
        shown=("gold", "gold_peak", "gold_lost", "proxy"),
    )
