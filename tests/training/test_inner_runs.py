"""DERL on recipes: inner runs of one's own recipe, what lies on disk, failures, a kill, and going on."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guerdon.cli.main import main
from guerdon.errors import NumericsError, RecipeError
from guerdon.language.domain import load_data
from guerdon.recipes import load_recipe
from guerdon.rewards.expression import RewardExpression
from guerdon.training.inner_runs import InnerRuns, Job, inner_recipe, make_pool
from guerdon.workers import Done, RayWorkers, WorkerError, Workers

INNER = """\
# a recipe as a user has it
loop: online
policy: {model: model, max_new_tokens: 6}
data: problems.jsonl
rewards: {first: "myrewards:deadly", right: exact_answer}
prompts_per_step: 4
group_size: 4
optim: {lr: 3.0e-3}
steps: 3
evaluation: {every: 0, size: 8, samples: 2}
run: {checkpoint_every: 2}
"""


@pytest.fixture
def inner(workplace) -> Path:
    path = workplace / "inner.yaml"
    path.write_text(INNER)
    return path


def words(**changes: object) -> list[str]:
    wanted = {
        "bilevel.inner": "inner.yaml",
        "bilevel.metric": "eval/sampled/first",
        "bilevel.workers": 0,
        "warm_start.steps": 60,
        "group_size": 3,
        "steps": 2,
        "run.directory": "runs",
        **changes,
    }
    return [word for name, value in wanted.items() for word in (f"--{name}", str(value))]


def lines(run: Path, name: str = "expressions") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def expression(text: str) -> RewardExpression:
    return RewardExpression.parse(text, 2)


def runs(folder: Path, pool=None, **options) -> InnerRuns:
    recipe = load_recipe("inner.yaml")
    return InnerRuns(recipe, folder, pool or Workers(0), metric="eval/sampled/first", **options)


# a whole run


def test_a_recipe_of_ones_own_from_the_command_to_what_lies_on_disk(inner, capsys):
    assert main(["train", "derl", *words(**{"run.name": "whole"})]) == 0
    run = Path("runs/whole")
    found = lines(run)
    assert [line["step"] for line in found] == [1, 1, 1, 2, 2, 2]
    assert any(line["valid"] for line in found)
    told = json.loads((run / "expression.json").read_text())
    assert told["metric"] == "eval/sampled/first"
    assert told["primitives"] == ["first", "right"]
    assert math.isfinite(told["base"])
    assert told["best"]["performance"] == max(line["performance"] for line in found if line["valid"])
    (last,) = told["last_runs"]
    assert math.isfinite(last["eval/sampled/first"])
    assert told["best"]["expression"] in (Path(last["run"]) / "recipe.yaml").read_text()
    assert list(Path(last["run"], "checkpoints").iterdir())
    # a run for each different expression, named after its recipe, whose checkpoints nobody needs any more
    folders = sorted((run / "inner" / "runs").iterdir())
    distinct = {expression(line["expression"]).program for line in found if line["valid"]}
    assert len(folders) == len(distinct)
    assert not any((folder / "checkpoints").exists() for folder in folders)
    shown = capsys.readouterr().out
    assert told["best"]["expression"] in shown
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_killed_in_an_inner_run_and_resumed_gives_the_same(inner, workplace):
    assert main(["train", "derl", *words(**{"run.name": "straight"})]) == 0
    # calls of the reward: 1 evaluation of the base; for each inner run one before, three steps, one after
    command = [sys.executable, "-m", "guerdon", "train", "derl", *words(**{"run.name": "killed"})]
    killed = subprocess.run(
        command, cwd=workplace, env={**os.environ, "DEADLY": "10"}, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = Path("runs/killed")
    ended = [f for f in (run / "inner" / "runs").iterdir() if '"finished"' in (f / "status.json").read_text()]
    before = {f.name: (f / "metrics.jsonl").stat().st_mtime_ns for f in ended}
    assert before
    assert main(["resume", str(run)]) == 0
    assert {name: (run / "inner" / "runs" / name / "metrics.jsonl").stat().st_mtime_ns for name in before} == before
    assert lines(run) == lines(Path("runs/straight"))
    ours, theirs = (
        load_file(f / "checkpoints" / "step-2" / "policy" / "model.safetensors") for f in (run, Path("runs/straight"))
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (first,), (second,) = (
        json.loads((f / "expression.json").read_text())["last_runs"] for f in (run, Path("runs/straight"))
    )
    assert first["eval/sampled/first"] == second["eval/sampled/first"]


def test_stopped_between_iterations_and_resumed_gives_the_same(inner):
    for name, first in (("straight", 2), ("parted", 1)):
        assert main(["train", "derl", *words(**{"run.name": name, "steps": first, "bilevel.population": "true"})]) == 0
    assert main(["resume", "runs/parted", "--steps", "2"]) == 0
    straight, parted = lines(Path("runs/straight")), lines(Path("runs/parted"))
    assert parted == straight
    best = [json.loads(Path("runs", name, "expression.json").read_text())["best"] for name in ("straight", "parted")]
    assert best[0] == best[1]


# the population


def test_a_population_goes_on_exactly_where_the_best_stopped(inner, tmp_path):
    found = runs(tmp_path / "runs")
    found.prepare()
    first = found.train([expression("g1"), expression("g2")], None, 0)
    best = max(first, key=lambda trained: trained.performance)
    assert best.checkpoint is not None
    found.forget([best.checkpoint])
    assert Path(best.checkpoint).is_dir()
    assert sum((f / "checkpoints").exists() for f in (tmp_path / "runs" / "runs").iterdir()) == 1
    (second,) = found.train([expression("g1+g2")], best.checkpoint, 1)
    assert second.checkpoint is not None
    records = lines(Path(second.checkpoint).parents[2], "metrics")
    assert records[0]["eval/sampled/first"] == best.performance
    (told,) = found.conclude("g1+g2", second.checkpoint, 5)  # what it has arrived at, as it is, on held-out data
    assert lines(Path(told["run"]), "metrics")[-1]["step"] == 0


# the inner side


def test_the_same_reward_from_the_same_start_gives_the_same(inner, tmp_path):
    first, second = runs(tmp_path / "a"), runs(tmp_path / "b")
    assert first.prepare() == second.prepare()
    (a,), (b,) = (one.train([expression("g1 - 0.5*g2")], None, i) for i, one in enumerate((first, second)))
    assert a.performance == b.performance
    assert not a.fault


def test_what_is_measured_on_was_neither_trained_on_nor_is_it_the_test(inner, tmp_path):
    found = runs(tmp_path / "runs", share=0.3)
    found.prepare()
    (trained,) = found.train([expression("g1")], None, 0)
    assert trained.checkpoint is not None
    own = load_recipe(Path(trained.checkpoint).parents[2] / "recipe.yaml")
    assert own.data is not None
    data = load_data(own.data, loop="online", evaluation=own.evaluation, seed=own.seed)
    drawn = {str(data.train[i]["prompt"]) for i in range(len(data.train))}
    measured = {str(row["prompt"]) for row in data.held_out}
    assert drawn
    assert measured
    assert not drawn & measured
    (told,) = found.conclude("g1", None, 1)
    last = load_recipe(Path(told["run"]) / "recipe.yaml")
    assert last.evaluation.share is None
    assert last.seed == 1000


class Scripted:
    """A pool whose jobs end as they are told to: one outcome after the other for each expression."""

    def __init__(self, outcomes: dict[str, list]) -> None:
        self.outcomes, self.asked = outcomes, []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        pass

    def run(self, function, jobs: list[Job], *, go_on: bool = False):
        assert go_on
        formulas = [job.recipe.weighting["expression"]["formula"] for job in jobs]
        self.asked.append(formulas)
        for i, formula in enumerate(formulas):
            jobs[i].run.mkdir(parents=True, exist_ok=True)
            outcome = self.outcomes[formula].pop(0)
            error = outcome if isinstance(outcome, Exception) else None
            yield Done(i, None if error else outcome, error)


def test_a_run_that_fails_is_worth_nothing_and_the_others_count(inner, tmp_path):
    pool = Scripted({"g1": [0.5], "g2": [NumericsError("the loss is NaN")], "g1+g2": [math.nan]})
    found = runs(tmp_path / "runs", pool)
    rewards = [expression(text) for text in ("g1", "g2", "g1+g2")]
    results = found.train(rewards, None, 0)
    assert [trained.worth for trained in results] == [0.5, 0.0, 0.0]
    assert [trained.fault for trained in results] == [
        "",
        "NumericsError: the loss is NaN",
        "eval/sampled/first is no finite number",
    ]
    # a loop that was stopped finds what had failed, and does not try again
    again = runs(tmp_path / "runs", Scripted({"g1": [0.5]})).train(rewards, None, 0)
    assert [trained.fault for trained in again] == [trained.fault for trained in results]


def test_retries_begin_failed_runs_again_and_no_others(inner, tmp_path):
    pool = Scripted({"g1": [0.5], "g2": [OSError("no space"), OSError("no space"), 0.25], "2*g1": [OSError("x")] * 3})
    found = runs(tmp_path / "runs", pool, retries=2)
    results = found.train([expression(text) for text in ("g1", "g2", "2*g1")], None, 0)
    assert [trained.worth for trained in results] == [0.5, 0.25, 0.0]
    assert pool.asked == [["g1", "g2", "2*g1"], ["g2", "2*g1"], ["g2", "2*g1"]]


def test_a_process_that_ends_does_not_condemn_those_beside_it(inner, tmp_path):
    gone = WorkerError("the process ended")
    pool = Scripted({"g1": [gone, 0.5], "g2": [gone, gone], "2*g1": [0.75]})
    results = runs(tmp_path / "runs", pool).train([expression(text) for text in ("g1", "g2", "2*g1")], None, 0)
    assert [trained.worth for trained in results] == [0.5, 0.0, 0.75]
    assert pool.asked == [["g1", "g2", "2*g1"], ["g1"], ["g2"]]
    assert "the process ended" in results[1].fault


def test_a_real_failure_says_why(inner, tmp_path):
    found = runs(tmp_path / "runs")
    found.prepare()
    found.recipe.rewards["first"] = "myrewards:sometimes_raises"
    (trained,) = found.train([expression("g1")], None, 0)
    assert trained.worth == 0.0
    assert "ZeroDivisionError" in trained.fault
    assert trained.checkpoint is None


# what is wrong before anything runs


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"bilevel.inner": "nowhere.yaml"}, "bilevel.inner: there is no recipe file"),
        ({"bilevel.inner": "sft"}, "bilevel.inner"),
        ({"bilevel.settings.optim.lrr": 1}, r"bilevel.inner: .*optim.lrr"),
        ({"rewards.correct": "exact_answer"}, "takes its reward from inner runs"),
        ({"group_size": 1}, "at least 2"),
        ({"policy.max_new_tokens": 2, "bilevel.write": "grammar"}, "too few"),
        ({"bilevel.metric": "eval/sampled/gold"}, "measures no 'eval/sampled/gold'. It measures: .*eval/sampled/first"),
    ],
)
def test_what_is_wrong_is_said(inner, changes, why, capsys):
    assert main(["train", "derl", *words(**changes)]) != 0
    assert re.search(why, capsys.readouterr().err)


def test_the_inner_recipe_takes_settings_as_on_a_command_line(inner):
    outer = load_recipe(
        "derl",
        words(**{"bilevel.settings.optim.lr": 1e-4, "bilevel.settings.rewards.right": "null", "bilevel.last.steps": 9}),
    )
    assert inner_recipe(outer.bilevel).optim.lr == 1e-4
    assert list(inner_recipe(outer.bilevel).rewards) == ["first"]
    assert inner_recipe(outer.bilevel, outer.bilevel.last).steps == 9
    with pytest.raises(RecipeError, match="must be given"):
        inner_recipe(load_recipe({"loop": "bilevel"}, complete=False).bilevel)


def test_pools():
    settings = load_recipe("derl", ["--bilevel.workers", "3"]).bilevel
    pool = make_pool(settings)
    assert isinstance(pool, Workers)
    assert pool.processes == 3


@pytest.mark.slow
def test_inner_runs_in_processes_give_what_they_give_here(inner, tmp_path):
    rewards = [expression("g1"), expression("g2")]
    here, there = runs(tmp_path / "here"), runs(tmp_path / "there", Workers(2))
    here.prepare()
    with there.pool:
        there.prepare()
        found = there.train(rewards, None, 0)
    assert [t.performance for t in found] == [t.performance for t in here.train(rewards, None, 0)]


@pytest.mark.slow
def test_inner_runs_on_ray_give_what_they_give_here(inner, tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'guerdon[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    rewards = [expression("g1"), expression("g2")]
    here, there = runs(tmp_path / "here"), runs(tmp_path / "there", RayWorkers())
    here.prepare()
    try:
        with there.pool:
            there.prepare()
            found = there.train(rewards, None, 0)
    finally:
        ray.shutdown()
    assert [t.performance for t in found] == [t.performance for t in here.train(rewards, None, 0)]
