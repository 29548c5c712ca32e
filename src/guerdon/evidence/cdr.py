"""CDR's claim: the ratio of two models ranks answers, the better the further apart they are; asked for a domain, it follows."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guerdon import cache
from guerdon.evidence.base import Budget, Evidence, Results, Settings, Unit, at_least, compare
from guerdon.language.characters import character_tokenizer
from guerdon.language.completions import Groups
from guerdon.language.data import read_rows
from guerdon.language.policy import LanguagePolicy
from guerdon.language.preferences import preference_rows
from guerdon.language.tasks import topics
from guerdon.language.tasks.small import small_llama
from guerdon.language.tasks.stream import Stream
from guerdon.objectives.simpo import simpo
from guerdon.rewards.density_ratio import DensityRatio, log_density_ratio
from guerdon.rewards.domains import customise, read_domains
from guerdon.rewards.likelihood import Likelihood, SequenceLogp
from guerdon.signal import Signal
from guerdon.training.annotation import annotate
from guerdon.training.evaluation import evaluate
from guerdon.training.optimisation import Optim
from guerdon.training.preference import Preference
from guerdon.training.supervised import Supervised

SLUG = "cdr"
TITLE = "Customisable density ratios"
PAPER = "CDR: Customizable Density Ratios of Strong-over-weak LLMs for Preference Annotation, 2024, arXiv 2411.02481"
CLAIM = (
    "Over 221 pairs of models the reward log pi_strong - log pi_weak ranks the better the wider the gap between them; with "
    "customised prompts a pair of 7B models scores 82.6 on RewardBench without training, and SimPO on what it annotates lifts "
    "Llama-3-8B-Instruct to 37.4% on ArenaHard (+15.1)."
)
MAX_NEW_TOKENS = 13
# share of good letters in the demonstrations of one training run, stage by stage: ever better models
SHARES = (0.3, 0.45, 0.6, 0.75, 0.9)
CRITERIA = {"first": {"criteria": "1"}, "second": {"criteria": "2"}}
ALPHABET = topics.ALPHABET + "\n Gost:12"  # what customised prompts are written with
SIZES: dict[Budget, Settings] = {
    "smoke": {"steps": 40, "pairs": 300},
    "full": {"steps": 250, "pairs": 1500},
}
LEARN: Settings = {"prompts": 1000, "updates": 150, "batch_size": 64, "lr": 1e-3}
OBEY: Settings = {"steps": 400, "pairs": 800}
LABELS = ("ratio", "true-labels", "likelihood")
ROLES: dict[str, Any] = {
    "gaps": "method",
    "domains": "method",
    "ratio": "method",
    "true-labels": "baseline",
    "likelihood": "baseline",
}
NOTES = (
    "Topics task: 0.1 M weights. gaps: five stages of one supervised run on answers with 30% to 90% good letters; each of the 20 "
    "ordered pairs ranks pairs of answers of the middle stage, and is judged by true quality. strong_alone: the best "
    "stage's log-likelihood.",
    "domains: the strong model was shown answers that do what a criterion in the prompt asks for, the weak one answers that do "
    "not care; accuracy on what the criterion asks for, with it, without one, and with the other one.",
    "ratio, true-labels, likelihood: 1000 prompts, 4 answers each of the middle stage, annotated with the widest gap, with the "
    "true quality, and with the best stage's log-likelihood; then 150 steps of SimPO at the same settings. Nothing is tuned.",
)


def plan(budget: Budget, seeds: int, tuned: Mapping[str, Settings] | None = None) -> list[Unit]:
    """Ranking by all pairs of models; with the full budget also domains, and SimPO on three kinds of labels. Nothing is tuned."""
    settings: dict[str, Settings] = {"gaps": SIZES[budget]}
    if budget == "full":
        settings |= {"domains": OBEY, **{name: {**LEARN, "steps": SIZES[budget]["steps"]} for name in LABELS}}
    return [Unit(name, seed, settings[name]) for name in settings for seed in range(seeds)]


def measure(unit: Unit) -> dict[str, Any]:
    """One arm."""
    settings: dict[str, Any] = dict(unit.settings)
    if unit.arm == "gaps":
        return gaps(unit.seed, **settings)
    return domains(unit.seed, **settings) if unit.arm == "domains" else learn(unit.arm, unit.seed, **settings)


# ---------------------------------------------------------------- the wider the gap, the better the ranking


def family(seed: int, steps: int) -> list[LanguagePolicy]:
    """Five stages of one supervised run on ever better demonstrations; cached."""
    found: list[LanguagePolicy] = []
    for stage, share in enumerate(SHARES):
        policy = LanguagePolicy.load(topics.model(seed), tokenizer=topics.tokenizer(), max_new_tokens=MAX_NEW_TOKENS)
        if found:
            policy.model.load_state_dict(found[-1].model.state_dict())
        rows = topics.demonstrations(seed * len(SHARES) + stage, good_share=share)
        key = {"seed": seed, "steps": steps, "stage": stage, "shares": list(SHARES)}
        policy.model.load_state_dict(
            cache.weights("bases", "topics-family", key, partial(_taught, policy, rows, steps, seed))
        )
        found.append(policy)
    return found


def _taught(policy: LanguagePolicy, rows: Sequence[Mapping[str, Any]], steps: int, seed: int) -> dict[str, Tensor]:
    optim = Optim(lr=3e-3, warmup_steps=20, weight_decay=0.01)
    Supervised(policy, rows, batch_size=64, optim=optim, steps=steps, seed=seed).run(steps)
    return policy.model.state_dict()


def gaps(seed: int, *, steps: int, pairs: int) -> dict[str, Any]:
    """Accuracy of every ordered pair of the family on pairs of answers of its middle model."""
    models = family(seed, steps)
    rows = topics.held_out_rows(pairs)
    prompts = [row["prompt"] for row in rows]
    quality = [_quality(model, rows[:400]) for model in models]
    answers = models[len(models) // 2].sample(prompts, 2, list(range(pairs))).samples
    worth = torch.tensor(topics.quality(answers, [row["topic"] for row in rows]))
    sums = [Likelihood(model=model, batch_size=128)(prompts, answers) for model in models]
    ordered = [(s, w) for s in range(len(models)) for w in range(len(models)) if s != w]
    points = [(quality[s] - quality[w], accuracy(log_density_ratio(sums[s], sums[w]), worth)) for s, w in ordered]
    upward = sorted(point for point, (s, w) in zip(points, ordered, strict=True) if s > w)
    widest = points[ordered.index((len(models) - 1, 0))]
    figures = {
        "correlation": _correlation(points),
        "correlation_upward": _correlation(upward),
        "gap": widest[0],
        "accuracy": widest[1],
        "strong_alone": accuracy(sums[-1].total, worth),
    }
    return {"figures": figures, "curves": {"accuracy": upward}}


def accuracy(rewards: Tensor, worth: Tensor) -> float:
    """Share of pairs [P, 2] of different worth that the rewards order alike; a tie is wrong."""
    better = (worth[:, 0] - worth[:, 1]).sign()
    known = better != 0
    return ((rewards[:, 0] - rewards[:, 1]).sign() == better)[known].float().mean().item()


def _correlation(points: Sequence[tuple[float, float]]) -> float:
    return torch.corrcoef(torch.tensor(points, dtype=torch.float64).T)[0, 1].item()


def _quality(policy: LanguagePolicy, rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean true quality of its samples."""
    found = evaluate(policy, rows, Signal(rewards={"quality": topics.quality}), greedy=False)
    return found.metrics["eval/sampled/quality"]


