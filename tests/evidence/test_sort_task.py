"""The shared job: its base is trained once, and a run is what its settings say."""

from __future__ import annotations

import doctest

import pytest
import torch

from guerdon.advantages import gae, grpo
from guerdon.evidence import sort_task
from guerdon.evidence.cache import cache_folder
from guerdon.evidence.sort_task import accuracy, base_policy, sort_run
from guerdon.objectives import dapo, policy_gradient
from guerdon.rewards import exact_answer
from guerdon.sampling.dynamic import Dynamic
from guerdon.signal import Signal
from guerdon.training.supervised import Supervised

TINY = {"warm_steps": 2, "prompts": 2, "group_size": 2, "eval_size": 4}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUERDON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def trained(monkeypatch) -> list[int]:
    """Seeds of the bases that are trained, not read."""
    seeds: list[int] = []
    run = Supervised.run

    def spy(self, steps, on_step=None):
        seeds.append(self.seed)
        run(self, steps, on_step)

    monkeypatch.setattr(Supervised, "run", spy)
    return seeds


def weights(policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def signal(**options) -> Signal:
    return Signal(rewards={"correct": exact_answer}, **{"advantage": grpo, **options})


def test_the_example():
    assert doctest.testmod(sort_task).failed == 0


def test_a_base_is_trained_once(trained):
    first = base_policy(3, steps=2)
    assert torch.equal(weights(first), weights(base_policy(3, steps=2)))
    assert trained == [3]
    assert not torch.equal(weights(first), weights(base_policy(4, steps=2)))
    assert not torch.equal(weights(first), weights(base_policy(3, steps=1)))
    assert trained == [3, 4, 3]
    assert not torch.equal(weights(first), weights(base_policy(3, steps=0)))
    assert trained == [3, 4, 3]


def test_a_damaged_base_is_trained_again(trained):
    first = base_policy(5, steps=2)
    path = max((cache_folder() / "bases").glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        again = base_policy(5, steps=2)
    assert torch.equal(weights(first), weights(again))
    path.with_suffix(".sha256").unlink()
    base_policy(5, steps=2)
    assert trained == [5, 5, 5]


def test_accuracy_is_the_share_of_right_answers(monkeypatch):
    policy = base_policy(3, steps=2)
    right = {row["prompt"]: row["answer"] for row in sort_task.sort.held_out_rows(8)}
    calls = []

    def sample(prompts, group_size, seeds, *, greedy=False, module=None):
        calls.append((greedy, group_size))
        rollout = real(prompts, group_size, seeds, greedy=greedy)
        # every second prompt is answered, when greedy; else every second sample
        rollout.samples = [
            [right[p] if (i if greedy else g) % 2 else "" for g in range(group_size)] for i, p in enumerate(prompts)
        ]
        return rollout

    real = policy.sample
    monkeypatch.setattr(policy, "sample", sample)
    assert accuracy(policy, size=8, samples=4) == {"greedy": 0.5, "sampled": 0.5}
    assert calls == [(True, 1), (False, 4)]


def test_a_run_is_repeated_exactly():
    first, again = (sort_run(0, signal=signal(), objective=dapo, steps=2, **TINY) for _ in range(2))
    for found in (first, again):
        found["figures"].pop("seconds")
    assert repr(first) == repr(again)
    other = sort_run(0, signal=signal(), objective=dapo, steps=2, **{**TINY, "group_size": 3})
    assert (first["figures"]["rollouts"], other["figures"]["rollouts"]) == (8.0, 12.0)


def test_where_it_is_evaluated():
    def steps(**options):
        found = sort_run(0, signal=signal(), objective=dapo, steps=5, **options, **TINY)
        assert [step for step, _ in found["curves"]["greedy"]] == [step for step, _ in found["curves"]["sampled"]]
        return [step for step, _ in found["curves"]["sampled"]]

    assert steps() == [0.0, 5.0]
    assert steps(eval_every=2, eval_at=(1,)) == [0.0, 1.0, 2.0, 4.0, 5.0]


def test_what_a_step_tells_becomes_a_curve_and_a_figure():
    seen = []

    def on_step(result):
        seen.append(result.step)
        return {"double": 2.0 * result.step}

    found = sort_run(0, signal=signal(), objective=dapo, steps=12, on_step=on_step, **TINY)
    assert seen == list(range(1, 13))
    assert found["figures"]["double"] == 13.0
    assert found["curves"]["double"] == [(5.5, 11.0), (11.5, 23.0)]
    figures = found["figures"]
    assert figures["mixed_groups"] == pytest.approx(1 - figures["constant_groups"])
    assert figures["sampled_gain"] == figures["sampled_after"] - figures["sampled_before"]


def test_settings_reach_the_loop():
    def on_step(result):
        return {"lr": result.metrics["lr"], "size": float(result.rollout.mask.shape[0])}

    found = sort_run(
        0, signal=signal(), objective=dapo, steps=1, lr=1e-3, optim={"warmup_steps": 4}, on_step=on_step, **TINY
    )
    assert (found["figures"]["lr"], found["figures"]["size"]) == (pytest.approx(2.5e-4), 2.0)
    several = sort_run(0, signal=signal(), objective=dapo, steps=1, passes=2, mini_batches=2, on_step=on_step, **TINY)
    assert several["figures"]["lr"] == 3e-4


def test_a_sampler_and_a_reward_of_ones_own():
    def length(samples):
        return [[float(len(sample)) for sample in group] for group in samples]

    class Twice(Dynamic):
        """Refuses the first rollout of each step."""

        def draw(self, count):
            self.drawn = getattr(self, "drawn", 0) + 1
            return super().draw(count)

        def keep(self, scores, score_names=()):
            return super().keep(scores, score_names) & (self.drawn % 2 == 0)

    own = Signal(rewards={"length": length}, advantage=grpo)
    found = sort_run(0, signal=own, objective=dapo, sampler=Twice(on_shortage="train"), steps=3, **TINY)
    assert found["figures"]["rollouts"] == 2 * 3 * 4
    assert found["figures"]["mixed_groups"] == 1.0
    assert found["figures"]["reward"] > 1.0 >= found["figures"]["sampled_after"]


def test_a_reference_and_a_critic_are_there_where_they_are_asked_for():
    def near_reference(logp, logp_old, advantages, mask, logp_ref=None, *, beta=0.1):
        assert logp_ref is not None
        return policy_gradient(logp, logp_old, advantages, mask, logp_ref, beta=beta)

    assert sort_run(0, signal=signal(), objective=near_reference, steps=1, **TINY)["figures"]["rollouts"] == 4.0
    assert sort_run(0, signal=signal(advantage=gae), objective=dapo, steps=1, **TINY)["figures"]["rollouts"] == 4.0
