"""Corrections of a policy gradient for a verifier that errs at known, or estimated, rates.

A verifier that rejects right answers (false negatives, rate f_n) and accepts wrong ones (false positives, rate f_p) is
a binary channel between the true verdict R and the observed one S: E[S | R] = (1 - f_p - f_n) R + f_p.
Reinforcement Learning with Verifiable yet Noisy Rewards under Imperfect Verifiers, 2025, arXiv 2510.00915.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from guerdon.errors import BindingError, RecipeError, ScoreError, check_shapes

Rate = float | Sequence[float] | Tensor


# ---------------------------------------------------------------- the channel and its two corrections


def backward_reward(
    scores: Tensor, false_positive_rate: Rate, false_negative_rate: Rate, *, eps_c: float = 1e-3
) -> Tensor:
    """The reward whose mean over the verifier's errors is the true verdict: (S - f_p) / max(1 - f_p - f_n, eps_c).

    Args:
        scores: [P, ...], 0 or 1; NaN = not scored.
        false_positive_rate: f_p, a number or one per prompt [P].
        false_negative_rate: f_n, likewise.
        eps_c: the least denominator.

    Returns:
        Rewards of the shape of scores.

    Example:
        >>> backward_reward(torch.tensor([[1.0, 0.0]]), 0.1, 0.4)
        tensor([[ 1.8000, -0.2000]])
    """
    low, miss = (_per_prompt(rate, scores) for rate in (false_positive_rate, false_negative_rate))
    return (scores - low) / (1 - low - miss).clamp(min=eps_c)


def forward_weight(scores: Tensor, false_negative_rate: Rate) -> Tensor:
    """S - (1 - f_n): its mean is 0 for right answers and f_p + f_n - 1 for wrong ones, whatever f_p is.

    Args:
        scores: [P, ...], 0 or 1; NaN = not scored.
        false_negative_rate: f_n, a number or one per prompt [P].

    Returns:
        Weights of the shape of scores, in [-1, 1].

    Example:
        >>> forward_weight(torch.tensor([[1.0, 0.0]]), 0.4)
        tensor([[ 0.4000, -0.6000]])
    """
    return scores - (1 - _per_prompt(false_negative_rate, scores))


def leave_one_out(values: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Values minus the mean of the group's other scored samples, or minus 0 if there are none; 0 where not scored."""
    others = (~values.isnan()).sum(-1, keepdim=True) - 1
    rest = values.nansum(-1, keepdim=True) - values.nan_to_num(nan=0.0)
    return (values - rest / others.clamp(min=1)).nan_to_num(nan=0.0)


def flip_probabilities(false_positive_rate: float, false_negative_rate: float) -> list[list[float]]:
    """P(S = column | R = row), rows and columns 0 and 1."""
    return [
        [1 - false_positive_rate, false_positive_rate],
        [false_negative_rate, 1 - false_negative_rate],
    ]


def backward_variance(
    false_positive_rate: float, false_negative_rate: float, *, eps_c: float = 1e-3
) -> tuple[float, float]:
    """Variance that the verifier's errors give the backward reward of a wrong and of a right answer."""
    c = max(1 - false_positive_rate - false_negative_rate, eps_c)
    return tuple(rate * (1 - rate) / c**2 for rate in (false_positive_rate, false_negative_rate))  # pyright: ignore[reportReturnType]


