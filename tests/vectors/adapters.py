"""How each file of reference numbers is computed with the library: slug -> function from inputs to outputs.

Inputs are nested lists, numbers and strings; outputs are tensors, numbers, lists or dicts under the names of the file.
An adapter knows the names, never the cases.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guerdon.advantages import (
    copo,
    dr_grpo,
    gae,
    group_advantages,
    grpo,
    normalise_then_sum,
    prompt_tracker,
    reinforce,
    rloo,
    value_anchored,
)
from guerdon.diffusion.pathwise import unroll
from guerdon.diffusion.steps import (
    add_noise,
    dance_std,
    ddim_step,
    denoising_loss,
    flow_grpo_std,
    flow_sde_step,
    gaussian_kl,
    gaussian_log_prob,
    guide,
    interpolate,
    v_target,
)
from guerdon.errors import RecipeError
from guerdon.inference import optimise_noise
from guerdon.metrics import SuiteReport
from guerdon.objectives import (
    aot,
    copg,
    copo_loss,
    cpo,
    diffusion_dpo,
    dpo,
    dpok,
    exo,
    ipo,
    kto,
    nca,
    orpo,
    policy_gradient,
    ppo,
    prdp,
    real,
    reward_weighted,
    simpo,
    slic,
    sppo,
    srpo,
    tgdpo,
)
from guerdon.objectives.copg import contrast
from guerdon.objectives.demonstration import demonstration
from guerdon.objectives.demonstration_value import demonstration_value, value_terms
from guerdon.objectives.kl import kl_estimate
from guerdon.objectives.kto import kto_reference_point
from guerdon.objectives.pairs import Sides, sequence_logp
from guerdon.objectives.q_values import q_values, read_logits
from guerdon.objectives.real import relative_scores
from guerdon.objectives.reward_difference import reward_pairs
from guerdon.objectives.srpo import srpo_terms
from guerdon.rewards import appeal
from guerdon.rewards.closeness import block_shares, box_field
from guerdon.rewards.density_ratio import log_density_ratio
from guerdon.rewards.expression import RewardExpression, thirds
from guerdon.rewards.likelihood import summed_logp
from guerdon.rewards.overlong import overlong
from guerdon.rewards.pairing import pick_pair
from guerdon.rewards.spans import align_spans, length_weight
from guerdon.rewards.topologies import play
from guerdon.rewards.win_rate import win_rates
from guerdon.sampling import vade
from guerdon.sampling.mixed import mixed_groups
from guerdon.sampling.thompson import largest
from guerdon.sampling.vade import information_gain, mixed_probability
from guerdon.shaping import backward_correction, forward_correction, sweet_spot
from guerdon.shaping.noise_correction import (
    backward_reward,
    backward_variance,
    correction_audit,
    flip_probabilities,
    forward_weight,
    leave_one_out,
    step_coefficients,
)
from guerdon.shaping.sweet_spot import zone_of
from guerdon.weighting.gradient_alignment import GradientAlignment, influence
from guerdon.weighting.hypervolume import Hypervolume
from tests.vectors.hacked import constrained, shaped_rewards, tri_factors

Values = dict[str, Any]


def tensor(value: Any) -> Tensor:
    """A float64 tensor of nested lists."""
    return torch.tensor(value, dtype=torch.float64)


def grpo_family(inputs: Values) -> Values:
    logp, logp_old, logp_ref = (tensor(inputs[name]) for name in ("logp", "logp_old", "logp_ref"))
    mask = tensor(inputs["mask"]).bool()
    rewards = tensor(inputs["rewards"])
    options = {"clip_low": inputs["eps_low"], "clip_high": inputs["eps_high"], "beta": inputs["beta"]}
    outputs: Values = {
        "advantages": {
            "grpo": grpo(rewards),
            "mean_only": dr_grpo(rewards),
            "rloo": rloo(rewards),
            "batch_scaled": group_advantages(rewards, scale="batch"),
            "reinforce": reinforce(rewards),
        },
        "overlong": overlong(
            torch.tensor(inputs["overlong_lengths"]), max_length=inputs["overlong_max"], cache=inputs["overlong_cache"]
        ),
        "keep_group": mixed_groups(rewards),
    }
    losses: dict[str, Values] = {
        "grpo": {"denominator": "per_sample"},
        "token_mean": {"denominator": "per_token"},
        "dr_grpo": {"denominator": "constant", "max_length": inputs["max_length"]},
        "gspo": {"denominator": "per_sample", "level": "sequence"},
    }
    for name, more in losses.items():
        variable = logp.clone().requires_grad_()
        result = policy_gradient(variable, logp_old, grpo(rewards), mask, logp_ref, **options, **more)
        loss = result.total / result.count.clamp(min=1)
        loss.backward()
        outputs |= {f"loss_{name}": loss, f"grad_{name}": variable.grad}
    for estimator in ("k1", "k2", "k3"):
        outputs[f"kl_{estimator}"] = kl_estimate(logp, logp_ref, estimator)
    return outputs


def consistency(inputs: Values) -> Values:
    options = {name: inputs[name] for name in ("gamma", "rho", "mode", "consistency_coefficient")}
    # the numbers were made with a small constant inside the logarithm of the entropy
    found = copo(tensor(inputs["rewards"]), inputs["answers"], log_eps=1e-8, **options)
    logp = tensor(inputs["logp"]).requires_grad_()
    loss = copo_loss(
        logp,
        tensor(inputs["logp_old"]),
        found.local_advantages,
        found.global_advantages,
        found.local_weight,
        tensor(inputs["mask"]).bool(),
        clip_low=inputs["eps_low"],
        clip_high=inputs["eps_high"],
    )
    mean = loss.total / loss.count
    mean.backward()
    return {
        "entropy": found.consistency_entropy,
        "global_reward": found.global_reward,
        "local_advantage": found.local_advantages,
        "global_advantage": found.global_advantages[:, 0],
        "local_weight": found.local_weight,
        "loss": mean,
        "grad": logp.grad,
    }


def labels(inputs: Values) -> Values:
    logp, logp_old, rewards = (tensor(inputs[name]) for name in ("logp", "logp_old", "rewards"))
    mask = tensor(inputs["mask"]).bool()
    outputs: Values = {"scores": relative_scores(logp, logp_old, mask)}
    for variant in ("real", "bce"):
        variable = logp.clone().requires_grad_()
        result = real(variable, logp_old, rewards, mask, tau=inputs["tau"], variant=variant)
        loss = result.total / result.count.clamp(min=1)
        loss.backward()
        outputs |= {f"loss_{variant}": loss, f"grad_{variant}": variable.grad}
    return outputs


def variance_aware(inputs: Values) -> Values:
    sampler = vade(**{name: inputs[name] for name in ("alpha0", "beta0", "decay_global", "decay_selected")})
    sampler.prepare(inputs["samples"], seed=0)
    steps = []
    for step in inputs["steps"]:
        gain = information_gain(np.array(step["draw"]))
        selected = largest(gain, inputs["batch"]).tolist()
        right = torch.arange(inputs["group"]) < torch.tensor(step["correct"])[:, None]
        sampler.observe(selected, right.double().unsqueeze(-1))
        state = {name: getattr(sampler, name) for name in ("alpha", "beta", "mean", "evidence")}
        steps.append({"gain": gain, "selected": selected, **state})
    grid = tensor(inputs["p_grid"])
    return {
        "steps": steps,
        "mixed_probability": mixed_probability(grid, inputs["group"]),
        "gain_grid": information_gain(grid),
    }


def tournaments(inputs: Values) -> Values:
    judge = inputs["judge"]
    outputs: Values = {}
    for topology in ("anchor", "round_robin", "single_elimination"):
        found = play(topology, len(judge), lambda pairs: [tuple(judge[i][j]) for i, j in pairs])
        outputs[f"advantages_{topology}"] = grpo(tensor([found.quantiles]), eps=1e-6)[0]
        outputs[f"comparisons_{topology}"] = found.comparisons
    return outputs


def noise(inputs: Values) -> Values:
    scores, logp, logp_old = (tensor(inputs[name]) for name in ("noisy_rewards", "logp", "logp_old"))
    mask = tensor(inputs["mask"]).bool()
    low, miss, eps_c = inputs["rho0"], inputs["rho1"], inputs["eps_c"]
    backward, forward = backward_reward(scores, low, miss, eps_c=eps_c), forward_weight(scores, miss)
    # what the road gives: the stages, and the advantages that go with them
    stage = backward_correction(
        false_positive_rate=low, false_negative_rate=miss, eps_c=eps_c, scale=inputs["scale_backward"]
    )
    coefficients = {"backward": rloo(stage(scores))}
    stage = forward_correction(false_negative_rate=miss, scale=inputs["scale_forward"])
    coefficients["forward"] = reinforce(stage(scores))
    plain = {"backward": leave_one_out(scores), "forward": scores}
    outputs: Values = {
        "backward_reward": backward,
        "forward_weight": forward,
        "coef_noise_loo": plain["backward"],
        "coef_noise_direct": plain["forward"],
        "flip_probability_matrix": flip_probabilities(low, miss),
        "noise_variance_inflation": backward_variance(low, miss, eps_c=eps_c),
    }
    for name, values in (("backward", backward), ("forward", forward)):
        audit = correction_audit(coefficients[name], plain[name], mask)._asdict()
        bare, clipped = logp.clone().requires_grad_(), logp.clone().requires_grad_()
        loss = -(values * bare.where(mask, 0.0).sum(-1)).mean()
        loss.backward()
        found = policy_gradient(
            clipped, logp_old, coefficients[name], mask, clip_low=inputs["clip"], clip_high=inputs["clip"]
        )
        surrogate = -found.total / found.count
        surrogate.backward()
        ends = torch.tensor(inputs["step_ends"])
        outputs |= {
            f"coef_{name}": coefficients[name],
            f"audit_{name}": {key: None if value != value else value for key, value in audit.items()},
            f"loss_{name}": loss,
            f"grad_{name}": bare.grad,
            f"surrogate_{name}": surrogate,
            f"surrogate_grad_{name}": clipped.grad,
            f"step_coef_{name}": step_coefficients(
                tensor(inputs["step_rewards"]),
                ends,
                length=mask.shape[2],
                correction=name,  # type: ignore[arg-type]
                false_positive_rate=low,
                false_negative_rate=miss,
                scale=inputs[f"scale_{name}"],
                eps_c=eps_c,
            ),
        }
    return outputs | appeals(inputs)


def appeals(inputs: Values) -> Values:
    names = ("appeal_probability", "ema_decay", "pseudo_alpha", "pseudo_beta", "rho_max")
    stage = appeal(reward="exact_answer", strong="exact_answer", **{name: inputs[name] for name in names})
    single = appeal(reward="exact_answer", strong="exact_answer", **{name: inputs[name] for name in names})
    nothing = {name: value.clone() for name, value in single.state_dict().items()}
    estimates, trace = [], []
    for positives, _, appealed, overturned in inputs["appeal_batches"]:
        counts = [torch.tensor([number]) for number in (positives, appealed, overturned)]
        stage.observe(*counts)
        trace.append(stage.rate.item())
        single.load_state_dict(nothing)
        single.observe(*counts)
        estimates.append(single.rate.item() if single.estimated else None)
    return {"fn_rate_estimates": estimates, "fn_rate_trace": trace}


def tiers(inputs: Values) -> Values:
    found = box_field(tensor(inputs["point"]), tensor(inputs["box"]))
    options = {"zones": inputs["zones"], "amplification": inputs["amplification"]}
    shares = [
        [block_shares(sample, truth, inputs["block"]) for sample in group]
        for group, truth in zip(inputs["prediction"], inputs["truth"], strict=True)
    ]
    done = tensor(inputs["prediction"]).eq(tensor(inputs["truth"]).unsqueeze(1)).all(-1).double()
    means = tensor(shares).mean(-1)
    progress = sweet_spot(means, shares, aggregate="tiers", alpha=1.0, **options)
    tiered = sweet_spot(means, shares, aggregate="tiers", alpha=inputs["alpha"], **options)
    return {
        "mahalanobis2": found.distance,
        "field": found.closeness,
        "zone": zone_of(found.closeness, inputs["zones"]),
        "inside": found.inside.double(),
        "reward_distance": found.inside + sweet_spot(found.closeness, alpha=inputs["alpha"], **options),
        "block_match": shares,
        "progress": progress,
        "done": done,
        "reward_progress": done + tiered,
    }


def denoising(inputs: Values) -> Values:
    return {"ddim_step": ddim, "flow_sde_step": flow, "losses": denoising_losses, "cfg": guidance}[inputs["kind"]](
        inputs
    )


def ddim(inputs: Values) -> Values:
    x, output, after = (tensor(inputs[name]) for name in ("x_t", "model_output", "x_prev"))
    levels = (inputs["alpha_bar_t"], inputs["alpha_bar_prev"])
    step = ddim_step(x, output, *levels, inputs["eta"], inputs["prediction_type"])
    logp = {f"logp_{r}": gaussian_log_prob(after, step.mean, step.std, r) for r in ("mean", "sum")}
    return {"pred_x0": step.x0, "pred_eps": step.eps, "mean": step.mean, "std": step.std.item(), **logp}


def flow(inputs: Values) -> Values:
    x, velocity, after = (tensor(inputs[name]) for name in ("x_t", "velocity", "x_prev"))
    sigma, sigma_next, second = (tensor(inputs[name]) for name in ("sigma", "sigma_next", "sigma_second"))
    noise_of = flow_grpo_std(inputs["noise_level"])
    # a case stands alone, so the second time of its grid is given: the one that follows where sigma is 1
    step = flow_sde_step(x, velocity, sigma, sigma_next, lambda now, _: noise_of(now, second))
    logp = {f"logp_{r}": gaussian_log_prob(after, step.mean, step.std, r) for r in ("mean", "sum")}
    return {"sigma_t": noise_of(sigma, second), "mean": step.mean, "std": step.std.item(), **logp}


def denoising_losses(inputs: Values) -> Values:
    x0, drawn, output, alpha_bar, sigma = (
        tensor(inputs[name]) for name in ("x0", "noise", "model_output", "alpha_bar", "sigma")
    )
    v = v_target(x0, drawn, alpha_bar)
    return {
        "x_t": add_noise(x0, drawn, alpha_bar),
        "loss_epsilon": denoising_loss(output, drawn),
        "v_target": v,
        "loss_v": denoising_loss(output, v),
        "x_sigma": interpolate(x0, drawn, sigma),
        "loss_flow": denoising_loss(output, drawn - x0),
    }


def guidance(inputs: Values) -> Values:
    return {"guided": guide(tensor(inputs["uncond"]), tensor(inputs["cond"]), inputs["scale"])}


def image_baselines(inputs: Values) -> Values:
    if "sigmas" in inputs:
        return denoising_steps(inputs)
    if "reward_rounds" in inputs:
        return trackers(inputs)
    return image_losses(inputs)


def denoising_steps(inputs: Values) -> Values:
    x, v, v_ref, x_next = (tensor(inputs[name]) for name in ("x", "v", "v_ref", "x_next"))
    sigma, after = (tensor(inputs["sigmas"][inputs["index"] + i]) for i in (0, 1))
    std_fn = flow_grpo_std(inputs["noise_level"])
    step = flow_sde_step(x, v, sigma, after, std_fn)
    reference = flow_sde_step(x, v_ref, sigma, after, std_fn)
    dance = flow_sde_step(x, v, sigma, after, dance_std(inputs["eta"]))
    return {
        "flow_mean": step.mean,
        "flow_std_dev": std_fn(sigma, after),
        "flow_logp_mean": gaussian_log_prob(x_next, step.mean, step.std),
        "flow_kl": gaussian_kl(step.mean, reference.mean, step.std, time_step=sigma - after),
        "dance_x0": dance.x0,
        "dance_logp_mean": gaussian_log_prob(x_next, dance.mean, dance.std),
    }


def trackers(inputs: Values) -> Values:
    tracker = prompt_tracker(size=inputs["buffer_size"], min_count=inputs["min_count"])
    found: Values = {"ddpo": [], "flow_group_std": [], "flow_global_std": []}
    for rewards in map(tensor, inputs["reward_rounds"]):
        indices = list(range(len(rewards)))
        found["ddpo"].append(tracker(rewards, indices).tolist())
        tracker.observe(rewards, indices)
        found["flow_group_std"].append(group_advantages(rewards, bessel=False).tolist())
        found["flow_global_std"].append(group_advantages(rewards, scale="batch", bessel=False).tolist())
    return found


def image_losses(inputs: Values) -> Values:
    logp, logp_old, kl = (tensor(inputs[name]) for name in ("logp", "logp_old", "kl"))
    advantages, rewards, error = (tensor(inputs[name]) for name in ("advantages", "rewards", "fm_error"))
    mask, beta = torch.ones_like(logp).bool(), inputs["beta_kl"]
    clips = {"clip_low": inputs["clip"], "clip_high": inputs["clip"], "advantage_clip": inputs["adv_clip"]}
    variable = logp.clone().requires_grad_()
    clipped = policy_gradient(variable, logp_old, advantages, mask, **clips)
    loss = clipped.total / clipped.count
    loss.backward()
    penalised = policy_gradient(logp, logp_old, advantages, mask, kl=kl, beta=beta, kl_estimator="exact", **clips)
    # the score function is DPOK's loss without a divergence, per step in place of per sample
    plain = dpok(logp, logp_old, advantages, mask, kl, beta=0.0)
    whole = dpok(logp, logp_old, rewards, mask, kl, beta=beta)
    weighted = reward_weighted(rewards, error, temperature=1 / inputs["rwr_temp"])
    return {
        "ddpo_is": loss,
        "ddpo_is_grad": variable.grad,
        "ddpo_sf": plain.total / plain.count / logp.shape[2],
        "flow_grpo": penalised.total / penalised.count,
        "dpok": whole.total / whole.count,
        "rwr": weighted.total / weighted.count,
    }


def reward_difference(inputs: Values) -> Values:
    logp, logp_old, logp_ref, rewards = (tensor(inputs[name]) for name in ("logp", "logp_old", "logp_ref", "rewards"))
    mask = tensor(inputs["mask"]).bool() if "mask" in inputs else torch.ones_like(logp).bool()
    options = {"beta": inputs["beta"], "clip": inputs["eps"]}
    logp.requires_grad_()
    found = prdp(logp, logp_old, logp_ref, rewards, mask, **options)
    loss = found.total / found.count
    loss.backward()
    pairs = reward_pairs(logp.detach(), logp_old, logp_ref, rewards, mask, **options)
    return {
        "loss": loss,
        "pair_unclipped": pairs.unclipped[pairs.kept],
        "pair_clipped": pairs.clipped[pairs.kept],
        "grad_logp": logp.grad,
    }


def anchored_values(inputs: Values) -> Values:
    names = ("gamma", "k", "first_n", "eps", "eps_w", "use_step_weights", "mix")
    rewards = tensor(inputs["instant_rewards"])
    stage = value_anchored(**{name: inputs[name] for name in names if name in inputs})
    found = stage(rewards, torch.ones_like(rewards).bool())
    return {"q": found.action_values, "omega": found.step_weights, "advantages": found.advantages}


def preferences(inputs: Values) -> Values:
    if "testpoints" in inputs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that the suite does not know
            report = SuiteReport.from_judgements(inputs["testpoints"], inputs["scores"])
        return {"primary": report.primary, "sub": report.sub}
    rates = win_rates(tensor(inputs["outcomes"]), round_digits=3)
    scores = torch.stack([rates, tensor(inputs["second_reward"])], -1)[None]
    weight = inputs["weight_second"]
    both = normalise_then_sum(scores, tensor([1 - weight, weight]), eps=1e-8, whiten=False)
    return {
        "win_rate_rounded3": rates,
        "advantages": grpo(rates[None], eps=1e-8)[0],
        "weighted_advantages": both[0],
    }


def contrastive(inputs: Values) -> Values:
    logp, logp_ref = (tensor(inputs[name]).unsqueeze(-1) for name in ("logp", "logp_ref"))
    given = (logp.requires_grad_(), logp_ref, tensor(inputs["rewards"]), torch.ones_like(logp).bool())
    found = copg(*given, beta=inputs["beta"])
    loss = found.total / found.count
    loss.backward()
    parts = contrast(*given, beta=inputs["beta"])
    assert logp.grad is not None
    return {
        "objective_per_prompt": parts.objective.detach(),
        "loss": loss.item(),
        "grad_logp": logp.grad.squeeze(-1),
        "regularised_reward": parts.regularised,
    }


def _spread(means: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences of the given lengths in which every token has the mean log-probability."""
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return means[:, None].expand(mask.shape), mask


