"""Rewards as labels: losses and gradients by hand, bounds, invariances, labels from scores, edge cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guerdon.errors import NumericsError, RecipeError, ScoreError, ShapeError
from guerdon.objectives import real
from guerdon.objectives.real import relative_scores
from guerdon.rollout import Rollout
from guerdon.signal import Signal

NAN = math.nan
MASK = torch.arange(4) < torch.tensor([[4, 1, 2, 3], [2, 4, 3, 1]]).unsqueeze(-1)  # [2, 4, 4]
REWARDS = torch.tensor([[1.0, 0, 0, 0], [0.0, 1, 1, 0]], dtype=torch.float64)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


LOGP_OLD = -random(2, 4, 4, seed=1).abs()
LOGP = LOGP_OLD + random(2, 4, 4, seed=2, scale=0.3)


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(logp: Tensor, rewards: Tensor = REWARDS, mask: Tensor = MASK, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss / count, and its gradient with respect to logp."""
    variable = logp.clone().requires_grad_()
    loss = real(variable, LOGP_OLD[: len(logp), : logp.shape[1]], rewards, mask, **options)
    value = loss.total / loss.count.clamp(min=1)
    (grad,) = torch.autograd.grad(value, variable)
    return value.detach(), grad


def pull(scores: list[float], labels: list[float], **options: Any) -> tuple[float, list[float]]:
    """Loss of one group of samples of one step, and its derivatives with respect to their scores."""
    logp = double(scores).view(1, -1, 1).requires_grad_()
    rewards = double(labels).unsqueeze(0)
    loss = real(logp, torch.zeros_like(logp), rewards, torch.ones_like(logp).bool(), **options)
    loss.total.backward()
    assert logp.grad is not None
    return loss.total.item(), logp.grad.flatten().tolist()


def log1p_sum(values: list[float]) -> float:
    return math.log1p(sum(map(math.exp, values)))


class TestByHand:
    def test_scores_are_means_over_own_steps(self):
        found = relative_scores(LOGP, LOGP_OLD, MASK)
        gap = LOGP - LOGP_OLD
        torch.testing.assert_close(found[0, 0], gap[0, 0].mean())
        torch.testing.assert_close(found[0, 1], gap[0, 1, 0])
        torch.testing.assert_close(found[1, 2], gap[1, 2, :3].mean())

    def test_the_loss_of_a_group(self):
        s, tau = [0.3, -0.2, 0.1, 0.4, -0.5], 0.5
        value, grad = pull(s, [1, 1, 0, 0, 0], tau=tau)
        assert value == pytest.approx(log1p_sum([-x / tau for x in s[:2]]) + log1p_sum([x / tau for x in s[2:]]))
        right = [math.exp(-x / tau) for x in s[:2]]
        wrong = [math.exp(x / tau) for x in s[2:]]
        expected = [-e / (1 + sum(right)) / tau for e in right] + [e / (1 + sum(wrong)) / tau for e in wrong]
        assert grad == pytest.approx(expected)

    def test_bce(self):
        s, tau = [0.3, -0.2, 0.1], 0.5
        value, grad = pull(s, [1, 0, 0], tau=tau, variant="bce")
        assert value == pytest.approx(sum(math.log1p(math.exp(x / tau)) for x in (-0.3, -0.2, 0.1)))
        assert grad == pytest.approx(
            [(1 / (1 + math.exp(-x / tau)) - y) / tau for x, y in zip(s, [1, 0, 0], strict=True)]
        )

    def test_product(self):
        s, tau = [0.3, -0.2, 0.1, 0.4], 0.5
        value, _ = pull(s, [1, 1, 0, 0], tau=tau, variant="product")
        assert value == pytest.approx(log1p_sum([(low - up) / tau for low in s[2:] for up in s[:2]]))

    def test_counts(self):
        rewards = double([[1, 0, 0, 0], [1, 1, 1, 1]])
        for variant, count in (("real", 2), ("product", 2), ("bce", 4)):
            loss = real(LOGP, LOGP_OLD, rewards, MASK, variant=variant)
            assert loss.count == count
            assert loss.count == real(LOGP_OLD, LOGP_OLD, rewards, MASK, variant=variant).count

    def test_the_default_temperature(self):
        assert torch.equal(run(LOGP)[0], run(LOGP, tau=0.5)[0])
        assert not torch.equal(run(LOGP)[0], run(LOGP, tau=1.0)[0])


