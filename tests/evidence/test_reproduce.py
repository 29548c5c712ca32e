"""`guerdon reproduce`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from guerdon import evidence
from guerdon.cli import reproduce
from guerdon.cli.main import main
from guerdon.evidence import pages
from tests.evidence import batched, toy


@pytest.fixture
def toys(diary, monkeypatch, tmp_path):
    """Two claim tests in place of the real ones, and a folder for what they find."""
    monkeypatch.setattr(reproduce, "MEMBERS", {"toy": "toy", "batched": "batched"})
    monkeypatch.setattr(evidence, "find", {"toy": toy, "batched": batched}.__getitem__)
    return tmp_path / "docs" / "evidence"


def test_a_claim_that_fails_is_no_error(toys, monkeypatch, capsys):
    monkeypatch.setenv("TOY_EDGE", "-0.4")
    assert main(["reproduce", "toy", "--jobs", "1", "--out", str(toys)]) == 0
    out = capsys.readouterr().out
    assert "mechanism does not hold, headline not shown at this scale" in out
    assert out.strip().endswith(str(toys.with_suffix(".md")))
    assert not pages.load(toys / "toy.json").holds
    assert (toys / "toy.svg").exists()


def test_options_reach_the_run(toys, diary, capsys):
    words = ["reproduce", "toy", "--jobs", "1", "--out", str(toys), "--budget", "full", "--seeds", "2"]
    assert main(words) == 0
    found = pages.load(toys / "toy.json")
    assert (found.budget, found.seeds) == ("full", (0, 1))
    diary.clear()
    assert main(words) == 0
    assert diary.lines() == []
    assert main([*words, "--fresh"]) == 0
    assert len(diary.lines()) == 16
    assert main(["reproduce", "toy", "--jobs", "1", "--out", str(toys)]) == 0
    assert "is kept: it holds a full run" in capsys.readouterr().out


def test_one_that_breaks_does_not_stop_the_others(toys, monkeypatch, capsys):
    monkeypatch.setenv("TOY_FAULT", "raise:method0")
    assert main(["reproduce", "--all", "--jobs", "1", "--seeds", "2", "--out", str(toys)]) == 1
    out, err = capsys.readouterr()
    assert "method (measure, seed 0, lr 0.2) failed: ZeroDivisionError" in err
    assert "1 of 2 tests failed: toy" in err
    assert "batched" in out
    assert not (toys / "toy.json").exists()
    assert pages.load(toys / "batched.json").holds


def test_one_alone_that_breaks(toys, monkeypatch, capsys):
    monkeypatch.setenv("TOY_FAULT", "raise:method0")
    assert main(["reproduce", "toy", "--jobs", "1", "--out", str(toys)]) == 1
    assert "failed: ZeroDivisionError" in capsys.readouterr().err


def test_mistakes_in_the_command(capsys):
    assert main(["reproduce", "grpo-familly"]) == 2
    assert "Did you mean 'grpo-family'" in capsys.readouterr().err
    assert main(["reproduce", "grpo-family", "--seeds", "0"]) == 2
    assert main(["reproduce", "grpo-family", "--budget", "huge"]) == 2


def test_the_list(tmp_path, capsys):
    assert main(["reproduce", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for slug in evidence.MEMBERS:
        assert f"{slug}: {evidence.find(slug).TITLE}\n  {evidence.find(slug).CLAIM}\n  not run" in out


def test_help_and_list_do_not_import_torch(tmp_path):
    code = (
        "import sys; from guerdon.cli.main import main; "
        f"main(['--help']); main(['reproduce', '--help']); main(['reproduce', '--out', {str(tmp_path)!r}]); "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "reproduce" in done.stdout
