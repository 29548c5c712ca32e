"""From written feedback to an update: local credit, the loop, the recipe, and going on after a stop."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from guerdon.advantages import gae
from guerdon.cli.main import main
from guerdon.errors import RecipeError
from guerdon.language.policy import LanguagePolicy
from guerdon.language.tasks import sort
from guerdon.objectives import ppo
from guerdon.recipes import load_recipe
from guerdon.rewards.critics.program import ProgramCritic
from guerdon.rewards.spans import Spans
from guerdon.signal import Signal
from guerdon.training import Online, Optim, checkpoint
from tests.training.bandit import BanditPolicy

CRITIC = ProgramCritic(function=sort.critique)
LOCAL = partial(gae, gamma=0.0, lam=0.0, whiten=False)


def policy(**options):
    options = {"max_new_tokens": 8, "critic": True, **options}
    return LanguagePolicy.load(sort.model(0), tokenizer=sort.tokenizer(), **options)


def loop(advantage=LOCAL, *, of=None, steps=True, **options):
    signal = Signal(rewards={"feedback": Spans(critic=CRITIC, steps=steps)}, advantage=advantage)
    of = of or policy()
    if signal.needs_reference:
        of.keep_reference()
    options = {"prompts_per_step": 4, "group_size": 3, "optim": Optim(lr=1e-3), "steps": 10, **options}
    return Online(of, sort.train_rows(0), signal, ppo, **options)


def test_tokens_outside_spans_have_no_gradient():
    rollout = policy(critic=False)
    rollout.keep_offsets = True
    found = rollout.sample(["310=", "52="], 4, [0, 1]).update({"columns": {"answer": ["013", "25"]}})

    def half(prompt, response, answer):
        marks = sort.critique(prompt, response, answer)["marks"]
        return {"marks": [mark if n % 2 else 0 for n, mark in enumerate(marks)]}

    signal = Signal(rewards={"feedback": Spans(critic=ProgramCritic(function=half))}, advantage=LOCAL)
    found = signal(found.update({"values": torch.zeros_like(found.logp_old)}))
    rewards = found.rewards
    logp = found.logp_old.clone().requires_grad_()
    zero = torch.zeros_like(logp)
    ppo(logp, found.logp_old, found.advantages, zero, zero, zero, found.mask).total.backward()
    assert torch.equal(logp.grad != 0, rewards != 0)
    assert (rewards != 0).any()
    assert (rewards[found.mask] == 0).any()


def test_the_loop_pays_every_digit():
    result = loop().step()
    step_scores = result.rollout.extras["step_scores"][..., 0]
    for p, group in enumerate(result.rollout.samples):
        for g, text in enumerate(group):
            marks = sort.critique("", text, result.rollout.columns["answer"][p])["marks"]
            counted = [mark if letter.isdigit() else 0 for mark, letter in zip(marks, text, strict=True)]
            places = result.rollout.extras["offsets"][p, g].tolist()  # a padding token in a sample writes nothing
            assert step_scores[p, g].tolist() == [sum(counted[start:end]) for start, end in places]
            assert sum(end - start for start, end in places) == len(text)
    assert torch.equal(result.rollout.rewards, step_scores)
    assert torch.equal(result.rollout.rewards.sum(-1), result.rollout.scores[..., 0])
    assert result.metrics["reward"] == pytest.approx(step_scores.sum(-1).mean().item())
    assert result.metrics["critic_failures"] == 0


def test_summed_feedback_is_one_reward():
    assert loop(steps=False).step().rollout.rewards.shape == (4, 3)


@pytest.mark.parametrize("advantage", [gae, partial(gae, beta=0.1, kl_estimator="exact")])
def test_micro_batches_change_nothing(advantage):
    ends = []
    for micro_batch in (None, 1):
        trained = loop(advantage, of=policy(dtype="float64"), micro_batch=micro_batch, passes=2)
        for _ in range(2):
            trained.step()
        ends.append(torch.cat([p.detach().flatten() for p in trained.policy.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


def test_the_exact_divergence_is_there_where_it_is_asked_for():
    assert loop().step().rollout.extras.get("kl_old") is None
    trained = loop(partial(gae, beta=0.1, kl_estimator="exact"), optim=Optim(lr=0.01))
    assert not trained.needs_reference  # nothing reads its log-probabilities
    assert trained.step().rollout.extras["kl_old"].abs().max() < 1e-5
    assert trained.step().rollout.extras["kl_old"].max() > 1e-4
    with pytest.raises(RecipeError, match="no divergence over all that it could draw"):
        Online(
            BanditPolicy(critic=True),
            [{"prompt": 0}],
            Signal(rewards={"r": lambda samples: samples}, advantage=partial(gae, beta=0.1, kl_estimator="exact")),
            ppo,
            prompts_per_step=1,
        )


SHORT = ["--prompts_per_step", "4", "--group_size", "2", "--evaluation.size", "4", "--warm_start.steps", "2"]


def run(folder, name, *words, steps=3):
    written = ["--run.directory", str(folder), "--run.name", name, "--run.checkpoint_every", "1", "--steps", str(steps)]
    assert main(["train", "text2grad", *SHORT, *written, *words]) == 0
    return folder / name


def test_the_recipe_and_going_on_after_a_stop(tmp_path):
    straight = run(tmp_path, "straight", "--steps", "3")
    stopped = run(tmp_path, "stopped", steps=2)
    assert main(["resume", str(stopped), "--steps", "3"]) == 0
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (straight, stopped)
    ]
    timed = ("seconds", "tokens_per_s", "elapsed")
    ends = [{k: v for k, v in line[-1].items() if not k.startswith(timed)} for line in lines]
    assert ends[0] == ends[1]
    assert ends[0]["advantage_stage/beta"] != 0.01
    assert {"score/feedback", "no_feedback", "unmatched", "value_loss", "eval/greedy/correct"} <= set(ends[0])
    assert checkpoint.list_steps(straight)
    for one in (straight, stopped):
        assert (one / "checkpoints" / "step-3" / "policy" / "critic.safetensors").exists()


def test_a_model_of_ones_own_needs_a_critic(tmp_path, capsys):
    assert main(["train", "text2grad", "--policy.model", "m", "--data", "d.jsonl"]) != 0
    assert "rewards.feedback.spans: the option critic must be given" in capsys.readouterr().err


def test_another_critic_takes_the_place_of_the_trial_s():
    recipe = load_recipe("text2grad", ["--rewards.feedback.spans.critic", "{classifier: {model: ./judge}}"])
    assert recipe.policy.model == "sort"
    assert recipe.rewards == {"feedback": {"spans": {"critic": {"classifier": {"model": "./judge"}}}}}