def _pair_by_pair(function: Callable[..., Any], *fields: Tensor, **options: Any) -> Tensor:
    """The loss of each pair alone."""
    rows = range(len(fields[0]))
    return torch.stack([function(*(f[b : b + 1] for f in fields), **options).total for b in rows])


def preference_losses(inputs: Values) -> Values:
    kind = inputs["loss_type"]
    if kind == "kto":
        return _unpaired(inputs)
    if kind == "diffusion_dpo":
        return _image_pairs(inputs)
    if kind == "orpo":
        return _odds(inputs)
    if kind.startswith("cpo_"):
        return _contrastive_preferences(inputs)
    smoothing = {"label_smoothing": inputs["label_smoothing"]}
    losses: dict[str, tuple[Callable[..., Any], Values]] = {
        "sigmoid": (dpo, smoothing),
        "robust": (dpo, {**smoothing, "robust": True}),
        "ipo": (ipo, {"average_log_prob": False}),
        "hinge": (slic, {}),
        "sppo_hard": (sppo, {}),
        "exo_pair": (exo, smoothing),
        "nca_pair": (nca, {}),
        "aot": (aot, smoothing),
        "aot_pair": (aot, {**smoothing, "paired": False}),
    }
    function, options = losses[kind]
    names = ("logp_chosen", "logp_rejected", "ref_logp_chosen", "ref_logp_rejected")
    sums = [tensor(inputs[name])[:, None] for name in names]
    sums = [*(value.requires_grad_() for value in sums[:2]), *sums[2:]]
    live = torch.ones_like(sums[0]).bool()
    options = {"beta": inputs["beta"], **options}
    found = function(*sums, live, live, **options)
    loss = found.total / found.count
    loss.backward()
    with torch.no_grad():
        if kind in ("aot", "aot_pair"):  # of the quantiles, which belong to no pair
            chosen, rejected, ref_chosen, ref_rejected = (value[:, 0] for value in sums)
            first, second = chosen - rejected, ref_chosen - ref_rejected
            if kind == "aot_pair":
                first, second = chosen - ref_chosen, rejected - ref_rejected
            delta = (first.sort().values - second.sort().values)[:, None]
            zero = torch.zeros_like(delta)
            each = _pair_by_pair(dpo, delta, zero, zero, zero, live, live, beta=inputs["beta"], **smoothing)
        else:
            each = _pair_by_pair(function, *sums, live, live, **options)
    return {
        "losses": each,
        "loss": loss,
        "grad_logp_chosen": sums[0].grad[:, 0],
        "grad_logp_rejected": sums[1].grad[:, 0],
    }