def step_coefficients(
    step_scores: Float[Tensor, "P G J"],
    step_ends: Int[Tensor, "P G J"],
    *,
    length: int,
    correction: Literal["backward", "forward"],
    false_negative_rate: Rate,
    false_positive_rate: Rate = 0.0,
    baseline: float = 0.0,
    scale: float = 1.0,
    eps_c: float = 1e-3,
) -> Float[Tensor, "P G T"]:
    """Advantages per token from noisy scores of reasoning steps.

    A_t is the sum of x_j / s over the steps j that end at t or later, where x_j is the corrected score of step j: the
    backward reward minus the baseline, or the forward weight.

    Args:
        step_scores: [P, G, J], 0 or 1; NaN = no such step.
        step_ends: [P, G, J], position of each step's last token.
        length: T, number of token positions.
        correction: which of the two.
        false_negative_rate: of the step verifier; a number or one per prompt [P].
        false_positive_rate: likewise; not read by `forward`.
        baseline: subtracted from every backward reward.
        scale: s.
        eps_c: as in `backward_reward`.

    Returns:
        Advantages [P, G, T]; masked positions are for the objective to leave out.

    Raises:
        ShapeError: scores and ends have different shapes.
        ScoreError: a score is neither 0 nor 1.

    Example:
        >>> ends = torch.tensor([[[0, 2]]])
        >>> step_coefficients(torch.ones(1, 1, 2), ends, length=3, correction="forward", false_negative_rate=0.25)
        tensor([[[0.5000, 0.2500, 0.2500]]])
    """
    where = "shaping.step_coefficients"
    check_shapes(where, step_scores=(step_scores, "P G J"), step_ends=(step_ends, "P G J"))
    scores = _binary(where, step_scores, None)
    if correction == "forward":
        corrected = forward_weight(scores, false_negative_rate)
    else:
        corrected = backward_reward(scores, false_positive_rate, false_negative_rate, eps_c=eps_c) - baseline
    counts = step_ends.unsqueeze(-1) >= torch.arange(length, device=step_ends.device)
    return (corrected.nan_to_num(nan=0.0).unsqueeze(-1) * counts).sum(2) / scale


class Audit(NamedTuple):
    """How far corrected advantages are from uncorrected ones over live steps.

    Attributes:
        mean: mean of |difference|.
        max: largest |difference|.
        cosine: of the two; NaN if one is 0 everywhere. mean = max = 0 and cosine 1: the correction does nothing.
    """

    mean: float
    max: float
    cosine: float


def correction_audit(corrected: Tensor, uncorrected: Tensor, mask: Bool[Tensor, "P G T"]) -> Audit:
    """Compare corrected with uncorrected advantages, step by step.

    Args:
        corrected: [P, G], or [P, G, T] per step.
        uncorrected: the same without the correction, with the baseline and the scale that go with it.
        mask: [P, G, T], True = a live step.

    Example:
        >>> advantages, mask = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, 1).bool()
        >>> found = correction_audit(2 * advantages, advantages, mask)
        >>> found.mean, found.max, round(found.cosine, 6)
        (1.0, 1.0, 1.0)
    """
    one, other = (
        (a if a.ndim == 3 else a.unsqueeze(-1)).expand(mask.shape)[mask].double() for a in (corrected, uncorrected)
    )
    if not len(one):
        return Audit(0.0, 0.0, float("nan"))
    gap = (one - other).abs()
    return Audit(gap.mean().item(), gap.max().item(), (one @ other / (one.norm() * other.norm())).item())


# ---------------------------------------------------------------- the stages