class TestOnPolicy:
    @pytest.mark.parametrize("tau", [0.5, 0.03, 2.0])
    def test_closed_form(self, tau):
        value, grad = run(LOGP_OLD, tau=tau)
        # groups of 1 right and 3 wrong, and of 2 and 2
        torch.testing.assert_close(value, double((math.log(2) + math.log(4) + math.log(3) + math.log(3)) / 2))
        side = double([[-1 / 2, 1 / 4, 1 / 4, 1 / 4], [1 / 3, -1 / 3, -1 / 3, 1 / 3]])
        expected = side.unsqueeze(-1) * MASK / (tau * MASK.sum(-1, keepdim=True)) / 2
        torch.testing.assert_close(grad, expected)

    @pytest.mark.parametrize(("right", "wrong"), [(1, 7), (4, 4), (7, 1)])
    def test_the_two_sides_pull_nearly_alike(self, right, wrong):
        _, grad = pull([0.0] * 8, [1.0] * right + [0.0] * wrong, tau=0.5)
        assert sum(grad[:right]) == pytest.approx(-2 * right / (1 + right))
        assert sum(grad[right:]) == pytest.approx(2 * wrong / (1 + wrong))


@given(
    scores=st.lists(st.floats(-5, 5), min_size=2, max_size=8),
    tau=st.sampled_from([0.03, 0.5, 3.0]),
    flags=st.integers(1, 2**8 - 2),
)
@settings(max_examples=60, deadline=None)
def test_weights_are_bounded_and_have_the_right_sign(scores, tau, flags):
    labels = [float(flags >> g & 1) for g in range(len(scores))]
    _, grad = pull(scores, labels, tau=tau)
    if len(set(labels)) == 1:
        assert grad == [0.0] * len(scores)
        return
    right = [g for g, y in zip(grad, labels, strict=True) if y]
    wrong = [g for g, y in zip(grad, labels, strict=True) if not y]
    assert max(right) <= 0
    assert min(wrong) >= 0
    assert all(abs(g) <= 1 / tau for g in grad)
    assert -sum(right) <= (1 + 1e-12) / tau
    assert sum(wrong) <= (1 + 1e-12) / tau


class TestWeights:
    LABELS = (1.0, 1.0, 0.0, 0.0, 0.0)

    @pytest.mark.parametrize("tau", [0.5, 0.1])
    def test_the_pull_of_a_side_is_below_one_over_tau(self, tau):
        for scores in ([0.5, -0.9, 0.8, 0.3, 0.1], [-0.9, -0.9, 0.9, 0.9, 0.9]):
            _, grad = pull(scores, list(self.LABELS), tau=tau)
            assert -sum(grad[:2]) < 1 / tau
            assert sum(grad[2:]) < 1 / tau
            assert all(0 < abs(g) < 1 / tau for g in grad)

    def test_many_samples_pull_no_harder(self):
        _, grad = pull([3.0] * 500 + [-3.0] * 500, [0.0] * 500 + [1.0] * 500, tau=0.5)
        assert sum(map(abs, grad)) < 4

    def test_a_right_sample_that_has_fallen_weighs_more(self):
        weights = [-pull([s, 0.1, 0.2, -0.1, 0.0], list(self.LABELS))[1][0] for s in (1.0, 0.5, 0.0, -0.5, -1.0)]
        assert weights == sorted(weights)
        assert len(set(weights)) == 5

    def test_a_wrong_sample_that_has_risen_weighs_more(self):
        weights = [pull([0.1, 0.2, s, -0.1, 0.0], list(self.LABELS))[1][2] for s in (-1.0, -0.5, 0.0, 0.5, 1.0)]
        assert weights == sorted(weights)
        assert len(set(weights)) == 5

    @pytest.mark.parametrize("tau", [0.5, 0.1, 2.0])
    def test_two_samples_of_a_side_weigh_by_their_scores(self, tau):
        scores = [0.3, -0.4, 0.2, 0.5, -0.1]
        _, grad = pull(scores, list(self.LABELS), tau=tau)
        assert grad[3] / grad[2] == pytest.approx(math.exp((0.5 - 0.2) / tau))
        assert grad[1] / grad[0] == pytest.approx(math.exp((0.3 + 0.4) / tau))

    def test_a_high_temperature_forgets_the_scores(self):
        _, grad = pull([0.3, -0.4, 0.2, 0.5, -0.1], list(self.LABELS), tau=1e6)
        assert [1e6 * g for g in grad] == pytest.approx([-1 / 3, -1 / 3, 1 / 4, 1 / 4, 1 / 4], rel=1e-5)

    def test_two_samples_are_twice_bce(self):
        scores, labels = [0.3, -0.4], [1.0, 0.0]
        value, grad = pull(scores, labels)
        expected = math.log1p(math.exp(-0.3 / 0.5)) + math.log1p(math.exp(-0.4 / 0.5))
        assert value == pytest.approx(expected)
        bce = real(
            double(scores).view(1, 2, 1),
            torch.zeros(1, 2, 1).double(),
            double([labels]),
            torch.ones(1, 2, 1).bool(),
            variant="bce",
        )
        assert value == pytest.approx(2 * (bce.total / bce.count).item())
        assert grad == pytest.approx(pull(scores, labels, variant="bce")[1])


