"""The clean samples that the states of a path point to, and what is learnt from their rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from guerdon.advantages import value_anchored
from guerdon.cli.main import main
from guerdon.diffusion.policy import DenoisingPolicy
from guerdon.objectives import policy_gradient
from guerdon.rewards import instant
from guerdon.signal import Signal
from guerdon.training.online import Online
from guerdon.training.optimisation import Optim
from tests.diffusion.pipelines import stable_diffusion_3
from tests.diffusion.test_policy import CAPTIONS, KINDS, policy


def bright(samples):
    return [[image.mean().item() for image in group] for group in samples]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_projection_is_the_clean_sample_seen_in_the_state_after_the_step(kind, guidance):
    made = policy(kind, guidance=guidance)
    plain = made.sample(["red", "blue"], 2, [1, 2])
    assert "projections" not in plain.extras
    made.keep_projections = True
    runs: list[int] = []
    made.model.conv_in.register_forward_hook(lambda *_: runs.append(1))
    rollout = made.sample(["red", "blue"], 2, [1, 2]).validate()
    assert len(runs) == 4  # no run of the network more than there are steps
    assert torch.equal(rollout.steps["latents"], plain.steps["latents"])
    assert torch.equal(rollout.logp_old, plain.logp_old)
    found = rollout.extras["projections"]
    assert found.shape == (2, 2, 4, 3, 8, 8)
    grid, condition = made.process.grid(4), {"label": torch.tensor([0, 0, 2, 2])}
    for i in range(3):
        x = rollout.steps["latents"][:, :, i + 1].flatten(0, 1)
        clean = made.step(x, condition, grid, i + 1).x0.detach()
        torch.testing.assert_close(found[:, :, i].flatten(0, 1), made.decode(clean), rtol=1e-5, atol=1e-6)
    for p in range(2):
        assert torch.equal(found[p, :, -1], torch.stack(rollout.samples[p]))
        assert torch.equal(torch.stack(rollout.samples[p]), torch.stack(plain.samples[p]))


def test_the_flow_by_hand():
    made = policy(guidance=1.0)
    made.keep_projections = True
    rollout = made.sample(["red"], 1, [3])
    sigma = made.process.grid(4).levels
    x = rollout.steps["latents"][0, :, 2]
    v = made.predict(x, 1000 * sigma[2], {"label": torch.tensor([0])}).detach()
    torch.testing.assert_close(rollout.extras["projections"][0, 0, 1], made.decode(x - float(sigma[2]) * v)[0])


def test_a_deterministic_sample_has_one_which_is_itself():
    made = policy(eval_steps=3)
    made.keep_projections = True
    rollout = made.sample(["red", "blue"], 2, [1, 2], greedy=True).validate()
    assert rollout.extras["projections"].shape == (2, 2, 1, 3, 8, 8)
    assert torch.equal(rollout.extras["projections"][1, 1, 0], rollout.samples[1][1])


def test_sampling_in_parts_and_an_image_decoder():
    made = DenoisingPolicy.load(stable_diffusion_3(), steps=3, sample_batch=3)
    made.keep_projections = True
    rollout = made.sample(["a cat", "dog"], 2, [1, 2])
    assert rollout.extras["projections"].shape == (2, 2, 3, 3, 16, 16)
    assert torch.equal(rollout.extras["projections"][1, 1, -1], rollout.samples[1][1])


def test_the_loop_asks_for_them_and_does_not_keep_them():
    made = policy(steps=3)
    seen: list[torch.Size] = []

    def looked_at(samples, projections):
        seen.append(projections.shape)
        return bright(samples)

    loop = Online(
        made,
        [{"prompt": caption} for caption in CAPTIONS],
        Signal(rewards={"dense": instant(reward=bright)}, watch={"other": looked_at}, advantage=value_anchored(k=0.0)),
        policy_gradient,
        prompts_per_step=3,
        group_size=2,
        micro_batch=1,
        optim=Optim(lr=1e-3),
        steps=1,
    )
    assert made.keep_projections
    result = loop.step()
    assert seen == [torch.Size([3, 2, 3, 3, 8, 8])]
    assert "projections" not in result.rollout.extras
    assert result.rollout.extras["step_rewards"].shape == (3, 2, 3)
    # the last step, which has no noise, is scored and not trained on
    assert (result.rollout.advantages[..., :2] != 0).all()
    assert (result.rollout.advantages[..., 2] == 0).all()


def run(recipe: str, folder: Path, **changes: object) -> int:
    wanted = {
        "policy.steps": 3, "rewards.likeness": "{instant: {reward: 'tests.diffusion.test_projections:bright'}}",
        "watch": "null", "prompts_per_step": 2, "group_size": 3, "steps": 2, "evaluation.every": 0,
        "evaluation.size": 2, "evaluation.samples": 1, "run.directory": folder, "run.name": "run", **changes,
    }  # fmt: skip
    return main(["train", recipe, *(word for name, value in wanted.items() for word in (f"--{name}", str(value)))])


@pytest.mark.parametrize("task", ["digits", "shapes"])
def test_the_recipe_trains_on_rewards_of_steps(tmp_path, task):
    options = {"gamma": 0.9, "first_n": 1, "use_step_weights": "true", "omega_max": 2.0}
    changes = {f"advantage.value_anchored.{name}": value for name, value in options.items()}
    assert run("vgpo", tmp_path, **{"policy.model": task, "data": task, **changes}) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["grad_norm"] > 0
    assert lines[-1]["advantage_stage/size_1"] > 0
    # of the three steps the last one, without noise, has no advantage
    assert lines[-1]["advantage_stage/size_2"] == 0
    assert {"eval/greedy/likeness", "eval/sampled/likeness"} <= set(lines[-1])


def test_a_language_model_has_none(tmp_path, capsys):
    words = ["--rewards.correct", "{instant: {reward: exact_answer}}", "--run.directory", str(tmp_path)]
    assert main(["train", "sort", *words]) == 1
    assert "reward 'correct' needs the field 'projections', which nothing before it provides" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_later_stages_do_not_find_them(tmp_path, capsys):
    words = {"advantage": "tests.diffusion.test_projections:late"}
    assert run("vgpo", tmp_path, **{"policy.model": "digits", **words}) == 1
    assert "needs the field 'projections'" in capsys.readouterr().err


def late(rewards, projections):
    return rewards
