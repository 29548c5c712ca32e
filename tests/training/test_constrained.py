"""Constrained RLHF through the loop: a value head for each stream, multipliers, and the search, from call to recipe."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guerdon.advantages import gae_by_component
from guerdon.cli.main import main
from guerdon.errors import CheckpointError, RecipeError
from guerdon.language.policy import LanguagePolicy
from guerdon.language.tasks import hacking
from guerdon.objectives import ppo
from guerdon.rewards import kl_penalty
from guerdon.signal import Signal
from guerdon.training import Online, Optim
from guerdon.weighting import lagrangian, proxy_point_search

OBJECTIVE = partial(ppo, value_clip=None, value_coefficient=1.0, value_coefficients={"kl": 0.4})


def policy(heads=3, **options):
    options = {"max_new_tokens": 6, "dtype": "float64", "critic": heads, **options}
    return LanguagePolicy.load(hacking.model(0), tokenizer=hacking.tokenizer(), **options)


def digits(samples):
    return [[sum(letter.isdigit() for letter in text) / 6 for text in group] for group in samples]


def loop(of=None, *, optim=None, **options):
    signal = Signal(
        rewards={
            "digits": digits,
            "kl": kl_penalty(steps=True, coefficient=0.2, target=0.1),
            "exclamations": hacking.exclamations,
        },
        weighting=lagrangian(thresholds={"digits": 0.9, "exclamations": 0.1}, lr=1.0, updates=2),
        # the divergence of the first step is rounding alone, which must not be made large
        advantage=partial(gae_by_component, eps=1e-4),
    )
    of = of or policy()
    of.keep_reference()
    options = {
        "prompts_per_step": 4,
        "group_size": 3,
        "optim": optim or Optim(lr=3e-3),
        "passes": 2,
        "steps": 10,
        **options,
    }
    return Online(of, hacking.train_rows(0), signal, OBJECTIVE, **options)


def test_a_head_for_each_component():
    made = policy()
    torch.nn.init.normal_(made.critic.weight, generator=torch.Generator().manual_seed(0))
    rollout = made.sample(["310=", "5=", "0011="], 4, [0, 1, 2])
    assert rollout.validate().values.shape == (*rollout.mask.shape, 3)
    assert (rollout.values[~rollout.mask] == 0).all()
    for k in range(3):
        single = policy(1)
        single.critic.load_state_dict({name: value[k : k + 1] for name, value in made.critic.state_dict().items()})
        torch.testing.assert_close(single.log_prob(rollout).values, rollout.values[..., k])
    longer = rollout.extend(rollout.mask.shape[2] + 2)
    assert longer.values.shape == (*longer.mask.shape, 3)
    torch.testing.assert_close(made.log_prob(longer).values, longer.values)


def test_heads_are_saved_and_loaded(tmp_path):
    made = policy()
    torch.nn.init.normal_(made.critic.weight, generator=torch.Generator().manual_seed(0))
    made.save(tmp_path)
    other = policy()
    other.load_weights(tmp_path)
    assert torch.equal(other.critic.weight, made.critic.weight)
    loaded = LanguagePolicy.load(str(tmp_path), critic=True, max_new_tokens=6, dtype="float64")
    assert torch.equal(loaded.critic.weight, made.critic.weight)
    with pytest.raises(CheckpointError, match="size mismatch"):
        policy(1).load_weights(tmp_path)


def test_every_head_learns_its_own_stream_and_the_advantage_is_their_mixture():
    made = loop(steps=30)
    first = made.step()
    extras = first.rollout.extras
    assert extras["returns"].shape == (*first.rollout.mask.shape, 3)
    # at first the policy is its own reference, but for rounding: that stream has nothing to say
    assert extras["step_scores"].abs().max() < 1e-12
    assert (
        first.attribution.contributions[..., 1].abs().max() < 1e-6 < first.attribution.contributions[..., 0].abs().max()
    )
    torch.testing.assert_close(first.attribution.contributions.sum(-1), first.rollout.advantages.sum(-1))
    errors, squares = torch.zeros(3), torch.zeros(3)
    for number in range(20):
        last = made.step()
        if number >= 5:
            live = last.rollout.mask
            returns = last.rollout.extras["returns"][live]
            errors += (last.rollout.values[live] - returns).square().mean(0)
            squares += returns.square().mean(0)
    # each head tells more of its own stream than nothing, which is where it started, and nothing of another's sign
    assert (errors < 0.8 * squares).all()
    signs = last.rollout.values[last.rollout.mask].mean(0).sign().tolist()
    assert signs == [1, -1, 1]
    assert {"value_loss/digits", "value_loss/kl", "value_loss/exclamations"} <= set(last.metrics)
    assert last.metrics["rewards_kl/coefficient"] != 0.2
    assert last.metrics["weight/kl"] == pytest.approx(
        2 - last.metrics["weight/digits"] - last.metrics["weight/exclamations"]
    )


def test_micro_batches_change_nothing():
    def end(**options):
        # no Adam, which makes steps of rounding errors where a gradient is 0
        made = loop(optim=Optim(name="sgd", lr=0.1), **options)
        for _ in range(3):
            made.step()
        return {name: value.clone() for name, value in made.policy.state_dict().items()}

    whole, parts = end(mini_batches=2), end(mini_batches=2, micro_batch=1)
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) < 1e-8
    start = policy().state_dict()
    assert (whole["critic.weight"] - start["critic.weight"]).abs().max() > 1e-4


def test_a_critic_with_too_few_heads_is_an_error():
    with pytest.raises(Exception, match=r"gae_by_component: values must be \[P, G, T, K\] with K = 3"):
        loop(policy(1)).step()


def figures(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("elapsed", "seconds/", "tokens_per_s"))} for line in lines
    ]


def words(folder: Path, recipe: str, **changes: object) -> list[str]:
    wanted = {
        "run.directory": folder / "runs",
        "run.checkpoint_every": 2,
        "evaluation.size": 8,
        "evaluation.every": 2,
        **changes,
    }
    return ["train", recipe, *(word for name, value in wanted.items() for word in (f"--{name}", str(value)))]


SMALL = {"warm_start.steps": 2, "prompts_per_step": 4, "group_size": 3, "steps": 6}
OWN = {
    "policy.model": "model",
    "data": "problems.jsonl",
    "policy.max_new_tokens": 6,
    "prompts_per_step": 8,
    "micro_batch": 2,
    "passes": 2,
    "rewards.first": "myrewards:first",
    "rewards.short": "myrewards:sometimes_none",
    "on_bad_score": "drop",
    "optim.lr": 1e-3,
    "steps": 6,
}
RUNS = {
    "mu-ppo": SMALL,
    # right digits are paid to begin with, so a point is reached at once now and then
    "constrained-search": {
        **SMALL,
        "weighting.proxy_point_search.steps": 5,
        "weighting.proxy_point_search.steps_per_point": 2,
    },
}


def assert_goes_on(folder, recipe, changes, monkeypatch):
    """A run of 6 steps, and one that ends after 4 and is gone on with, are the same."""
    monkeypatch.setenv("GUERDON_CACHE", str(folder / "cache"))
    assert main(words(folder, recipe, **{**changes, "run.name": "straight"})) == 0
    assert main(words(folder, recipe, **{**changes, "run.name": "parted", "steps": 4})) == 0
    straight, parted = folder / "runs/straight", folder / "runs/parted"
    assert main(["resume", str(parted), "--steps", "6"]) == 0
    # the run that was to end after 4 steps measured then, as this one does; what is learnt is the same
    assert figures(parted)[-1] == figures(straight)[-1]
    for name in ("model", "critic"):
        ours, theirs = (load_file(run / f"checkpoints/step-6/policy/{name}.safetensors") for run in (straight, parted))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    return straight


@pytest.mark.parametrize("recipe", RUNS)
def test_the_recipes_run_on_the_bundled_task_and_go_on(tmp_path, monkeypatch, recipe, capsys):
    run = assert_goes_on(tmp_path, recipe, RUNS[recipe], monkeypatch)
    lines = figures(run)
    assert len(load_file(run / "checkpoints/step-6/policy/critic.safetensors")["weight"]) == 3
    last = lines[-1]
    for name in ("right", "exclamations"):
        assert f"weighting_stage/multiplier/{name}" in last
        assert f"value_loss/{name}" in last
    weights = [last[f"weight/{name}"] for name in ("right", "exclamations", "kl")]
    assert sum(weights) == pytest.approx(2.0)
    assert "eval/sampled/gold" in last
    assert last["share/kl"] > 0
    if recipe == "constrained-search":
        assert last["weighting_stage/points"] >= 3
        tried = {line["weighting_stage/threshold/right"] for line in lines[1:]}
        assert len(tried) >= 3
        gold = [line["watch/gold"] for line in lines[1:6]]
        assert last["weighting_stage/best"] in [pytest.approx(value, abs=1e-6) for value in gold]


def test_the_recipe_runs_on_a_model_and_data_of_ones_own(workplace, monkeypatch):
    changes = {**OWN, "weighting.lagrangian.thresholds": "{first: 0.6, short: 3.0}"}
    run = assert_goes_on(workplace, "mu-ppo", changes, monkeypatch)
    last = figures(run)[-1]
    assert sum(last[f"weight/{name}"] for name in ("first", "short", "kl")) == pytest.approx(2.0)
    assert last["weighting_stage/multiplier/first"] > figures(run)[1]["weighting_stage/multiplier/first"]


def test_what_a_recipe_lacks_is_said(workplace, capsys):
    changes = {**OWN, "run.name": "none"}
    assert main(words(workplace, "mu-ppo", **changes)) == 2
    assert "weighting.lagrangian.thresholds: must be finite numbers, one for each reward" in capsys.readouterr().err
    assert main(words(workplace, "constrained-search", **changes)) == 2
    assert "weighting.proxy_point_search.box: must name a component" in capsys.readouterr().err
    box = {"weighting.proxy_point_search.box": "{first: [0.2, 0.6], short: [1, 3]}"}
    assert main(words(workplace, "constrained-search", **changes, **box)) == 1
    assert "judged by a watched reward, and there is none" in capsys.readouterr().err


def test_a_search_needs_somewhere_to_look():
    with pytest.raises(RecipeError, match="must name a component"):
        proxy_point_search(box={})