def _contrastive_preferences(inputs: Values) -> Values:
    sides = [
        _spread(tensor(inputs[f"logp_{side}"]) / tensor(inputs[f"length_{side}"]), tensor(inputs[f"length_{side}"]))
        for side in ("chosen", "rejected")
    ]
    fields = [*(logp for logp, _ in sides), *(mask for _, mask in sides)]
    kind, weight = inputs["loss_type"].removeprefix("cpo_"), inputs["nll_weight"]
    common = {"beta": inputs["beta"], "label_smoothing": inputs["label_smoothing"]}
    found = cpo(*fields, beta=inputs["beta"], nll_weight=weight)
    if kind == "simpo":
        options = {**common, "gamma_beta_ratio": inputs["simpo_gamma"] / inputs["beta"]}
        each = _pair_by_pair(simpo, *fields, **options)
    else:
        each = _pair_by_pair(cpo, *fields, **common, loss_type=kind, nll_weight=0.0)
    nll = found.metrics["nll"]
    return {"losses": each, "nll": nll, "loss": each.mean() + weight * nll}


def _odds(inputs: Values) -> Values:
    chosen, rejected = (tensor(inputs[f"avg_logp_{side}"]).requires_grad_() for side in ("chosen", "rejected"))
    logp, mask = _spread(chosen, tensor(inputs["length_chosen"]))
    live = torch.ones_like(rejected)[:, None].bool()
    fields = (logp, rejected[:, None], mask, live)
    found = orpo(*fields, beta=inputs["beta"])
    loss = found.total / found.count
    loss.backward()
    with torch.no_grad():
        rows = [[f[b : b + 1] for f in fields] for b in range(len(chosen))]
        ratios = torch.stack([orpo(*row, beta=inputs["beta"]).metrics["log_odds_ratio"] for row in rows])
    return {
        "log_odds_ratio": ratios,
        "nll": found.metrics["nll"],
        "loss": loss,
        "grad_avg_logp_chosen": chosen.grad,
        "grad_avg_logp_rejected": rejected.grad,
    }


