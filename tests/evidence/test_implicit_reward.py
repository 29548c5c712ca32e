"""The claim test of implicit-reward: its plan, verdicts that follow from the figures, and how the figures are measured."""

from __future__ import annotations

import pytest
import torch

from guerdon.evidence import implicit_reward, runner
from guerdon.evidence.base import Evidence, Result, Results, Unit
from guerdon.language.tasks import experts, topics

FIGURES = {
    "quality": 0.7,
    "kl": 12.0,
    "length": 8.0,
    "nll": 4.4,
    "ranking": 0.6,
    "ranking_best": 0.75,
    "quality_dpo": 0.9,
    "seconds": 4.0,
}
ALL_WELL = {
    arm: FIGURES | {"kl": 6.0, "nll": 3.0, "quality_dpo": 0.93} if arm not in ("sft", "sft-high") else dict(FIGURES)
    for arm in implicit_reward.ARMS
}


def concluded(change=None, budget="full") -> Evidence:
    results = [
        # seeds differ a little, so that there is a standard error
        Result(Unit(arm, seed), {k: v + 1e-3 * seed for k, v in (ALL_WELL[arm] | (change or {}).get(arm, {})).items()})
        for arm in ALL_WELL
        for seed in range(3)
    ]
    return implicit_reward.conclude(Results(results, budget))


def test_all_well():
    evidence = concluded()
    assert (evidence.holds, evidence.headline) == (True, "shown")
    short = concluded(budget="smoke")
    assert (short.holds, short.headline) == (True, "")


@pytest.mark.parametrize(
    ("arm", "changed", "name"),
    [
        ("pearson", {"kl": 9.5}, "pearson: divergence from the start"),
        ("pearson", {"nll": 4.35}, "pearson: held-out likelihood cost"),
        ("hellinger", {"kl": 9.5}, "hellinger: divergence from the start"),
        ("hellinger", {"nll": 4.35}, "hellinger: held-out likelihood cost"),
        ("pearson-token", {"kl": 11.0}, "pearson-token: divergence"),
        ("hellinger-token", {"kl": 11.0}, "hellinger-token: divergence"),
        ("sft", {"ranking_best": 0.6}, "logits as Q-values"),
        ("sft-low", {"kl": 12.0}, "a smaller learning rate stays nearer too"),
        ("sft-low", {"quality_dpo": 0.91}, "a fifth of the learning rate"),
        ("sft-low", {"quality": 0.75}, "although its own quality"),
        ("pearson", {"quality_dpo": 0.9}, "pearson: true quality after DPO"),
        ("hellinger", {"quality_dpo": 0.9}, "hellinger: true quality after DPO"),
    ],
)
def test_each_condition_can_fail(arm, changed, name):
    failed = [check.name for check in concluded({arm: changed}).checks if not check.holds]
    assert len(failed) == 1
    assert failed[0].startswith(name)


def test_the_plan():
    units = runner.checked(implicit_reward, implicit_reward.plan("full", 5))
    assert len(units) == 5 * len(implicit_reward.ARMS)
    rates = {unit.arm: unit.settings["lr"] for unit in units}
    assert rates["sft"] == rates["pearson"] == rates["hellinger"]  # the price is compared at one rate
    assert rates["sft-high"] == pytest.approx(5 * rates["sft-low"])


def test_figures_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    policy = implicit_reward.start(0, steps=2)
    policy.keep_reference()
    found = implicit_reward.sampled(policy, 8)
    assert found["kl"] == pytest.approx(0.0, abs=1e-5)
    assert 0 <= found["quality"] <= 1
    rows = experts.held_out_rows(3)
    losses, tokens = 0.0, 0
    for row in rows:
        rollout = policy.demonstrations([row])
        with torch.no_grad():
            losses -= policy.log_prob(rollout).logp.sum().item()
        tokens += int(rollout.mask.sum())
    assert implicit_reward.surprise(policy, rows) == pytest.approx(losses / tokens, rel=1e-5)
    pairs = implicit_reward.own_pairs(policy, 0, 40)
    assert len(pairs) > 30
    assert all(row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"] for row in pairs)
    assert pairs == implicit_reward.own_pairs(policy, 0, 40)


def test_a_policy_that_knows_the_good_letters_ranks_right(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    policy = implicit_reward.start(0, steps=2)
    policy.keep_reference()
    assert implicit_reward.ranking(policy, 40) == 0.0  # no reward yet, so nothing is told apart
    letters = policy.tokenizer.convert_ids_to_tokens(range(len(topics.ALPHABET)))
    good = {topic: torch.tensor([letter in of for letter in letters]) for topic, of in topics.GOOD.items()}

    def knowing(rollout, **options):
        ids = rollout.steps["completion_ids"]
        told = torch.stack([good[p][ids[i]] for i, p in enumerate(rollout.prompts)])
        found = type(policy).log_prob(policy, rollout, **options)
        return found._replace(logp=found.logp + 0.5 * told)

    monkeypatch.setattr(policy, "log_prob", knowing)
    assert implicit_reward.ranking(policy, 40) > 0.9
