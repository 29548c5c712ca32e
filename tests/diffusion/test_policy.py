"""The policy: what it samples, what it scores, and that the two agree."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from guerdon.advantages import grpo
from guerdon.diffusion import policy as policies
from guerdon.diffusion.draws import path_noise, plan
from guerdon.diffusion.policy import DenoisingPolicy
from guerdon.errors import CheckpointError, DataError, RecipeError, ShapeError
from guerdon.objectives import policy_gradient
from guerdon.rollout import Rollout, join
from guerdon.signal import Signal
from guerdon.training.online import Online
from guerdon.training.optimisation import Optim
from guerdon.training.policy import Policy
from guerdon.training.supervised import Supervised
from tests.diffusion.pipelines import unet

CAPTIONS = ("red", "green", "blue")
KINDS = ("diffusion", "flow")


def scheduler(kind: str) -> Any:
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False)


def policy(kind: str = "flow", *, network: Any = None, **settings: Any) -> DenoisingPolicy:
    """Four steps over a small random network; its outputs are stirred, so that they depend on state, time and class."""
    network = unet() if network is None else network
    settings = {"steps": 4, "captions": CAPTIONS, **settings}
    made = DenoisingPolicy.load(network, scheduler=scheduler(kind), **settings)
    with torch.no_grad():
        made.model.conv_out.weight.mul_(5)
        made.model.class_embedding.weight.mul_(3)
    return made


def stir(made: DenoisingPolicy, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def latents(made: DenoisingPolicy, *arguments: Any, **options: Any) -> Tensor:
    return made.sample(*arguments, **options).steps["latents"]


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_has_the_shapes_it_promises(kind):
    made = policy(kind)
    assert isinstance(made, Policy)
    rollout = made.sample(["red", "blue"], 3, [1, 2]).validate()
    assert rollout.steps["latents"].shape == (2, 3, 5, 3, 8, 8)
    assert rollout.steps["condition_label"].tolist() == [0, 2]
    assert not rollout.steps["latents"].requires_grad
    assert rollout.mask.shape == rollout.logp_old.shape == (2, 3, 4)
    # the last step of both has no noise: nothing would take it away again
    assert rollout.mask[..., :3].all()
    assert not rollout.mask[..., 3].any()
    assert (rollout.logp_old[..., 3] == 0).all()
    assert (rollout.logp_old[..., :3] != 0).all()
    for group in rollout.samples:
        for image in group:
            assert image.shape == (3, 8, 8)
            assert 0 <= image.min() < image.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_on_its_seed_alone(kind):
    made = policy(kind, guidance=2.0)
    both = latents(made, ["red", "blue"], 3, [7, 8])
    alone = latents(made, ["blue"], 2, [8])
    torch.testing.assert_close(both[1:, :2], alone, rtol=1e-5, atol=1e-5)
    again = latents(made, ["red", "blue"], 3, [7, 8])
    assert torch.equal(both, again)
    assert (latents(made, ["red"], 3, [9]) - both[:1]).abs().amax() > 0.1
    # members of a group differ from the start
    assert (both[0, 0, 0] - both[0, 1, 0]).abs().amax() > 0.1


def test_sampling_in_parts_changes_nothing():
    whole, parts = policy(guidance=2.0), policy(guidance=2.0, sample_batch=2)
    found, expected = (made.sample(["red", "blue"], 3, [7, 8]) for made in (parts, whole))
    torch.testing.assert_close(found.steps["latents"], expected.steps["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logp_old, expected.logp_old, rtol=1e-5, atol=1e-5)


def test_a_group_may_share_its_first_state():
    made = policy(shared_noise=True)
    found = latents(made, ["red", "blue"], 3, [1, 2])
    assert torch.equal(found[:, 0, 0], found[:, 2, 0])
    assert not torch.equal(found[:, 0, 1], found[:, 2, 1])
    assert not torch.equal(found[0, 0, 0], found[1, 0, 0])
    assert torch.equal(found[:, 0, 0], latents(policy(), ["red", "blue"], 1, [1, 2])[:, 0, 0])


def test_the_deterministic_sampler():
    made = policy(eval_steps=6)
    found = made.sample(["red", "blue"], 2, [1, 2], greedy=True).validate()
    assert found.mask.shape == (2, 2, 6)
    assert not found.mask.any()
    # Euler's method from the same first state as a training sample
    x = latents(made, ["red", "blue"], 2, [1, 2])[:, :, 0].flatten(0, 1)
    condition = {"label": torch.tensor([0, 0, 2, 2])}
    grid = made.process.grid(6)
    for i in range(6):
        x = x + made.predict(x, grid.times[i], condition).detach() * float(grid.levels[i + 1] - grid.levels[i])
    torch.testing.assert_close(found.steps["latents"].flatten(0, 2), x, rtol=1e-4, atol=1e-5)
    assert made.log_prob(found).logp.abs().sum() == 0


def test_the_mean_of_a_step_is_where_the_noise_is_added():
    made = policy()
    rollout = made.sample(["red"], 1, [3])
    states = rollout.steps["latents"][0]
    noise = path_noise([3], 1, 5, (3, 8, 8))[0]
    assert torch.equal(states[:, 0], noise[:, 0])
    step = made.step(states[:, 1], {"label": torch.tensor([0])}, made.process.grid(4), 1)
    torch.testing.assert_close(states[:, 2], (step.mean + step.std * noise[:, 2]).detach(), rtol=1e-5, atol=1e-6)


# -- scoring -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("guidance", "reduction"), [(0.0, "mean"), (1.0, "sum"), (3.0, "mean")])
def test_scoring_finds_what_sampling_found(kind, reduction, guidance):
    made = policy(kind, logp_reduction=reduction, guidance=guidance)
    rollout = made.sample(["red", "blue"], 3, [1, 2])
    out = made.log_prob(rollout)
    # several steps are scored in one batch, whose size may change the last bits of a network's output
    torch.testing.assert_close(out.logp.detach(), rollout.logp_old, rtol=3e-6, atol=3e-6)
    assert (out.logp == 0).equal(rollout.logp_old == 0)
    assert out.logp.requires_grad
    assert out.entropy is out.values is out.kl is None


def test_the_ratio_at_equal_parameters_is_1():
    network = unet()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    made = policy(network=network)
    made.train()  # what loops and wrappers do
    rollout = made.sample(["red", "blue"], 2, [1, 2])
    first, second = made.log_prob(rollout).logp, made.log_prob(rollout).logp
    assert torch.equal((first - second).exp(), torch.ones_like(first))
    torch.testing.assert_close((first - rollout.logp_old).exp(), torch.ones_like(first), rtol=0, atol=1e-5)
    loss = policy_gradient(first, second.detach(), torch.tensor([[1.0, -2.0], [0.5, 3.0]]), rollout.mask)
    assert (loss.total / loss.count).item() == pytest.approx(-(1 - 2 + 0.5 + 3) / 4)


def test_log_probabilities_by_hand():
    made = policy()
    rollout = made.sample(["red"], 1, [3])
    x = rollout.steps["latents"][0, 0]
    grid = made.process.grid(4)
    i, condition = 2, {"label": torch.tensor([0])}
    sigma, after = float(grid.levels[i]), float(grid.levels[i + 1])
    v = made.denoiser.predict(made.model, x[i : i + 1], torch.tensor([1000 * sigma]), condition)[0].double()
    s, dt = 0.7 * math.sqrt(sigma / (1 - sigma)), after - sigma
    mean = x[i] * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    std = s * math.sqrt(-dt)
    density = torch.distributions.Normal(mean, std).log_prob(x[i + 1].double())
    assert rollout.logp_old[0, 0, i].item() == pytest.approx(density.mean().item(), rel=1e-4)


def test_sum_is_mean_times_dimensions():
    mean, total = (policy(logp_reduction=r).sample(["red"], 2, [1]) for r in ("mean", "sum"))
    assert torch.equal(mean.steps["latents"], total.steps["latents"])
    torch.testing.assert_close(total.logp_old, mean.logp_old * 3 * 8 * 8)


def test_masked_steps_are_nothing():
    made = policy()
    rollout = made.sample(["red", "blue"], 2, [1, 2])
    full = made.log_prob(rollout).logp
    mask = rollout.mask.clone()
    mask[0, 1, 0] = mask[1, 0, 2] = False
    mask[:, :, 1] = False
    out = made.log_prob(replace(rollout, mask=mask)).logp
    torch.testing.assert_close(out, full.where(mask, 0.0), rtol=1e-5, atol=1e-5)
    # states of masked steps may hold anything
    rollout.steps["latents"][0, 1, 0] = float("nan")
    out = made.log_prob(replace(rollout, mask=mask)).logp
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


def test_a_batch_that_is_masked_as_a_whole_still_has_a_graph():
    made = policy()
    rollout = made.sample(["red"], 2, [1])
    made.exact_kl = True
    out = made.log_prob(replace(rollout, mask=torch.zeros_like(rollout.mask)))
    assert out.logp.abs().sum() == 0
    assert out.kl is not None
    (out.logp.sum() + out.kl.sum()).backward()
    assert all(p.grad.abs().sum() == 0 for p in made.parameters() if p.grad is not None)


def test_scoring_a_part_or_a_trimmed_rollout():
    made = policy()
    rollout = made.sample(["red", "green", "blue"], 2, [1, 2, 3])
    full = made.log_prob(rollout).logp
    part = made.log_prob(rollout.select([2, 0]).trim()).logp
    assert part.shape == (2, 2, 3)
    torch.testing.assert_close(part, full[[2, 0], :, :3], rtol=1e-5, atol=1e-5)
    assert made.log_prob(join([rollout.select([0]), rollout.select([1, 2])])).logp.shape == (3, 2, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind):
    made = policy(kind, guidance=2.0, dtype="float64", logp_reduction="sum")
    rollout = made.sample(["red", "blue"], 1, [1, 2])
    assert rollout.logp_old.dtype == torch.float64
    weight = made.model.conv_in.weight
    made.log_prob(rollout).logp.sum().backward()
    expected, found = weight.grad[0, 0, 0, 0].item(), []
    for change in (1e-5, -1e-5):
        with torch.no_grad():
            weight[0, 0, 0, 0] += change
            found.append(made.log_prob(rollout).logp.sum().item())
            weight[0, 0, 0, 0] -= change
    assert (found[0] - found[1]) / 2e-5 == pytest.approx(expected, rel=1e-4)


def test_the_score_function_estimates_the_gradient_through_the_sampler():
    made = DenoisingPolicy.load(
        unet(), scheduler=scheduler("flow"), steps=4, captions=CAPTIONS, logp_reduction="sum", shared_noise=True
    )
    count, bias = 250, made.model.conv_out.bias
    rollout = made.sample(["red"], count, [1])
    reward = rollout.steps["latents"][0, :, -1].flatten(1).mean(1)
    (made.log_prob(rollout).logp[0].sum(-1) * (reward - reward.mean())).mean().backward()
    estimate = bias.grad.clone()
    made.zero_grad()
    noise = path_noise([1], count, 5, (3, 8, 8), shared=True)[0]
    x, grid, condition = noise[:, 0], made.process.grid(4), {"label": torch.zeros(count, dtype=torch.long)}
    for i in range(4):
        step = made.step(x, condition, grid, i)
        x = step.mean + step.std * noise[:, i + 1]
    x.flatten(1).mean().backward()  # the last step, without noise, is next to nothing on this grid
    torch.testing.assert_close(estimate, bias.grad, rtol=0, atol=0.08)
    assert bias.grad.max() < -0.3


def held(made: DenoisingPolicy, rollout: Rollout) -> int:
    """Bytes that scoring keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made.log_prob(rollout).logp.sum().backward()
    return sum(kept.values())


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain, saving = (
        policy(guidance=2.0, dtype="float64"),
        policy(guidance=2.0, dtype="float64", gradient_checkpointing=True),
    )
    for made in (plain, saving):
        made.keep_reference()
        made.exact_kl = True
        stir(made)
    rollout = plain.sample(["red"], 2, [1])
    for made in (plain, saving):
        out = made.log_prob(rollout)
        (out.logp + out.kl).sum().backward()
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_with_checkpointing_only_states_are_held_between_the_steps():
    sizes = {}
    for saving in (False, True):
        made = policy(steps=9, gradient_checkpointing=saving)
        runs: list[int] = []
        made.model.conv_in.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        rollout = made.sample(["red"], 4, [1])
        runs.clear()
        sizes[saving] = held(made, rollout)
        # each step once more in the backward pass; without checkpoints one batch holds them all
        assert len(runs) == (16 if saving else 1)
    assert sizes[False] > 100 * sizes[True]
    assert sizes[True] <= 2 * 8 * 4 * 3 * 8 * 8 * 4  # bytes of the states before and after each step


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_several_steps_in_one_batch_score_as_one_by_one(guidance, monkeypatch):
    made = policy(steps=6, random_share=0.5, guidance=guidance)  # another set of rows at every step
    made.keep_reference()
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    made.exact_kl = True
    rollout = made.sample(["red", "green"], 3, [1, 2])
    found = []
    for room in (policies._STATES, 1):
        monkeypatch.setattr(policies, "_STATES", room)
        runs: list[int] = []
        hook = made.model.conv_in.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        out = made.log_prob(rollout)
        hook.remove()
        made.zero_grad()
        (out.logp + out.kl).sum().backward()
        found.append((len(runs), out.logp.detach(), out.kl.detach(), *(p.grad for p in made.parameters())))
    (few, *ours), (many, *theirs) = found
    assert few < many
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