def _unpaired(inputs: Values) -> Values:
    logp, ref, other, other_ref = (
        tensor(inputs[name])[:, None, None] for name in ("logp", "ref_logp", "kl_logp", "ref_kl_logp")
    )
    logp, other, live = logp.requires_grad_(), other.requires_grad_(), torch.ones_like(ref).bool()
    desirable = torch.tensor(inputs["desirable"])[:, None]
    point = kto_reference_point(other, other_ref, live)
    options = {"beta": inputs["beta"], **{name: inputs[name] for name in ("desirable_weight", "undesirable_weight")}}
    found = kto(logp, ref, desirable, live, point, **options)
    loss = found.total / found.count
    grad, grad_other = torch.autograd.grad(loss, (logp, other), allow_unused=True)
    rows = [slice(n, n + 1) for n in range(len(logp))]
    with torch.no_grad():
        each = [kto(logp[r], ref[r], desirable[r], live[r], point, **options).total for r in rows]
    return {
        "kl": point,
        "losses": torch.stack(each),
        "loss": loss,
        "grad_logp": grad.flatten(),
        "grad_kl_logp": torch.zeros(len(logp)) if grad_other is None else grad_other.flatten(),
    }


def _image_pairs(inputs: Values) -> Values:
    given = {
        name: tensor(inputs[name]) for name in ("target_w", "target_l", "pred_w", "pred_l", "ref_pred_w", "ref_pred_l")
    }
    for name in ("pred_w", "pred_l"):
        given[name].requires_grad_()
    errors = [
        (given[f"{kind}_{side}"] - given[f"target_{side}"]).square().mean(-1)
        for kind in ("pred", "ref_pred")
        for side in "wl"
    ]
    found = diffusion_dpo(*errors, beta=inputs["beta"])
    loss = found.total / found.count
    loss.backward()
    with torch.no_grad():
        each = _pair_by_pair(diffusion_dpo, *errors, beta=inputs["beta"])
    return {
        "losses": each,
        "loss": loss,
        "implicit_accuracy": found.metrics["implicit_accuracy"],
        "grad_pred_w": given["pred_w"].grad,
        "grad_pred_l": given["pred_l"].grad,
    }


