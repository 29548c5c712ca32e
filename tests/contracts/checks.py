"""The contract of each stage as checks of one member; a check raises AssertionError where the contract is broken."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from guerdon.errors import DataError, ShapeError
from guerdon.stages import call, signature
from tests.contracts.fields import OPTIONS, Sizes, copy, permute_samples, poison_masked, select_prompts
from tests.contracts.members import Member, same, state

Check = Callable[[Member], None]
ORDER = [2, 0, 3, 1]

# advantages whose stated rule for a constant group is not 0
NOT_ZERO_WHEN_CONSTANT = {
    "advantages.adaptive_gae",
    "advantages.copo",
    "advantages.gae",
    "advantages.gae_by_component",
    "advantages.prompt_tracker",
    "advantages.reinforce",
    "advantages.value_anchored",
}
# weightings that do more than multiply by the weights they return
NOT_LINEAR: set[str] = {"weighting.expression"}
# objectives whose gradient is by design not the derivative of their value
NOT_A_DERIVATIVE: set[str] = set()
# objectives that sort or compare the whole batch: the loop refuses to cut it
WHOLE_BATCH: set[str] = {"objectives.aot"}
# objectives that take a mean over live steps, and refuse a sample (or a batch) without any
NEEDS_LIVE_STEPS: set[str] = {
    "objectives.cpo",
    "objectives.demonstration",
    "objectives.demonstration_value",
    "objectives.ipo",
    "objectives.orpo",
    "objectives.simpo",
}
# samplers that keep a record per prompt and so cannot serve endless data
NEEDS_A_SIZE: set[str] = {"sampling.vade"}
# samplers that give each prompt once a draw at most
ONCE_A_DRAW: set[str] = {"sampling.vade"}


# ---------------------------------------------------------------- all stages


def inputs_are_not_changed(member: Member) -> None:
    fields = _for(member, member.make())
    before = copy(fields)
    member.run(fields)
    assert same(copy(fields), before), "an input was changed in place"


def the_same_call_gives_the_same(member: Member) -> None:
    fields = _for(member, member.make())
    assert same(_values(member.run(copy(fields))), _values(member.run(copy(fields))))


def the_state_dict_is_the_whole_state(member: Member) -> None:
    first = member.build()
    if not isinstance(first, nn.Module):
        return
    for seed in range(3):
        _step(member, first, seed)
    second = member.build()
    second.load_state_dict(state(first))
    for seed in range(3, 6):
        assert same(_step(member, first, seed), _step(member, second, seed)), "a restored module goes on differently"
    assert same(state(first), state(second))


def it_is_documented(member: Member) -> None:
    text = inspect.getdoc(member.target) or ""
    wanted = {"rewards": ["Args", "Returns"]}.get(member.stage, ["Args", "Returns", "Raises", "Source"])
    if inspect.isclass(member.target):
        wanted = ["Args", "Source"] if _options(member.target) else ["Source"]
        own = member.target.forward if "forward" in vars(member.target) else None
        if own is not None:
            _documents(own, inspect.getdoc(own) or "", ["Args", "Returns"])
    _documents(member.target, text, wanted)


def its_options_are_declared(member: Member) -> None:
    required = OPTIONS.get(member.key, {})
    for name, parameter in inspect.signature(member.target).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        assert parameter.annotation is not parameter.empty, f"{name} has no annotation"
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            assert name in required, f"option {name} has no default and is not in OPTIONS of tests/contracts/fields.py"
    if inspect.isclass(member.target):
        kinds = [p.kind for p in inspect.signature(member.target).parameters.values()]
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for kind in kinds), "constructor options must be keyword-only"


# ---------------------------------------------------------------- objectives


def it_returns_a_loss(member: Member) -> None:
    fields = member.make()
    loss = _loss(member, fields)
    assert set(loss) - {"implicit"} == {"total", "count", "metrics"}, "an objective returns Loss(total, count, metrics)"
    implicit = loss.get("implicit")
    assert implicit is None or not implicit.requires_grad, "implicit has a graph"
    assert loss["total"].shape == ()
    assert loss["total"].requires_grad
    assert loss["total"].isfinite()
    assert loss["count"].shape == ()
    assert not loss["count"].requires_grad, "count has a graph"
    assert loss["count"] > 0
    for name, metric in loss["metrics"].items():
        assert isinstance(metric, Tensor), f"metric {name} is not a tensor"
        assert metric.shape == (), f"metric {name} is not a scalar"
        assert not metric.requires_grad, f"metric {name} has a graph"
        assert metric.isfinite(), f"metric {name} is not finite"


def masked_steps_are_nothing_to_the_loss(member: Member) -> None:
    masks = _masks(member)
    if not masks:
        return
    fields = member.make()
    clean, poisoned = _loss(member, fields), _loss(member, poison_masked(fields))
    assert same(clean["total"], poisoned["total"]), "what masked steps hold changes the loss"
    assert same(clean["count"], poisoned["count"])
    assert same(clean["metrics"], poisoned["metrics"]), "what masked steps hold changes a metric"
    clean, poisoned = _gradients(member, fields), _gradients(member, poison_masked(fields))
    assert same(clean, poisoned), "what masked steps hold changes the gradient"
    for mask, gradient in zip(masks if len(masks) > 1 else masks * len(poisoned), poisoned, strict=True):
        assert (gradient[~fields[mask]] == 0).all(), "masked steps have a gradient"


def the_order_of_samples_is_nothing_to_the_loss(member: Member) -> None:
    if not member.takes("logp") and not member.takes("imitation"):
        return  # of pairs: chosen and rejected are no group
    fields = member.make()
    moved = permute_samples(fields, ORDER)
    assert same(_loss(member, fields)["total"], _loss(member, moved)["total"], exact=False)
    for first, second in zip(_gradients(member, fields), _gradients(member, moved), strict=True):
        assert same(first[:, ORDER], second, exact=False)


def micro_batches_add_up(member: Member) -> None:
    if member.key in WHOLE_BATCH:
        return
    fields = member.make()
    whole = _loss(member, fields)
    parts = [_loss(member, select_prompts(fields, rows)) for rows in ([0], [1, 2])]
    for name in ("total", "count"):
        together = sum(part[name] for part in parts)
        assert same(whole[name].detach(), together.detach(), exact=False), f"{name} of the parts does not add up"


def the_count_ignores_the_policy(member: Member) -> None:
    fields = member.make()
    first = _loss(member, fields)["count"]
    for name in _learned(member):
        for value in (fields[name] * 0.0, fields[name] - 3.0, fields[name] * 2.0):
            assert same(first, _loss(member, fields | {name: value})["count"]), f"count depends on {name}"


def nothing_live_is_finite(member: Member) -> None:
    masks = _masks(member)
    if not masks:
        return
    fields = member.make()
    fields |= {mask: torch.zeros_like(fields[mask]) for mask in masks}
    if member.key in NEEDS_LIVE_STEPS and not _goes_on_without_steps(member, fields):
        return
    loss = _loss(member, fields)
    assert loss["total"].isfinite()
    assert loss["total"].requires_grad
    assert all(metric.isfinite() for metric in loss["metrics"].values())
    assert all((gradient == 0).all() for gradient in _gradients(member, fields))


def _goes_on_without_steps(member: Member, fields: dict[str, Any]) -> bool:
    """Whether a loss of means goes on without live steps; otherwise its error must name the row."""
    try:
        _loss(member, fields)
    except DataError as error:
        complaint = str(error)
    else:
        return True
    assert "[0]" in complaint, f"the error must name the row: {complaint}"
    return False


def a_loss_of_groups_of_one_is_finite(member: Member) -> None:
    fields = member.make(Sizes(G=1))
    if _needs_a_group(member, _for(member, fields)):
        return
    assert _loss(member, fields)["total"].isfinite()
    assert all(gradient.isfinite().all() for gradient in _gradients(member, fields))


def a_loss_of_constant_groups_is_finite(member: Member) -> None:
    fields = member.make()
    for name, value in (("rewards", 1.0), ("scores", 1.0), ("advantages", 0.0)):
        fields[name][0] = value
    assert _loss(member, fields)["total"].isfinite()
    assert all(gradient.isfinite().all() for gradient in _gradients(member, fields))


def the_gradient_is_the_derivative(member: Member) -> None:
    if member.key in NOT_A_DERIVATIVE:
        return
    fields = member.make(Sizes(P=2, G=2, T=3))

    names = _learned(member)

    def total(*values: Tensor) -> Tensor:
        return member.run(fields | dict(zip(names, values, strict=True)))["total"]

    values = tuple(fields[name].clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(total, values, raise_exception=False), f"gradcheck fails for {names}"


def optional_fields_are_optional(member: Member) -> None:
    if not member.plain:
        return
    fields = _for(member, member.make())
    stage = member.build()
    results = member.run({name: fields[name] for name in signature(stage).required if name in fields}, stage)
    assert all(value.isfinite().all() for value in results.values() if isinstance(value, Tensor))


# ---------------------------------------------------------------- advantages


def it_returns_advantages(member: Member) -> None:
    fields = member.make()
    fields["rewards"].requires_grad_()
    found = member.run(fields)["advantages"]
    assert found.shape in (fields["rewards"].shape, fields["mask"].shape)
    assert found.isfinite().all()
    assert found.dtype == torch.float64
    assert not found.requires_grad, "advantages have a graph"


def the_order_of_samples_only_orders_advantages(member: Member) -> None:
    fields = member.make()
    found = member.run(permute_samples(fields, ORDER))["advantages"]
    assert same(member.run(fields)["advantages"][:, ORDER], found, exact=False)


def a_constant_group_has_no_advantage(member: Member) -> None:
    fields = member.make(Sizes(G=7))
    for name in ("rewards", "scores"):
        fields[name][0] = 0.1  # seven of them have a mean that is not exactly 0.1
    found = member.run(fields)["advantages"]
    assert found.isfinite().all()
    if member.key not in NOT_ZERO_WHEN_CONSTANT:
        assert (found[0] == 0).all(), "a constant group has an advantage"
        assert (found[1] != 0).any()


def an_unscored_sample_has_no_advantage(member: Member) -> None:
    fields = member.make()
    for name in ("rewards", "scores"):
        fields[name][0, 1] = math.nan
        fields[name][2] = math.nan
    found = member.run(fields)["advantages"]
    assert found.isfinite().all(), "an unscored sample makes advantages NaN"
    assert (found[0, 1] == 0).all()
    assert (found[2] == 0).all()
    assert (found[1] != 0).any()


def masked_steps_are_nothing_to_advantages(member: Member) -> None:
    if not member.takes("mask"):
        return
    fields = member.make()
    clean, poisoned = member.run(fields), member.run(poison_masked(fields))
    assert same(clean, poisoned), "what masked steps hold changes advantages"
    for value in poisoned.values():
        if value.shape == fields["mask"].shape:
            assert (value[~fields["mask"]] == 0).all()


def advantages_of_groups_of_one_are_finite(member: Member) -> None:
    fields = member.make(Sizes(G=1))
    assert _needs_a_group(member, fields) or member.run(fields)["advantages"].isfinite().all()


# ---------------------------------------------------------------- weighting


def it_returns_rewards_and_weights(member: Member) -> None:
    fields = member.make()
    found = member.run(fields)
    assert set(found) >= {"rewards", "weights"}, "a weighting returns rewards and weights"
    assert found["rewards"].shape == fields["scores"].shape[:2]
    assert found["rewards"].isfinite().all()
    assert found["weights"].shape in (fields["scores"].shape, fields["scores"].shape[2:])
    assert found["weights"].isfinite().all()


def contributions_add_up(member: Member) -> None:
    if member.key in NOT_LINEAR:
        return
    fields = member.make()
    fields["scores"][0, 1, 0] = math.nan
    found = member.run(fields)
    together = (fields["scores"].nan_to_num(nan=0.0) * found["weights"]).sum(-1)
    assert same(found["rewards"], together, exact=False), "rewards are not the weighted sum of scores"


# a constraint alone still has its multiplier for a weight
CONSTRAINED = {"weighting.lagrangian", "weighting.proxy_point_search"}


def one_component_is_the_reward(member: Member) -> None:
    if member.key in NOT_LINEAR | CONSTRAINED or not member.plain:
        return
    fields = member.make(Sizes(K=1))
    assert same(member.run(fields)["rewards"], fields["scores"][..., 0], exact=False)


def what_was_not_scored_is_left_out(member: Member) -> None:
    fields = member.make()
    fields["scores"][0, 1, 0] = math.nan
    fields["scores"][2, 3] = math.nan
    found = member.run(fields)["rewards"]
    unscored = torch.zeros_like(found, dtype=torch.bool)
    unscored[2, 3] = True
    assert torch.equal(found.isnan(), unscored), "NaN must mean exactly that no component was scored"


def the_order_of_samples_only_orders_rewards(member: Member) -> None:
    fields = member.make()
    found = member.run(permute_samples(fields, ORDER))["rewards"]
    assert same(member.run(fields)["rewards"][:, ORDER], found, exact=False)


def constant_groups_stay_constant(member: Member) -> None:
    fields = member.make()
    fields["scores"][0] = 0.3
    found = member.run(fields)["rewards"]
    assert found.isfinite().all()
    assert (found[0] == found[0, 0]).all(), "equal scores were given different rewards"


# ---------------------------------------------------------------- shaping


def it_returns_scores_of_the_same_shape(member: Member) -> None:
    fields = _for(member, member.make())
    fields["scores"][0, 1] = math.nan
    found = member.run(fields)["scores"]
    assert found.shape == fields["scores"].shape
    assert torch.equal(found.isnan(), fields["scores"].isnan()), "NaN (not scored) must stay, and no other appear"


def the_order_of_samples_only_orders_scores(member: Member) -> None:
    fields = _for(member, member.make())
    found = member.run(permute_samples(fields, ORDER))["scores"]
    assert same(member.run(fields)["scores"][:, ORDER], found, exact=False)


def scores_of_constant_groups_are_finite(member: Member) -> None:
    fields = _for(member, member.make())
    fields["scores"][:] = fields["scores"][0, 0].item()
    assert member.run(fields)["scores"].isfinite().all()


# ---------------------------------------------------------------- sampling


def it_draws_positions_of_the_data(member: Member) -> None:
    once = member.key in ONCE_A_DRAW
    sampler = _prepared(member)
    for count in (0, 1, 5, 9) if once else (0, 1, 5, 9, 30):
        drawn = sampler.draw(count)
        assert isinstance(drawn, list)
        assert len(drawn) == count
        assert all(type(index) is int and 0 <= index < 9 for index in drawn)
        assert len(set(drawn)) == count or not once
    assert sampler.draws_max >= 1


def the_seed_decides_what_is_drawn(member: Member) -> None:
    before = torch.get_rng_state()
    first = [_prepared(member, size=20).draw(20) for _ in range(2)]
    assert first[0] == first[1]
    assert torch.equal(before, torch.get_rng_state()), "drawing uses the global generator"


def endless_data_is_never_repeated(member: Member) -> None:
    if member.key in NEEDS_A_SIZE:
        return
    sampler = _prepared(member, size=None)
    drawn = sampler.draw(5) + sampler.draw(5)
    assert len(set(drawn)) == 10
    assert min(drawn) >= 0


def a_restored_sampler_goes_on(member: Member) -> None:
    first = _prepared(member)
    for seed in range(3):
        first.draw(4)
        _keep(first, member.make(seed=seed))
        _observe(first, member.make(seed=seed))
    second = _prepared(member)
    second.load_state_dict(state(first))
    for seed in range(3, 6):
        assert first.draw(4) == second.draw(4), "a restored sampler draws something else"
        assert torch.equal(_keep(first, member.make(seed=seed)), _keep(second, member.make(seed=seed)))


def it_keeps_whole_groups(member: Member) -> None:
    fields = member.make()
    before = copy(fields)
    kept = _keep(_prepared(member), fields)
    assert kept.dtype == torch.bool
    assert kept.shape == (3,)
    assert same(fields, before), "an input was changed in place"


# ---------------------------------------------------------------- the batteries

EVERY_STAGE: list[Check] = [it_is_documented, its_options_are_declared]
CALLED: list[Check] = [inputs_are_not_changed, the_same_call_gives_the_same, the_state_dict_is_the_whole_state]
BATTERIES: dict[str, list[Check]] = {
    "objectives": [
        *EVERY_STAGE,
        *CALLED,
        it_returns_a_loss,
        masked_steps_are_nothing_to_the_loss,
        the_order_of_samples_is_nothing_to_the_loss,
        micro_batches_add_up,
        the_count_ignores_the_policy,
        nothing_live_is_finite,
        a_loss_of_groups_of_one_is_finite,
        a_loss_of_constant_groups_is_finite,
        the_gradient_is_the_derivative,
        optional_fields_are_optional,
    ],
    "advantages": [
        *EVERY_STAGE,
        *CALLED,
        it_returns_advantages,
        the_order_of_samples_only_orders_advantages,
        a_constant_group_has_no_advantage,
        an_unscored_sample_has_no_advantage,
        masked_steps_are_nothing_to_advantages,
        advantages_of_groups_of_one_are_finite,
        optional_fields_are_optional,
    ],
    "weighting": [
        *EVERY_STAGE,
        *CALLED,
        it_returns_rewards_and_weights,
        contributions_add_up,
        one_component_is_the_reward,
        what_was_not_scored_is_left_out,
        the_order_of_samples_only_orders_rewards,
        constant_groups_stay_constant,
        optional_fields_are_optional,
    ],
    "shaping": [
        *EVERY_STAGE,
        *CALLED,
        it_returns_scores_of_the_same_shape,
        the_order_of_samples_only_orders_scores,
        scores_of_constant_groups_are_finite,
        optional_fields_are_optional,
    ],
    "sampling": [
        *EVERY_STAGE,
        it_draws_positions_of_the_data,
        the_seed_decides_what_is_drawn,
        endless_data_is_never_repeated,
        a_restored_sampler_goes_on,
        it_keeps_whole_groups,
    ],
    "rewards": EVERY_STAGE,
    "optim": EVERY_STAGE,
}


# ---------------------------------------------------------------- helpers


def _for(member: Member, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as the stage gets them: a shaping sees one component, an objective's policy has a graph."""
    if member.stage == "shaping":
        return fields | {"scores": fields["scores"][..., 0].clone()}
    if member.stage == "objectives":
        return fields | {name: fields[name].clone().requires_grad_() for name in _learned(member)}
    return fields


