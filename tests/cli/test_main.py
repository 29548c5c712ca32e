"""Dispatch, exit codes and messages."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import guerdon
from guerdon.cli import methods
from guerdon.cli.main import COMMANDS, main
from guerdon.cli.train import split
from guerdon.errors import RecipeError, ScoreError
from guerdon.recipes.yaml12 import loads

Calls = list[tuple[Any, ...]]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], Calls]:
    """Put a recording function in the place of `train` and `resume`."""

    def install(then: Callable[..., Any]) -> Calls:
        calls: Calls = []

        def record(*arguments: Any) -> Any:
            calls.append(arguments)
            return then()

        stand_in = ModuleType("guerdon.training.run")
        stand_in.train = stand_in.resume = record  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "guerdon.training.run", stand_in)
        return calls

    return install


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"guerdon {guerdon.__version__}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    out = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert name in out
        assert command.help in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"usage: guerdon {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'?"),
        (["--verison"], "no option '--verison'"),
        (["train"], "required: RECIPE"),
        (["train", "--dry-rn", "sort"], "no option '--dry-rn'. Did you mean 'dry-run'?"),
        (["train", "sort", "more"], "no argument 'more'"),
        (["report", "runs/none"], "no run folder 'runs/none'"),
        (["resume", "runs/none", "--steps", "many"], "--steps"),
        (["compare", "one"], "two or more runs"),
        (["methods", "--stage", "advantage"], "no stage 'advantage'. Did you mean 'advantages'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_exits_with_2_and_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("guerdon: ")
    assert err.count("\n") == 1
    assert said in err


def test_dry_run_prints_a_recipe_that_reads_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = ["--optim.lr", "1e-4", "--rewards.short.regex.pattern", "^.{3}$"]
    assert main(["train", "sort", "--dry-run", *settings]) == 0
    first = capsys.readouterr().out
    path = tmp_path / "again.yaml"
    path.write_text(first, encoding="utf-8")
    assert main(["train", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out == first
    assert "lr: 0.0001" in first
    assert loads(first)["rewards"]["short"] == {"regex": {"pattern": "^.{3}$"}}


def test_train_hands_over_the_resolved_recipe(runner: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}", encoding="utf-8")
    calls = runner(lambda: tmp_path)
    assert main(["train", "--steps", "3", "sort", "--advantage=rloo"]) == 0
    ((recipe, name),) = calls
    assert (recipe.steps, recipe.advantage, recipe.policy.model, name) == (3, "rloo", "sort", "sort")
    assert str(tmp_path / "report.html") in capsys.readouterr().out.replace("\n", "")


def test_resume_hands_over_the_folder_and_the_steps(runner: Any, tmp_path: Path) -> None:
    calls = runner(lambda: tmp_path)
    (tmp_path / "recipe.yaml").write_text("{}", encoding="utf-8")
    assert main(["resume", str(tmp_path), "--steps", "400"]) == 0
    assert calls == [(tmp_path, ["--steps", "400"], None)]


def _raise(error: BaseException) -> Callable[[], None]:
    def raiser() -> None:
        raise error

    return raiser


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ScoreError("reward 'x' raised"), 1, "guerdon: reward 'x' raised\n"),
        (RecipeError("sizes do not divide"), 2, "guerdon: sizes do not divide\n"),
        (KeyboardInterrupt(), 130, "guerdon: interrupted\n"),
    ],
    ids=["run-time", "recipe", "interrupt"],
)
def test_exit_codes(
    error: BaseException, code: int, said: str, runner: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    runner(_raise(error))
    assert main(["train", "sort"]) == code
    assert capsys.readouterr().err == said


def test_traceback_on_demand(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner(_raise(ScoreError("bad")))
    with pytest.raises(ScoreError, match="bad"):
        main(["train", "sort", "--traceback"])
    monkeypatch.setenv("GUERDON_TRACEBACK", "1")
    with pytest.raises(ScoreError, match="bad"):
        main(["train", "sort"])


def test_an_error_that_is_not_guerdons_is_not_hidden(runner: Any) -> None:
    runner(_raise(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["train", "sort"])


def test_report_and_compare(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    compared: list[Any] = []
    stand_in = ModuleType("guerdon.report")
    stand_in.write_report = lambda run: run / "report.html"  # type: ignore[attr-defined]
    stand_in.print_summary = lambda run: print(f"summary of {run.name}")  # type: ignore[attr-defined]
    stand_in.write_comparison = lambda runs, out: compared.extend([runs, out])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "guerdon.report", stand_in)
    monkeypatch.setattr("webbrowser.open", opened.append)
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        run.mkdir()
        (run / "recipe.yaml").write_text("{}", encoding="utf-8")
    assert main(["report", str(runs[0])]) == 0
    assert "summary of a" in capsys.readouterr().out
    assert opened == []
    assert main(["report", str(runs[0]), "--open"]) == 0
    assert opened == [(runs[0] / "report.html").as_uri()]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    assert compared == [runs, tmp_path / "both.html"]


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sort-1").mkdir()
    assert main(["report", str(tmp_path / "sort-2")]) == 2
    assert "Did you mean" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "sort-1")]) == 2
    assert "has no recipe.yaml" in capsys.readouterr().err


def test_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--stage", "rewards", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    components = {entry["name"]: entry for entry in listing["components"]}
    assert components["exact_answer"]["options"] == {"strip": "True", "ignore_case": "False"}
    assert components["regex"]["options"]["pattern"] is None
    assert components["regex"]["fields"] == ["samples", "answer"]
    assert {m["slug"]: m["state"] for m in listing["methods"]}["basics"] == "built"


def test_a_table_is_cut_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from guerdon.catalogue import METHODS

    whole = methods.table(METHODS)
    assert METHODS[0].line in whole
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("os.get_terminal_size", lambda: type("Size", (), {"columns": 60}))
    assert max(map(len, methods.table(METHODS).splitlines())) == 60


def test_settings_are_told_from_the_commands_own_words() -> None:
    words = ["--optim.lr", "-1", "sort", "--dry-run", "--a.b=c", "--flag", "--x", "y", "z"]
    assert split(words, ["--dry-run", "--help"]) == (
        ["sort", "--dry-run", "z"],
        ["--optim.lr", "-1", "--a.b=c", "--flag", "--x", "y"],
    )