def length_normalised_preferences(inputs: Values) -> Values:
    logps = [tensor(inputs[f"logp_{side}"]).requires_grad_() for side in ("chosen", "rejected")]
    masks = [tensor(inputs[f"mask_{side}"]).bool() for side in ("chosen", "rejected")]
    options = {name: inputs[name] for name in ("beta", "gamma_beta_ratio", "label_smoothing", "loss_type")}
    found = simpo(*logps, *masks, **options)
    loss = found.total / found.count
    loss.backward()
    with torch.no_grad():
        each = _pair_by_pair(simpo, *logps, *masks, **options)
        means = sequence_logp("simpo", *logps, *masks, average=True)
    assert found.implicit is not None
    return {
        "avg_logp_chosen": means.chosen,
        "avg_logp_rejected": means.rejected,
        "losses": each,
        "loss": loss,
        "chosen_rewards": found.implicit[:, 0],
        "rejected_rewards": found.implicit[:, 1],
        "grad_logp_chosen": logps[0].grad,
        "grad_logp_rejected": logps[1].grad,
    }


def implicit_rewards(inputs: Values) -> Values:
    if "level" not in inputs:
        actions = torch.tensor(inputs["actions"])
        now, then = (read_logits(tensor(inputs[name]), actions) for name in ("logits", "ref_logits"))
        found = q_values(*now, then.logp, torch.ones_like(actions).bool(), beta=inputs["beta"])
        return {
            "V": found.value,
            "Q_taken": found.q,
            "advantage": found.advantage,
            "token_reward_maxent": found.reward,
            "token_reward_kl": found.reward_kl,
            "sum_identity": (found.reward.sum() - found.value[0] - found.advantage.sum()).item(),
        }
    mask, options = tensor(inputs["mask"]).bool(), {name: inputs[name] for name in ("divergence", "beta")}
    if inputs["level"] == "value":
        logits, reference = tensor(inputs["logits"]).requires_grad_(), tensor(inputs["ref_logits"])
        actions = torch.tensor(inputs["actions"])
        options |= {"centre": inputs["centre"], "denominator": "per_sample"}
        fields = (*read_logits(logits, actions), *read_logits(reference, actions), mask)
        terms = value_terms(*fields, beta=inputs["beta"], centre=inputs["centre"])
        loss = demonstration_value(*fields, **options)
        mean = loss.total / loss.count
        mean.backward()
        each = _each_demonstration(demonstration_value, *fields, **options)
        return {
            "implicit_reward": terms.reward,
            "value_start": terms.start,
            "losses": each,
            "loss": mean,
            "grad_logits": logits.grad,
        }
    logp, logp_ref, level = tensor(inputs["logp"]).requires_grad_(), tensor(inputs["logp_ref"]), inputs["level"]
    loss = demonstration(logp, logp_ref, mask, level=level, **options)
    mean = loss.total / loss.count
    mean.backward()
    each = _each_demonstration(demonstration, logp, logp_ref, mask, level=level, **options)
    token = (inputs["beta"] * (logp.detach() - logp_ref)).where(mask, 0.0)
    return {
        "implicit_reward": token if level == "token" else loss.implicit,
        "losses": each / mask.sum(-1).clamp(min=1) if level == "token" else each,
        "loss": mean,
        "grad_logp": logp.grad,
    }


