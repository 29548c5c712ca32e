"""What every test runs under: annotations checked at run time, one thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

# before guerdon is imported anywhere: shapes and types of every annotated argument are checked in all tests
jaxtyping.install_import_hook("guerdon", "beartype.beartype")

from tests.models import REWARDS, problems, saved_model  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def forget_rewards_of_other_tests():
    """Each test that brings reward functions writes a module of this name in a folder of its own."""
    yield
    sys.modules.pop("myrewards", None)


@pytest.fixture
def friendly_errors() -> Iterator[None]:
    """Switch the run-time annotation checks off, so that the library's own error messages can be seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def workplace(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model, data and a module of rewards, which is the current folder."""
    (tmp_path / "model").symlink_to(saved)
    problems(tmp_path / "problems.jsonl")
    (tmp_path / "myrewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("myrewards", None)
    yield tmp_path
    sys.modules.pop("myrewards", None)
