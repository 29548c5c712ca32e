"""A cache of its own for every test, and the toy's diary."""

from __future__ import annotations

from pathlib import Path

import pytest


class Diary:
    """What the toy measured, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


@pytest.fixture
def diary(tmp_path, monkeypatch) -> Diary:
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "toy.log"))
    return Diary(tmp_path / "toy.log")