def _each_demonstration(function: Callable[..., Any], *fields: Tensor, **options: Any) -> Tensor:
    """The loss of each sample, from the totals of pairs: a sample without live steps is refused where it is alone."""
    live = int(fields[-1].any(-1).nonzero()[0])
    alone = function(*(f[[live]] for f in fields), **options).total
    pairs = (function(*(f[[b, live]] for f in fields), **options).total - alone for b in range(len(fields[0])))
    return torch.stack([alone if b == live else other for b, other in enumerate(pairs)])


def token_guidance(inputs: Values) -> Values:
    sides = ("chosen", "rejected")
    logps, refs, guides = (
        [tensor(inputs[f"{name}_{side}"]) for side in sides] for name in ("logp", "ref_logp", "guide_logp")
    )
    masks = [tensor(inputs[f"mask_{side}"]).bool() for side in sides]
    options = {name: inputs[name] for name in ("beta", "alpha")}
    fields = [*(logp.requires_grad_() for logp in logps), *refs, *guides, *masks]
    found = tgdpo(*fields, **options)
    loss = found.total / found.count
    loss.backward()
    with torch.no_grad():
        each = _pair_by_pair(tgdpo, *fields, **options)
        rewards = [
            (inputs["beta"] * (logp - ref)).where(mask, 0.0) for logp, ref, mask in zip(logps, refs, masks, strict=True)
        ]
    assert found.implicit is not None
    assert torch.allclose(found.implicit, torch.stack([side.sum(-1) for side in rewards], -1))
    return {
        "losses": each,
        "loss": loss,
        **{f"token_rewards_{side}": value for side, value in zip(sides, rewards, strict=True)},
        **{f"grad_logp_{side}": logp.grad for side, logp in zip(sides, logps, strict=True)},
    }


