"""The page of a run whose samples are pictures."""

from __future__ import annotations

import base64
import json

import pytest
import torch

from guerdon.report import write_report
from guerdon.report.samples import read_samples
from guerdon.training.images import write_image

from .synthetic import write_run


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    records = []
    for line in (folder / "samples.jsonl").read_text().splitlines():
        record = json.loads(line)
        name = f"{record['step']}-{record['phase']}-{record['mode']}-{record['index']}-{len(records)}"
        write_image(folder / "images", name, torch.full((3, 4, 4), len(records) % 7 / 7))
        records.append({**record, "sample": {"image": f"images/{name}.png"}})
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def page(folder):
    return write_report(folder).read_text("utf-8")


def sources(html):
    return [part.split('"')[0] for part in html.split('<img class="sample" src="')[1:]]


def test_pictures_before_and_after_stand_in_a_grid_with_their_scores(run):
    html = page(run)
    shown = read_samples(run / "samples.jsonl", [])
    assert shown.pictures
    pairs = sum(len(group.pairs) for group in shown.sets)
    assert pairs == 24  # more than the eight of a kind that are shown of texts
    assert html.count('<figure class="picture">') == pairs
    first = shown.sets[0].pairs[0]
    encoded = base64.b64encode((run / first.before.image).read_bytes()).decode()
    assert f"data:image/png;base64,{encoded}" in sources(html)
    assert all(source.startswith("data:image/png;base64,") for source in sources(html))
    assert '<table class="pairs">' not in html


def test_the_ledger_shows_the_pictures_of_its_groups(run):
    assert len(sources(page(run))) > 2 * 24


def test_large_pictures_are_shown_by_their_small_copies(run):
    pair = read_samples(run / "samples.jsonl", []).sets[0].pairs[0]
    write_image(run / "images", pair.before.image.removeprefix("images/").removesuffix(".png"), torch.rand(3, 400, 400))
    small = (run / pair.before.image).with_suffix(".small.png")
    assert f"data:image/png;base64,{base64.b64encode(small.read_bytes()).decode()}" in sources(page(run))


def test_a_picture_that_is_gone_is_said_to_be(run):
    pair = read_samples(run / "samples.jsonl", []).sets[0].pairs[0]
    (run / pair.after.image).unlink()
    assert f"{pair.after.image} is gone" in page(run)


@pytest.mark.parametrize("name", ["../secret.png", "images/../../secret.png", "/etc/passwd", "images/a b.png", 3])
def test_no_file_outside_the_run_is_read(run, name):
    (run.parent / "secret.png").write_bytes(b"secret")
    lines = (run / "samples.jsonl").read_text().splitlines()
    changed = [json.dumps({**json.loads(line), "sample": {"image": name}}) for line in lines]
    (run / "samples.jsonl").write_text("\n".join(changed) + "\n")
    html = page(run)
    assert sources(html) == []
    assert base64.b64encode(b"secret").decode() not in html


def test_a_length_that_never_changes_is_not_shown(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("eval/greedy/length", "eval/sampled/length", "length"):
        for record in lines:
            record[name] = 4.0
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    html = page(run)
    assert "Held-out length" not in html
    assert "<h3>length</h3>" not in html
    lines[-1] |= {"eval/greedy/length": 3.0, "length": 3.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert "Held-out length, greedy" in page(run)


def test_texts_are_shown_as_before(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    html = page(folder)
    assert '<table class="pairs">' in html
    assert sources(html) == []
