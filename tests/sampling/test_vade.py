"""VADE: posteriors, decay on two scales, selection by Thompson sampling, and nothing forgotten by the state."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.advantages import copo, grpo
from guerdon.errors import CheckpointError, DataError, RecipeError, ShapeError
from guerdon.objectives import copo_loss, policy_gradient
from guerdon.sampling import uniform, vade
from guerdon.sampling.thompson import draw_all
from guerdon.sampling.vade import information_gain, mixed_probability
from guerdon.signal import Signal
from guerdon.training import Online, Optim
from tests.training.bandit import BanditPolicy, best_arm, rows

NAN = math.nan


def sampler(size: int | None = 6, seed: int = 0, **options) -> vade:
    made = vade(**options)
    made.prepare(size, seed)
    return made


def groups(right: list[int], size: int = 8) -> torch.Tensor:
    """[P, G, 1]: so many right samples of each group."""
    return (torch.arange(size) < torch.tensor(right)[:, None]).float().unsqueeze(-1)


def world(made, truth: np.ndarray, steps: int, count: int, seed: int = 0, drift: float = 0.0, size: int = 8):
    """Play against prompts of known difficulty; share of mixed groups and calibration error of each step."""
    random = np.random.default_rng(seed)
    mixed, errors = [], []
    for _ in range(steps):
        chosen = made.draw(count)
        right = random.binomial(size, truth[chosen])
        mixed.append(np.mean((right > 0) & (right < size)))
        if isinstance(made, vade):
            errors.append(np.mean(np.abs(made.mean.numpy()[chosen] - truth[chosen])))
            made.observe(chosen, groups(right.tolist(), size))
        if drift:
            inside = (truth > 0) & (truth < 1)
            logit = np.log(truth[inside] / (1 - truth[inside])) + drift
            truth[inside] = 1 / (1 + np.exp(-logit))
    return np.array(mixed), np.array(errors)


# ---------------------------------------------------------------- gains


def test_information_gain():
    grid = np.linspace(0, 1, 30_001)
    assert grid[np.argmax(information_gain(grid))] == pytest.approx(1 / 3, abs=1e-4)
    assert information_gain(1 / 3) == pytest.approx(4 / 27, rel=1e-12)
    assert information_gain(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 0.125, 0.0]


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (3.0, 2.0), (0.5, 6.0)])
def test_the_expected_gain_has_a_closed_form(a, b):
    draws = np.random.default_rng(0).beta(a, b, 400_000)
    expected = a * b * (b + 1) / ((a + b) * (a + b + 1) * (a + b + 2))
    gains = information_gain(draws)
    assert abs(gains.mean() - expected) < 5 * gains.std() / math.sqrt(len(gains))


@given(p=st.floats(0.01, 0.99), q=st.floats(0.01, 0.99), size=st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_mixed_orders_as_variance_does(p, q, size):
    if p * (1 - p) > q * (1 - q) + 1e-9:
        assert mixed_probability(p, size) >= mixed_probability(q, size)


def test_mixed_probability():
    assert mixed_probability(0.5, 4) == 0.875
    assert mixed_probability(torch.tensor([0.1, 0.0]), 4).tolist() == pytest.approx([0.3438, 0.0])


@pytest.mark.parametrize(("gain", "peak"), [("information", 1 / 3), ("variance", 0.5), ("mixed", 0.5)])
def test_each_gain_prefers_its_own_difficulty(gain, peak):
    made = sampler(11, gain=gain, decay_global=1.0, decay_selected=1.0)
    truth = np.linspace(0, 1, 11)
    right = (truth * 2000).round().astype(int)
    made.observe(list(range(11)), groups(right.tolist(), 2000))
    assert abs(truth[made.draw(1)[0]] - peak) < 0.051


# ---------------------------------------------------------------- posteriors


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_without_decay_it_is_the_beta_bernoulli_bandit(batches):
    made = sampler(5, decay_global=1.0, decay_selected=1.0, alpha0=2.0, beta0=0.5)
    right, total = np.zeros(5), np.zeros(5)
    for number, batch in enumerate(batches):
        where = [(number + i) % 5 for i in range(3)]
        made.observe(where, groups(batch, 4))
        right[where] += batch
        total[where] += 4
    assert made.alpha.tolist() == (2.0 + right).tolist()
    assert made.beta.tolist() == (0.5 + total - right).tolist()


def test_numbers_of_two_steps():
    made = sampler(3, decay_global=0.9, decay_selected=0.5)
    made.observe([0, 1], groups([1, 4], 4))
    assert made.alpha.tolist() == [2.0, 5.0, 1.0]
    assert made.beta.tolist() == [4.0, 1.0, 1.0]
    made.observe([1, 2], groups([2, 0], 4))
    # prompt 0: (1, 3) * 0.9; prompt 1: (4, 0) * 0.9 * 0.5 + (2, 2); prompt 2: (0, 4)
    assert made.alpha.tolist() == pytest.approx([1.9, 4.8, 1.0], rel=1e-12)
    assert made.beta.tolist() == pytest.approx([3.7, 3.0, 5.0], rel=1e-12)
    assert made.evidence.tolist() == pytest.approx([3.6, 5.8, 4.0], rel=1e-12)
    assert made.mean[1].item() == pytest.approx(4.8 / 7.8)


@pytest.mark.parametrize("decay", [0.998, 0.5, 0.01, 0.0])
def test_evidence_of_a_prompt_that_is_never_selected_fades(decay):
    made = sampler(3, decay_global=decay)
    made.observe([2], groups([5]))
    before = made.alpha[2].item() - 1
    for step in range(1, 40):
        made.observe([0], groups([3]))
        assert made.alpha[2].item() - 1 == pytest.approx(before * decay**step, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(("decay_global", "decay_selected"), [(0.998, 0.8), (1.0, 0.5), (0.9, 0.9)])
def test_evidence_of_a_prompt_that_is_always_selected_has_a_fixed_point(decay_global, decay_selected):
    made = sampler(2, decay_global=decay_global, decay_selected=decay_selected)
    for _ in range(200):
        made.observe([1], groups([3]))
    assert made.evidence[1].item() == pytest.approx(8 / (1 - decay_global * decay_selected), rel=1e-9)


def test_without_memory_only_the_last_group_counts():
    made = sampler(2, decay_selected=0.0)
    for right in (8, 2, 5):
        made.observe([1], groups([right]))
    assert (made.alpha[1].item(), made.beta[1].item()) == (6.0, 4.0)


def test_many_steps_do_not_wear_the_numbers_out():
    made = sampler(2, decay_global=0.5, decay_selected=1.0)
    for _ in range(500):
        made.observe([0], groups([4]))
    assert made.alpha[0].item() == pytest.approx(9.0)
    assert made.alpha[1].item() == 1.0
    assert 0 < made.scale.item() <= 1.0


def test_graded_scores():
    scores = torch.tensor([[[0.5], [0.49], [1.5], [-1.0]]])
    plain, strict, soft = sampler(), sampler(threshold=1.0), sampler(fractional=True)
    for made in (plain, strict, soft):
        made.observe([3], scores)
    assert (plain.alpha[3].item(), plain.beta[3].item()) == (3.0, 3.0)
    assert (strict.alpha[3].item(), strict.beta[3].item()) == (2.0, 4.0)
    assert (soft.alpha[3].item(), soft.beta[3].item()) == pytest.approx((2.99, 3.01))


def test_the_first_or_the_named_component_is_read():
    scores = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    one, other = sampler(), sampler(component="short")
    for made in (one, other):
        made.observe([0], scores, ("correct", "short"))
    assert (one.alpha[0].item(), other.alpha[0].item()) == (3.0, 1.0)


def test_samples_without_a_score_are_not_counted():
    made = sampler(3, decay_global=1.0, decay_selected=0.5)
    made.observe([0, 1], groups([4, 4], 4))
    scores = torch.tensor([[[NAN], [1.0], [0.0], [NAN]], [[NAN]] * 4])
    made.observe([0, 1], scores)
    assert (made.alpha[0].item(), made.beta[0].item()) == (1 + 4 * 0.5 + 1, 2.0)
    assert (made.alpha[1].item(), made.beta[1].item()) == (5.0, 1.0)  # nothing was measured, so nothing is replaced


def test_nothing_at_all_was_scored():
    made = sampler(2)
    made.observe([0], torch.full((1, 4, 1), NAN))
    assert made.evidence.tolist() == [0.0, 0.0]
    assert made.metrics() == {"effective_groups": 0.0}


def test_metrics():
    made = sampler(4)
    assert made.metrics() == {}
    made.observe([0, 1, 3], groups([8, 2, 0]))
    found = made.metrics()
    assert found["effective_groups"] == pytest.approx(1 / 3)
    assert found["calibration_error"] == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert found["evidence"] == pytest.approx(8.0)


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize("size", [40, 3000])
def test_a_draw_holds_no_prompt_twice_and_repeats_for_its_seed_and_step(size):
    one, same, other = sampler(size, 1), sampler(size, 1), sampler(size, 2)
    first = [made.draw(16) for made in (one, same, other)]
    assert first[0] == first[1] != first[2]
    assert len(set(first[0])) == 16
    assert one.draw(16) != first[0]


def test_all_prompts_can_be_drawn():
    assert sorted(sampler(5).draw(5)) == [0, 1, 2, 3, 4]
    assert sampler(5).draw(0) == []


def test_a_draw_is_the_largest_gains_of_one_draw_of_every_posterior():
    made = sampler(50, seed=7)
    made.observe(list(range(10)), groups([4] * 10))
    random = np.random.default_rng([7, 0])
    alpha, beta = made.alpha.numpy(), made.beta.numpy()
    expected = draw_all(lambda at: (alpha[at], beta[at]), 8, information_gain, 1 / 3, random).positions.tolist()
    gains = information_gain(np.random.default_rng([7, 0]).beta(alpha, beta))
    assert made.draw(8) == expected == np.argsort(-gains, kind="stable")[:8].tolist()


def test_the_shortcut_for_many_prompts_selects_as_drawing_for_all_does(monkeypatch):
    size, count, rounds = 4000, 16, 300
    truth = np.repeat([0.0, 1.0, 0.3, 0.9], size // 4)

    def played(few: int) -> tuple[np.ndarray, float]:
        monkeypatch.setattr(sys.modules["guerdon.sampling.vade"], "_FEW", few)
        made = sampler(size, seed=few)
        kinds = np.zeros(4)
        random = np.random.default_rng(few)
        for _ in range(rounds):
            chosen = made.draw(count)
            kinds += np.bincount(np.array(chosen) // (size // 4), minlength=4)
            made.observe(chosen, groups(random.binomial(8, truth[chosen]).tolist()))
        return kinds / kinds.sum(), float(made.density)

    (near, density), (every, _) = played(100), played(10**9)
    assert density > 0
    assert np.abs(near - every).max() < 0.04
    assert near[2] > 0.35  # of prompts a quarter


def test_samplers_fed_the_same_stay_the_same():
    # processes share nothing but the seed and the gathered scores
    made = [sampler(3000, 5) for _ in range(2)]
    random = np.random.default_rng(0)
    for _ in range(20):
        chosen = [one.draw(8) for one in made]
        assert chosen[0] == chosen[1]
        right = random.integers(0, 9, 8).tolist()
        for one in made:
            one.observe(chosen[0], groups(right))


def test_drawing_does_not_touch_global_generators():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    sampler(3000).draw(20)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_it_finds_the_prompts_that_teach():
    random = np.random.default_rng(0)
    truth = random.random(400)
    truth[random.random(400) < 0.3] = 0.0
    truth[random.random(400) < 0.3] = 1.0
    steps = 3 * 400 // 20
    ours, _ = world(sampler(400), truth, 2 * steps, 20)
    plain = uniform()
    plain.prepare(400, 0)
    theirs, _ = world(plain, truth, 2 * steps, 20)
    assert ours[steps:].mean() > 1.5 * theirs[steps:].mean()


def test_decay_keeps_up_with_a_moving_policy():
    def error(**options) -> float:
        random = np.random.default_rng(1)
        truth = 1 / (1 + np.exp(-random.normal(0, 1.5, 512)))
        truth[:150], truth[150:300] = 0.0, 1.0
        return world(sampler(512, **options), truth, 80, 32, drift=0.03)[1][40:].mean()

    assert error() < 0.75 * error(decay_global=1.0, decay_selected=1.0)


# ---------------------------------------------------------------- data and state


def test_endless_data_needs_a_pool(friendly_errors):
    with pytest.raises(DataError, match=r"the data is endless.*--sampling\.vade\.pool 1024"):
        sampler(None)
    made = sampler(None, pool=7)
    assert made.size == 7
    assert sorted(made.draw(7)) == [0, 1, 2, 3, 4, 5, 6]
    assert sampler(5, pool=7).size == 5
    assert sampler(9, pool=7).size == 7


def test_the_state_dict_is_the_whole_state():
    first = sampler(3000, seed=3)
    for right in (1, 5):
        first.observe(first.draw(4), groups([right] * 4))
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    late, early = vade(), vade()
    late.prepare(3000, 3)
    late.load_state_dict(saved)
    early.load_state_dict(saved)
    early.prepare(3000, 3)
    for right in (2, 7):
        chosen = first.draw(4)
        assert chosen == late.draw(4) == early.draw(4)
        for made in (first, late, early):
            made.observe(chosen, groups([right] * 4))
    for made in (late, early):
        assert all(torch.equal(value, made.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("prepared_first", [True, False])
def test_more_data_starts_at_the_prior(prepared_first):
    first = sampler(3)
    first.observe([1], groups([4]))
    second = vade()
    if prepared_first:
        second.prepare(5, 0)
        second.load_state_dict(first.state_dict())
    else:
        second.load_state_dict(first.state_dict())
        second.prepare(5, 0)
    assert second.alpha.tolist() == [1.0, 5.0, 1.0, 1.0, 1.0]
    assert max(second.draw(5)) == 4


def test_less_data_is_an_error():
    saved = sampler(5).state_dict()
    with pytest.raises(RuntimeError, match="the state is of 5 prompts, and the data has 3"):
        sampler(3).load_state_dict(saved)
    second = vade()
    second.load_state_dict(saved)
    with pytest.raises(DataError, match=r"the state is of 5 prompts, and the data has 3.*known by their position"):
        second.prepare(3, 0)


def make_loop(**options) -> Online:
    signal = Signal(rewards={"best": best_arm}, advantage=options.pop("advantage", grpo))
    settings = {"prompts_per_step": 4, "group_size": 6, "optim": Optim(lr=0.1), "steps": 10, "seed": 3, **options}
    settings.setdefault("sampler", vade())
    return Online(BanditPolicy(24), rows(24), signal, settings.pop("objective", policy_gradient), **settings)


def test_the_loop_goes_on_bit_for_bit():
    straight = make_loop()
    drawn = [straight.step().rollout.indices for _ in range(6)]
    first = make_loop()
    for _ in range(3):
        first.step()
    state, weights = first.state(), {name: value.clone() for name, value in first.policy.state_dict().items()}
    assert state.tensors["sampler.counts"].shape == (24, 2)
    second = make_loop()
    second.policy.load_state_dict(weights)
    second.load_state(state)
    assert [second.step().rollout.indices for _ in range(3)] == drawn[3:]
    assert torch.equal(second.policy.table, straight.policy.table)
    assert torch.equal(second.sampler.counts, straight.sampler.counts)


def test_a_checkpoint_of_more_data_is_refused():
    state = make_loop().state()
    other = make_loop(sampler=vade(pool=12))
    with pytest.raises(CheckpointError, match="the state is of 24 prompts, and the data has 12"):
        other.load_state(state)


def test_the_loop_tells_it_what_came_out():
    loop = make_loop()
    result = loop.step()
    where = torch.tensor(result.rollout.indices)
    right = (result.rollout.scores[..., 0] >= 0.5).sum(-1)
    torch.testing.assert_close(loop.sampler.alpha[where], 1.0 + right.double())
    assert result.metrics["sampling/effective_groups"] == ((right > 0) & (right < 6)).double().mean().item()
    assert result.metrics["draws"] == 1.0
    assert "sampling/calibration_error" in result.metrics


def test_with_copo():
    def answered(samples, best):
        # the first draw is the answer
        return [
            [(float(draw[:1] == [b]), str(draw[:1])) for draw in group] for group, b in zip(samples, best, strict=True)
        ]

    signal = Signal(rewards={"answered": answered}, advantage=copo)
    loop = Online(
        BanditPolicy(24),
        rows(24),
        signal,
        copo_loss,
        sampler=vade(),
        prompts_per_step=8,
        group_size=4,
        optim=Optim(lr=0.1),
    )
    before = loop.policy.table.detach().clone()
    for _ in range(3):
        result = loop.step()
    assert not torch.equal(before, loop.policy.table)
    assert {"local_weight", "sampling/effective_groups"} <= result.metrics.keys()


def test_errors(friendly_errors):
    with pytest.raises(RecipeError, match="alpha0 must be above 0; got 0"):
        vade(alpha0=0.0)
    with pytest.raises(RecipeError, match="beta0 must be above 0; got nan"):
        vade(beta0=NAN)
    with pytest.raises(RecipeError, match=r"decay_global must be in \[0, 1\]; got 1.5"):
        vade(decay_global=1.5)
    with pytest.raises(RecipeError, match=r"decay_selected must be in \[0, 1\]; got -0.1"):
        vade(decay_selected=-0.1)
    with pytest.raises(
        RecipeError, match=r"gain must be one of information, variance, mixed; got 'varianc'. Did you mean 'v"
    ):
        vade(gain="varianc")
    with pytest.raises(RecipeError, match="pool must be at least 1; got 0"):
        vade(pool=0)
    with pytest.raises(DataError, match="the data has 0 prompts"):
        sampler(0)
    with pytest.raises(DataError, match="8 prompts are wanted and there are 6; each can be drawn once a step"):
        sampler().draw(8)
    with pytest.raises(ValueError, match="8 prompts are wanted"):
        sampler().draw(8)
    with pytest.raises(ShapeError, match=r"scores must be \[P, G, K\]; got \[2, 3\]"):
        sampler().observe([0, 1], torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="indices must have P = 2 entries; got 1"):
        sampler().observe([0], torch.zeros(2, 3, 1))
    with pytest.raises(DataError, match="prompt 4 was observed twice"):
        sampler().observe([1, 4, 4], torch.zeros(3, 2, 1))
    with pytest.raises(DataError, match="there is no prompt 6; there are 6"):
        sampler().observe([0, 6], torch.zeros(2, 2, 1))
    with pytest.raises(RecipeError, match=r"no component 'corect'\. Did you mean 'correct'"):
        sampler(component="corect").observe([0], torch.zeros(1, 2, 1), ("correct",))
