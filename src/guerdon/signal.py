"""The signal: rewards -> shaping -> weighting -> advantages, as one callable.

Each part is a stage (see `guerdon.stages`) and can be swapped alone. What every component contributed is kept, so that
the ledger can say where an advantage came from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from guerdon.errors import RecipeError, ShapeError, nearest
from guerdon.rewards.scoring import FLAT, Scores, differentiable_scores, score
from guerdon.rollout import Rollout, paid_by_step
from guerdon.stages import call, check, label, outputs, signature, wants

Stage = Callable[..., Any]

# many times the size of all else a rollout holds: gone once the rewards have seen them
_FOR_REWARDS = {"projections"}


class Signal(nn.Module):
    """Turn samples into advantages.

    The state of a signal is that of its stages with state (running moments, multipliers, posteriors): they are
    submodules, so `state_dict` holds all of it.

    Args:
        rewards: component name -> reward function, or a sequence of functions named by themselves.
        shaping: component name -> stages applied to that component's scores [P, G] in order; `"*"` for all components.
        weighting: from `scores` [P, G, K] to `rewards`; None weighs every component with 1.
        advantage: from `rewards` to `advantages`; None for objectives that read rewards directly.
        watch: rewards that are scored and recorded, and never trained on.
        on_bad_score: `stop` raises on a score that is no finite number, `drop` leaves the sample out.

    Raises:
        RecipeError: shaping names a component that is not there.

    Example:
        >>> import torch
        >>> from guerdon.advantages import grpo
        >>> from guerdon.rollout import Rollout
        >>> def length(samples): return [[float(len(s)) for s in group] for group in samples]
        >>> rollout = Rollout(["p"], [["a", "bbb"]], torch.ones(1, 2, 3).bool(), torch.zeros(1, 2, 3))
        >>> Signal(rewards=[length], advantage=grpo)(rollout).advantages.round(decimals=2)
        tensor([[-0.7100,  0.7100]])
    """

    def __init__(
        self,
        *,
        rewards: Mapping[str, Stage] | Sequence[Stage],
        shaping: Mapping[str, Sequence[Stage]] | None = None,
        weighting: Stage | None = None,
        advantage: Stage | None = None,
        watch: Mapping[str, Stage] | None = None,
        on_bad_score: Literal["stop", "drop"] = "stop",
    ) -> None:
        super().__init__()
        if not isinstance(rewards, Mapping):
            rewards = {label(reward).split(".")[-1]: reward for reward in rewards}
        self.rewards: dict[str, Stage] = dict(rewards)
        self.watch: dict[str, Stage] = dict(watch or {})
        shaping = dict(shaping or {})
        for name in shaping:
            if name != "*" and name not in self.rewards:
                raise RecipeError(
                    f"shaping.{name}: there is no reward of that name.{nearest(name, self.rewards)} "
                    f"There are: {', '.join(self.rewards)}."
                )
        # what a stage with state learns of one component is nothing to another
        shared = {name: [_own_copy(stage, n) for stage in shaping.get("*", ())] for n, name in enumerate(self.rewards)}
        self.shaping = {name: [*shared[name], *shaping.get(name, ())] for name in self.rewards}
        self.weighting = weighting
        self.advantage = advantage
        self.on_bad_score: Literal["stop", "drop"] = on_bad_score
        # stages with state must be submodules for state_dict to hold them; dictionaries of functions are not searched
        self.stateful = nn.ModuleDict(
            {name: stage for name, stage in self._named_stages() if isinstance(stage, nn.Module)}
        )

    def _named_stages(self) -> Iterable[tuple[str, Stage]]:
        for name, reward in self.rewards.items():
            yield f"rewards_{name}", reward
        for name, reward in self.watch.items():
            yield f"watch_{name}", reward
        seen: set[int] = set()
        for name, stages in self.shaping.items():
            for position, stage in enumerate(stages):
                if id(stage) not in seen:
                    seen.add(id(stage))
                    yield f"shaping_{name}_{position}", stage
        if self.weighting is not None:
            yield "weighting_stage", self.weighting
        if self.advantage is not None:
            yield "advantage_stage", self.advantage

    @property
    def score_names(self) -> tuple[str, ...]:
        """The K component names."""
        return tuple(self.rewards)

    def needs(self, field: str) -> bool:
        """Whether any stage asks for a costly field such as `logp_ref` or `values`."""
        return any(wants(stage, field) for _, stage in self._named_stages())

    @property
    def value_heads(self) -> int:
        """Values of a step that the critic must give: one, or one a component where the advantage reads `scores` beside them.

        0 where no stage asks for the field `values`.
        """
        if not self.needs("values"):
            return 0
        each = self.advantage is not None and {"values", "scores"} <= set(signature(self.advantage).fields)
        return len(self.rewards) if each else 1

    @property
    def needs_reference(self) -> bool:
        """Whether the policy that training starts from must be kept: for its log-probabilities or for its answers."""
        return self.needs("logp_ref") or self.needs("kl_old") or self.needs("ref_scores") or bool(self.uncalibrated())

    def check(self, available: Iterable[str]) -> set[str]:
        """Check before training that every stage will find the fields it names.

        Args:
            available: names the policy and the data provide.

        Returns:
            All names that will be there after the signal.

        Raises:
            BindingError: naming the stage, the field and the fields there are.
        """
        there = set(available)
        for name, reward in (self.rewards | self.watch).items():
            flat = {field for name in FLAT if name in signature(reward).fields for field in FLAT[name]}
            there |= set(check(reward, there | flat, f"reward {name!r}").outputs) - {"scores"}
        there = there - _FOR_REWARDS | {"scores", "score_names", "outcomes"}
        for name, stages in self.shaping.items():
            for stage in stages:
                there |= set(check(stage, there, f"shaping of {name!r}").outputs)
        if self.weighting is not None:
            there |= set(check(self.weighting, there).outputs)
            if self.advantage is None and getattr(self.weighting, "apply_to", None) == "advantage":
                raise RecipeError(
                    f"{label(self.weighting)}: it multiplies advantages, and this recipe has no advantage stage. Set "
                    "apply_to: reward."
                )
        there |= {"rewards", "weights"}
        if self.advantage is not None:
            there |= set(check(self.advantage, there).outputs) | {"advantages"}
        return there

    def forward(self, rollout: Rollout) -> Rollout:
        """Score and assign: fills `scores`, `outcomes`, `rewards` and `advantages`."""
        return self.assign(self.score(rollout))

    def score(self, rollout: Rollout) -> Rollout:
        """Call the rewards: fills `scores` [P, G, K], `score_names` and `outcomes`; takes `projections` away.

        Raises:
            ScoreError: see `guerdon.rewards.scoring.score`.
        """
        found = score(self.rewards, rollout, on_bad_score=self.on_bad_score)
        extras = {**found.extras, "dropped": _by_prompt(found, len(rollout))}
        if self.watch:
            extras["watched"] = score(self.watch, rollout, on_bad_score="drop").scores
        produced = {"scores": found.scores, "score_names": self.score_names, "outcomes": found.outcomes, **extras}
        kept = {name: value for name, value in rollout.extras.items() if name not in _FOR_REWARDS}
        return replace(rollout, extras=kept).update(produced)

    def score_images(self, rollout: Rollout, images: Tensor) -> Rollout:
        """As `score`, with scores that keep the graph of the images [P * G, C, H, W].

        Raises:
            ScoreError: see `guerdon.rewards.scoring.differentiable_scores`.
        """
        found = differentiable_scores(self.rewards, rollout, images, on_bad_score=self.on_bad_score)
        extras: dict[str, Any] = {"dropped": _by_prompt(found, len(rollout))}
        if self.watch:
            with torch.no_grad():
                extras["watched"] = score(self.watch, rollout, on_bad_score="drop").scores
        return rollout.update({"scores": found.scores, "score_names": self.score_names, **extras})

    def weigh(self, rollout: Rollout, *, without: Stage | None = None) -> Rollout:
        """From scores to rewards: fills `rewards`, and `shaped` and `weights` [P, G, K], which the ledger reads.

        Where a reward gave `step_scores`, `rewards` are [P, G, T]: each step's weighted scores, and at a sample's last step
        what they leave of its whole reward, such as components without steps and what shaping changed.
        Where the scores have a graph, so have the rewards, unless a stage ends it.

        Args:
            rollout: with scores.
            without: a shaping stage to leave out.
        """
        if rollout.scores is None:
            raise ShapeError("signal.weigh: the rollout has no scores; call signal.score first.")
        fields = rollout.available()
        produced: dict[str, Any] = {}
        shaped = []
        for k, name in enumerate(rollout.score_names):
            column = rollout.scores[..., k]
            for stage in self.shaping[name]:
                if stage is without:
                    continue
                own = _of_component({**fields, **produced, "scores": column}, k)
                found = outputs(call(stage, own, f"shaping of {name!r}"), "scores")
                column = found.pop("scores")
                produced |= found
            shaped.append(column)
        produced["shaped"] = torch.stack(shaped, dim=-1)
        if self.weighting is None:
            weighted = {"rewards": _nansum(produced["shaped"])}
        else:
            own = {"scores": produced["shaped"], "raw_scores": rollout.scores, "score_names": rollout.score_names}
            fields |= {**produced, **own}
            weighted = outputs(call(self.weighting, fields), "rewards")
        # one weight per sample and component, whatever the stage gave, so that it is selected with the prompts
        weights = weighted.get("weights", produced["shaped"].new_ones(()))
        weighted["weights"] = weights.expand_as(produced["shaped"])
        for p, faults in enumerate(rollout.extras.get("dropped", ())):
            for fault in faults:
                weighted["rewards"][p, fault.sample] = torch.nan
        weighted["rewards"] = _by_step(rollout, weighted["rewards"], weighted["weights"])
        return rollout.update({**produced, **weighted})

    @torch.no_grad()
    def assign(self, rollout: Rollout) -> Rollout:
        """From scores to advantages: fills `rewards` and `advantages`.

        All prompts of the batch must be in the rollout: some stages compare prompts with one another. A shaping stage
        that has a method `audit` is told what the advantages are without it, as `uncorrected_advantages`.
        """
        assigned = self._assign(rollout)
        for name, stage in self.stateful.items():
            if hasattr(stage, "audit") and assigned.advantages is not None:
                plain = self._assign(rollout, without=stage).advantages
                for own in self._fields_of(name, stage, assigned.available() | {"uncorrected_advantages": plain}):
                    call(stage, own, method="audit")
        return assigned

    def _assign(self, rollout: Rollout, *, without: Stage | None = None) -> Rollout:
        return self._with_advantages(self.weigh(rollout, without=without))

    def _with_advantages(self, rollout: Rollout) -> Rollout:
        if self.advantage is None:
            return rollout
        # a stage that combines components itself reads the shaped scores
        fields = rollout.available() | {"scores": rollout.extras["shaped"]}
        produced = outputs(call(self.advantage, fields), "advantages")
        if "advantage_scale" in rollout.extras:
            advantages = produced["advantages"]
            scale = rollout.extras["advantage_scale"].view(-1, *[1] * (advantages.ndim - 1))
            produced["advantages"] = advantages * scale
        return rollout.update(produced)

    @property
    def adapts(self) -> Any:
        """The weighting, if it asks for the gradients of each component alone; else None."""
        return self.weighting if hasattr(self.weighting, "adapt") else None

    @torch.no_grad()
    def alone(self, rollout: Rollout) -> list[Rollout]:
        """K rollouts with the advantages that each component would give, were it the only one (with weight 1)."""
        weighed = self.weigh(rollout)
        shaped = weighed.extras["shaped"]
        dropped = torch.zeros_like(shaped[..., 0], dtype=torch.bool)
        for p, faults in enumerate(rollout.extras.get("dropped", ())):
            for fault in faults:
                dropped[p, fault.sample] = True
        found = []
        for k in range(shaped.shape[-1]):
            weights = torch.zeros_like(shaped)
            weights[..., k] = 1.0
            rewards = _by_step(rollout, shaped[..., k].masked_fill(dropped, torch.nan), weights)
            own = {"rewards": rewards, "weights": weights}
            extras = {name: value for name, value in weighed.extras.items() if name != "advantage_scale"}
            found.append(self._with_advantages(replace(weighed, extras=extras).update(own)))
        return found

    def validate(self, metrics: Mapping[str, float]) -> None:
        """Tell stages that ask for it the mean scores on held-out prompts, sampled ones where there are any."""
        for stage in self.stateful.values():
            if hasattr(stage, "validate"):
                mode = "sampled" if any(key.startswith("eval/sampled/") for key in metrics) else "greedy"
                means = [metrics.get(f"eval/{mode}/{name}", float("nan")) for name in self.rewards]
                if any(value != value for value in means):
                    raise RecipeError(
                        "weighting: it needs the mean score of every component on held-out prompts. Give the data rows "
                        "to hold out (evaluation), and rewards that score every sample."
                    )
                call(stage, {"validation": torch.tensor(means), "score_names": self.score_names}, method="validate")

    def observe(self, fields: Mapping[str, Any]) -> None:
        """Let stages with state learn from what happened, after an update; a shaping sees the scores it shaped."""
        taught = [(name, stage) for name, stage in self.stateful.items() if hasattr(stage, "observe")]
        # all fields are found before the first stage learns: what one is given depends on those before it in its chain
        lessons = [(stage, own) for name, stage in taught for own in self._fields_of(name, stage, fields)]
        for stage, own in lessons:
            call(stage, own, method="observe")

    def uncalibrated(self) -> list[tuple[nn.Module, int]]:
        """Shaping stages that have yet to be calibrated by reference scores, each with its component's place."""
        found = [(stage, k) for k, name in enumerate(self.rewards) for stage in self.shaping[name]]
        return [(stage, k) for stage, k in found if isinstance(stage, nn.Module) and not getattr(stage, "ready", True)]

    def calibrate(self, ref_scores: Tensor) -> None:
        """Give stages that are calibrated once the scores [N, M, K] of a reference policy, before the first update."""
        for stage, k in self.uncalibrated():
            cast(Any, stage).calibrate(ref_scores[..., k])

    def metrics(self) -> dict[str, float]:
        """What stages with state have to tell of the last step, as `STAGE/METRIC`; the loop logs it."""
        told = {name: cast(Any, stage).metrics() for name, stage in self.stateful.items() if hasattr(stage, "metrics")}
        return {f"{name}/{metric}": value for name, found in told.items() for metric, value in found.items()}

    def _fields_of(self, name: str, stage: Stage, fields: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        """The fields as a stage gets them: a shaping once for each component that it shapes, with `scores` [P, G]."""
        if not name.startswith("shaping_"):
            return [fields]
        found = []
        for k, component in enumerate(self.rewards):
            if all(own is not stage for own in self.shaping[component]):
                continue  # its chain need not be run
            own = _of_component({**fields, "scores": fields["scores"][..., k]}, k)
            for before in self.shaping[component]:
                if before is stage:
                    found.append(own)
                    break
                own |= outputs(call(before, own), "scores")
        return found


def _own_copy(stage: Stage, number: int) -> Stage:
    return copy.deepcopy(stage) if number and isinstance(stage, nn.Module) else stage


def _of_component(fields: dict[str, Any], k: int) -> dict[str, Any]:
    """The fields with component k's own reference scores [P, M], where there are any."""
    references = fields.get("ref_scores")
    if not isinstance(references, Tensor) or references.ndim != 3:
        return fields
    return {**fields, "ref_scores": references[..., k]}


def _by_prompt(found: Scores, count: int) -> list[list[Any]]:
    rows: list[list[Any]] = [[] for _ in range(count)]
    for fault in found.dropped:
        rows[fault.prompt].append(fault)
    return rows


def _by_step(rollout: Rollout, rewards: Tensor, weights: Tensor) -> Tensor:
    """Rewards [P, G, T] that add up to those of samples, where components say when they are earned; else as they are."""
    step_scores = rollout.extras.get("step_scores")
    if step_scores is None:
        return rewards
    return paid_by_step(rewards, (step_scores * weights.unsqueeze(2)).sum(-1), rollout.mask)


def _nansum(scores: Tensor) -> Tensor:
    total = scores.nansum(-1)
    return total.masked_fill(scores.isnan().all(-1), torch.nan)