def self_improvement(inputs: Values) -> Values:
    names = ("w", "l", "w_given_w", "l_given_w", "w_given_l", "l_given_l")
    logps, refs = ([tensor(inputs[f"{of}_{name}"])[:, None] for name in names] for of in ("logp", "ref_logp"))
    live = torch.ones_like(logps[0], dtype=torch.bool)
    options = {name: inputs[name] for name in ("beta", "alpha", "gen_scale") if name in inputs}
    fields = [*(logp.requires_grad_() for logp in logps), *refs, live, live]
    fields += [tensor(inputs["preference"])] if "preference" in inputs else []
    found = srpo(*fields, **options)
    loss = found.total / found.count
    loss.backward()
    sides = [
        Sides(*(a.detach() - b for a, b in zip(logps[i : i + 2], refs[i : i + 2], strict=True))) for i in (0, 2, 4)
    ]
    terms = srpo_terms(*(Sides(*(part[:, 0] for part in pair)) for pair in sides), *fields[14:], beta=inputs["beta"])
    assert torch.allclose(found.metrics["generative_loss"], terms.generative.mean())
    assert torch.allclose(found.metrics["self_improvement_loss"], terms.self_improvement.mean())
    return {
        "losses": _pair_by_pair(srpo, *fields, **options),
        "loss": loss,
        "generative_loss": terms.generative,
        "self_improvement_loss": terms.self_improvement,
        **{f"grad_logp_{name}": logp.grad[:, 0] for name, logp in zip(names, logps, strict=True)},
    }


