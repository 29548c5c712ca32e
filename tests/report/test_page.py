from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from guerdon.errors import DataError
from guerdon.report import print_summary, read_run, write_report
from guerdon.report.headlines import headlines
from guerdon.report.terminal import sparkline

from .synthetic import write_run


class Page(HTMLParser):
    """A page taken apart as a browser would: attributes, script elements, text outside of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._within: list[str] = []
        self.html = path.read_text("utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("script", "style"):
            self._within.append(tag)
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag):
        if self._within and self._within[-1] == tag:
            self._within.pop()

    def handle_data(self, data):
        if not self._within:
            self.text.append(data)
        elif self._within[-1] == "script":
            self.scripts[-1] += data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]

    @property
    def charts(self) -> list[dict]:
        return json.loads(self.scripts[0])["charts"]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    return Page(write_report(write_run(tmp_path_factory.mktemp("runs") / "sorting", steps=100)))


def test_the_page_is_beside_the_run(tmp_path):
    run = write_run(tmp_path / "one", steps=5)
    assert write_report(run) == run / "report.html"
    assert not list(run.glob("*.tmp"))


def test_the_header_says_what_ran_and_how_it_ended(page):
    assert "<h1>sorting" in page.html
    for words in ("finished", "task sort", "steps 100 of 100", "duration 1 min 20 s", "device cpu", "2026-01-02 10:00"):
        assert words in page.words


def test_the_headline_figures_go_from_before_to_after(page, tmp_path):
    run = read_run(write_run(tmp_path / "one", steps=100))
    found = {headline.label: headline for headline in headlines(run)}
    assert list(found) == [
        "Held-out correct, greedy", "Held-out short, greedy", "Held-out correct, sampled", "Held-out short, sampled",
        "Constant groups", "Length", "Speed",
    ]  # fmt: skip
    greedy = found["Held-out correct, greedy"]
    assert greedy.before == run.metrics[0]["eval/greedy/correct"]
    assert greedy.after == run.metrics[100]["eval/greedy/correct"]
    length = [record["length"] for record in run.metrics[1:]]
    assert found["Length"].before == pytest.approx(sum(length[:10]) / 10)
    assert found["Length"].after == pytest.approx(sum(length[-10:]) / 10)
    assert found["Length"].unit == "tokens"
    for text in greedy.texts():
        assert text in page.words


def test_every_curve_of_the_run_is_there_with_its_numbers(page):
    titles = [value.removesuffix(" over training steps") for value in page.values("aria-label")]
    for title in (
        "Reward", "correct", "short", "tidy", "Share of the advantage", "Constant groups", "Entropy", "Length", "Loss",
        "KL to the reference", "Truncated samples", "Gradient norm", "Learning rate", "Clipped", "Time of a step",
        "Speed", "All right, all wrong: correct", "Dropped samples",
    ):  # fmt: skip
        assert title in titles
    assert "Weights" not in titles  # constant weights are told in words
    assert "Weights are constant: correct 1, short 0.2." in page.words
    assert not [title for title in titles if "shaped" in title]  # equal to the raw score
    plots = [value for tag, name, value in page.attributes if name == "id" and value.startswith("chart-")]
    assert [chart["id"] for chart in page.charts] == plots
    correct = page.charts[1]["lines"]
    assert [(line["name"], line["style"]) for line in correct] == [
        ("training", "light"), ("held-out, greedy", "points"), ("held-out, sampled", "points"),
    ]  # fmt: skip
    assert correct[0]["x"] == list(range(1, 101))
    assert correct[1]["x"] == [0, 20, 40, 60, 80, 100]


def test_weights_that_vary_are_drawn(tmp_path):
    page = Page(write_report(write_run(tmp_path / "one", steps=20, varying=True)))
    assert "Weights over training steps" in page.values("aria-label")
    assert "Weights are constant" not in page.words


def test_trade_offs_between_rewards_are_drawn(tmp_path):
    run = write_run(tmp_path / "one", steps=20, varying=True)
    assert "Trade-offs" not in Page(write_report(run)).words  # no front was tracked
    scores = iter([(0.1, 0.9), (0.4, 0.5), (0.3, 0.4), (0.2, 0.95), (0.6, 0.2), (0.5, 0.3)])
    records = [json.loads(row) for row in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    for record in records:
        if "eval/sampled/correct" in record:
            record["eval/sampled/correct"], record["eval/sampled/short"] = next(scores)
            record |= {"front/hypervolume": 0.1 * record["step"], "front/size": 2.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(write_report(run))
    for title in ("Hypervolume over training steps", "short against correct"):
        assert any(label.startswith(title) for label in page.values("aria-label")), title
    assert "Other figures" not in page.words or "front/size" not in page.words
    way, front = next(c["lines"] for c in page.charts if [line["name"] for line in c["lines"]][-1:] == ["on the front"])
    assert way["x"] == [0.1, 0.4, 0.3, 0.2, 0.6, 0.5]
    assert list(zip(front["x"], front["y"], strict=True)) == [(0.2, 0.95), (0.4, 0.5), (0.5, 0.3), (0.6, 0.2)]


def test_the_ledger_shows_groups_with_their_samples_and_what_was_dropped(page):
    assert "Largest spread" in page.words
    assert "Smallest spread" in page.words
    assert "ZeroDivisionError: division by zero" in page.words
    assert "step 7, prompt 58, sample 1; step 32, prompt 64, sample 1" in page.words
    steps = [value for tag, name, value in page.attributes if tag == "option" and name == "value"]
    assert steps == [str(step) for step in range(10, 101, 10)]  # where samples were written
    assert sum(name == "hidden" for _, name, _ in page.attributes) == len(steps) - 1


def test_before_and_after_stand_side_by_side(page):
    assert "The same held-out prompts, greedy, before and after training: rose" in page.words
    assert any(value == "reward up" for value in page.values("class"))
    assert "advantage: grpo" in page.words  # the recipe
    assert "2.13.0" in page.words  # versions


def test_sections_without_data_are_left_out(tmp_path):
    (tmp_path / "recipe.yaml").write_text("loop: online\ndata: sort\nsteps: 5\n")
    page = Page(write_report(tmp_path))
    assert "No step has been written yet." in page.words
    assert page.charts == []
    for heading in ("Ledger", "Before and after", "Reward", "Policy", "Machine and versions"):
        assert heading not in page.words
    assert len(page.html) < 60_000  # without a chart there is no need of plotly

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.6}\n')
    page = Page(write_report(tmp_path))
    assert [chart["lines"][0]["y"] for chart in page.charts] == [[0.5, 0.6]]


def test_a_failed_run_says_why_and_a_killed_one_what_is_missing(tmp_path):
    run = write_run(tmp_path / "one", steps=5)
    status = {"state": "failed", "step": 3, "steps": 5, "reason": "rewards.correct: NaN at prompt <3>"}
    (run / "status.json").write_text(json.dumps(status))
    for name in ("metrics", "ledger", "samples"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 6, "re')
    page = Page(write_report(run))
    assert "rewards.correct: NaN at prompt <3>" in page.words
    assert "state failed" in page.values("class")
    for name in ("metrics", "ledger", "samples"):
        assert f"{name}.jsonl: line" in page.words
    assert page.words.count("is cut off") == 3


def test_a_malformed_ledger_stops_the_report(tmp_path):
    run = write_run(tmp_path / "one", steps=5)
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    with pytest.raises(DataError, match=r"ledger\.jsonl, line 2"):
        write_report(run)


HOSTILE = '</script><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(2)>{{ 7 * 7 }}'


def test_samples_and_names_are_text_not_markup(tmp_path):
    run = write_run(tmp_path / "one", steps=10, sample=HOSTILE)
    renamed = (run / "metrics.jsonl").read_text().replace("watch/tidy", "watch/</script><b>")
    (run / "metrics.jsonl").write_text(renamed)
    (run / "status.json").write_text(json.dumps({"state": "failed", "reason": HOSTILE, "step": 1, "steps": 2}))
    page = Page(write_report(run))
    assert HOSTILE in page.words
    assert "<script>alert" not in page.html
    assert len(page.scripts) == 3  # data, plotly, the page's own
    assert not [value for tag, name, value in page.attributes if tag == "img" or name.startswith("on")]
    assert any(line["name"] == "training" for chart in page.charts for line in chart["lines"])  # still valid JSON


def test_the_page_asks_nothing_of_any_network(page):
    assert not [v for _, name, v in page.attributes if name in ("src", "srcset", "poster", "action", "data")]
    assert all(value.startswith("#") for value in page.values("href"))
    assert "@import" not in page.html.partition("</style>")[0]
    (policy,) = [value for value in page.values("content") if "default-src" in value]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert policy.count("'sha256-") == 2  # plotly and the page's own script, nothing else runs


def test_a_page_is_small_and_quick_to_write(tmp_path):
    run = write_run(tmp_path / "one", steps=200)
    write_report(run)  # imports and templates
    start = time.process_time()
    path = write_report(run)
    assert time.process_time() - start < 2.0
    assert path.stat().st_size < 6_000_000


def test_nothing_heavy_is_imported():
    code = "import sys, guerdon.report; print([m for m in ('torch', 'plotly', 'jinja2', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_summary_in_the_terminal(tmp_path):
    run = write_run(tmp_path / "one", steps=100)
    text = io.StringIO()
    print_summary(run, Console(file=text, width=120))
    assert "one  finished · step 100 of 100 · 1 min 20 s · task sort" in text.getvalue()
    row = next(line for line in text.getvalue().splitlines() if "Held-out correct, greedy" in line)
    assert row.split()[3:6] == ["0.191", "0.953", "+0.762"]
    (tmp_path / "recipe.yaml").write_text("steps: 5\n")
    (tmp_path / "status.json").write_text('{"state": "failed", "reason": "[bold]no"}')
    text = io.StringIO()
    print_summary(tmp_path, Console(file=text, width=120))
    assert "failed · step 0 of 5" in text.getvalue()
    assert "[bold]no" in text.getvalue()  # a reason is text, not markup
    assert "No step has been written yet." in text.getvalue()


def test_sparkline():
    assert sparkline([0.0, 1.0, 2.0, 3.0, 7.0]) == "▁▂▃▄█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline([float(i) for i in range(1000)])) <= 24
