"""Every example in a docstring, and every Python block of the pages, does what it shows."""

from __future__ import annotations

import ast
import doctest
import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.pages import ROOT, Block, blocks, own_pages
from tests.test_readme import name, write_files

SOURCE = ROOT / "src"
_PARSER = doctest.DocTestParser()
_FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples(path: Path) -> Iterator[tuple[str, str, int]]:
    """(where, docstring, line) of every docstring with an example; read from the source: no wrapper hides one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and ">>>" in text:
                yield getattr(node, "name", path.stem), text, node.body[0].lineno


MODULES = sorted(path for path in SOURCE.rglob("*.py") if any(examples(path)))


def run(source: str, fields: dict[str, object], where: str, line: int, file: Path) -> None:
    test = _PARSER.get_doctest(source, {}, where, str(file), line)
    test.globs = fields
    runner = doctest.DocTestRunner(optionflags=_FLAGS, verbose=False)
    report: list[str] = []
    runner.run(test, out=report.append, clear_globs=False)
    assert runner.tries > 0
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_docstrings(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    for where, text, line in examples(path):
        run(text, {**vars(module), "torch": torch}, f"{module.__name__}.{where}", line, path)


def test_most_modules_of_the_stages_have_an_example() -> None:
    stages = [p for p in MODULES if p.parent.name in ("advantages", "objectives", "rewards", "sampling", "weighting")]
    assert len(stages) >= 10


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("python", "pycon") and not block.title]


@pytest.mark.parametrize("page", [page for page in own_pages() if runnable(page)], ids=name)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, friendly_errors: None) -> None:
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    fields: dict[str, object] = {"__name__": "page"}
    try:
        for block in runnable(page):
            if block.language == "pycon":
                run(textwrap.dedent(block.text), fields, page.name, block.line, page)
            else:
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), fields)
    finally:
        for added in set(sys.modules) - before:  # the page's own files, which another page may call the same
            if (tmp_path / f"{added}.py").exists():
                del sys.modules[added]