# -- steps that are not trained on -------------------------------------------------------------------------------------


def test_a_share_of_the_first_steps():
    rollout = policy(steps=10, trained_share=0.5).sample(["red"], 2, [1])
    assert rollout.mask[0, 0].tolist() == [True] * 5 + [False] * 5
    assert (rollout.logp_old[0, 0, 5:] == 0).all()
    # they are sampled with noise all the same
    everything = policy(steps=10).sample(["red"], 2, [1])
    assert torch.equal(rollout.steps["latents"], everything.steps["latents"])


def test_a_random_share_of_the_steps():
    made = policy(steps=11, random_share=0.6)
    rollout = made.sample(["red", "blue"], 4, [1, 2])
    assert (rollout.mask.sum(-1) == 6).all()  # of the ten that have noise
    assert not rollout.mask[..., -1].any()
    assert len({tuple(row) for row in rollout.mask.flatten(0, 1).tolist()}) > 4  # each sample has its own
    assert torch.equal(rollout.mask[1:], made.sample(["blue"], 4, [2]).mask)
    assert torch.equal(made.log_prob(rollout).logp != 0, rollout.mask)
    assert policy(steps=2, random_share=0.1).sample(["red"], 1, [1]).mask.sum() == 1


def test_a_window_of_noise():
    made = policy(steps=8, window=2, window_range=(0, 5), shared_noise=True)
    rollout = made.sample(["red"] * 6, 3, list(range(6)))
    assert (rollout.mask.sum(-1) == 2).all()
    starts = rollout.mask[:, 0].float().argmax(-1)
    assert len(set(starts.tolist())) > 1
    assert starts.max() <= 3
    for p, start in enumerate(starts.tolist()):
        assert torch.equal(rollout.mask[p, 0], rollout.mask[p, 2])  # the whole group has the same
        states = rollout.steps["latents"][p]
        assert torch.equal(states[0, : start + 1], states[1, : start + 1])  # and branches there
        assert not torch.equal(states[0, start + 1], states[1, start + 1])
    # outside the window the steps are Euler's
    grid, x = made.process.grid(8), rollout.steps["latents"][0, 0]
    i = (int(starts[0]) + 2) % 7
    v = made.predict(x[i : i + 1], grid.times[i], {"label": torch.tensor([0])})[0].detach()
    torch.testing.assert_close(x[i + 1], x[i] + v * float(grid.levels[i + 1] - grid.levels[i]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.log_prob(rollout).logp, rollout.logp_old, rtol=1e-5, atol=1e-5)


def test_a_plan_by_hand():
    found = plan([1], 2, (True, True, True, True, False), trained_share=0.6)
    assert found.noisy[0].tolist() == [[True] * 4 + [False]] * 2
    assert found.trained[0].tolist() == [[True] * 3 + [False] * 2] * 2
    # 99 % of ten steps are nine
    assert plan([1], 1, (True,) * 10, trained_share=0.99).trained.sum() == 9


def test_without_noise_there_is_nothing_to_learn_from():
    for made in (policy("diffusion", eta=0.0), policy("flow", noise_level=0.0), policy("flow", steps=1)):
        rollout = made.sample(["red"], 2, [1])
        assert not rollout.mask.any()
        with pytest.raises(RecipeError, match="the sampler has no noise, so its steps have no log-probabilities"):
            made.log_prob(rollout)


# -- the reference and the divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True])
def test_the_reference_is_the_policy_as_it_was(adapters):
    made = policy(guidance=2.0)
    rollout = made.sample(["red", "blue"], 2, [1, 2])
    if adapters:
        made.add_adapters(rank=2, alpha=4)
        assert sum(p.requires_grad for p in made.parameters()) == sum("lora" in n for n, _ in made.named_parameters())
    made.keep_reference()
    torch.testing.assert_close(made.reference_log_prob(rollout), rollout.logp_old)
    stir(made, 0.05)
    out = made.log_prob(rollout).logp
    assert (out - rollout.logp_old).abs().max() > 1e-4
    reference = made.reference_log_prob(rollout)
    torch.testing.assert_close(reference, rollout.logp_old)
    assert not reference.requires_grad
    assert "reference" not in " ".join(made.state_dict())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_divergence(kind, reduction):
    made = policy(kind, logp_reduction=reduction)
    rollout = made.sample(["red", "blue"], 2, [1, 2])
    made.keep_reference()
    made.exact_kl = True
    assert made.log_prob(rollout).kl.abs().max() == 0  # nothing has moved
    stir(made)
    kl = made.log_prob(rollout).kl
    assert (kl[rollout.mask] > 0).all()
    assert (kl[~rollout.mask] == 0).all()
    i, condition = 1, {"label": torch.tensor([0, 0, 2, 2])}
    x = rollout.steps["latents"][:, :, i].flatten(0, 1)
    grid = made.process.grid(4)
    step = made.step(x, condition, grid, i)
    reference = made.step(x, condition, grid, i, network=made._reference[0])
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(step.mean, step.std), normal(reference.mean, step.std)).flatten(1)
    expected = exact.mean(1) if reduction == "mean" else exact.sum(1)
    torch.testing.assert_close(kl[:, :, i].flatten(), expected)
    kl.sum().backward()
    assert made.model.conv_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in made._reference[0].parameters())
    # not computed where nothing can learn from it
    with torch.no_grad():
        assert made.log_prob(rollout).kl is None