def reward_gradients(inputs: Values) -> Values:
    times, levels, noise, target = (tensor(inputs[name]) for name in ("times", "alpha_bar", "noise", "target"))
    u, eta, outputs = tensor(inputs["u"]), inputs["eta"], {}

    for cut in inputs["start"]:
        weight, bias = (tensor(inputs[name]).requires_grad_() for name in ("W", "b"))

        def step(x: Tensor, i: int, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            eps = (x @ weight.T + bias + times[i] * u).tanh()
            found = ddim_step(x, eps, levels[i].item(), levels[i + 1].item(), eta)
            return found.mean + found.std * noise[i]

        x0 = unroll(step, tensor(inputs["x_T"]), len(times), cut=cut)
        reward = -(x0 - target).square().sum(-1)
        loss = -reward.mean()
        loss.backward()
        outputs[str(cut)] = {
            "x0": x0.detach(),
            "reward": reward.detach(),
            "loss": loss.item(),
            "grad_W": weight.grad,
            "grad_b": bias.grad,
        }
    return outputs


def noise_search(inputs: Values) -> Values:
    matrix, bias, vectors = (tensor(inputs[name]) for name in ("A", "b", "reward_vectors"))
    names = [str(k) for k in range(len(vectors))]
    seen: list[Tensor] = []
    found = optimise_noise(
        lambda z: (z @ matrix.T + bias).tanh(),
        tensor(inputs["z0"])[None],
        {name: lambda images, vector=vector: images @ vector for name, vector in zip(names, vectors, strict=True)},
        weights=dict(zip(names, inputs["weights"], strict=True)),
        offsets=dict(zip(names, inputs["offsets"], strict=True)),
        iterations=inputs["n_iters"],
        lr=inputs["lr"],
        momentum=inputs["momentum"],
        nesterov=inputs["nesterov"],
        grad_clip=inputs["grad_clip"],
        norm_weight=inputs["reg_weight"],
        on_iteration=lambda i, noise, images, loss: seen.append(noise[0]),
    )
    losses = found.loss[:, 0]
    return {
        "latents": torch.stack(seen),
        "reward_loss": losses,
        "best_index": int(found.best[0]),
        "initial": losses[0].item(),
        "best": losses[found.best[0]].item(),
    }


def adaptive_weights(inputs: Values) -> Values:
    if inputs["kind"] == "gradient":
        stage = GradientAlignment(
            weights=inputs["weights"], mu=inputs["mu"], accumulate=inputs["accumulate"], clip_norm=None
        )
        found: Values = {"influence": [], "weights": []}
        for gradients in map(tensor, inputs["gradients"]):
            found["influence"].append(influence(gradients).tolist())
            stage.adapt(gradients @ gradients.T, inputs["lr"])
            found["weights"].append(stage.weights.tolist())
        return found
    names = [str(k) for k in range(len(inputs["reference"]))]
    stage = Hypervolume(maximise=dict(zip(names, inputs["maximise"], strict=True)), normalise=False)
    stage.validate(tensor(inputs["reference"]), names)
    found = {"contribution": [], "meta_reward": [], "kept": []}
    for point in inputs["stream"]:
        before, size = stage.hypervolume(), len(stage.front)
        stage.validate(tensor(point), names)
        found["contribution"].append(stage.hypervolume() - before)
        found["meta_reward"].append(stage.scale)
        found["kept"].append(len(stage.front) > size)
    return {**found, "hypervolume": stage.hypervolume(), "pareto_front": stage.pareto_front().tolist()}


def density_ratios(inputs: Values) -> Values:
    mask = tensor(inputs["mask"]) != 0
    strong, weak = (summed_logp(tensor(inputs[f"logp_{name}"]), mask) for name in ("strong", "weak"))
    reward = log_density_ratio(strong, weak)
    picked = pick_pair(reward.tolist(), [str(n) for n in range(len(reward))], rejected="worst")
    return {
        "reward_sum": reward,
        "reward_mean": log_density_ratio(strong, weak, normalise="mean"),
        "chosen_index": picked.chosen,
        "worst_index": picked.rejected,
    }


def text_feedback(inputs: Values) -> Values:
    if inputs["kind"] == "align":
        rewards, unmatched = align_spans(inputs["text"], inputs["offsets"], inputs["spans"])
        return {"token_rewards": rewards, "unmatched": unmatched}
    if inputs["kind"] == "length":
        scores = tensor(inputs["scores"])
        weights = length_weight(scores, torch.tensor(inputs["suggested"]), alpha=float(inputs["alpha"]))
        return {"weights": weights, "scores": scores * weights}
    names = ("logp_old", "logp_ref", "logp", "values_old", "values", "token_rewards")
    # one sample a prompt: [B, T] as [P, 1, T]
    old, ref, logp, values_old, values, delta = (tensor(inputs[name]).unsqueeze(1) for name in names)
    mask = tensor(inputs["mask"]).bool().unsqueeze(1)
    beta = inputs["kl_coef"]
    found = gae(delta, values_old, mask, old, ref, gamma=inputs["gamma"], lam=inputs["lam"], beta=beta, whiten=False)
    # the numbers have the whitening of masked steps as well, and the divergence's price there, which no loss reads
    live = found.advantages[mask]
    advantages = (found.advantages - live.mean()) * (live.var() + 1e-8).rsqrt()
    losses = [
        ppo(
            logp,
            old,
            advantages,
            values,
            values_old,
            found.returns,
            mask,
            clip_low=inputs["clip"],
            clip_high=inputs["clip"],
            value_clip=inputs["clip_value"],
            value_coefficient=coefficient,
        )
        for coefficient in (0.0, inputs["vf_coef"])
    ]
    policy_loss, whole = (loss.total / loss.count for loss in losses)
    return {
        "rewards": (delta.where(mask, 0.0) - beta * (old - ref)).squeeze(1),
        "advantages": advantages.squeeze(1),
        "returns": found.returns.squeeze(1),
        "policy_loss": policy_loss,
        "value_loss_times_coef": whole - policy_loss,
    }


def reward_expressions(inputs: Values) -> Values:
    if inputs["kind"] == "stages":
        return {"primitives": [thirds(tensor(steps)) for steps in inputs["step_scores"]]}
    if inputs["kind"] == "outer":
        feedback = torch.where(torch.tensor(inputs["valid"]), tensor(inputs["performance"]), 0.0)
        advantages = grpo(feedback[None], eps=1e-6)[0]
        return {"feedback": feedback, "advantages": advantages, "best": int(feedback.argmax())}
    primitives = tensor(inputs["primitives"])
    found: Values = {"valid": [], "values": []}
    for text in inputs["expressions"]:
        try:
            values = RewardExpression.parse(text, primitives.shape[-1])(primitives).tolist()
        except RecipeError:
            values = None
        found["valid"].append(values is not None)
        found["values"].append(values)
    return found


ADAPTERS: dict[str, Callable[[Values], Values]] = {
    "alignprop": reward_gradients,
    "arena-rl": tournaments,
    "cdr": density_ratios,
    "derl": reward_expressions,
    "copg": contrastive,
    "dynamic-weighting": adaptive_weights,
    "copo": consistency,
    "diffusion-base": denoising,
    "diffusion-rl-base": image_baselines,
    "dpo-family": preference_losses,
    "grpo-family": grpo_family,
    "noisy-verifier": noise,
    "par": shaped_rewards,
    "constrained-rlhf": constrained,
    "quark-medical": tri_factors,
    "prdp": reward_difference,
    "pref-grpo": preferences,
    "real": labels,
    "reno": noise_search,
    "implicit-reward": implicit_rewards,
    "simpo": length_normalised_preferences,
    "srpo": self_improvement,
    "text2grad": text_feedback,
    "tgdpo": token_guidance,
    "sweet-spot": tiers,
    "vade": variance_aware,
    "vgpo": anchored_values,
}

# files whose numbers were made in single precision: relative and absolute tolerance
TOLERANCES: dict[str, float] = {
    "arena-rl": 1e-5,
    "diffusion-rl-base": 1e-4,
    "par": 1e-5,
    "pref-grpo": 1e-6,
    "reno": 1e-4,
}
