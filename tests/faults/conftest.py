from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import REWARDS, problems, saved_model


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
