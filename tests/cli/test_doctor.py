"""The doctor: what is there, what is missing, and the line that installs it."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from guerdon.cli import doctor
from guerdon.cli.main import main

DECLARED = [
    "torch>=2.6",
    "pyyaml>=6",
    "peft>=0.18; extra == 'language'",
    'transformers[torch]>=99.0; extra == "language"',
]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """A machine with PyYAML and an old transformers, without torch, peft and a browser."""
    versions: dict[str, str | None] = {"pyyaml": "6.0", "transformers": "5.0", "torch": None, "peft": None}
    real = importlib.util.find_spec

    def version(name: str) -> str:
        found = versions[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in versions and versions[name] is None else real(name, package)

    monkeypatch.setattr(doctor.metadata, "requires", lambda name: DECLARED)
    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    return versions


def test_missing_core_is_an_exit_code(machine: dict[str, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "core: 1 of 2 missing or too old" in out
    assert "install with: pip install 'guerdon'\n" in out
    assert "torch is not installed" in out


def test_missing_extra_is_named_and_is_no_failure(
    machine: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    machine["torch"] = "2.13.0+cpu"
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "core: complete" in out
    assert "language: 2 of 2 missing or too old" in out
    assert "install with: pip install 'guerdon[language]'" in out
    assert "no Chromium found" in out


def test_not_installed_as_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", absent)
    assert doctor.requirements() is None


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo '<html><p>guerdon</p></html>'", "chromium opens"), ("exit 7", "does not open: exit code 7")],
    ids=["opens", "fails"],
)
def test_browser(script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "chromium"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(program))
    assert said in doctor.browser()


def test_accelerate_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "one process" in doctor.accelerate_config()
    path = tmp_path / "accelerate" / "default_config.yaml"
    path.parent.mkdir()
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 8\nmixed_precision: bf16\n", encoding="utf-8")
    assert "distributed_type MULTI_GPU, num_processes 8, mixed_precision bf16" in doctor.accelerate_config()


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GiB free for" in doctor.disk(tmp_path / "not" / "yet")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    assert "TOO LITTLE" in doctor.disk(tmp_path)
