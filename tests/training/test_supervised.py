"""The supervised loop with an objective: what it is given, micro-batches, adapters, a stopped run, recipes."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from guerdon.cli.main import main
from guerdon.errors import BindingError, RecipeError
from guerdon.language.policy import LanguagePolicy
from guerdon.language.tasks import experts, topics
from guerdon.objectives import demonstration, demonstration_value, dpo
from guerdon.objectives.f_divergence import phi
from guerdon.objectives.loss import Loss
from guerdon.recipes.schema import load_recipe
from guerdon.report import read_run
from guerdon.training import Optim, Supervised

ROWS = topics.answered(0.75, "test", count=24)
LINEAR = "total_variation"


def policy(*, lora: bool = False, seed: int = 0, dtype: str = "float64") -> LanguagePolicy:
    torch.manual_seed(seed)  # of the adapters
    found = LanguagePolicy.load(
        topics.model(seed),
        tokenizer=topics.tokenizer(),
        max_new_tokens=13,
        dtype=dtype,
        lora={"rank": 2} if lora else None,
    )
    found.keep_reference()
    return found


def trained(objective, *, steps: int = 3, lora: bool = False, optim: Optim | None = None, **settings):
    optim = optim or Optim(name="sgd", lr=0.3, betas=(0.0, 0.0))
    settings = {"batch_size": 8, **settings}
    loop = Supervised(policy(lora=lora), ROWS, objective, optim=optim, steps=steps, **settings)
    return loop, [loop.step() for _ in range(steps)]


def apart(first: Supervised, second: Supervised) -> float:
    ours, theirs = first.policy.state_dict(), second.policy.state_dict()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("objective", [demonstration, demonstration_value, partial(demonstration, level="sequence")])
def test_micro_batches_change_nothing(objective):
    (whole, first), (parts, second) = (trained(objective, micro_batch=size) for size in (None, 3))
    assert apart(whole, parts) < 1e-9
    for one, other in zip(first, second, strict=True):
        for name in set(one) - {"tokens_per_s"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    held_out = topics.held_out_rows(10)
    ours, theirs = whole.evaluate(held_out), parts.evaluate(held_out)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert {"eval/loss", "eval/nll", "eval/implicit"} <= set(ours)


@pytest.mark.parametrize(
    "objective", [partial(demonstration, divergence=LINEAR), partial(demonstration_value, divergence=LINEAR)]
)
def test_total_variation_is_the_loop_without_an_objective(objective):
    (plain, before), (ours, found) = trained(None), trained(objective)
    assert apart(plain, ours) < 1e-9
    for one, other in zip(before, found, strict=True):
        assert one["loss"] == pytest.approx(other["nll"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"])
    assert plain.evaluate(ROWS)["eval/loss"] == pytest.approx(ours.evaluate(ROWS)["eval/nll"], rel=1e-6)


def test_the_loss_is_what_whole_logits_say():
    """One evaluation against the definition, from logits of the model and of its start."""
    loop, _ = trained(demonstration_value, steps=4)
    rows, start = topics.held_out_rows(6), policy()
    losses, live = 0.0, 0
    for row in rows:
        rollout = start.pack([row["prompt"]], [[row["completion"]]])
        prompt, words = rollout.steps["prompt_ids"][0], rollout.steps["completion_ids"][0, 0]
        with torch.no_grad():
            ids = torch.cat([prompt, words])[None]
            now, then = (who.model(ids).logits[0, len(prompt) - 1 : -1].double() for who in (loop.policy, start))
        value = now.logsumexp(-1) - then.logsumexp(-1)
        q = (now - then).gather(1, words[:, None])[:, 0]
        x = q - torch.cat([value[1:], torch.zeros(1)])
        losses += (value[0] - phi(x, "pearson").sum()).item()
        live += len(words)
    assert loop.evaluate(rows)["eval/loss"] == pytest.approx(losses / live, rel=1e-5)


def test_it_holds_the_model_near_its_start():
    """Against the likelihood at the same learning rate and in the same steps."""
    optim = Optim(lr=3e-3)
    far, near = (trained(name, steps=60, optim=optim, batch_size=24)[0] for name in (None, demonstration_value))
    moved = []
    for loop in (far, near):
        rollout = loop.policy.sample(list(topics.GOOD), 64, [1, 2, 3, 4])
        gap = rollout.logp_old - loop.policy.reference_log_prob(rollout)
        moved.append(gap.where(rollout.mask, 0.0).sum(-1).mean().item())
    assert moved[1] < 0.75 * moved[0]


def test_adapters_off_are_the_reference():
    loop, steps = trained(demonstration_value, lora=True, optim=Optim(lr=1e-2))
    assert steps[0]["implicit"] == pytest.approx(0.0, abs=1e-6)
    assert steps[-1]["implicit"] > 0
    assert not loop.policy._reference
    assert all("lora" in name for name, p in loop.policy.named_parameters() if p.requires_grad)


def test_a_stopped_run_goes_on_exactly():
    settings = {"optim": Optim(lr=3e-3), "steps": 4}
    straight, _ = trained(demonstration_value, **settings)
    first = Supervised(policy(), ROWS, demonstration_value, batch_size=8, **settings)
    first.step()
    first.step()
    second = Supervised(policy(), ROWS, demonstration_value, batch_size=8, **settings)
    second.policy.load_state_dict(first.policy.state_dict())
    second.load_state(first.state())
    second.step()
    second.step()
    assert apart(straight, second) == 0.0


def test_an_objective_is_given_what_it_names():
    def likelihood(logp, mask, topic, logp_ref=None):
        """Columns of the data are there; an optional reference is not made where no beta asks for it."""
        assert logp_ref is None or not logp_ref.any()
        assert len(topic) == len(logp)
        assert set(topic) <= set(topics.GOOD)
        return Loss(-logp.where(mask, 0.0).sum(), mask.sum().float(), {})

    assert apart(trained(likelihood)[0], trained(None)[0]) < 1e-12
    with pytest.raises(BindingError, match="logp_chosen"):
        trained(dpo)


def test_a_scaled_learning_rate():
    (one, first), (other, second) = (
        trained(None, optim=optim) for optim in (Optim(lr=1e-3), Optim(lr=4e-3, lr_scale=0.25))
    )
    assert first[-1]["lr"] == second[-1]["lr"] == 1e-3
    assert apart(one, other) == 0.0


# recipes


def test_the_recipes_are_what_the_page_says():
    plain, ours = (load_recipe(name, ["--policy.model", "m", "--data", "d"]) for name in ("sft", "implicit-reward"))
    assert plain.objective is None
    assert ours.objective == {"demonstration_value": {"divergence": "pearson", "beta": 1.0}}
    assert (plain.optim, plain.steps, plain.prompts_per_step) == (ours.optim, ours.steps, ours.prompts_per_step)
    reduced = load_recipe("sft", ["--policy.model", "m", "--data", "d", "--optim.lr_scale", "0.25"])
    assert Optim(**vars(reduced.optim)).build(policy().parameters(), 10)[0].param_groups[0]["initial_lr"] == 5e-6
    trial = load_recipe("implicit-reward")
    assert (trial.policy.model, trial.data, trial.optim.lr) == ("experts", "experts", 2e-3)
    with pytest.raises(RecipeError, match="needs a language policy"):
        load_recipe("shapes", ["--loop", "supervised", "--objective", "demonstration"])
    with pytest.raises(RecipeError, match="objective: must be a name"):
        load_recipe("dpo", ["--objective", "null"])


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    topics.model(0).save_pretrained(tmp_path / "model")
    topics.tokenizer().save_pretrained(tmp_path / "model")
    rows = topics.answered(0.75, "test", count=40)
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:]))
    return tmp_path


OWN = [
    "--policy.model",
    "model",
    "--data",
    "examples.jsonl",
    "--policy.max_new_tokens",
    "13",
    "--optim.warmup_steps",
    "0",
]


def run(recipe, name, *more, steps=4):
    words = ["--prompts_per_step", "8", "--optim.schedule", "constant", "--optim.lr", "3e-3", "--evaluation.every", "2"]
    words += ["--steps", str(steps), "--run.name", name, "--run.checkpoint_every", "2", *more]
    assert main(["train", recipe, *words]) == 0
    return read_run(f"runs/{name}")


def test_a_run_on_ones_own_model_and_data(workplace):
    quality = ["--watch.quality", "guerdon.language.tasks.topics:quality", "--evaluation.samples", "1"]
    found = run("implicit-reward", "ours", *OWN, *quality, "--watch.kl", "kl_penalty")
    first, last = found.metrics[0], found.metrics[-1]
    assert (first["step"], last["step"]) == (0, 4)
    assert first["eval/loss"] == pytest.approx(0.0, abs=1e-5)  # at the reference every reward is nothing
    assert last["eval/nll"] < first["eval/nll"]
    assert last["eval/implicit"] > 0
    assert last["eval/sampled/kl"] < first["eval/sampled/kl"] == pytest.approx(0.0, abs=1e-5)
    assert {"loss", "nll", "implicit", "value_start", "eval/sampled/quality_win_rate"} <= set(last)
    lines = (workplace / "runs/ours/samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["phase"] for line in lines} == {"before", "after"}
    # the likelihood of the other recipe, from the command line
    linear = ["--objective.demonstration_value.divergence", LINEAR]
    plain, same = run("sft", "plain", *OWN), run("sft", "same", *OWN, *linear)
    assert plain.metrics[-1]["eval/loss"] == pytest.approx(same.metrics[-1]["eval/nll"], abs=1e-3)


def test_a_resumed_run_is_the_same(workplace):
    adapters = ["--policy.lora.rank", "2", "--objective.demonstration.divergence", "hellinger"]
    run("implicit-reward", "straight", *OWN, *adapters)
    run("implicit-reward", "stopped", *OWN, *adapters, steps=2)
    assert main(["resume", "runs/stopped", "--steps", "4"]) == 0
    ours, theirs = (
        load_file(f"runs/{name}/checkpoints/step-4/policy/adapter_model.safetensors")
        for name in ("straight", "stopped")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_bundled_task_and_preferences_after_it(workplace):
    warm = ["--warm_start.steps", "3", "--warm_start.batch_size", "4", "--evaluation.size", "20"]
    found = run("implicit-reward", "first", *warm)
    assert {"eval/nll", "eval/sampled/quality"} <= set(found.metrics[-1])
    assert len(found.supervised) == 3
    model = ["--policy.model", "runs/first/checkpoints/step-4/policy", "--data", "experts"]
    second = run("dpo", "second", *model, "--policy.max_new_tokens", "16", "--evaluation.size", "20")
    assert second.metrics[0]["eval/margin"] == pytest.approx(0.0, abs=1e-5)


def test_the_rows_of_the_bundled_task():
    def share(rows):
        return sum(topics.share_good(row["completion"], row["topic"]) for row in rows) / len(rows)

    assert len(experts.demonstrations(0)) == 96
    assert share(experts.demonstrations(0)[:]) == pytest.approx(0.75, abs=0.06)
    assert share(experts.held_out_rows(1000)) == pytest.approx(0.75, abs=0.02)
    assert share(experts.pretraining(0)[:1000]) == pytest.approx(0.45, abs=0.02)
