"""The page "from raw completions", as it is written: its script makes models and samples, its two commands a better model."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from guerdon.cli.main import main
from tests.pages import ROOT, blocks, commands
from tests.test_readme import write_files

PAGE = ROOT / "docs" / "howto" / "from-raw-completions.md"


def test_the_page_aligns_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], friendly_errors: None
) -> None:
    write_files(PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    script = next(block.text for block in blocks(PAGE) if block.title == "start.py")
    short = script.replace("STEPS, PROMPTS = 200, 1000", "STEPS, PROMPTS = 10, 40")
    assert short != script
    exec(compile(short, "start.py", "exec"), {})
    lines = [command.line for command in commands(PAGE)]
    annotate = next(
        line for line in lines if line.startswith("guerdon annotate samples.jsonl --strong ./strong --weak")
    )
    train = next(line for line in lines if "--run.name aligned" in line)
    assert main(shlex.split(annotate)[1:]) == 0
    assert "agreement with labels" in capsys.readouterr().out
    pair = json.loads((tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(pair) == {"prompt", "chosen", "rejected", "scores", "score_chosen", "score_rejected", "topic"}
    assert main([*shlex.split(train)[1:], "--steps", "2", "--evaluation.size", "5"]) == 0
    run = tmp_path / "runs" / "aligned"
    first = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert "eval/sampled/quality" in first
    assert (run / "checkpoints" / "step-2" / "policy" / "model.safetensors").exists()


def test_the_rewards_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("myrewards", None)
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "p", "completions": ["aa", "b" * 50, "c" * 60]}))
    line = next(command.line for command in commands(PAGE) if "myrewards:length" in command.line)
    assert main(shlex.split(line)[1:]) == 0
    pair = json.loads((tmp_path / "samples.pairs.jsonl").read_text(encoding="utf-8"))
    assert (pair["scores"], pair["rejected"]) == ([2.0, 40.0, 40.0], "aa")
