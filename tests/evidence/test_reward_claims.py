"""The claim tests of PAR, constrained RLHF and Quark: plans, small policies, and verdicts that follow from the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guerdon.evidence import constrained_rlhf, par, quark_medical, runner
from guerdon.evidence.base import Evidence, Result, Results, Unit
from guerdon.evidence.writers import Writers

HACKED = {"gold": -0.5, "gold_peak": 0.7, "gold_lost": 1.2, "proxy": 25.0}
PAR = {arm: dict(HACKED) for arm in par.HACKED}
PAR |= {arm: {"gold": 0.6, "gold_peak": 0.65, "gold_lost": 0.05, "proxy": 8.0} for arm in par.REFERENCES}
HELD = {"worth": 0.98, "worth_peak": 0.99, "worth_lost": 0.01, "first": 0.45, "second": 0.3, "off": 0.03}
CONSTRAINED = {arm: dict(HELD) for arm in constrained_rlhf.ARMS}
CONSTRAINED["none"] |= {"worth": -0.2, "worth_lost": 1.1}
CONSTRAINED["search"] |= {"worth_best": 0.95, "points": 13.0}
CONSTRAINED["squares-coins"] |= {"worth": 0.1}
BALANCED = {"correct": 0.4, "helpful": 0.5, "unsafe": 0.0, "format": 0.99}
QUARK = {arm: dict(BALANCED) for arm in quark_medical.ARMS}
QUARK["raw-sum"] |= {"correct": 0.0}
QUARK["group-z"] |= {"correct": 0.0}
QUARK["unsafe-start-no-risk"] |= {"unsafe": 0.2}
QUARK["copies-no-redundancy"] |= {"correct": 0.1}
CASES = [(par, PAR), (constrained_rlhf, CONSTRAINED), (quark_medical, QUARK)]


def concluded(module: Any, figures: Any, change: Any = None, budget: Any = "full") -> Evidence:
    results = [
        # seeds differ a little, so that there is a standard error
        Result(Unit(arm, seed), {k: v + 1e-4 * seed for k, v in (figures[arm] | (change or {}).get(arm, {})).items()})
        for arm in figures
        for seed in range(3)
    ]
    return module.conclude(Results(results, budget))


@pytest.mark.parametrize(("module", "figures"), CASES)
def test_all_well(module, figures):
    evidence = concluded(module, figures)
    assert (evidence.holds, evidence.headline) == (True, "shown")
    assert concluded(module, figures, budget="smoke").holds


@pytest.mark.parametrize(
    ("module", "figures", "arm", "changed", "names"),
    [
        (par, PAR, "none", {"gold_lost": 0.4}, ["the unshaped reward is hacked"]),
        *((par, PAR, arm, {"gold": 0.2}, [f"PAR: more gold than {arm}"]) for arm in par.HACKED),
        (par, PAR, "par-10", {"gold": 0.7}, ["one reference answer is as good as ten"]),
        (constrained_rlhf, CONSTRAINED, "none", {"worth_lost": 0.4}, ["without constraints the worth falls"]),
        (constrained_rlhf, CONSTRAINED, "xi", {"worth": 0.8}, ["xi ends at its worth"]),
        (constrained_rlhf, CONSTRAINED, "mu", {"off": 0.2}, ["mu holds the rewards at their points"]),
        (constrained_rlhf, CONSTRAINED, "search", {"worth_best": 0.7}, ["the search finds good points in one run"]),
        (constrained_rlhf, CONSTRAINED, "none", {"worth": 0.96}, ["and better ones than no constraint ends at"]),
        (constrained_rlhf, CONSTRAINED, "squares-coins", {"worth": 0.95}, ["equality against squares, where scores are 0 or 1"]),
        (quark_medical, QUARK, "raw-sum", {"correct": 0.3}, ["more correct than raw-sum"]),
        (quark_medical, QUARK, "group-z", {"correct": 0.3}, ["more correct than group-z"]),
        (quark_medical, QUARK, "three-factors", {"format": 0.8}, ["the format is kept"]),
        (quark_medical, QUARK, "three-factors", {"unsafe": 0.1}, ["and nothing unsafe is written"]),
        (quark_medical, QUARK, "unsafe-start", {"unsafe": 0.3}, ["the risk factor, after an unsafe start"]),
        (quark_medical, QUARK, "copies", {"correct": 0.1}, ["the redundancy factor, with three copies of a score"]),
    ],
)  # fmt: skip
def test_each_condition_can_fail(module, figures, arm, changed, names):
    evidence = concluded(module, figures, {arm: changed})
    failed = [check.name for check in evidence.checks if not check.holds]
    assert failed == names
    assert Evidence.from_json(evidence.to_json()).verdict == evidence.verdict


@pytest.mark.parametrize("module", [par, constrained_rlhf, quark_medical])
def test_the_plans_and_a_unit_alone(module, monkeypatch):
    units = runner.checked(module, module.plan("full", 5))
    assert {unit.arm for unit in units} == set(module.ARMS)
    assert {unit.seed for unit in units} == set(range(5))
    monkeypatch.setattr(module, "EVERY", 3)
    if module is quark_medical:
        monkeypatch.setattr(module, "STEPS", 6)
        short = [Unit(arm, 0) for arm in module.ARMS]
    else:
        short = [Unit(arm, 0, {"steps": 6}) for arm in module.ARMS]
    together = module.measure_all(short)
    for unit, found in zip(short[:3], together, strict=False):
        (alone,) = module.measure_all([unit])
        assert found["figures"] == pytest.approx(alone["figures"], abs=1e-3)


def test_writers_are_autoregressive_and_tell_their_likelihood():
    writers = Writers([0], prompts=1, length=3, tokens=4, end=0)
    writers.tables[0, 0, 3 + 1, 2] = 50.0  # after a 1 always a 2
    writers.tables[0, 0, 0, 1] = 50.0
    texts = writers.write(2000)
    assert (texts[..., 0] == 1).all()
    assert (texts[..., 1] == 2).all()
    shares = torch.bincount(texts[..., 2].flatten(), minlength=4) / 2000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.04, rtol=0)
    assert writers.logp(texts)[..., 2].mean().item() == pytest.approx(-1.3863, abs=1e-3)
    # what comes after the end is not learnt from
    (gradient,) = writers.gradients(torch.tensor([[[[0, 3, 3]]]]), [torch.ones(1, 1, 1)])
    assert gradient[0, 0, 0].abs().sum() > 0
    assert gradient[0, 0, 1:-1].abs().sum() == 0