def test_the_divergence_scaled_by_time():
    made = policy()
    rollout = made.sample(["red"], 2, [1])
    made.keep_reference()
    made.exact_kl = True
    stir(made)
    exact = made.log_prob(rollout).kl
    made.kl_scaling = "time"
    steps = -made.process.grid(4).levels.diff()
    torch.testing.assert_close(made.log_prob(rollout).kl, (exact * steps).float())


def test_no_reference():
    made = policy()
    rollout = made.sample(["red"], 1, [1])
    with pytest.raises(CheckpointError, match=r"there is no reference; call keep_reference\(\)"):
        made.reference_log_prob(rollout)
    made.exact_kl = True
    with pytest.raises(CheckpointError, match="there is no reference"):
        made.log_prob(rollout)


def test_the_reference_moves_with_the_policy():
    made = policy()
    made.keep_reference()
    made.to(torch.float64)
    assert made._reference[0].conv_in.weight.dtype == torch.float64
    rollout = made.sample(["red"], 1, [1])
    torch.testing.assert_close(made.reference_log_prob(rollout), rollout.logp_old)


# -- examples ----------------------------------------------------------------------------------------------------------


def rows(count: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"prompt": CAPTIONS[i % 3], "image": torch.rand(3, 8, 8, generator=generator)} for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_imitation_loss_by_hand(kind):
    made = policy(kind, condition_dropout=0.0)
    given = made.demonstrations(rows(), [1, 2, 3, 4]).validate()
    assert given.mask.shape == (4, 1, 1)
    x0, noise, times = (given.steps[name][:, 0, 0] for name in ("x0", "noise", "time"))
    torch.testing.assert_close(x0, torch.stack([row["image"] for row in rows()]) * 2 - 1)
    if kind == "flow":
        sigma = times[:, None, None, None]
        x, told, target = (1 - sigma) * x0 + sigma * noise, 1000 * times, noise - x0
    else:
        train = scheduler(kind)
        x, told = train.add_noise(x0, noise, times.long()), times.long()
        target = train.get_velocity(x0, noise, times.long())
    out = made.denoiser.predict(made.model, x, told, {"label": torch.tensor([0, 1, 2, 0])})
    loss = made.imitation_loss(given)
    assert loss.count == 4
    assert loss.total.item() == pytest.approx((out - target).square().flatten(1).mean(1).sum().item(), rel=1e-5)
    loss.total.backward()
    assert made.model.conv_in.weight.grad.abs().sum() > 0


