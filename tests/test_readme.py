"""What the README and the pages say to type is right: commands parse, recipes load, the table of methods is current."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from guerdon.cli.main import COMMANDS, main
from guerdon.recipes.schema import load_recipe
from guerdon.recipes.yaml12 import loads
from tests.pages import ROOT, Command, blocks, commands, own_pages

README = ROOT / "README.md"
METHODS = [
    ROOT / "docs" / "methods" / f"{slug}.md"
    for slug in ("cdr", "copo", "noisy-verifier", "real", "sweet-spot", "text2grad")
]
PAGES = sorted({README, *METHODS, *own_pages()})
COMMANDS_SHOWN = [(page, command) for page in PAGES for command in commands(page)]


def name(value: object) -> str:
    if isinstance(value, Command):
        return value.line
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def write_files(page: Path, folder: Path) -> None:
    """The files that a page shows under a title."""
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")


@pytest.mark.parametrize(("page", "command"), COMMANDS_SHOWN, ids=name)
def test_command(
    page: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.line)[1:]
    if words[0] == "train" and "--help" not in words:
        code = main([*words, "--dry-run"])
        shown = capsys.readouterr()
        if command.answer:  # a mistake that the page shows with what is said about it
            assert code == 2
            assert shown.err.startswith(command.answer.removesuffix("..."))
        else:
            assert code == 0, shown.err
            assert "loop:" in shown.out
    elif words[0] in ("resume", "report", "compare"):
        # the folders are placeholders: it is the folder that must be missed, and nothing else
        assert main(words) == 2
        assert "there is no run folder" in capsys.readouterr().err
    elif words[0] == "methods":
        assert main(words) == 0
    elif words[0] == "annotate":
        # its options are right as far as they can be checked without the data, which is what must be missed
        assert main(words) == 1
        assert "there is no such file" in capsys.readouterr().err
    else:
        assert words[0] in COMMANDS
        main([words[0], "--help"])
        usage = capsys.readouterr().out
        assert all(word in usage for word in words[1:] if word.startswith("--"))


def test_there_are_commands_to_test() -> None:
    assert len(commands(README)) >= 10
    assert any("resume" in command.line for command in commands(README))


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "yaml" for b in blocks(page))], ids=name)
def test_recipe_in_yaml_loads(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            given = loads(block.text)
            # an excerpt stands in a recipe that names these; one that brings its own is taken as it is
            rest = {"rewards": {"correct": "exact_answer"}, "policy": {"model": "sort"}, "data": "sort"}
            load_recipe({**rest, **given})


def test_make_targets_exist() -> None:
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [
        line.split()[1] for block in blocks(README) for line in block.text.splitlines() if line.startswith("make ")
    ]
    assert lines == ["demo", "test"]
    assert all(f"\n{target}:" in targets for target in lines)


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_of_methods_is_current() -> None:
    readme = README.read_text(encoding="utf-8")
    made = script(ROOT / "docs" / "scripts" / "tables.py").update(readme)
    assert readme == made, "run: python docs/scripts/tables.py"


def test_every_setting_is_documented() -> None:
    from guerdon.recipes.schema import Recipe
    from guerdon.typed import dotted

    table = script(ROOT / "docs" / "scripts" / "tables.py").settings()
    for path, setting, _ in dotted(Recipe):
        assert f"`{path.rpartition('.')[2]}`" in table, path
        assert setting.metadata["help"]