# ---------------------------------------------------------------- what a customised prompt asks for


def domains(seed: int, *, steps: int, pairs: int) -> dict[str, Any]:
    """Accuracy on what each of two criteria asks for: with its criterion in the prompt, without one, and with the other."""
    strong, weak = (_reader(seed, steps, obeys) for obeys in (True, False))
    rows = topics.held_out_rows(pairs)
    prompts, wanted = [row["prompt"] for row in rows], [row["topic"] for row in rows]
    answers = weak.sample(prompts, 2, list(range(pairs))).samples
    ratio = partial(DensityRatio, strong=strong, weak=weak, batch_size=128)
    scores = {"": ratio()(prompts, answers).scores}
    scores |= {name: ratio(domains=CRITERIA, domain=name)(prompts, answers).scores for name in CRITERIA}
    found: dict[str, list[float]] = {"accuracy": [], "no_criterion": [], "other_criterion": []}
    for name, other in (("first", "second"), ("second", "first")):
        worth = torch.tensor(topics.quality(answers, [_asked_for(topic, name) for topic in wanted]))
        for figure, prompt in (("accuracy", name), ("no_criterion", ""), ("other_criterion", other)):
            found[figure].append(accuracy(scores[prompt], worth))
    return {"figures": {name: sum(values) / len(values) for name, values in found.items()}}


def _asked_for(topic: str, domain: str) -> str:
    """The topic whose letters are good under a criterion: its own, or the next one's."""
    names = list(topics.GOOD)
    return topic if domain == "first" else names[(names.index(topic) + 1) % len(names)]


def _reader(seed: int, steps: int, obeys: bool) -> LanguagePolicy:
    """A model taught on prompts of which a third ask for nothing; one that obeys was shown what the others ask for."""
    tokenizer = character_tokenizer(ALPHABET, pad=topics.PAD, eos=topics.EOS, bos=topics.BOS)
    ids = {name: ALPHABET.index(mark) for name, mark in (("pad", topics.PAD), ("eos", topics.EOS), ("bos", topics.BOS))}
    network = small_llama(seed, tokens=len(ALPHABET), **ids)
    policy = LanguagePolicy.load(network, tokenizer=tokenizer, max_new_tokens=MAX_NEW_TOKENS)
    known = read_domains(CRITERIA)

    def row(index: int) -> dict[str, Any]:
        draw = random.Random(f"criteria {seed} {obeys} {index}")
        topic, domain = draw.choice(list(topics.GOOD)), draw.choice(["", *known])
        shown = domain if obeys and domain else draw.choice(list(known))
        text = topics.answer(draw, _asked_for(topic, shown), 0.9 if obeys else topics.GOOD_SHARE)
        return {"prompt": customise(topic, known[domain]) if domain else topic, "completion": text}

    key = {"seed": seed, "steps": steps, "obeys": obeys, "criteria": CRITERIA}
    make = partial(_taught, policy, Stream(row), steps, seed)
    policy.model.load_state_dict(cache.weights("bases", "topics-criteria", key, make))
    return policy