def test_demonstrations_follow_from_their_seeds():
    made = policy()
    both, alone = made.demonstrations(rows(2), [5, 6]), made.demonstrations(rows(2)[1:], [6])
    for name in ("noise", "time", "condition_label"):
        assert torch.equal(both.steps[name][1:], alone.steps[name])
    assert not torch.equal(both.steps["noise"][0], both.steps["noise"][1])


def test_some_conditions_are_dropped():
    made = policy(condition_dropout=0.3)
    given = made.demonstrations([rows()[0]] * 400, list(range(400)))
    dropped = given.steps["condition_label"] == 3
    assert given.steps["condition_label"].unique().tolist() == [0, 3]
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.07)


def test_images_may_be_pil():
    made = policy()
    image = Image.new("RGB", (8, 8), (255, 0, 51))
    given = made.demonstrations([{"prompt": 1, "image": image}], [0])
    assert given.steps["x0"][0, 0, 0, :, 0, 0].tolist() == pytest.approx([1.0, -1.0, -0.6])


def test_patches_are_exactly_invertible():
    made = policy(network=unet(channels=12), patch=2)
    images = torch.rand(2, 3, 16, 16)
    states = made.denoiser.latents(images)
    assert states.shape == (2, 12, 8, 8)
    torch.testing.assert_close(made.decode(states), images)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "red"}, "image 0 must be a tensor"),
        ({"prompt": "red", "image": torch.zeros(3, 4, 4)}, r"states \[3, 4, 4\], and the network takes \[3, 8, 8\]"),
        ({"prompt": "rad", "image": torch.zeros(3, 8, 8)}, "known caption; got 'rad'. Did you mean 'red'"),
        ({"prompt": 3, "image": torch.zeros(3, 8, 8)}, "prompt 0 must be a label from 0 to 2"),
    ],
)
def test_wrong_demonstrations(row, words):
    with pytest.raises(DataError, match=words):
        policy().demonstrations([row], [0])