def _needs_a_group(member: Member, fields: dict[str, Any]) -> bool:
    """Whether a member refuses groups of one; it must then say so by naming G."""
    try:
        member.run(fields)
    except ShapeError as error:
        complaint = str(error)
    else:
        return False
    assert re.search(r"\bG\b", complaint), f"refuses a group of one without naming G: {complaint}"
    return True


def _values(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in results.items()}


def _loss(member: Member, fields: dict[str, Any]) -> dict[str, Any]:
    return member.run(_for(member, fields))


def _gradients(member: Member, fields: dict[str, Any]) -> list[Tensor]:
    prepared = _for(member, fields)
    learned = [prepared[name] for name in _learned(member)]
    return list(torch.autograd.grad(member.run(prepared)["total"], learned))


def _learned(member: Member) -> list[str]:
    """The fields through which an objective reaches the policy: the first of these sets of which it takes any."""
    known = (
        _SIDES,
        ("error_chosen", "error_rejected"),
        ("logp", "normaliser"),
        ("imitation",),
    )
    return next(taken for names in known if (taken := [name for name in names if member.takes(name)]))


# log-probabilities of both samples of a pair; for some losses also after a prompt with a draft
_SIDES = tuple(
    f"logp_{side}{draft}" for draft in ("", "_given_chosen", "_given_rejected") for side in ("chosen", "rejected")
)


