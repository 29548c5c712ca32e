"""What the runner gets from the image domain: rows and policies, with errors that name the place."""

from __future__ import annotations

import json

import pytest
import torch

from guerdon.diffusion import domain
from guerdon.errors import DataError, RecipeError
from guerdon.recipes import resolve
from guerdon.training.images import png


def settings(**policy):
    return resolve({"policy": {"kind": "flow", "model": "shapes", **policy}}, complete=False).policy


def evaluation(**given):
    return resolve({"evaluation": given}, complete=False).evaluation


@pytest.fixture
def pictures(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(png(torch.rand(3, 16, 16, generator=generator)))
        rows.append({"prompt": "a red circle", "image": f"{i}.png", "weight": i})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_a_bundled_task():
    data = domain.load_data("shapes", loop="online", evaluation=evaluation(size=14), seed=0)
    assert [row["prompt"] for row in data.train][:2] == ["a red circle", "a red square"]
    assert len(data.train) == 12
    assert len(data.held_out) == 14
    assert "image" not in data.train[0]
    given = domain.load_data("digits", loop="supervised", evaluation=evaluation(size=3), seed=1)
    assert given.train[0]["image"].shape == (1, 8, 8)
    assert given.held_out[2]["image"].shape == (1, 8, 8)
    assert torch.equal(domain.demonstrations("digits", 1)[0]["image"], given.train[0]["image"])


def test_pictures_of_ones_own(pictures):
    data = domain.load_data(str(pictures), loop="supervised", evaluation=evaluation(size=2), seed=0)
    assert (len(data.train), len(data.held_out)) == (8, 2)
    row = data.train[3]
    assert row["image"].shape == (3, 16, 16)
    assert row["image"].min() >= 0
    assert row["image"].max() <= 1
    assert row["weight"] == 3
    assert data.held_out[0]["weight"] == 8
    assert domain.demonstrations(str(pictures), 0)[9]["weight"] == 9
    online = domain.load_data(str(pictures), loop="online", evaluation=evaluation(size=2), seed=0)
    assert online.train[0]["image"] == "0.png"  # no picture is opened that nobody asked for


def test_a_picture_that_cannot_be_read(pictures):
    data = domain.load_data(str(pictures), loop="supervised", evaluation=evaluation(size=2), seed=0)
    (pictures.parent / "4.png").write_bytes(b"no picture")
    (pictures.parent / "5.png").unlink()
    for place in (4, 5):
        with pytest.raises(DataError, match=rf"row {place}: the picture .*{place}.png cannot be read"):
            data.train[place]


def test_data_that_is_not_there(tmp_path, pictures):
    with pytest.raises(DataError, match=r"'shaps' is neither a file nor a bundled image task. Did you mean 'shapes'"):
        domain.load_data("shaps", loop="online", evaluation=evaluation(), seed=0)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(RecipeError, match=r"warm_start: the data must have images to learn from: .*no column 'image'"):
        domain.demonstrations(str(path), 0)


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
@pytest.mark.parametrize("model", ["shapes", "digits"])
def test_either_kind_of_either_task(kind, model):
    policy = domain.build_policy(settings(kind=kind, model=model, steps=3, guidance=2.0))
    assert policy.process.kind == kind
    prompt = "a blue square" if model == "shapes" else "7"
    rollout = policy.sample([prompt], 2, [0])
    size, channels = (16, 3) if model == "shapes" else (8, 1)
    assert rollout.samples[0][1].shape == (channels, size, size)
    assert rollout.mask.shape == (1, 2, 3)
    # the last step has no noise, and so no log-probability
    assert rollout.mask[0, 0].tolist() == [True, True, False]


def test_settings_reach_the_policy():
    chosen = settings(std="dance", noise_level=0.3, random_share=0.6, shared_noise=True, logp_reduction="sum")
    policy = domain.build_policy(chosen)
    assert (policy.process.std, policy.process.noise_level) == ("dance", 0.3)
    assert (policy.random_share, policy.shared_noise, policy.logp_reduction) == (0.6, True, "sum")
    assert domain.build_policy(settings(kind="diffusion", eta=0.5)).process.eta == 0.5


def test_adapters(tmp_path):
    chosen = settings(lora={"rank": 2})
    policy = domain.build_policy(chosen)
    assert not policy.has_adapters
    domain.add_adapters(policy, chosen)
    assert policy.has_adapters
    assert 0 < sum(p.numel() for p in policy.parameters() if p.requires_grad) < 100_000


def test_a_saved_policy_is_built_again(tmp_path):
    policy = domain.build_policy(settings(), seed=3)
    policy.save(tmp_path / "base")
    again = domain.build_policy(settings(model="shapes"), base=tmp_path / "base")
    prompts = ["a green circle"]
    assert torch.equal(policy.sample(prompts, 1, [5]).samples[0][0], again.sample(prompts, 1, [5]).samples[0][0])


def test_a_wrong_model_or_kind(tmp_path):
    with pytest.raises(RecipeError, match=r"no bundled model 'shapes/ful'. Did you mean 'shapes/full'"):
        domain.build_policy(settings(model="shapes/ful"))
    domain.build_policy(settings()).save(tmp_path / "saved")
    with pytest.raises(RecipeError, match=r"policy.kind is diffusion, but .* makes a flow policy"):
        domain.build_policy(settings(kind="diffusion", model=str(tmp_path / "saved")))