@pytest.mark.parametrize("kind", KINDS)
def test_imitation_of_own_samples(kind):
    made = policy(kind)
    rollout = made.sample(["red", "blue"], 2, [1, 2])
    found = made.imitation(rollout, [5, 6])
    assert found.imitation.shape == (2, 2)
    assert found.drift is None
    torch.testing.assert_close(made.imitation(rollout.select([1]), [6]).imitation, found.imitation[1:])
    assert not torch.equal(made.imitation(rollout, [7, 8]).imitation, found.imitation)
    # the same as if the last states were given as demonstrations: one sample with the seed of its place
    first = made.demonstrations([{"prompt": "red", "image": torch.zeros(3, 8, 8)}], [5])
    first.steps["x0"] = rollout.steps["latents"][:1, :1, -1:]
    if int(first.steps["condition_label"]) == 0:
        torch.testing.assert_close(made.imitation_loss(first).total, found.imitation[0, 0])
    found.imitation.sum().backward()
    assert made.model.conv_in.weight.grad.abs().sum() > 0


def test_drift_is_the_distance_from_the_reference():
    made = policy()
    rollout = made.sample(["red", "blue"], 2, [1, 2])
    with pytest.raises(CheckpointError, match="there is no reference"):
        made.imitation(rollout, [5, 6], drift=True)
    made.keep_reference()
    assert made.imitation(rollout, [5, 6], drift=True).drift.abs().max() == 0
    with torch.no_grad():
        made.model.conv_out.bias.add_(0.5)  # every output moves by 0.5
    found = made.imitation(rollout, [5, 6], drift=True)
    torch.testing.assert_close(found.drift, torch.full((2, 2), 0.25))
    found.drift.sum().backward()
    assert made.model.conv_out.bias.grad.tolist() == pytest.approx([4 * 2 * 0.5 / 3] * 3, rel=1e-4)