def _masks(member: Member) -> list[str]:
    """The masks it takes: for each field through which it reaches the policy, that of its steps."""
    sides = [name.split("_")[1] for name in _learned(member) if name in _SIDES]
    return [name for name in ("mask", *(f"mask_{side}" for side in sides)) if member.takes(name)]


def _step(member: Member, module: nn.Module, seed: int) -> dict[str, Any]:
    """Call a module on fresh fields, and let it observe them if it does."""
    fields = _for(member, member.make(seed=seed))
    found = _values(member.run(fields, module))
    # a shaping observes what it was given, not what it made of it
    _observe(module, found | fields if member.stage == "shaping" else fields | found)
    return found


def _observe(module: Any, fields: dict[str, Any]) -> None:
    if hasattr(module, "observe"):
        call(module, fields, method="observe")


def _keep(sampler: Any, fields: dict[str, Any]) -> Tensor:
    return call(sampler, fields, method="keep")


def _prepared(member: Member, size: int | None = 9) -> Any:
    sampler = member.build()
    sampler.prepare(size, 5)
    return sampler


def _options(target: Any) -> list[str]:
    return [name for name, p in inspect.signature(target).parameters.items() if p.kind is p.KEYWORD_ONLY]


def _documents(target: Any, text: str, sections: list[str]) -> None:
    """Assert that a docstring has its sections, and that Args names every parameter."""
    for section in sections:
        assert re.search(rf"^{section}:$", text, re.MULTILINE), f"the docstring has no section {section}"
    if "Args" not in sections:
        return
    for name, parameter in inspect.signature(target).parameters.items():
        if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            assert re.search(rf"^    {name}: ", text, re.MULTILINE), f"the docstring does not say what {name} is"
