from __future__ import annotations

import functools

import pytest
import torch

from guerdon.advantages import gae, grpo
from guerdon.errors import BindingError, DataError, NumericsError, RecipeError
from guerdon.objectives import policy_gradient, ppo, reward_weighted
from guerdon.objectives.loss import Loss
from guerdon.rewards import kl_penalty
from guerdon.sampling import dynamic
from guerdon.signal import Signal
from guerdon.training import Online, Optim, evaluate
from tests.training.bandit import BanditPolicy, best_arm, rows

SGD = Optim(name="sgd", lr=0.5, betas=(0.0, 0.0), clip_norm=None)


def make(policy=None, *, objective=policy_gradient, signal=None, **options):
    policy = policy or BanditPolicy()
    signal = signal or Signal(rewards={"best": best_arm}, advantage=grpo)
    options = {"prompts_per_step": 6, "group_size": 8, "optim": SGD, "steps": 50, **options}
    return Online(policy, rows(), signal, objective, **options)


def trajectory(steps: int = 4, **options) -> torch.Tensor:
    loop = make(**options)
    for _ in range(steps):
        loop.step()
    return loop.policy.table.detach().clone()


def test_it_learns_the_best_arm_of_every_prompt():
    loop = make(optim=Optim(lr=0.1))
    before = evaluate(loop.policy, rows(), loop.signal, samples=8).metrics["eval/sampled/best"]
    for _ in range(40):
        loop.step()
    after = evaluate(loop.policy, rows(), loop.signal, samples=8).metrics
    assert before < 0.45
    assert after["eval/sampled/best"] > 0.85
    assert after["eval/greedy/best"] == 1.0


