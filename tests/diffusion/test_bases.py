"""Trained bases: what they are made of, and that they are kept whole."""

from __future__ import annotations

import pytest
import torch

from guerdon import cache
from guerdon.diffusion import bases
from guerdon.diffusion.bases import BASES, Base, base, kept, untrained
from guerdon.errors import UnknownNameError

TINY = {
    "shapes/full": Base("shapes", "flow", 3, batch_size=4),
    "digits/full": Base("digits", "diffusion", 3, batch_size=4),
}


@pytest.fixture(autouse=True)
def _tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    for name, recipe in TINY.items():
        monkeypatch.setitem(BASES, name, recipe)


def weights(policy):
    return policy.model.state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_tried_settings():
    optim = {"lr": 2e-3, "betas": [0.9, 0.99], "schedule": "cosine", "final_lr": 0.05, "warmup_steps": 50}
    short = BASES["shapes/short"]
    assert (short.kind, short.steps, short.batch_size, short.condition_dropout) == ("flow", 400, 64, 0.1)
    assert {name: short.optim[name] for name in optim} == optim
    assert short.optim["ema"] == 0.995
    assert BASES["digits/short"].kind == "diffusion"


@pytest.mark.parametrize("name", TINY)
def test_a_base_is_trained_once_and_kept(name, capsys):
    assert not kept(name)
    first = base(name)
    assert kept(name)
    assert same(weights(first), weights(base(name)))
    assert not same(weights(first), weights(untrained(name.split("/")[0], TINY[name].kind)))
    said = capsys.readouterr().err
    assert said.count(f"training the base {name}") == 1


def test_settings_of_the_policy_do_not_change_the_base(tmp_path):
    first, guided = base("shapes/full"), base("shapes/full", guidance=2.0, steps=4, noise_level=0.3)
    assert guided.guidance == 2.0
    assert same(weights(first), weights(guided))
    assert len(list((tmp_path / "bases").iterdir())) == 1


def test_seed_kind_and_recipe_make_another(monkeypatch):
    first = weights(base("shapes/full"))
    assert not same(first, weights(base("shapes/full", seed=1)))
    diffusion = base("shapes/full", kind="diffusion")
    assert diffusion.process.kind == "diffusion"
    assert not same(first, weights(diffusion))
    monkeypatch.setitem(BASES, "shapes/full", Base("shapes", "flow", 2, batch_size=4))
    assert not kept("shapes/full")


def test_a_damaged_base_is_made_again_with_a_message(tmp_path):
    first = weights(base("shapes/full"))
    (path,) = (tmp_path / "bases").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged .*; it is made again"):
        assert same(first, weights(base("shapes/full")))
    assert same(first, weights(base("shapes/full")))
    assert cache.cache_folder() == tmp_path


def test_the_weights_are_the_average(monkeypatch):
    plain = {name: value for name, value in TINY["shapes/full"].optim.items() if name != "ema"}
    averaged = weights(base("shapes/full"))
    monkeypatch.setitem(BASES, "shapes/full", Base("shapes", "flow", 3, batch_size=4, optim=plain))
    assert not same(averaged, weights(base("shapes/full")))


def test_training_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    base("shapes/full")
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_trained_where_no_gradient_is_wanted_too():
    with torch.no_grad():
        assert weights(base("shapes/full"))


def test_an_unknown_base():
    with pytest.raises(UnknownNameError, match=r"no base 'shapes/ful'. Did you mean 'shapes/full'"):
        base("shapes/ful")


def test_every_base_can_be_named_as_a_model():
    assert set(bases.bundled_models()) == {"shapes", "digits", *BASES}
