"""Streams of components against single estimates, and their mixture against equation 3 of constrained RLHF."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.advantages import gae, gae_by_component
from guerdon.errors import ScoreError, ShapeError
from guerdon.ledger import attribute
from guerdon.rollout import Rollout
from guerdon.signal import Signal
from guerdon.weighting import lagrangian
from guerdon.weighting.lagrangian import mix_advantages

NAN = math.nan
NAMES = ("intent", "kl", "meteor")
MASK = torch.arange(5) < torch.tensor([[5, 1, 3], [2, 4, 2]]).unsqueeze(-1)


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fields():
    kl = normal(2, 3, 5, seed=2).where(MASK, 0.0)
    scores = normal(2, 3, 3, seed=0)
    scores[..., 1] = kl.sum(-1)
    steps = torch.zeros(2, 3, 5, 3, dtype=torch.float64)
    steps[..., 1] = kl
    return {
        "rewards": scores.sum(-1),
        "scores": scores,
        "weights": normal(3, seed=3),
        "values": normal(2, 3, 5, 3, seed=1),
        "mask": MASK,
        "step_scores": steps,
    }


@pytest.mark.parametrize("mode", ["mu", "xi"])
def test_the_mixture_is_equation_3_over_all_live_steps(fields, mode):
    stage = lagrangian(thresholds={"meteor": 0.2, "intent": 0.5}, mode=mode, start=-0.4)
    weights = stage(fields["scores"], NAMES).weights
    found = gae_by_component(**fields | {"weights": weights})
    streams = []
    for k, name in enumerate(NAMES):
        rewards = fields["step_scores"][..., k] if name == "kl" else fields["scores"][..., k]
        streams.append(gae(rewards, fields["values"][..., k], MASK, gamma=0.99, lam=0.95, whiten=False))
        assert torch.equal(found.returns[..., k], streams[k].returns)
    intent, kl, meteor = (stream.advantages[MASK] for stream in streams)
    own = stage.multipliers.weights
    expected = mix_advantages(torch.stack([meteor, intent], -1), kl, own, mode=mode)
    torch.testing.assert_close(found.advantages[MASK], expected)
    assert (found.advantages[~MASK] == 0).all()
    # by hand: K - sum of weights for the divergence
    whitened = [(a - a.mean()) / (a.std() + 1e-8) for a in (meteor, intent, kl)]
    by_hand = own[0] * whitened[0] + own[1] * whitened[1] + (2 - own.sum()) * whitened[2]
    torch.testing.assert_close(expected, by_hand)


def test_scale_and_shift_of_a_stream_are_nothing_to_the_mixture(fields):
    plain = gae_by_component(**fields, lam=1.0, gamma=1.0).advantages
    factor = torch.tensor([7.0, 1.0, 0.5], dtype=torch.float64)
    more = {name: fields[name] * factor for name in ("scores", "values", "step_scores")}
    torch.testing.assert_close(gae_by_component(**fields | more, lam=1.0, gamma=1.0).advantages, plain)
    # with lam 1 a constant in every score of a stream shifts its advantages, of all steps alike
    shifted = {"scores": fields["scores"] + torch.tensor([3.0, 0.0, -2.0], dtype=torch.float64)}
    torch.testing.assert_close(gae_by_component(**fields | shifted, lam=1.0, gamma=1.0).advantages, plain)


def test_what_is_not_paid_on_the_way_is_paid_at_the_end(fields):
    late = fields["scores"] - torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)  # what a shaping took away
    found = gae_by_component(**fields | {"scores": late}).returns[..., 1]
    last = torch.zeros(2, 3, 5, dtype=torch.float64)
    last.scatter_(-1, MASK.sum(-1, keepdim=True) - 1, 1.0)
    stepwise = gae(fields["step_scores"][..., 1] - last, fields["values"][..., 1], MASK, gamma=0.99)
    torch.testing.assert_close(found, stepwise.returns)


def test_contributions_are_what_the_ledger_keeps(fields):
    found = gae_by_component(**fields)
    torch.testing.assert_close(found.contributions.sum(-1), found.advantages.sum(-1))
    alone = gae_by_component(**fields | {"weights": fields["weights"] * torch.tensor([0.0, 1.0, 0.0])})
    torch.testing.assert_close(found.contributions[..., 1], alone.advantages.sum(-1))
    rollout = Rollout(["p", "q"], [["a"] * 3] * 2, MASK, normal(2, 3, 5, seed=4), values=fields["values"])
    rollout = rollout.update({"scores": fields["scores"], "score_names": NAMES, "step_scores": fields["step_scores"]})
    signal = Signal(rewards=dict.fromkeys(NAMES, lambda samples: None), advantage=gae_by_component)
    assert signal.value_heads == 3
    assigned = signal.assign(rollout).validate()
    split = attribute(assigned)
    plain = gae_by_component(**fields | {"weights": torch.ones(3, dtype=torch.float64)})
    torch.testing.assert_close(split.contributions, plain.contributions)
    torch.testing.assert_close(split.remainder, torch.zeros(2, 3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert Signal(rewards=dict.fromkeys(NAMES, lambda samples: None), advantage=gae).value_heads == 1


def test_a_component_without_a_score_adds_nothing_and_a_dropped_sample_has_no_advantage(fields):
    fields["scores"][0, 0, 2] = NAN
    fields["rewards"][1, 1] = NAN
    found = gae_by_component(**fields)
    assert (found.contributions[0, 0, 2], found.contributions[0, 0, 0] != 0) == (0, True)
    assert torch.equal(found.returns[0, 0, :, 2], fields["values"][0, 0, :, 2])
    assert (found.advantages[1, 1] == 0).all()
    assert torch.equal(found.returns[1, 1][MASK[1, 1]], fields["values"][1, 1][MASK[1, 1]])


def test_one_component_is_the_plain_estimate(fields):
    one = {"scores": fields["scores"][..., :1], "weights": torch.ones(1, dtype=torch.float64), "step_scores": None}
    single = gae_by_component(**fields | one | {"values": fields["values"][..., 0]})
    expected = gae(fields["scores"][..., 0], fields["values"][..., 0], MASK, gamma=0.99)
    assert torch.equal(single.advantages, expected.advantages)
    assert torch.equal(single.returns, expected.returns)
    raw = gae_by_component(**fields | one | {"values": fields["values"][..., :1]}, normalise=False)
    plain = gae(fields["scores"][..., 0], fields["values"][..., 0], MASK, gamma=0.99, whiten=False)
    assert torch.equal(raw.advantages, plain.advantages)
    assert raw.returns.shape == (2, 3, 5, 1)


def test_errors(fields, friendly_errors):
    with pytest.raises(
        ShapeError, match=r"gae_by_component: values must be \[P, G, T, K\] with K = 3; got \[2, 3, 5, 1\]"
    ):
        gae_by_component(**fields | {"values": fields["values"][..., 0]})
    with pytest.raises(ShapeError, match=r"gae_by_component: weights must be \[K\] with K = 3; got \[2\]"):
        gae_by_component(**fields | {"weights": torch.ones(2)})
    fields["scores"][0, 0, 0] = math.inf
    with pytest.raises(ScoreError, match="is infinite"):
        gae_by_component(**fields)