class TestInvariances:
    @pytest.mark.parametrize("variant", ["real", "bce", "product"])
    def test_the_order_of_a_group(self, variant):
        order = [2, 0, 3, 1]
        value, grad = run(LOGP, variant=variant)
        variable = LOGP[:, order].clone().requires_grad_()
        loss = real(variable, LOGP_OLD[:, order], REWARDS[:, order], MASK[:, order], variant=variant)
        (moved,) = torch.autograd.grad(loss.total / loss.count, variable)
        torch.testing.assert_close(value, (loss.total / loss.count).detach())
        torch.testing.assert_close(grad[:, order], moved)

    @pytest.mark.parametrize(("variant", "factor"), [("real", 2 / 3), ("product", 2 / 3), ("bce", 1.0)])
    @pytest.mark.parametrize("label", [0.0, 1.0])
    def test_a_group_of_one_kind_only_divides(self, variant, factor, label):
        value, _ = run(LOGP, variant=variant)
        more = [torch.cat([t, t[:1]]) for t in (LOGP, LOGP_OLD, MASK)]
        rewards = torch.cat([REWARDS, torch.full((1, 4), label, dtype=torch.float64)])
        variable = more[0].clone().requires_grad_()
        loss = real(variable, more[1], rewards, more[2], variant=variant)
        torch.testing.assert_close((loss.total / loss.count).detach(), factor * value)
        loss.total.backward()
        assert variable.grad is not None
        assert (variable.grad[2] == 0).all()

    @pytest.mark.parametrize("variant", ["real", "bce", "product"])
    def test_a_sequence_said_twice(self, variant):
        value, grad = run(LOGP, variant=variant)
        twice = [torch.cat([t, t], -1) for t in (LOGP, LOGP_OLD, MASK)]
        variable = twice[0].clone().requires_grad_()
        loss = real(variable, twice[1], REWARDS, twice[2], variant=variant)
        (doubled,) = torch.autograd.grad(loss.total / loss.count, variable)
        torch.testing.assert_close((loss.total / loss.count).detach(), value)
        torch.testing.assert_close(doubled[..., :4] + doubled[..., 4:], grad)

    def test_only_the_product_ignores_a_common_shift(self):
        shifted = {v: run(LOGP + 0.7, variant=v)[0] - run(LOGP, variant=v)[0] for v in ("real", "bce", "product")}
        assert abs(shifted["product"]) < 1e-12
        assert abs(shifted["real"]) > 0.01
        assert abs(shifted["bce"]) > 0.01