@pytest.mark.parametrize("denominator", ["per_sample", "per_token", "constant"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_do_not_change_the_trajectory(denominator, micro_batch):
    objective = functools.partial(policy_gradient, denominator=denominator, max_length=3)
    whole = trajectory(objective=objective)
    split = trajectory(objective=objective, micro_batch=micro_batch)
    assert not torch.equal(whole, BanditPolicy().table)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-12)


def test_one_pass_over_one_batch_is_plain_policy_gradient():
    loop = make()
    result = loop.step()
    assert result.metrics["ratio_max"] == 1.0
    assert result.metrics["logp_gap_max"] < 1e-12


def test_several_passes_and_mini_batches_leave_the_old_policy_behind():
    loop = make(passes=2, mini_batches=3)
    result = loop.step()
    assert result.metrics["ratio_max"] > 1.0
    assert loop.schedule.last_epoch == 6


def test_recomputed_log_probabilities_equal_the_samplers():
    torch.testing.assert_close(trajectory(passes=2, old_logp="recompute"), trajectory(passes=2), rtol=0, atol=1e-12)


def test_a_reference_is_scored_when_a_stage_asks_for_it():
    policy = BanditPolicy()
    policy.keep_reference()
    signal = Signal(rewards={"best": best_arm, "kl": kl_penalty()}, advantage=grpo)
    loop = make(policy, signal=signal, objective=functools.partial(policy_gradient, beta=0.1))
    assert loop.needs_reference
    loop.step()
    second = loop.step()
    assert second.metrics["kl"] > 0
    assert second.rollout.logp_ref is not None
    assert not make().needs_reference


def test_ppo_with_a_critic_learns_values():
    policy = BanditPolicy(critic=True)
    loop = make(
        policy, signal=Signal(rewards={"best": best_arm}, advantage=gae), objective=ppo, optim=Optim(lr=0.05), passes=2
    )
    for _ in range(30):
        loop.step()
    assert policy.value is not None
    assert policy.value.min() > 0.2  # rewards lie near their ceiling of 1 by now
    after = evaluate(loop.policy, rows(), loop.signal, samples=8).metrics
    assert after["eval/sampled/best"] > 0.7


def weighted(policy=None, **options):
    if policy is None:
        policy = BanditPolicy()
        policy.keep_reference()
    signal = Signal(rewards={"best": best_arm})
    return make(
        policy, signal=signal, objective=functools.partial(reward_weighted, temperature=0.2, beta=0.1), **options
    )


def test_learning_from_own_samples_by_their_worth():
    loop = weighted(optim=Optim(lr=0.1), passes=2)
    before = evaluate(loop.policy, rows(), loop.signal, samples=8).metrics["eval/sampled/best"]
    assert loop.step().metrics["effective_samples"] < 8
    for _ in range(30):
        loop.step()
    assert evaluate(loop.policy, rows(), loop.signal, samples=8).metrics["eval/sampled/best"] > before + 0.3


def test_micro_batches_do_not_change_learning_from_own_samples():
    def end(**options):
        loop = weighted(**options)
        for _ in range(3):
            loop.step()
        return loop.policy.table.detach().clone()

    torch.testing.assert_close(end(micro_batch=1, passes=2), end(passes=2), rtol=0, atol=1e-12)


def test_noise_is_other_in_every_pass_and_the_same_in_every_run(monkeypatch):
    def asked() -> list[list[int]]:
        found: list[list[int]] = []
        loop = weighted(passes=2, mini_batches=2)
        plain = loop.policy.imitation

        def noting(rollout, seeds, **options):
            found.append(list(seeds))
            return plain(rollout, seeds, **options)

        monkeypatch.setattr(loop.policy, "imitation", noting)
        loop.step()
        return found

    seeds = asked()
    assert [len(part) for part in seeds] == [3, 3, 3, 3]
    assert not set(seeds[0]) & set(seeds[2])
    assert asked() == seeds


def test_the_average_of_the_weights_follows_them_and_is_evaluated():
    loop = make(optim=Optim(lr=0.1, ema=0.5))
    start = loop.policy.table.detach().clone()
    loop.step()
    live = loop.policy.table.detach().clone()
    with loop.averaged():
        # the first decay is 1/10
        torch.testing.assert_close(loop.policy.table.detach(), 0.1 * start + 0.9 * live)
    assert torch.equal(loop.policy.table.detach(), live)
    other = make(optim=Optim(lr=0.1, ema=0.5))
    other.load_state(loop.state())
    assert torch.equal(other.average.weight_0, loop.average.weight_0)


def test_an_exact_divergence_is_asked_for_only_where_it_is_used():
    policy = BanditPolicy()
    make(policy)
    assert not getattr(policy, "exact_kl", False)
    make(policy, objective=functools.partial(policy_gradient, kl_estimator="exact"))
    assert not getattr(policy, "exact_kl", False)
    policy.keep_reference()
    loop = make(policy, objective=functools.partial(policy_gradient, beta=0.1, kl_estimator="exact"))
    assert policy.exact_kl
    assert not loop.needs_reference
    with pytest.raises(BindingError, match="needs the field kl, which is not there"):
        loop.step()


def test_dynamic_sampling_keeps_mixed_groups_only():
    policy = BanditPolicy()
    with torch.no_grad():
        policy.table[:3] = torch.tensor([-30.0, 30.0, -30.0, -30.0], dtype=torch.float64)  # always the same arm
    loop = make(policy, sampler=dynamic(max_draws=20), prompts_per_step=2)
    for _ in range(3):
        result = loop.step()
        assert min(result.rollout.indices) >= 3
        assert result.metrics["constant_groups"] == 0.0
        assert len(result.rollout) == 2


def test_dynamic_sampling_says_when_it_finds_too_few():
    policy = BanditPolicy()
    with torch.no_grad():
        policy.table[:] = torch.tensor([-30.0, 30.0, -30.0, -30.0], dtype=torch.float64)
    with pytest.raises(DataError, match=r"only 0 of 6 groups.*after 3 draws.*max_draws"):
        make(policy, sampler=dynamic(max_draws=3)).step()


def test_a_stage_without_its_field_is_found_before_the_first_step():
    with pytest.raises(BindingError, match="needs the field 'values'"):
        make(signal=Signal(rewards={"best": best_arm}, advantage=gae))


def test_a_count_that_depends_on_the_policy_is_refused():
    def crooked(logp, mask):
        return Loss(-logp.sum(), logp.exp().sum().detach(), {})

    with pytest.raises(RecipeError, match="A count may depend on masks and rewards"):
        make(objective=crooked, passes=2).step() and make(objective=crooked, passes=2).step()


def test_a_loss_that_is_not_finite_stops_and_changes_nothing():
    def poisoned(logp, mask):
        return Loss((logp * torch.nan).sum(), mask.sum(), {})

    policy = BanditPolicy()
    before = policy.table.detach().clone()
    with pytest.raises(NumericsError, match="step 1: loss nan"):
        make(policy, objective=poisoned).step()
    assert torch.equal(policy.table, before)


def test_sizes_that_do_not_divide_are_an_error():
    with pytest.raises(RecipeError, match="multiple of mini_batches x processes = 4 x 1"):
        make(mini_batches=4)


def test_the_ledger_adds_up_to_what_was_optimised():
    def short(samples):
        return [[-float(len(s)) for s in group] for group in samples]

    signal = Signal(rewards={"best": best_arm, "short": short}, advantage=grpo)
    result = make(signal=signal).step()
    ledger = result.attribution
    torch.testing.assert_close(ledger.contributions.sum(-1) + ledger.remainder, result.rollout.advantages)
    assert ledger.remainder.abs().max() < 1e-6  # a z-score is a straight line of the reward
    assert (ledger.contributions.abs().sum((0, 1)) > 0).all()


def test_state_goes_on_bit_for_bit():
    settings = {"optim": Optim(lr=0.1, schedule="cosine"), "passes": 2, "prompts_per_step": 4}
    straight = make(**settings)
    for _ in range(5):
        straight.step()

    first = make(**settings)
    for _ in range(2):
        first.step()
    state, weights = first.state(), {k: v.clone() for k, v in first.policy.state_dict().items()}
    second = make(**settings)
    second.policy.load_state_dict(weights)
    second.load_state(state)
    for _ in range(3):
        second.step()
    assert torch.equal(second.policy.table, straight.policy.table)
