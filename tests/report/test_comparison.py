from __future__ import annotations

import json
import statistics

import pytest

from guerdon.errors import DataError
from guerdon.report import read_run, write_comparison
from guerdon.report.compare import differences, final_figures, members

from .synthetic import write_run
from .test_page import Page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "grpo-0", steps=40, seed=0),
        write_run(folder / "grpo-1", steps=40, seed=1),
        write_run(folder / "rloo", steps=40, seed=0, advantage="{copo: {gamma: 3}}", lr="1.0e-3"),
    ]


def test_curves_lie_over_each_other_with_one_legend(runs, tmp_path):
    out = write_comparison(runs, tmp_path / "compare.html")
    page = Page(out)
    assert out.stat().st_size < 6_000_000
    assert "3 runs compared" in page.words
    assert page.values("data-run") == ["0", "1", "2"]
    held_out = page.charts[0]
    assert [line["name"] for line in held_out["lines"]] == ["grpo-0", "grpo-1", "rloo"]
    assert [line["run"] for line in held_out["lines"]] == [0, 1, 2]
    assert held_out["lines"][0]["x"] == [0, 8, 16, 24, 32, 40]
    assert not [v for _, name, v in page.attributes if name in ("src", "href")]


def test_only_settings_that_differ_are_listed(runs, tmp_path):
    assert differences([read_run(run) for run in runs]) == [
        ("advantage", ["grpo", "grpo", ABSENT := "–"]),
        ("advantage.copo.gamma", [ABSENT, ABSENT, "3"]),
        ("optim.lr", ["0.0003", "0.0003", "0.001"]),
        ("seed", ["0", "1", "0"]),
    ]
    page = Page(write_comparison(runs, tmp_path / "compare.html"))
    assert "optim.lr 0.0003 0.0003 0.001" in page.words
    assert "prompts_per_step" not in page.words


def test_seeds_of_one_recipe_share_a_colour_and_a_mean(runs):
    group = members([read_run(run) for run in runs])
    assert [(member.color, member.dash) for member in group] == [(0, 0), (0, 1), (1, 0)]
    columns, families = final_figures(group)
    column = columns[0]
    assert column.label == "Held-out correct, greedy"
    assert [family.label for family in families] == ["grpo-0, grpo-1"]
    first, second = column.values[:2]
    assert first is not None
    assert second is not None
    spread = statistics.stdev([first, second])
    assert families[0].figures[0] == f"{(first + second) / 2:.3g} ± {spread:.2g}"


def test_runs_of_different_recipes_have_a_colour_each(runs):
    group = members([read_run(runs[0]), read_run(runs[2])])
    assert [member.color for member in group] == [0, 1]
    assert final_figures(group)[1] == []


def test_runs_of_one_recipe_have_a_colour_each_too(runs, tmp_path):
    twin = write_run(tmp_path / "grpo-0", steps=40, seed=5)
    group = members([read_run(runs[0]), read_run(runs[1]), read_run(twin)])
    assert [member.color for member in group] == [0, 1, 2]
    assert [member.label for member in group] == [f"{runs[0].parent.name}/grpo-0", "grpo-1", f"{tmp_path.name}/grpo-0"]


def test_a_metric_that_one_run_lacks_is_drawn_for_the_others(runs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    records = [{"step": step, "reward": 0.1 * step, "odd": 1} for step in range(1, 5)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(write_comparison([runs[0], other], tmp_path / "compare.html"))
    lines = {tuple(line["name"] for line in chart["lines"]) for chart in page.charts}
    assert lines == {("grpo-0", "other"), ("grpo-0",)}


def test_too_few_runs_or_one_twice_is_an_error(runs, tmp_path):
    with pytest.raises(DataError, match="at least two runs; got 1"):
        write_comparison(runs[:1], tmp_path / "compare.html")
    with pytest.raises(DataError, match="given twice"):
        write_comparison([runs[0], runs[1], runs[0]], tmp_path / "compare.html")
