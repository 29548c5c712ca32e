"""The claim test of Text2Grad: its critic, its small policies, and verdicts that follow from the figures."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from guerdon.evidence import reports_task, runner, text2grad
from guerdon.evidence.base import Evidence, Result, Results, Unit
from guerdon.evidence.writers import Writers
from guerdon.rewards.critics.base import Response
from guerdon.rewards.critics.feedback import parse_feedback

REPORT = {"right": 0.99, "right_half": 0.9, "steps_to_90": 150.0}
FIGURES = {arm: dict(REPORT) for arm, of in text2grad.ARMS.items() if of.task == "reports"}
FIGURES["summed-group"] |= {"steps_to_90": math.inf}
for arm in ("spans", "learned"):
    FIGURES[arm] |= {"steps_to_90": 100.0, "placed": 0.96, "critic": 0.98}
for arm, share in (("sort-spans", 0.4), ("sort-summed", 0.2)):
    FIGURES[arm] = {"right": share, "greedy": 0.5, "right_before": 0.2, "seconds": 10.0}


def concluded(change: Any = None, budget: Any = "full") -> Evidence:
    results = [
        Result(Unit(arm, seed), {k: v + 1e-3 * seed for k, v in (FIGURES[arm] | (change or {}).get(arm, {})).items()})
        for arm in FIGURES
        for seed in range(3)
    ]
    return text2grad.conclude(Results(results, budget))


def test_all_well():
    evidence = concluded()
    assert (evidence.holds, evidence.headline) == (True, "shown")
    assert concluded(budget="smoke").holds
    assert Evidence.from_json(evidence.to_json()).verdict == evidence.verdict


@pytest.mark.parametrize(
    ("arm", "changed", "name"),
    [
        ("spans", {"placed": 0.8}, "quoted phrases lead back to their words"),
        ("spans", {"right": 0.9}, "the policy learns the reports"),
        ("summed", {"steps_to_90": 120.0}, "steps to 0.9, summed over spans"),
        ("summed-group", {"steps_to_90": 120.0}, "steps to 0.9, GRPO on the sum over spans"),
        ("learned", {"critic": 0.9}, "the learned critic knows held-out words"),
        ("learned", {"right": 0.8}, "and teaches the reports"),
        ("learned-summed", {"steps_to_90": 120.0}, "steps to 0.9, its sum over its spans"),
        ("sort-summed", {"right": 0.36}, "sorting: more right answers than by the sum"),
    ],
)
def test_each_condition_can_fail(arm, changed, name):
    assert [check.name for check in concluded({arm: changed}).checks if not check.holds] == [name]


def test_a_method_that_never_gets_there_shows_nothing():
    never = {arm: {"steps_to_90": math.inf} for arm in ("spans", "summed", "summed-group")}
    assert concluded(never).headline == "not shown at this scale"


def test_the_plan():
    units = runner.checked(text2grad, text2grad.plan("full", 5))
    assert {unit.arm for unit in units} == set(text2grad.ARMS)
    assert {unit.seed for unit in units if unit.role == "measure"} == set(range(5))
    tuned = text2grad.plan("full", 1, {"summed": {"steps": 3, "lr": 0.7}})
    assert {u.settings["lr"] for u in tuned if u.arm == "summed" and u.role == "measure"} == {0.7}


def test_the_critic_quotes_runs():
    response = Response("p0", "w01 w02 w03 w01 w05", {"target": "w01 w02 w09 w01 w07", "terse": False})
    written = reports_task.critique(response)
    assert parse_feedback(written).spans == (("w01 w02", 1.0), ("w01", 1.0), ("w03", -1.0), ("w05", -1.0))
    assert json.loads(written)["textual_feedback"] == "keeps: 'w01 w02', 'w01'; fails: 'w03', 'w05'"
    many = Response("p0", " ".join(["w01 w02"] * 5), {"target": " ".join(["w01 w03"] * 5), "terse": True})
    labels = [label for _, label in parse_feedback(reports_task.critique(many)).spans]
    assert labels == [1.0] * 4 + [-1.0] * 3
    long = Response("p0", "w01 w02 w03 w04 w05", {"target": "w01 w02 w03 w04 w05", "terse": True})
    assert parse_feedback(reports_task.critique(long)).spans == (("w01 w02 w03", 1.0),)


def test_a_unit_learns_and_its_arms_differ():
    arms = [arm for arm, of in text2grad.ARMS.items() if of.task == "reports" and of.critic != "learned"]
    found = {arm: text2grad.measure(Unit(arm, 0, {"steps": 30, "lr": 0.1})) for arm in arms}
    assert found["spans"]["figures"]["right"] > 0.15  # 0.05 before
    assert found["spans"]["figures"]["placed"] > 0.7
    assert "placed" not in found["summed"]["figures"]
    assert len({tuple(measured["curves"]["right"]) for measured in found.values()}) == len(found)


def test_a_learned_critic_is_trained_once(monkeypatch, tmp_path):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    monkeypatch.setattr(reports_task, "RECORDS", 64)
    monkeypatch.setattr(reports_task, "STEPS", 12)
    unit = Unit("learned", 0, {"steps": 2, "lr": 0.1})
    first = text2grad.measure(unit)
    assert 0.45 < first["figures"]["critic"] < 1
    monkeypatch.setattr(reports_task, "Supervised", None)  # read, not trained
    assert text2grad.measure(unit) == first


def test_attempts_are_right_where_it_says():
    targets = reports_task.hidden(3)
    responses, right = reports_task.attempts(5, targets, 50)
    assert 0.3 < right.float().mean() < 0.7
    for response, row in zip(responses, right.tolist(), strict=True):
        pairs = zip(response.text.split(), response.columns["target"].split(), strict=True)
        assert [said == wanted for said, wanted in pairs] == row
        assert response.columns["target"] == reports_task.words(targets[int(response.prompt[1:]), 0].tolist())


@pytest.mark.parametrize("arm", ["sort-spans", "sort-summed"])
def test_sorting(arm):
    tiny = {"steps": 2, "warm_steps": 2, "prompts": 2, "group_size": 2, "eval_size": 4, "lr": 1e-3}
    found = text2grad.measure(Unit(arm, 0, tiny))
    assert set(found["figures"]) == {"right", "greedy", "right_before", "seconds"}
    assert len(found["curves"]["digits"]) == 1


def test_an_advantage_for_every_token():
    writers = Writers([0], prompts=1, length=3, tokens=4)
    texts = torch.tensor([[[[0, 3, 1], [2, 2, 2]]]])
    (same,) = writers.gradients(texts, [torch.tensor([[[1.0, -0.5]]])])
    by_token = torch.tensor([[[[1.0] * 3, [-0.5] * 3]]])
    (each,) = writers.gradients(texts, [by_token])
    torch.testing.assert_close(each, same)
    by_token[..., 1:] = 0.0
    (first,) = writers.gradients(texts, [by_token])
    assert first[0, 0, 0].abs().sum() > 0
    assert first[0, 0, 1:3].abs().sum() == 0
