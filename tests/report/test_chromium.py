"""The pages in a real browser: every chart is drawn, and nothing goes wrong on the way."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from guerdon.report import write_comparison, write_report

from .synthetic import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=20000",  # milliseconds for the page's timers, not of waiting
    "--enable-logging=stderr",
    "--v=0",
    "--dump-dom",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: no page is opened in a browser")


class Drawn(HTMLParser):
    """Ids of the plot elements of a page, and of those that hold a drawn chart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.plots: list[str] = []
        self.drawn: set[str] = set()
        self.paths = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        classes = given.get("class", "").split()
        if tag == "div" and "plot" in classes:
            self.plots.append(given["id"])
        if tag == "svg" and "main-svg" in classes and self.plots:
            self.drawn.add(self.plots[-1])
        self.paths += tag == "path" and ("js-line" in classes or "js-fill" in classes)


def open_page(path: Path, profile: Path) -> tuple[Drawn, list[str]]:
    """The page after its scripts ran, and everything that the browser's console was told."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", path.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return Drawn(done.stdout), re.findall(r"CONSOLE:\d+\] (.*)", done.stderr)


def check(path: Path, profile: Path) -> int:
    """Assert that a page draws all its charts without a word in the console; returns how many charts there are."""
    page, console = open_page(path, profile)
    assert not console, console
    assert page.plots
    assert page.drawn == set(page.plots)
    assert page.paths >= len(page.plots)
    return len(page.plots)


def test_the_report_draws_all_its_charts(tmp_path):
    run = write_run(tmp_path / "one", steps=100, varying=True, sample="</script><script>throw 1</script><img src=x>")
    assert check(write_report(run), tmp_path / "profile") >= 25


def test_the_comparison_draws_all_its_charts(tmp_path):
    runs = [write_run(tmp_path / f"run-{seed}", steps=40, seed=seed) for seed in range(3)]
    assert check(write_comparison(runs, tmp_path / "compare.html"), tmp_path / "profile") >= 15


BREAKAGES = [
    ('"use strict";', '"use strict"; throw new Error("on purpose");'),  # the policy refuses a changed script
    ("</main>", '<img src="https://example.invalid/x.png"></main>'),  # and a request
    ('"id":"chart-1"', '"id":"chart-none"'),  # an exception within the page's own script
]


def test_the_check_fails_on_a_broken_page(tmp_path):
    records = [{"step": step, "reward": 0.1 * step, "lr": 1e-3} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = write_report(tmp_path)
    html = path.read_text("utf-8")
    assert check(path, tmp_path / "profile") == 2
    for find, put in BREAKAGES:
        assert find in html
        path.write_text(html.replace(find, put, 1), "utf-8")
        with pytest.raises(AssertionError):
            check(path, tmp_path / "profile")


def test_the_check_fails_on_a_thrown_exception(tmp_path):
    path = tmp_path / "page.html"
    path.write_text('<div class="plot" id="a"><svg class="main-svg"><path class="js-line"></svg></div><p>')
    assert check(path, tmp_path / "profile") == 1
    with path.open("a") as file:
        file.write('<script>throw new Error("on purpose")</script>')
    with pytest.raises(AssertionError, match="Uncaught Error: on purpose"):
        check(path, tmp_path / "profile")