# -- the loops of the library ------------------------------------------------------------------------------------------


def brightness(samples: Any) -> list[list[float]]:
    return [[image.mean().item() for image in group] for group in samples]


@pytest.mark.parametrize(("kind", "adapters"), [("diffusion", False), ("flow", False), ("flow", True)])
def test_the_online_loop_makes_images_brighter(kind, adapters):
    # trailing times: a step of next to no noise, as leading ones end with, tells little and moves much
    spacing = "trailing" if kind == "diffusion" else None
    settings = {"steps": 4, "captions": CAPTIONS, "spacing": spacing, "shared_noise": True}
    made = DenoisingPolicy.load(unet(), scheduler=scheduler(kind), **settings)
    if adapters:
        made.add_adapters(rank=4, alpha=16)
    signal = Signal(rewards=[brightness], advantage=grpo)
    loop = Online(
        made,
        [{"prompt": caption} for caption in CAPTIONS],
        signal,
        policy_gradient,
        prompts_per_step=3,
        group_size=8,
        optim=Optim(lr=1e-2 if adapters else 1e-3),
        steps=5,
        seed=0,
    )
    before = made.sample(CAPTIONS, 8, [1, 2, 3]).samples
    found = [loop.step().metrics for _ in range(5)]
    after = made.sample(CAPTIONS, 8, [1, 2, 3]).samples  # the same noise, so what differs was learnt
    assert torch.tensor(brightness(after)).mean() > torch.tensor(brightness(before)).mean() + 0.01
    assert found[0]["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert found[0]["logp_gap_max"] < 1e-5
    assert found[0]["length"] == 3


def test_the_loop_asks_for_the_exact_divergence():
    def objective(logp, logp_old, advantages, mask, kl, *, beta=0.1):
        return policy_gradient(logp, logp_old, advantages, mask, kl=kl, beta=beta, kl_estimator="exact")

    made = policy()
    made.keep_reference()
    options = {
        "prompts_per_step": 3,
        "group_size": 4,
        "passes": 2,
        "micro_batch": 2,
        "optim": Optim(lr=1e-2),
        "steps": 2,
    }
    rows = [{"prompt": caption} for caption in CAPTIONS]
    loop = Online(made, rows, Signal(rewards=[brightness], advantage=grpo), objective, **options)
    assert made.exact_kl
    first, second = loop.step().metrics, loop.step().metrics
    assert 0 < first["kl"] < second["kl"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_supervised_loop_learns_to_denoise(kind):
    made = policy(kind)
    data = [
        {"prompt": caption, "image": torch.full((3, 8, 8), value)}
        for caption, value in zip(CAPTIONS, (0.1, 0.5, 0.9), strict=True)
    ]
    loop = Supervised(made, data * 8, batch_size=24, optim=Optim(lr=1e-2), steps=15, seed=0)
    losses = [loop.step()["loss"] for _ in range(15)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


# -- files, pictures, settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_alone_is_saved_and_loaded(kind, tmp_path):
    made = policy(kind, network=unet(channels=12), patch=2)
    made.save(tmp_path / "saved")
    back = DenoisingPolicy.load(tmp_path / "saved", steps=4)
    assert back.process.kind == kind
    one, two = made.sample(["red"], 2, [1]), back.sample(["red"], 2, [1])
    assert torch.equal(one.steps["latents"], two.steps["latents"])
    assert torch.equal(one.samples[0][1], two.samples[0][1])
    # `load_weights` into a policy that has others
    other = policy(kind, network=unet(seed=9, channels=12), patch=2)
    other.load_weights(tmp_path / "saved")
    assert torch.equal(latents(other, ["red"], 2, [1]), one.steps["latents"])
    # diffusers opens the folder too
    from diffusers import DDPMPipeline

    opened = DDPMPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(opened.unet.conv_in.weight, made.model.conv_in.weight)
    assert type(opened.scheduler) is type(made.scheduler)


def test_whole_tensors_are_saved_in_place_of_shards(tmp_path):
    made = policy()
    state = {name: torch.zeros_like(value) for name, value in made.state_dict().items()}
    made.save(tmp_path, state=state)
    assert DenoisingPolicy.load(tmp_path).model.conv_in.weight.abs().sum() == 0
    assert made.model.conv_in.weight.abs().sum() > 0


def test_adapters_are_saved_and_loaded(tmp_path):
    policy(network=unet(channels=12), patch=2).save(tmp_path / "base")
    made = DenoisingPolicy.load(tmp_path / "base", steps=4, lora={"rank": 2, "alpha": 8})
    stir(made, 0.1)
    made.save(tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "unet").exists()
    expected = latents(made, ["red"], 2, [1])
    back = DenoisingPolicy.load(tmp_path / "adapters", steps=4)  # knows its base
    assert torch.equal(latents(back, ["red"], 2, [1]), expected)
    assert not torch.equal(latents(DenoisingPolicy.load(tmp_path / "base", steps=4), ["red"], 2, [1]), expected)
    other = DenoisingPolicy.load(tmp_path / "base", steps=4, lora={"rank": 2, "alpha": 8})
    other.load_weights(tmp_path / "adapters")
    assert torch.equal(latents(other, ["red"], 2, [1]), expected)


def test_weights_of_another_network(tmp_path):
    policy(network=unet(channels=12), patch=2).save(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        policy().load_weights(tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights of this policy's unet"):
        policy().load_weights(tmp_path / "nowhere")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        policy().load_weights(tmp_path)


def test_pictures():
    made = policy()
    image = torch.tensor([[[1.0]], [[0.0]], [[0.2]]]).expand(3, 4, 6)
    (found,) = made.to_pil([[image]])[0]
    assert found.size == (6, 4)
    assert found.getpixel((5, 3)) == (255, 0, 51)
    grey = made.to_pil(torch.full((1, 2, 2), 0.5))
    assert grey.mode == "L"
    assert grey.getpixel((0, 0)) == 128


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_keep_precise_states(dtype):
    made = policy(dtype=dtype, guidance=2.0)
    rollout = made.sample(["red"], 2, [1])
    assert rollout.steps["latents"].dtype == rollout.logp_old.dtype == torch.float32
    out = made.log_prob(rollout)
    assert torch.equal(out.logp, rollout.logp_old)
    out.logp.sum().backward()
    assert made.model.conv_in.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "policy.steps must be at least 1"),
        ({"eval_steps": -1}, "policy.steps must be at least 1"),
        ({"eta": 1.0}, "policy.eta is a setting of a diffusion policy"),
        ({"std": "dances"}, "policy.std must be one of"),
        ({"trained_share": 0.0}, r"trained_share must be in \(0, 1\]"),
        ({"random_share": 1.5}, r"random_share must be in \(0, 1\]"),
        ({"condition_dropout": 1.0}, r"condition_dropout must be in \[0, 1\)"),
        ({"window": 4}, "window = 4 steps must lie within .0, 3. and within the 3 steps that have noise"),
        ({"window": 2, "window_range": (1, 2)}, "window = 2"),
        ({"prediction_type": "epsilon"}, "policy.prediction_type: FlowMatchEulerDiscreteScheduler has no such setting"),
        ({"dtype": "float8"}, "policy.dtype: 'float8' is not known"),
        ({"lora": {"rang": 2}}, "policy.lora: 'rang' is not known.* Did you mean 'rank'"),
        ({"lora": {"dropout": 0.1}}, "policy.lora.dropout must be 0"),
        ({"captions": ("a", "b", "c", "d"), "guidance": 2.0}, "no null class"),
        ({"captions": ("a", "b", "c", "d", "e")}, "5 captions and only 4 classes"),
        ({"logp_reduction": "max"}, "logp_reduction must be mean or sum"),
        ({"kl_scaling": "none"}, "kl_scaling must be exact or time"),
    ],
)
def test_wrong_settings(friendly_errors, settings, words):
    with pytest.raises(RecipeError, match=words):
        policy(**settings)


def test_the_scheduler_must_make_the_kind_that_is_asked_for():
    words = "policy.kind is diffusion, but the scheduler FlowMatchEulerDiscreteScheduler makes a flow policy"
    with pytest.raises(RecipeError, match=words):
        DenoisingPolicy.load(unet(), scheduler=scheduler("flow"), kind="diffusion")
    assert DenoisingPolicy.load((unet(), scheduler("flow")), kind="flow").process.kind == "flow"


def test_settings_of_the_scheduler_are_replaced_and_saved(tmp_path):
    made = policy(shift=3.0)
    assert made.process.grid(4).levels[1].item() == pytest.approx(3 * 0.667 / (1 + 2 * 0.667), rel=1e-3)
    made.save(tmp_path)
    assert DenoisingPolicy.load(tmp_path).scheduler.config["shift"] == 3.0
    assert policy("diffusion", prediction_type="epsilon", spacing="trailing").process.prediction_type == "epsilon"


def test_wrong_models(tmp_path):
    with pytest.raises(RecipeError, match="a network alone needs its scheduler"):
        DenoisingPolicy.load(unet())
    with pytest.raises(RecipeError, match="cannot be loaded as a pipeline of diffusers"):
        DenoisingPolicy.load(tmp_path)
    with pytest.raises(RecipeError, match="the network Linear is not supported"):
        DenoisingPolicy.load(torch.nn.Linear(1, 1), scheduler=scheduler("flow"))


def test_an_unconditional_network():
    made = DenoisingPolicy.load(unet(classes=None), scheduler=scheduler("flow"), steps=3)
    rollout = made.sample([None, None], 2, [1, 2])
    assert list(rollout.steps) == ["latents"]
    assert torch.equal(made.log_prob(rollout).logp, rollout.logp_old)
    with pytest.raises(RecipeError, match="no null class"):
        DenoisingPolicy.load(unet(classes=None), scheduler=scheduler("flow"), guidance=2.0)


def test_seeds_and_prompts_are_counted():
    made = policy()
    with pytest.raises(ShapeError, match=r"one seed per prompt \(P = 2\); got 1"):
        made.sample(["red", "blue"], 2, [1])
    with pytest.raises(DataError, match="no prompts"):
        made.sample([], 2, [])
    with pytest.raises(ShapeError, match="one seed per row"):
        made.demonstrations(rows(2), [1])
    with pytest.raises(ShapeError, match="one seed per prompt"):
        made.imitation(made.sample(["red"], 1, [1]), [1, 2])


def test_a_copy_is_apart():
    made = policy()
    other = copy.deepcopy(made)
    stir(other)
    assert not torch.equal(latents(other, ["red"], 1, [1]), latents(made, ["red"], 1, [1]))


def test_there_is_no_critic():
    with pytest.raises(RecipeError, match=r"have no critic.*value_anchored"):
        policy().add_critic()
