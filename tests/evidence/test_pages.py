"""What a reader sees: tables, pictures and the page."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as xml

import pytest
from rich.console import Console

from guerdon.evidence import pages, plot, table
from guerdon.evidence.base import Arm, Check, Evidence, EvidenceError, Points

SVG = "{http://www.w3.org/2000/svg}"


def evidence(
    *, budget="smoke", holds=True, shown: tuple[str, ...] = (), curves: list[Points] | None = None
) -> Evidence:
    rising = [[(0.0, 0.1), (1.0, 0.5 + 0.1 * seed)] for seed in range(2)] if curves is None else curves
    return Evidence(
        "toy",
        "Toy",
        "It reaches 0.9.",
        "Nobody 2025",
        (
            Arm("new", "method", {"accuracy": [0.5, 0.6], "cost": [1234.0, 1236.0]}, {"hits": rising}, {"lr": 0.1}),
            Arm("old", "baseline", {"accuracy": [0.4, math.nan]}, {"hits": rising}, {"lr": 0.2}),
        ),
        (
            Check("it moves", "distance | moved > 0", holds, figures={"method": 1.0}),
            Check("it wins", "difference > 0", False, "headline", {"method": 0.55, "baseline": 0.4, "spread": 0.02}),
        ),
        ("Only a toy.",),
        shown,
        budget=budget,
        seeds=(0, 1),
        seconds=12.3,
    )


def printed(found: Evidence) -> str:
    stream = io.StringIO()
    table.show(found, Console(file=stream))
    return stream.getvalue()


def test_a_claim_that_does_not_show_is_printed_as_such():
    text = printed(evidence(holds=False))
    assert "Toy: mechanism does not hold, headline not shown at this scale" in text
    rows = [line.split() for line in text.splitlines()]
    (wins,) = [row for row in rows if row[:3] == ["it", "wins", "(headline)"]]
    assert wins[3:] == ["difference", ">", "0", "0.55", "0.4", "0.02", "not", "shown", "at", "this", "scale"]
    (moves,) = [row for row in rows if row[:2] == ["it", "moves"]]
    assert moves[-6:] == ["1", "–", "–", "does", "not", "hold"]
    assert "Note: Only a toy." in text
    assert "smoke budget, 2 seeds, 12 CPU seconds" in text


def test_arms_are_printed_with_mean_and_spread():
    rows = [line.split() for line in printed(evidence()).splitlines()]
    assert ["new", "method", "0.55", "±", "0.0707", "1235", "±", "1.41"] in rows
    assert ["old", "baseline", "–", "–"] in rows


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (1.0, "1"), (12345.6, "12346"), (math.nan, "–"), (math.inf, "inf")]
)
def test_numbers(value, text):
    assert table.number(value) == text


def texts(picture: bytes) -> list[str]:
    return ["".join(node.itertext()).strip() for node in xml.fromstring(picture).iter(f"{SVG}text")]


def test_curves_are_drawn_with_a_band():
    picture = plot.draw(evidence())
    assert {"hits", "step", "new", "old"} <= set(texts(picture))
    assert b"FillBetween" in picture
    assert picture == plot.draw(evidence())


def test_curves_at_different_places_are_drawn_each():
    apart = plot.draw(evidence(curves=[[(0.0, 0.1), (1.0, 0.2)], [(0.0, 0.1), (3.0, 0.2)]]))
    assert b"FillBetween" not in apart
    assert texts(apart).count("new") == 1
    assert plot.draw(evidence(curves=[[(1.0, 0.1)], [(1.0, 0.2)]])) != apart


def test_figures_are_drawn_where_no_curve_is_wanted():
    picture = texts(plot.draw(evidence(shown=("accuracy",))))
    assert "accuracy" in picture
    assert "hits" not in picture


def test_the_page_holds_every_record(tmp_path):
    folder = tmp_path / "docs" / "evidence"
    assert pages.save(evidence(), folder)
    page = pages.write_page(folder)
    assert page == tmp_path / "docs" / "evidence.md"
    text = page.read_text()
    assert "| [toy](#toy) | Toy | holds | not shown at this scale | smoke budget, 2 seeds, 12 CPU seconds |" in text
    assert "| it moves | distance \\| moved > 0 | 1 | – | – | holds |" in text
    assert "(evidence/toy.svg)" in text
    assert "| new | method | 0.55 ± 0.0707 | 1235 ± 1.41 | lr 0.1 |" in text
    assert (folder / "toy.svg").read_bytes() == plot.draw(evidence())
    assert pages.load(folder / "toy.json").checks == evidence().checks
    assert sorted(path.name for path in folder.iterdir()) == ["toy.json", "toy.svg"]


def test_text_around_what_is_written_is_kept(tmp_path):
    folder = tmp_path / "evidence"
    page = tmp_path / "evidence.md"
    page.write_text("# My words\n\nAn introduction.\n")
    pages.save(evidence(), folder)
    pages.write_page(folder)
    first = page.read_text()
    assert first.startswith("# My words\n\nAn introduction.\n\n<!--")
    assert "| it wins (headline) |" in first
    page.write_text(first + "The end.\n")
    pages.save(evidence(holds=False), folder)
    pages.write_page(folder)
    second = page.read_text()
    assert second.startswith("# My words\n\nAn introduction.\n\n<!--")
    assert second.endswith("-->\nThe end.\n")
    assert "does not hold" in second
    assert second.count("## toy") == 1
    pages.write_page(folder)
    assert page.read_text() == second


def test_a_smoke_run_does_not_replace_a_full_one(tmp_path):
    assert pages.save(evidence(budget="full"), tmp_path)
    before = (tmp_path / "toy.json").read_bytes()
    assert not pages.save(evidence(holds=False), tmp_path)
    assert (tmp_path / "toy.json").read_bytes() == before
    assert pages.save(evidence(budget="full", holds=False), tmp_path)
    assert not pages.load(tmp_path / "toy.json").holds


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "toy.json").write_text("{")
    with pytest.raises(EvidenceError, match=r"toy\.json: .*not the record"):
        pages.write_page(tmp_path)