class TestLabels:
    SCORES = double([[0.1, 0.9, 0.5, 0.7], [0.5, 0.5, 0.5, 0.5]])

    def same_as(self, labels: list, **options: Any) -> None:
        value, grad = run(LOGP, self.SCORES, **options)
        expected, expected_grad = run(LOGP, double(labels))
        torch.testing.assert_close(value, expected)
        assert torch.equal(grad, expected_grad)

    def test_threshold(self):
        self.same_as([[0, 1, 0, 1], [0, 0, 0, 0]], threshold=0.6)

    def test_at_the_threshold_a_sample_is_left_out(self):
        self.same_as([[0, 1, NAN, 1], [NAN] * 4], threshold=0.5)

    def test_between_two_thresholds_samples_are_left_out(self):
        self.same_as([[0, 1, NAN, 1], [NAN] * 4], threshold=(0.1, 0.7))
        self.same_as([[0, 1, NAN, NAN], [NAN] * 4], threshold=(0.4, 0.8))

    def test_quantile(self):
        # of 0.1 0.5 0.7 0.9: a quarter 0.4, three quarters 0.75; the second group does not vary
        self.same_as([[0, 1, NAN, NAN], [NAN] * 4], quantile=0.25)
        self.same_as([[0, 1, 0, 1], [NAN] * 4], quantile=0.5)

    def test_where_the_quantiles_meet_samples_are_left_out(self):
        value, _ = run(LOGP, double([[0.5, 0.9, 0.5, 0.1], [0.0, 0.0, 0.0, 1.0]]), quantile=0.4)
        torch.testing.assert_close(value, run(LOGP, double([[NAN, 1, NAN, 0], [NAN, NAN, NAN, 1]]))[0])

    def test_a_quantile_of_labels_is_the_labels(self):
        for q in (0.1, 0.25):
            assert torch.equal(run(LOGP, quantile=q)[0], run(LOGP)[0])

    @pytest.mark.parametrize("quantile", [0.34, 0.5])
    def test_the_quantile_is_of_what_was_scored(self, quantile):
        rewards = double([[NAN, 0.9, 0.5, 0.7], [0.5, 0.5, 0.5, 0.5]])
        value, _ = run(LOGP, rewards, quantile=quantile)
        torch.testing.assert_close(value, run(LOGP, double([[NAN, 1, 0, NAN], [NAN] * 4]))[0])

    @pytest.mark.parametrize("value", [0.5, -1.0, 2.0])
    def test_scores_without_a_labeller_are_refused(self, value):
        rewards = REWARDS.clone()
        rewards[1, 2] = value
        with pytest.raises(ScoreError, match=rf"rewards\[1, 2\] = {value:g}.*threshold .*quantile"):
            real(LOGP, LOGP_OLD, rewards, MASK)

    def test_tournament_rewards_are_refused_on_the_road(self):
        def ranks(samples):
            return [[g / (len(group) - 1) for g in range(len(group))] for group in samples]

        rollout = Rollout(["p"], [["a", "b", "c"]], torch.ones(1, 3, 2).bool(), torch.zeros(1, 3, 2))
        found = Signal(rewards=[ranks])(rollout)
        assert found.advantages is None
        assert found.rewards is not None
        with pytest.raises(
            ScoreError, match=r"rewards must be 0 or 1, the labels wrong and right; got rewards\[0, 1\]"
        ):
            real(found.logp_old, found.logp_old, found.rewards, found.mask)
        assert real(found.logp_old, found.logp_old, found.rewards, found.mask, threshold=0.5).total > 0