class _Correction(nn.Module):
    """What both corrections share: rates from options or fields, and a watch over what became of the correction."""

    where: str
    advice: str

    def __init__(
        self,
        false_positive_rate: float | None,
        false_negative_rate: float | None,
        threshold: float | None,
        scale_decay: float,
        scale_floor: float,
    ) -> None:
        super().__init__()
        for name, rate in (("false_positive_rate", false_positive_rate), ("false_negative_rate", false_negative_rate)):
            if rate is not None and not 0 <= rate < 1:
                raise RecipeError(f"{self.where}.{name}: must be at least 0 and below 1; got {rate}.")
        if not 0 <= scale_decay < 1 or not scale_floor > 0:
            raise RecipeError(
                f"{self.where}: scale_decay must be in [0, 1) and scale_floor above 0; got {scale_decay} and "
                f"{scale_floor}."
            )
        self.false_positive_rate, self.false_negative_rate = false_positive_rate, false_negative_rate
        self.threshold = threshold
        self.scale_decay, self.scale_floor = scale_decay, scale_floor
        self.running_scale: Tensor
        self.observed: Tensor
        self.register_buffer("running_scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))
        self._audit: Audit | None = None
        self._warned = False

    def _rate(self, name: str, given: Rate | None, scores: Tensor) -> Tensor:
        option = getattr(self, name)
        if option is not None:
            return _per_prompt(option, scores)
        if given is None:
            raise BindingError(
                f"{self.where}: {name} is neither given as an option nor there as a field. Set the option, add a "
                "column of that name to the data, or estimate it with the reward `appeal`."
            )
        rate = _per_prompt(given, scores)
        if bool(((rate < 0) | (rate >= 1) | rate.isnan()).any()):
            raise RecipeError(
                f"{self.where}: the field {name} must be at least 0 and below 1 for every prompt; got "
                f"{rate.flatten().tolist()!r:.80}."
            )
        return rate

    def _follow_scale(self, coefficients: Tensor) -> None:
        size = coefficients.detach().square().mean().sqrt().to(self.running_scale)
        self.running_scale += (1.0 if self.observed == 0 else 1 - self.scale_decay) * (size - self.running_scale)

    def audit(
        self,
        advantages: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
        uncorrected_advantages: Float[Tensor, "P G"] | Float[Tensor, "P G T"],
        mask: Bool[Tensor, "P G T"],
        scores: Float[Tensor, "P G"],
        false_positive_rate: Any = None,
        false_negative_rate: Any = None,
    ) -> None:
        """Told every step what the same road gives without this stage; warns once if that is the same.

        Args:
            advantages: [P, G] or [P, G, T], as they will be used.
            uncorrected_advantages: the same without this stage.
            mask: [P, G, T], True = a live step.
            scores: [P, G], what the reward said.
            false_positive_rate: [P], if it is a field.
            false_negative_rate: [P], if it is a field.
        """
        self._audit = correction_audit(advantages, uncorrected_advantages, mask)
        if self._warned or not self._audit.cosine > 1 - 1e-6:
            return
        change = self(scores, false_positive_rate, false_negative_rate) - scores
        size = advantages.abs().max().item()
        if change.nan_to_num(nan=0.0).abs().max().item() > 0.01 and self._audit.max <= 2e-3 * size:
            self._warned = True
            warnings.warn(
                f"{self.where}: the advantage stage undoes the correction. With and without it the advantages are the "
                f"same (largest difference {self._audit.max:.1e}). {self.advice}",
                UserWarning,
                stacklevel=2,
            )

    def metrics(self) -> dict[str, float]:
        """The last audit, and what is estimated."""
        found = {} if self._audit is None else {f"audit_{name}": v for name, v in self._audit._asdict().items()}
        return found | {"running_scale": self.running_scale.item()}


class BackwardCorrection(_Correction):
    """Backward correction (PGBC): a reward that is right on average, (S - f_p) / (1 - f_p - f_n), over a scale.

    **Use `advantage: rloo`**, whose baseline (the mean of the group's other samples) keeps the expected update exactly
    that of the true verdict; `dr_grpo` multiplies it by 1 - 1/G. An advantage that divides by a deviation (`grpo`,
    `group_advantages`, `copo`, `running_scale`, a whitening `gae`) undoes the correction, which is a straight line of a
    binary score; the stage then warns. With the same rates for all prompts it changes the size of the step only; with
    rates per prompt it weighs prompts.

    Args:
        false_positive_rate: f_p = P(accepted | wrong); None = the field `false_positive_rate`, one per prompt.
        false_negative_rate: f_n = P(rejected | right); None = the field `false_negative_rate`, a data column or what
            the reward `appeal` estimates.
        eps_c: least value of 1 - f_p - f_n for rates from fields.
        scale: what rewards are divided by; `ema` is a running root mean square of the leave-one-out coefficients.
        scale_decay: of `ema`, per update.
        scale_floor: its least value.
        threshold: scores at or above it count as 1, others as 0; None = scores must be 0 or 1.

    Raises:
        RecipeError: a rate is outside [0, 1), f_p + f_n >= 1, or a scale is not above 0.

    Edge cases:
        NaN (not scored) stays NaN. Rates from fields with f_p + f_n >= 1 are held at 1 - f_p - f_n = eps_c, with a
        warning. `ema` starts at the first step observed and is 1 before.

    Example:
        >>> stage = BackwardCorrection(false_positive_rate=0.1, false_negative_rate=0.4)
        >>> stage(torch.tensor([[1.0, 0.0]]))
        tensor([[ 1.8000, -0.2000]])

    Source:
        Reinforcement Learning with Verifiable yet Noisy Rewards under Imperfect Verifiers, arXiv 2510.00915, appendix
        B; eps_c, the running scale and its constants are our reading.
    """

    where = "shaping.backward_correction"
    advice = "Every advantage that divides by a deviation does so. Use advantage: rloo."

    def __init__(
        self,
        *,
        false_positive_rate: float | None = None,
        false_negative_rate: float | None = None,
        eps_c: float = 1e-3,
        scale: float | Literal["ema"] = 1.0,
        scale_decay: float = 0.99,
        scale_floor: float = 1e-3,
        threshold: float | None = None,
    ) -> None:
        super().__init__(false_positive_rate, false_negative_rate, threshold, scale_decay, scale_floor)
        given = (false_positive_rate or 0.0) + (false_negative_rate or 0.0)
        if given >= 1:
            raise RecipeError(
                f"{self.where}: false_positive_rate + false_negative_rate must be below 1; got {given:g}. A verifier "
                "that is wrong so often says nothing, or the opposite."
            )
        if not eps_c > 0:
            raise RecipeError(f"{self.where}.eps_c: must be above 0; got {eps_c}.")
        self.eps_c = eps_c
        self.scale = _checked_scale(self.where, scale, ("ema",))

    def forward(
        self,
        scores: Float[Tensor, "P G"],
        false_positive_rate: Tensor | Sequence[float] | None = None,
        false_negative_rate: Tensor | Sequence[float] | None = None,
    ) -> Float[Tensor, "P G"]:
        """Correct one component's scores; changes no state.

        Args:
            scores: [P, G], 0 or 1; NaN = not scored.
            false_positive_rate: [P], read if the option is None.
            false_negative_rate: [P], read if the option is None.

        Returns:
            Rewards [P, G], without gradient.

        Raises:
            ShapeError: scores is not [P, G].
            ScoreError: a score is neither 0 nor 1.
            BindingError: a rate is neither an option nor a field.
        """
        scale = self.running_scale.clamp(min=self.scale_floor).to(scores) if self.scale == "ema" else self.scale
        return self._reward(scores, false_positive_rate, false_negative_rate) / scale

    def _reward(self, scores: Tensor, false_positive_rate: Rate | None, false_negative_rate: Rate | None) -> Tensor:
        check_shapes(self.where, scores=(scores, "P G"))
        verdicts = _binary(self.where, scores.detach(), self.threshold)
        low = self._rate("false_positive_rate", false_positive_rate, verdicts)
        miss = self._rate("false_negative_rate", false_negative_rate, verdicts)
        if bool((1 - low - miss < self.eps_c).any()):
            warnings.warn(
                f"{self.where}: the rates of the fields leave 1 - false_positive_rate - false_negative_rate below eps_c "
                f"= {self.eps_c:g}; it is held there, and rewards are up to {1 / self.eps_c:g}.",
                UserWarning,
                stacklevel=3,
            )
        return (verdicts - low) / (1 - low - miss).clamp(min=self.eps_c)

    @torch.no_grad()
    def observe(
        self,
        scores: Float[Tensor, "P G"],
        false_positive_rate: Tensor | Sequence[float] | None = None,
        false_negative_rate: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Take a finished step into the running scale.

        Args:
            scores: [P, G], what the reward said; NaN = not scored.
            false_positive_rate: [P], if it is a field.
            false_negative_rate: [P], if it is a field.
        """
        rewards = self._reward(scores, false_positive_rate, false_negative_rate)
        scored = ~rewards.isnan()
        if scored.any():
            self._follow_scale(leave_one_out(rewards)[scored])
            self.observed += 1


class ForwardCorrection(_Correction):
    """Forward correction (PGFC): weights whose expected update points where the true one does; needs f_n alone.

    w = S - (1 - f_n), minus a baseline that does not look at the current samples, over a scale.

    **Use `advantage: reinforce`**, which leaves the weights as they are. Any advantage that centres within the group or
    the batch turns this into training on the uncorrected scores; the stage then warns. Do not filter groups by their
    scores either (`sampling: dynamic`): a group of rejected samples teaches here.

    With f_n = 0.2, a rejected sample has weight -0.8 and an accepted one 0.2: nearly all updates push down. That is
    unbiased, but at a learning rate made for centred advantages it unlearns; lower the rate, or take the baseline
    `ema`. Without a clip the value of f_n is itself only a baseline: a wrong one costs variance, not direction.

    Args:
        false_negative_rate: f_n = P(rejected | right); None = the field `false_negative_rate`, a data column or what
            the reward `appeal` estimates.
        false_positive_rate: f_p; read with scale `informedness` only. None = the field.
        baseline: `none` is the method; `ema` is a running mean of the steps before, 0 at the first; or a number.
        baseline_rate: of `ema`, per update.
        scale: a number, `recall` = 1 - f_n, `informedness` = 1 - f_p - f_n (the size of the true gradient), or `ema`,
            a running root mean square of the coefficients.
        scale_decay: of `ema`, per update.
        scale_floor: least value of any scale that is not a number.
        threshold: scores at or above it count as 1, others as 0; None = scores must be 0 or 1.

    Raises:
        RecipeError: a rate is outside [0, 1), or another option is out of range.

    Edge cases:
        NaN (not scored) stays NaN. With f_n = 0 accepted samples have weight 0.

    Example:
        >>> ForwardCorrection(false_negative_rate=0.4)(torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.4000, -0.6000]])

    Source:
        Reinforcement Learning with Verifiable yet Noisy Rewards under Imperfect Verifiers, arXiv 2510.00915, appendix
        B; the running baseline's and scale's constants are our reading.
    """

    where = "shaping.forward_correction"
    advice = "Every advantage that centres in the group or the batch does so. Use advantage: reinforce."

    def __init__(
        self,
        *,
        false_negative_rate: float | None = None,
        false_positive_rate: float | None = None,
        baseline: float | Literal["none", "ema"] = "none",
        baseline_rate: float = 0.1,
        scale: float | Literal["recall", "informedness", "ema"] = 1.0,
        scale_decay: float = 0.99,
        scale_floor: float = 1e-3,
        threshold: float | None = None,
    ) -> None:
        super().__init__(false_positive_rate, false_negative_rate, threshold, scale_decay, scale_floor)
        if isinstance(baseline, str) and baseline not in ("none", "ema"):
            raise RecipeError(f"{self.where}.baseline: must be 'none', 'ema' or a number; got {baseline!r}.")
        if not 0 < baseline_rate <= 1:
            raise RecipeError(f"{self.where}.baseline_rate: must be above 0 and at most 1; got {baseline_rate}.")
        self.baseline, self.baseline_rate = baseline, baseline_rate
        self.scale = _checked_scale(self.where, scale, ("recall", "informedness", "ema"))
        self.running_baseline: Tensor
        self.register_buffer("running_baseline", torch.zeros((), dtype=torch.float64))

    def forward(
        self,
        scores: Float[Tensor, "P G"],
        false_positive_rate: Tensor | Sequence[float] | None = None,
        false_negative_rate: Tensor | Sequence[float] | None = None,
    ) -> Float[Tensor, "P G"]:
        """Correct one component's scores; changes no state.

        Args:
            scores: [P, G], 0 or 1; NaN = not scored.
            false_positive_rate: [P], read with scale `informedness` if the option is None.
            false_negative_rate: [P], read if the option is None.

        Returns:
            Coefficients [P, G], without gradient.

        Raises:
            ShapeError: scores is not [P, G].
            ScoreError: a score is neither 0 nor 1.
            BindingError: a rate is neither an option nor a field.
        """
        weights = self._weights(scores, false_negative_rate) - self._baseline(scores)
        return weights / self._scale(scores, false_positive_rate, false_negative_rate)

    def _weights(self, scores: Tensor, false_negative_rate: Rate | None) -> Tensor:
        check_shapes(self.where, scores=(scores, "P G"))
        verdicts = _binary(self.where, scores.detach(), self.threshold)
        return verdicts - (1 - self._rate("false_negative_rate", false_negative_rate, verdicts))

    def _baseline(self, scores: Tensor) -> Tensor | float:
        if isinstance(self.baseline, str):
            return self.running_baseline.to(scores) if self.baseline == "ema" else 0.0
        return self.baseline

    def _scale(
        self, scores: Tensor, false_positive_rate: Rate | None, false_negative_rate: Rate | None
    ) -> Tensor | float:
        if not isinstance(self.scale, str):
            return self.scale
        if self.scale == "ema":
            return self.running_scale.clamp(min=self.scale_floor).to(scores)
        scale = 1 - self._rate("false_negative_rate", false_negative_rate, scores)
        if self.scale == "informedness":
            scale = scale - self._rate("false_positive_rate", false_positive_rate, scores)
        return scale.clamp(min=self.scale_floor)

    @torch.no_grad()
    def observe(
        self, scores: Float[Tensor, "P G"], false_negative_rate: Tensor | Sequence[float] | None = None
    ) -> None:
        """Take a finished step into the running baseline and scale.

        Args:
            scores: [P, G], what the reward said; NaN = not scored.
            false_negative_rate: [P], if it is a field.
        """
        weights = self._weights(scores, false_negative_rate)
        found = weights[~weights.isnan()]
        if len(found):
            self._follow_scale(found - self._baseline(found))
            share = 1.0 if self.observed == 0 else self.baseline_rate
            self.running_baseline += share * (found.mean().to(self.running_baseline) - self.running_baseline)
            self.observed += 1

    def metrics(self) -> dict[str, float]:
        """The last audit, and what is estimated."""
        return super().metrics() | {"running_baseline": self.running_baseline.item()}


backward_correction = BackwardCorrection
forward_correction = ForwardCorrection


def _per_prompt(rate: Rate, scores: Tensor) -> Tensor:
    """A rate as a tensor that fits scores [P, ...]: a scalar, or [P, 1, ...]."""
    found = torch.as_tensor(rate, dtype=scores.dtype, device=scores.device)
    return found if found.ndim == 0 else found.reshape(-1, *(1 for _ in scores.shape[1:]))


def _binary(where: str, scores: Tensor, threshold: float | None) -> Tensor:
    if threshold is not None:
        return (scores >= threshold).to(scores.dtype).masked_fill(scores.isnan(), torch.nan)
    wrong = ((scores != 0) & (scores != 1) & ~scores.isnan()).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        raise ScoreError(
            f"{where}: scores must be 0 or 1; got {scores[tuple(place)].item():g} at {place}. Set threshold to say "
            "from which score on a sample counts as right."
        )
    return scores


def _checked_scale(where: str, scale: Any, words: tuple[str, ...]) -> Any:
    if scale in words if isinstance(scale, str) else scale > 0:
        return scale
    raise RecipeError(f"{where}.scale: must be a number above 0 or one of {', '.join(words)}; got {scale!r}.")
