"""Corrections for a verifier that errs: unbiased by enumeration, cancelled by a z-score, kept by rloo and reinforce."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

from guerdon.advantages import dr_grpo, group_advantages, grpo, reinforce, rloo
from guerdon.errors import BindingError, RecipeError, ScoreError, ShapeError
from guerdon.rollout import Rollout
from guerdon.shaping import backward_correction, forward_correction
from guerdon.shaping.noise_correction import (
    Audit,
    backward_reward,
    backward_variance,
    correction_audit,
    flip_probabilities,
    forward_weight,
    leave_one_out,
    step_coefficients,
)
from guerdon.signal import Signal

LOGITS = torch.tensor([0.3, -0.5, 1.0, 0.1], dtype=torch.float64)
RIGHT = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
RATES = [(0.0, 0.0), (0.1, 0.2), (0.0, 0.4), (0.3, 0.0), (0.45, 0.5)]
SCORES = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)


def score_functions(logits: Tensor = LOGITS) -> Tensor:
    """grad log pi(a) of a softmax policy, one row per arm."""
    return torch.eye(len(logits), dtype=logits.dtype) - logits.softmax(-1)


def clean_gradient(logits: Tensor = LOGITS, right: Tensor = RIGHT) -> Tensor:
    return (logits.softmax(-1) * right) @ score_functions(logits)


def expected_update(value, rates: tuple[float, float]) -> Tensor:
    """E[value(S) grad log pi] over arms and both outcomes of the verifier."""
    channel = torch.tensor(flip_probabilities(*rates), dtype=torch.float64)
    total = torch.zeros(len(LOGITS), dtype=torch.float64)
    for arm, seen in itertools.product(range(len(LOGITS)), (0, 1)):
        weight = LOGITS.softmax(-1)[arm] * channel[int(RIGHT[arm]), seen]
        total += weight * value(torch.tensor([[float(seen)]], dtype=torch.float64)).item() * score_functions()[arm]
    return total


# ---------------------------------------------------------------- what the paper proves


@pytest.mark.parametrize("rates", RATES)
def test_the_backward_reward_is_right_on_average(rates):
    found = expected_update(lambda seen: backward_reward(seen, *rates), rates)
    assert torch.allclose(found, clean_gradient(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rates", RATES)
def test_the_forward_update_is_the_clean_one_times_the_informedness(rates):
    found = expected_update(lambda seen: forward_weight(seen, rates[1]), rates)
    assert torch.allclose(found, (1 - sum(rates)) * clean_gradient(), rtol=0, atol=1e-12)


def test_the_false_positive_rate_does_not_turn_the_forward_update():
    found = [expected_update(lambda seen: forward_weight(seen, 0.3), (low, 0.3)) for low in (0.0, 0.2, 0.5)]
    for update in found:
        assert torch.cosine_similarity(update, clean_gradient(), dim=0).item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("wrong", [0.0, 0.25, 0.9])
def test_a_wrong_false_negative_rate_is_a_baseline_only(wrong):
    found = expected_update(lambda seen: forward_weight(seen, wrong), (0.1, 0.4))
    assert torch.allclose(found, 0.5 * clean_gradient(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_leave_one_out_keeps_the_expected_update_and_the_group_mean_shrinks_it(size):
    logits, right, rates = LOGITS[:3], RIGHT[:3], (0.1, 0.3)
    channel = torch.tensor(flip_probabilities(*rates), dtype=torch.float64)
    outcomes = list(itertools.product(range(3), (0, 1)))
    kept, shrunk = torch.zeros(2, 3, dtype=torch.float64)
    for group in itertools.product(outcomes, repeat=size):
        weight = math.prod(logits.softmax(-1)[a].item() * channel[int(right[a]), s].item() for a, s in group)
        rewards = backward_reward(torch.tensor([[float(s) for _, s in group]], dtype=torch.float64), *rates)
        grads = score_functions(logits)[[a for a, _ in group]]
        kept += weight * (rloo(rewards)[0, :, None] * grads).mean(0)
        shrunk += weight * (dr_grpo(rewards)[0, :, None] * grads).mean(0)
    clean = clean_gradient(logits, right)
    assert torch.allclose(kept, clean, rtol=0, atol=1e-12)
    assert torch.allclose(shrunk, (1 - 1 / size) * clean, rtol=0, atol=1e-12)


def test_variances_by_enumeration_and_monte_carlo():
    low, miss = backward_variance(0.1, 0.3)
    assert low == pytest.approx(0.09 / 0.36)
    assert miss == pytest.approx(0.21 / 0.36)
    generator = torch.Generator().manual_seed(0)
    for right, rate, expected in ((0, 0.1, low), (1, 0.3, miss)):
        wrong = torch.rand(1, 200_000, generator=generator, dtype=torch.float64) < rate
        seen = (wrong != bool(right)).double()
        rewards = backward_reward(seen, 0.1, 0.3)
        assert rewards.mean().item() == pytest.approx(right, abs=0.01)
        assert rewards.var().item() == pytest.approx(expected, rel=0.02)


def test_the_backward_reward_explodes_where_the_forward_weight_stays():
    seen = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert backward_reward(seen, 0.49, 0.5).abs().max().item() == pytest.approx(51)
    assert forward_weight(seen, 0.5).tolist() == [[-0.5, 0.5]]
    assert backward_reward(seen, 0.0, 0.0).tolist() == seen.tolist()


# ---------------------------------------------------------------- what undoes a correction


@pytest.mark.parametrize("rates", [(0.1, 0.2), (0.0, 0.4), (0.2, 0.5)])
def test_a_z_score_in_the_group_cancels_both_corrections(rates):
    plain = grpo(SCORES, eps=1e-9)
    for corrected in (backward_reward(SCORES, *rates), forward_weight(SCORES, rates[1])):
        assert torch.allclose(grpo(corrected, eps=1e-9), plain, rtol=0, atol=1e-8)
        assert (grpo(corrected) - grpo(SCORES)).abs().max() < 1e-3


def test_every_centring_cancels_the_forward_correction():
    corrected = forward_weight(SCORES, 0.3)
    for advantage in (rloo, dr_grpo, grpo):
        assert torch.allclose(advantage(corrected), advantage(SCORES), rtol=0, atol=1e-12)
    assert (reinforce(corrected) - reinforce(SCORES)).abs().max().item() == pytest.approx(0.7)


def test_leave_one_out_backward_differs_from_uncorrected_in_size_only():
    found, plain = rloo(backward_reward(SCORES, 0.1, 0.4)), rloo(SCORES)
    assert torch.allclose(found, plain / 0.5, rtol=0, atol=1e-12)
    audit = correction_audit(found, plain, torch.ones(3, 4, 2).bool())
    assert audit.cosine == pytest.approx(1, abs=1e-12)
    assert audit.mean > 0.3


def test_rates_per_prompt_weigh_prompts():
    miss = torch.tensor([0.5, 0.0, 0.2], dtype=torch.float64)
    found = rloo(backward_reward(SCORES, 0.0, miss))
    assert torch.allclose(found, rloo(SCORES) / (1 - miss)[:, None], rtol=0, atol=1e-12)
    assert torch.allclose(backward_reward(SCORES, 0.0, [0.5, 0.0, 0.2]), backward_reward(SCORES, 0.0, miss))


def rollout(scores: Tensor = SCORES) -> Rollout:
    count, size = scores.shape
    return Rollout(
        [f"p{p}" for p in range(count)],
        [["x"] * size] * count,
        torch.ones(count, size, 2).bool(),
        torch.zeros(count, size, 2),
        columns={"verdict": scores.tolist()},
    )


def verdict(samples, verdict):
    return verdict


def other(samples):
    return [[float(g) for g in range(len(group))] for group in samples]


@pytest.mark.parametrize("advantage", [grpo, group_advantages])
@pytest.mark.parametrize("kind", ["backward", "forward"])
def test_the_signal_warns_once_where_the_advantage_cancels_the_correction(kind, advantage):
    signal = Signal(rewards={"right": verdict}, shaping={"right": [stage(kind)]}, advantage=advantage)
    wanted = "rloo" if kind == "backward" else "reinforce"
    with pytest.warns(UserWarning, match=rf"undoes the correction.*Use advantage: {wanted}"):
        signal(rollout())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        signal(rollout())
    metrics = signal.metrics()
    assert metrics["shaping_right_0/audit_mean"] < 1e-3
    assert metrics["shaping_right_0/audit_max"] < 1e-3
    assert metrics["shaping_right_0/audit_cosine"] == pytest.approx(1, abs=1e-9)


def test_the_signal_warns_where_forward_weights_are_centred():
    signal = Signal(rewards={"right": verdict}, shaping={"right": [stage("forward")]}, advantage=rloo)
    with pytest.warns(UserWarning, match="undoes the correction"):
        signal(rollout())


@pytest.mark.parametrize(("kind", "advantage"), [("backward", rloo), ("backward", dr_grpo), ("forward", reinforce)])
def test_the_advantages_that_go_with_a_correction_keep_it(kind, advantage):
    signal = Signal(rewards={"right": verdict}, shaping={"right": [stage(kind)]}, advantage=advantage)
    found = signal(rollout())
    corrected = backward_reward(SCORES, 0.1, 0.4) if kind == "backward" else forward_weight(SCORES, 0.4)
    assert torch.allclose(found.advantages.double(), advantage(corrected), atol=1e-6)
    metrics = signal.metrics()
    assert metrics["shaping_right_0/audit_mean"] > 0.2
    plain = advantage(SCORES)
    expected = torch.cosine_similarity(advantage(corrected).flatten(), plain.flatten(), dim=0).item()
    assert metrics["shaping_right_0/audit_cosine"] == pytest.approx(expected, abs=1e-6)


def test_no_warning_without_a_correction_or_a_signal():
    signal = Signal(
        rewards={"right": verdict},
        shaping={"right": [backward_correction(false_positive_rate=0.0, false_negative_rate=0.0)]},
        advantage=grpo,
    )
    signal(rollout())  # warnings are errors here
    constant = Signal(rewards={"right": verdict}, shaping={"right": [stage("backward")]}, advantage=grpo)
    constant(rollout(torch.ones(2, 3)))
    assert math.isnan(constant.metrics()["shaping_right_0/audit_cosine"])


def test_a_correction_beside_another_component_sees_its_own_scores_and_is_not_cancelled():
    correction = stage("backward", scale="ema")
    signal = Signal(rewards={"other": other, "right": verdict}, shaping={"right": [correction]}, advantage=grpo)
    found = signal(rollout())  # the other component's scores are no verdicts, and would be refused
    assert signal.metrics()["shaping_right_0/audit_mean"] > 0.01
    signal.observe(found.available())
    expected = leave_one_out(backward_reward(SCORES, 0.1, 0.4)).square().mean().sqrt()
    assert correction.running_scale.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_correction_of_all_components_observes_each():
    correction = stage("forward", baseline="ema")
    signal = Signal(rewards={"one": verdict, "two": verdict}, shaping={"*": [correction]}, advantage=reinforce)
    signal.observe(signal(rollout()).available())
    # each component has a copy of its own: what is learnt of one is nothing to the other
    assert [chain[0].observed.item() for chain in signal.shaping.values()] == [1, 1]
    assert signal.shaping["one"][0] is correction


# ---------------------------------------------------------------- the stages


def stage(kind: str, **options):
    if kind == "backward":
        return backward_correction(**{"false_positive_rate": 0.1, "false_negative_rate": 0.4, **options})
    return forward_correction(**{"false_negative_rate": 0.4, **options})


def test_numbers_of_the_stages():
    seen = torch.tensor([[1.0, 0.0, math.nan]], dtype=torch.float64)
    found = stage("backward", scale=2.0)(seen)
    assert torch.allclose(found, torch.tensor([[0.9, -0.1, math.nan]], dtype=torch.float64), equal_nan=True)
    assert torch.allclose(rloo(found), torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64))
    found = stage("forward", baseline=0.1, scale="recall")(seen)
    assert torch.allclose(found, torch.tensor([[0.5, -7 / 6, math.nan]], dtype=torch.float64), equal_nan=True)
    found = stage("forward", scale="informedness", false_positive_rate=0.1)(seen)
    assert torch.allclose(found[0, :2], torch.tensor([0.8, -1.2], dtype=torch.float64))
    assert reinforce(found)[0, 2] == 0


def test_without_false_negatives_only_rejections_act():
    assert forward_correction(false_negative_rate=0.0)(torch.tensor([[1.0, 0.0]])).tolist() == [[0.0, -1.0]]


def test_a_group_of_one_has_no_baseline():
    assert leave_one_out(torch.tensor([[2.0], [math.nan]])).tolist() == [[2.0], [0.0]]
    found = leave_one_out(torch.tensor([[1.0, math.nan, 0.0, 4.0]]))
    assert found.tolist() == [[-1.0, 0.0, -2.5, 3.5]]


def test_rates_come_from_fields_where_no_option_is_given():
    seen = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    found = forward_correction()(seen, None, torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert found.tolist() == [[0.25, -0.75], [0.5, -0.5]]
    assert forward_correction(false_negative_rate=0.5)(seen, None, [0.1, 0.1]).tolist() == [[0.5, -0.5], [0.5, -0.5]]
    found = backward_correction()(seen, [0.0, 0.0], [0.5, 0.0])
    assert found.tolist() == [[2.0, 0.0], [1.0, 0.0]]
    with pytest.raises(BindingError, match=r"false_negative_rate is neither given as an option nor there as a field"):
        forward_correction()(seen)
    with pytest.raises(RecipeError, match=r"the field false_negative_rate must be at least 0 and below 1"):
        forward_correction()(seen, None, [0.1, 1.0])


def test_rates_from_fields_that_leave_nothing_are_held_with_a_warning():
    seen = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"below eps_c = 0.1; it is held there"):
        found = backward_correction(eps_c=0.1, false_positive_rate=0.5)(seen, None, [0.6])
    assert torch.allclose(found, torch.tensor([[5.0, -5.0]], dtype=torch.float64))


def test_the_running_baseline_is_that_of_the_steps_before():
    stage = forward_correction(false_negative_rate=0.2, baseline="ema", baseline_rate=0.5)
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    assert stage(first).flatten().tolist() == pytest.approx([0.2, -0.8])
    stage.observe(first)  # mean weight -0.3
    assert stage.running_baseline.item() == pytest.approx(-0.3)
    assert stage(second).flatten().tolist() == pytest.approx([0.5, 0.5, -0.5, 0.5])
    stage.observe(second)  # mean weight -0.05
    assert stage.running_baseline.item() == pytest.approx(-0.175)
    assert stage.metrics()["running_baseline"] == pytest.approx(-0.175)
    stage.observe(torch.full((1, 2), math.nan))
    assert stage.observed.item() == 2


def test_the_running_scale():
    stage = backward_correction(false_positive_rate=0.0, false_negative_rate=0.5, scale="ema", scale_decay=0.5)
    seen = torch.tensor([[1.0, 0.0]])
    assert stage(seen).tolist() == [[2.0, 0.0]]
    stage.observe(seen)  # leave-one-out coefficients 2 and -2
    assert stage(seen).tolist() == [[1.0, 0.0]]
    stage.observe(torch.ones(1, 2))  # coefficients 0
    assert stage.running_scale.item() == pytest.approx(1.0)
    for _ in range(30):
        stage.observe(torch.ones(1, 2))
    assert stage(seen).flatten()[0].item() == pytest.approx(2000)  # the floor is 1e-3


def test_the_state_goes_through_a_checkpoint_and_has_no_gradient():
    first = forward_correction(false_negative_rate=0.2, baseline="ema", scale="ema")
    for seed in range(3):
        first.observe((torch.rand(2, 4, generator=torch.Generator().manual_seed(seed)) > 0.5).float())
    second = forward_correction(false_negative_rate=0.2, baseline="ema", scale="ema")
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(SCORES), second(SCORES))
    assert set(first.state_dict()) == {"running_scale", "running_baseline", "observed"}
    assert not list(first.parameters())
    assert not first(SCORES.clone().requires_grad_()).requires_grad


def test_a_threshold_makes_verdicts_of_grades():
    grades = torch.tensor([[0.2, 0.5, 0.9, math.nan]])
    found = forward_correction(false_negative_rate=0.5, threshold=0.5)(grades)
    assert found[0, :3].tolist() == [-0.5, 0.5, 0.5]
    assert found[0, 3].isnan()
    with pytest.raises(ScoreError, match=r"scores must be 0 or 1; got 0.2 at \[0, 0\]. Set threshold"):
        forward_correction(false_negative_rate=0.5)(grades)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: stage("backward", false_negative_rate=1.0), "false_negative_rate: must be at least 0 and below 1"),
        (lambda: stage("forward", false_negative_rate=-0.1), "must be at least 0 and below 1; got -0.1"),
        (lambda: stage("backward", false_positive_rate=0.7), r"must be below 1; got 1.1"),
        (lambda: stage("backward", eps_c=0.0), "eps_c: must be above 0"),
        (lambda: stage("backward", scale=0.0), "scale: must be a number above 0 or one of ema"),
        (lambda: stage("forward", scale="recal"), "one of recall, informedness, ema; got 'recal'"),
        (lambda: stage("forward", baseline="mean"), "must be 'none', 'ema' or a number; got 'mean'"),
        (lambda: stage("forward", baseline_rate=0.0), "baseline_rate: must be above 0"),
        (lambda: stage("forward", scale_decay=1.0), r"scale_decay must be in \[0, 1\)"),
    ],
)
def test_options_out_of_range(make, complaint, friendly_errors):
    with pytest.raises(RecipeError, match=complaint):
        make()


def test_a_wrong_shape(friendly_errors):
    with pytest.raises(ShapeError, match=r"shaping.forward_correction: scores must be \[P, G\]; got \[4\]"):
        forward_correction(false_negative_rate=0.1)(torch.zeros(4))


# ---------------------------------------------------------------- steps and audit


def test_scores_of_steps():
    scores = torch.tensor([[[1.0, 0.0, math.nan]]], dtype=torch.float64)
    ends = torch.tensor([[[1, 3, 3]]])
    found = step_coefficients(scores, ends, length=5, correction="forward", false_negative_rate=0.25, scale=0.5)
    # weights 0.25 and -0.75 over 0.5
    assert found.tolist() == [[[-1.0, -1.0, -1.5, -1.5, 0.0]]]
    found = step_coefficients(
        scores, ends, length=4, correction="backward", false_negative_rate=0.5, false_positive_rate=0.0, baseline=0.5
    )
    assert found.tolist() == [[[1.0, 1.0, -0.5, -0.5]]]
    with pytest.raises(ScoreError, match="step_coefficients: scores must be 0 or 1"):
        step_coefficients(scores / 2, ends, length=4, correction="forward", false_negative_rate=0.5)


def test_the_audit_counts_live_steps_only():
    mask = torch.tensor([[[True, True, True], [True, False, False]]])
    corrected, plain = torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 1.0]])
    found = correction_audit(corrected, plain, mask)
    assert found.mean == pytest.approx(1.0)
    assert found.max == 4.0
    assert found.cosine == pytest.approx(8 / (math.sqrt(28) * 2))
    per_step = corrected.unsqueeze(-1).expand(1, 2, 3).masked_fill(~mask, math.nan)
    assert correction_audit(per_step, plain, mask) == found
    assert math.isnan(correction_audit(corrected, 0 * plain, mask).cosine)
    empty = correction_audit(corrected, plain, torch.zeros_like(mask))
    assert isinstance(empty, Audit)
    assert empty.max == 0
