"""Recipes on a model and data of one's own, from the command to what lies on disk."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from guerdon.cli.main import main
from guerdon.report import read_run
from guerdon.training import checkpoint
from tests.models import saved_model, settings


def train(workplace, recipe="rlvr", **changes):
    changes = {"run.name": "run", "steps": 2, "evaluation.every": 0, **changes}
    if recipe == "sft":
        for name in ("rewards.correct", "group_size"):
            changes.setdefault(name, None)
    words = settings(workplace, **changes)
    pairs = [(words[i], words[i + 1]) for i in range(0, len(words), 2) if words[i + 1] != "None"]
    assert main(["train", recipe, *(word for pair in pairs for word in pair)]) == 0
    return workplace / "runs" / changes["run.name"]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_leaves_behind(workplace, capsys):
    run = train(workplace, **{"watch.length": "myrewards:sometimes_none", "steps": 6, "run.keep": 2})
    names = {path.name for path in run.iterdir()}
    assert names == {
        "recipe.yaml",
        "environment.json",
        "status.json",
        "metrics.jsonl",
        "ledger.jsonl",
        "samples.jsonl",
        "checkpoints",
        "report.html",
    }
    assert checkpoint.list_steps(run) == [4, 6]
    last = metrics(run)[-1]
    assert {
        "reward",
        "score/correct",
        "share/correct",
        "entropy",
        "grad_norm",
        "watch/length",
        "seconds/update",
    } <= set(last)
    assert {"eval/greedy/correct", "eval/sampled/correct", "eval/sampled/length"} <= set(last)
    phases = [json.loads(line)["phase"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert set(phases) == {"before", "train", "after"}
    shown = capsys.readouterr().out
    assert "Held-out correct, greedy" in shown
    assert str(run / "report.html") in shown


def test_the_saved_policy_is_the_hubs_own_format(workplace):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(workplace)
    folder = run / "checkpoints/step-2/policy"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(workplace / "model")
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert tokenizer("12=").input_ids == AutoTokenizer.from_pretrained(workplace / "model")("12=").input_ids
    again = train(workplace, **{"policy.model": folder, "run.name": "again"})
    assert metrics(again)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # inside peft
def test_adapters_are_trained_alone_and_saved_alone(workplace):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    changes = {"policy.lora.rank": 4, "objective.policy_gradient.beta": 0.1, "optim.lr": 0.03, "passes": 2}
    run = train(workplace, **changes)
    assert metrics(run)[-1]["kl"] > 0
    folder = run / "checkpoints/step-2/policy"
    assert not (folder / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    before = base(torch.tensor([[1, 2, 3]])).logits
    adapted = PeftModel.from_pretrained(base, folder)
    assert (adapted(torch.tensor([[1, 2, 3]])).logits - before).abs().max() > 1e-4


def test_a_warm_start_with_adapters_keeps_its_base(workplace):
    from safetensors.torch import load_file

    changes = {"policy.model": "sort", "policy.max_new_tokens": 11, "data": "sort", "rewards.correct": "exact_answer"}
    changes |= {
        "policy.lora.rank": 4,
        "warm_start.steps": 2,
        "warm_start.batch_size": 8,
        "objective.policy_gradient.beta": 0.1,
    }
    run = train(workplace, **changes)
    assert (run / "base" / "model.safetensors").exists()
    assert len((run / "supervised.jsonl").read_text().splitlines()) == 2
    assert main(["resume", str(run), "--steps", "3"]) == 0
    assert load_file(run / "checkpoints/step-3/policy/adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_other_data_formats(workplace, kind):
    rows = [json.loads(line) for line in (workplace / "problems.jsonl").read_text().splitlines()]
    path = workplace / {"csv": "p.csv", "parquet": "p.parquet", "folder": "p"}[kind]
    if kind == "csv":
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import datasets

        table = datasets.Dataset.from_list(rows)
        table.to_parquet(str(path)) if kind == "parquet" else table.save_to_disk(str(path))
    named = {
        "jsonl": train(workplace, **{"run.name": "jsonl"}),
        kind: train(workplace, data=path, **{"run.name": kind}),
    }
    one, other = ([line["reward"] for line in metrics(run) if "reward" in line] for run in named.values())
    assert one == other


def test_messages_go_through_the_chat_template(workplace, saved, tmp_path):
    from transformers import AutoTokenizer

    folder = saved_model(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": [{"role": "user", "content": f"{i % 10}{i % 7}"}], "answer": str(i % 10)} for i in range(20)]
    (workplace / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(
        workplace, **{"policy.model": folder, "data": workplace / "chat.jsonl", "rewards.correct": "myrewards:first"}
    )
    prompts = [json.loads(line)["prompt"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert all(prompt.startswith("user: ") for prompt in prompts)


def test_sft_lowers_the_loss_on_held_out_rows(workplace):
    rows = [{"prompt": f"{i}=", "completion": f"{i}"[::-1]} for i in range(60)]
    (workplace / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data": workplace / "sft.jsonl",
        "optim.schedule": "constant",
        "steps": 30,
        "evaluation.every": 10,
        "evaluation.size": 8,
    }
    run = train(workplace, "sft", **changes, **{"prompts_per_step": 16, "run.checkpoint_every": 10})
    losses = [line["eval/loss"] for line in metrics(run) if "eval/loss" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.1
    assert main(["resume", str(run), "--steps", "32"]) == 0
    assert metrics(run)[-1]["step"] == 32
    straight = train(workplace, "sft", **{**changes, "steps": 32, "prompts_per_step": 16, "run.name": "straight"})
    assert metrics(straight)[-1]["loss"] == metrics(run)[-1]["loss"]


def test_it_stops_at_a_target(workplace, capsys):
    run = train(workplace, **{"evaluation.every": 2, "steps": 6, "stop_at": "{eval/greedy/correct: -1.0}"})
    status = json.loads((run / "status.json").read_text())
    assert status["step"] == 2
    assert status["state"] == "finished"
    assert "reached -1" in status["reason"]


def test_trackers_are_imported_when_named(workplace):
    run = train(workplace, **{"run.trackers": "[tensorboard]"})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = [EventAccumulator(str(path)).Reload() for path in (workplace / "runs").rglob("events.out.tfevents.*")]
    (found,) = (file.Scalars("reward") for file in files if "reward" in file.Tags()["scalars"])
    assert len(found) == 2
    assert read_run(run).status["state"] == "finished"


def test_ppo_with_a_critic_from_a_recipe(workplace):
    run = train(workplace, advantage="gae", objective="ppo", passes=2, steps=3)
    assert {"value_loss", "clip_share"} <= set(metrics(run)[-1])
    assert (run / "checkpoints/step-3/policy/critic.safetensors").exists()
    assert main(["resume", str(run), "--steps", "4"]) == 0


def test_a_coroutine_and_a_trl_reward_of_ones_own(workplace):
    (workplace / "myrewards.py").write_text(
        "import asyncio\n"
        "async def slow(completions, answer, level, **kwargs):\n"
        "    await asyncio.sleep(0.001)\n"
        "    assert len(completions) == len(answer) == len(level)\n"
        "    return [float(c.startswith(a)) for c, a in zip(completions, answer)]\n"
        "def trl(prompts, completions, **kwargs):\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    run = train(workplace, **{"rewards.correct": "myrewards:slow", "rewards.length": "myrewards:trl"})
    assert {"score/correct", "score/length"} <= set(metrics(run)[-1])


def test_runs_are_compared_on_one_page(workplace):
    runs = [train(workplace, seed=seed, **{"run.name": f"seed-{seed}"}) for seed in (0, 1)]
    assert main(["compare", *map(str, runs), "--out", str(workplace / "both.html")]) == 0
    text = (workplace / "both.html").read_text()
    assert "seed-0" in text
    assert "seed-1" in text


def test_the_bundled_tasks_demonstrations_are_evaluated_too(tmp_path):
    words = ["--policy.model", "sort", "--data", "sort", "--steps", "2", "--evaluation.size", "8"]
    assert main(["train", "sft", *words, "--run.directory", str(tmp_path), "--run.name", "run"]) == 0
    assert metrics(tmp_path / "run")[-1]["eval/loss"] > 0