# ---------------------------------------------------------------- learning from what was annotated


def learn(
    labels: str, seed: int, *, steps: int, prompts: int, updates: int, batch_size: int, lr: float
) -> dict[str, Any]:
    """SimPO from the middle of the family, on pairs of its own samples, annotated as a user would."""
    models = family(seed, steps)
    policy, strong, weak = models[len(models) // 2], models[-1], models[0]
    rows = topics.train_rows(seed)[:prompts]
    reward: Callable[..., Any] = {
        "ratio": DensityRatio(strong=strong, weak=weak, batch_size=128),
        "true-labels": topics.quality,
        "likelihood": DensityRatio(strong=strong, weak=_nothing, batch_size=128),
    }[labels]
    samples = policy.sample([row["prompt"] for row in rows], 4, list(range(prompts))).samples
    held_out = topics.held_out_rows(400)
    before = _quality(policy, held_out)
    with tempfile.TemporaryDirectory() as folder:
        raw, pairs = Path(folder, "raw.jsonl"), Path(folder, "pairs.jsonl")
        lines = [
            json.dumps({**row, "completions": texts, "labels": topics.quality([texts], [row["topic"]])[0]})
            for row, texts in zip(rows, samples, strict=True)
        ]
        raw.write_text("\n".join(lines), encoding="utf-8")
        found = annotate(Groups(read_rows(raw)), reward, pairs, batch=64, seed=seed)
        data = preference_rows(read_rows(pairs), "paired")
        objective = partial(simpo, beta=2.0, gamma_beta_ratio=0.5)
        loop = Preference(policy, data, objective, batch_size=batch_size, optim=Optim(lr=lr), steps=updates, seed=seed)
        for _ in range(updates):
            loop.step()
    after = evaluate(policy, held_out, Signal(rewards={"quality": topics.quality}), greedy=False).metrics
    quality = after["eval/sampled/quality"]
    return {
        "figures": {
            "quality_before": before,
            "quality": quality,
            "gain": quality - before,
            "length": after["eval/sampled/length"],
            "right_labels": found.agreement[""].picked,
            "pairs": float(found.counts["pairs"]),
        }
    }


def _nothing(prompts: Sequence[Any], samples: Sequence[Sequence[Any]]) -> SequenceLogp:
    """A weak model that says nothing: what is left is the strong one's log-likelihood."""
    zeros = torch.zeros(len(samples), len(samples[0]), dtype=torch.float64)
    return SequenceLogp(zeros, zeros.long())


def conclude(results: Results) -> Evidence:
    """Ranking, and what a criterion does: mechanism. Learning from the annotation: the headline."""
    arms = {name: results.arm(name, role) for name, role in ROLES.items() if name in {r.unit.arm for r in results}}
    ranking = arms["gaps"].figures
    full = results.budget == "full"
    checks = [
        at_least(
            "the wider the gap, the better it ranks", ranking["correlation"], 0.7, what="mean correlation, 20 pairs"
        ),
        at_least(
            "also among those with the better model on top",
            ranking["correlation_upward"],
            0.7 if full else 0.5,
            what="mean correlation, 10 pairs",
        ),
        at_least("the widest gap ranks well", ranking["accuracy"], 0.85 if full else 0.6),
        compare(
            "and better than the strong model alone",
            ranking["accuracy"],
            ranking["strong_alone"],
            margin=0.15 if full else 0.0,
            kind="mechanism",
        ),
    ]
    if full:
        asked = arms["domains"].figures
        gain = {name: arms[name].figures["gain"] for name in LABELS}
        checks += [
            compare(
                "a criterion in the prompt is followed",
                asked["accuracy"],
                asked["no_criterion"],
                margin=0.05,
                kind="mechanism",
            ),
            compare(
                "SimPO learns at least 70% of what true labels teach",
                gain["ratio"],
                [0.7 * g for g in gain["true-labels"]],
            ),
            compare("and more than from the strong model's likelihood", gain["ratio"], gain["likelihood"], margin=0.02),
        ]
    return Evidence(
        SLUG,
        TITLE,
        CLAIM,
        PAPER,
        arms=tuple(arms.values()),
        checks=tuple(checks),
        notes=NOTES if full else NOTES[:1],
        shown=(
            "accuracy",
            "strong_alone",
            "correlation",
            "no_criterion",
            "other_criterion",
            "quality_before",
            "quality",
            "right_labels",
            "length",
        ),
        x="quality of strong - weak",
    )