class TestEdges:
    @pytest.mark.parametrize("variant", ["real", "bce", "product"])
    @pytest.mark.parametrize("rewards", [torch.zeros(2, 4), torch.ones(2, 4), torch.full((2, 4), NAN)])
    def test_no_live_group(self, variant, rewards):
        value, grad = run(LOGP, rewards.double(), variant=variant)
        assert value == 0
        assert (grad == 0).all()

    @pytest.mark.parametrize("variant", ["real", "bce", "product"])
    def test_an_unscored_sample_is_left_out(self, variant):
        rewards = REWARDS.clone()
        rewards[0, 1] = rewards[1, 0] = NAN
        _, grad = run(LOGP, rewards, variant=variant)
        assert (grad[0, 1] == 0).all()
        assert (grad[1, 0] == 0).all()
        one = run(LOGP[:1, [0, 2, 3]], REWARDS[:1, [0, 2, 3]], MASK[:1, [0, 2, 3]], variant=variant)[1]
        assert one.shape == (1, 3, 4)

    def test_what_is_left_is_the_group(self):
        rewards = double([[1, 0, NAN, 0]])
        keep = [0, 1, 3]
        variable = LOGP[:1].clone().requires_grad_()
        whole = real(variable, LOGP_OLD[:1], rewards, MASK[:1])
        parts = real(LOGP[:1, keep], LOGP_OLD[:1, keep], rewards[:, keep], MASK[:1, keep])
        torch.testing.assert_close(whole.total.detach(), parts.total)

    @pytest.mark.parametrize("variant", ["real", "bce", "product"])
    def test_a_sample_without_steps_is_left_out(self, variant):
        mask = MASK.clone()
        mask[0, 1] = False
        value, grad = run(LOGP, mask=mask, variant=variant)
        rewards = REWARDS.clone()
        rewards[0, 1] = NAN
        expected, _ = run(LOGP, rewards, variant=variant)
        torch.testing.assert_close(value, expected)
        assert (grad[0, 1] == 0).all()

    def test_a_group_whose_only_right_sample_has_no_steps_is_not_live(self):
        mask = MASK.clone()
        mask[0, 0] = False
        loss = real(LOGP, LOGP_OLD, REWARDS, mask)
        assert loss.metrics["live_groups"] == 0.5
        assert loss.count == 2
        assert real(LOGP, LOGP_OLD, REWARDS, mask, variant="bce").count == 4

    @pytest.mark.parametrize("variant", ["real", "bce", "product"])
    def test_masked_steps_are_nothing(self, variant):
        value, grad = run(LOGP, variant=variant)
        poisoned, poisoned_grad = run(LOGP.masked_fill(~MASK, NAN), variant=variant)
        assert torch.equal(value, poisoned)
        assert torch.equal(grad, poisoned_grad)
        assert (grad[~MASK] == 0).all()

    def test_no_gradient_to_the_old_policy(self):
        old = LOGP_OLD.clone().requires_grad_()
        assert not real(LOGP, old, REWARDS, MASK).total.requires_grad

    @pytest.mark.parametrize("variant", ["real", "bce", "product"])
    def test_far_from_the_old_policy_nothing_overflows(self, variant):
        # s / tau of -2000 and 2000, where exp is infinite
        value, grad = pull([-1000.0, 1000.0, 0.0], [1.0, 0.0, 0.0], variant=variant)
        assert value == pytest.approx(4000, abs=1)
        assert all(map(math.isfinite, grad))
        assert grad[0] == pytest.approx(-2)

    @pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
    def test_a_log_probability_that_is_not_finite(self, bad):
        for which in ("logp", "logp_old"):
            fields = {"logp": LOGP.clone(), "logp_old": LOGP_OLD.clone()}
            fields[which][0, 0, 1] = bad
            with pytest.raises(NumericsError, match=r"objectives.real: a log-probability of a live step is not finite"):
                real(**fields, rewards=REWARDS, mask=MASK)

    def test_metrics(self):
        rewards = double([[1, 0, NAN, 0], [0, 0, 0, 0]])
        found = real(LOGP, LOGP_OLD, rewards, MASK).metrics
        scores = relative_scores(LOGP, LOGP_OLD, MASK)
        assert found["live_groups"] == 0.5
        assert found["left_out"].item() == 1 / 8
        torch.testing.assert_close(found["score_gap"], scores[0, 0] - (scores[0, 1] + scores[0, 3]) / 2)
        torch.testing.assert_close(found["score_max"], scores.abs().max())


class TestErrors:
    def test_shapes(self, friendly_errors):
        with pytest.raises(
            ShapeError, match=r"objectives.real: rewards must be \[P, G\]; got \[2, 4, 4\]. A value per"
        ):
            real(LOGP, LOGP_OLD, LOGP, MASK)
        with pytest.raises(ShapeError, match=r"rewards must be \[P, G\]; got \[8\]. The samples look flat"):
            real(LOGP, LOGP_OLD, REWARDS.flatten(), MASK)

    def test_options(self, friendly_errors):
        for options, text in (
            ({"tau": 0.0}, "tau must be above 0; got 0"),
            ({"variant": "rael"}, "variant must be real, bce or product; got 'rael'. Did you mean 'real'"),
            ({"threshold": 0.5, "quantile": 0.5}, "two ways to the same labels"),
            ({"threshold": (0.5, 0.5)}, "a pair low < high"),
            ({"quantile": 0.6}, "quantile must be above 0 and at most 0.5"),
        ):
            with pytest.raises(RecipeError, match=text):
                real(LOGP, LOGP_OLD, REWARDS, MASK, **options)
