"""The page "align my pipeline", as it is written: its files make a pipeline, train it, and load what was trained."""

from __future__ import annotations

import json

from guerdon.cli.main import main
from tests.pages import ROOT, blocks
from tests.test_readme import write_files

PAGE = ROOT / "docs" / "howto" / "align-my-pipeline.md"


def test_the_page_trains_a_pipeline_on_disk(tmp_path, monkeypatch, friendly_errors):
    write_files(PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    scripts = {block.title: block.text for block in blocks(PAGE)}
    exec(compile(scripts["tiny.py"], "tiny.py", "exec"), {})
    short = {"steps": 1, "evaluation.every": 0, "evaluation.size": 1, "run.samples_every": 1, "run.name": "first"}
    assert main(["train", "align.yaml", *(word for k, v in short.items() for word in (f"--{k}", str(v)))]) == 0
    run = tmp_path / "runs" / "first"
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert {"score/coloured", "watch/contrast", "eval/greedy/coloured", "eval/sampled/contrast"} <= set(last)
    assert (run / "images" / "1-after-greedy-0-0.png").exists()
    assert not (run / "checkpoints" / "step-1" / "policy" / "vae").exists()
    exec(compile(scripts["load.py"].replace("step-20", "step-1"), "load.py", "exec"), {})
    assert (tmp_path / "rose.png").read_bytes()[1:4] == b"PNG"
