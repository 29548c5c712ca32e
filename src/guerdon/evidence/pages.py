"""The evidence folder and its page: `<slug>.json` and `<slug>.svg`, and one Markdown page over all of them."""

from __future__ import annotations

from pathlib import Path

from guerdon.evidence import cache
from guerdon.evidence.base import Evidence, EvidenceError
from guerdon.evidence.plot import draw
from guerdon.evidence.table import COLUMNS, arm_cells, cells, facts, markdown

_HEAD = """\
# Evidence

Every method's claim at small scale, against its own baseline. A *mechanism* check asks whether the method does what it
is said to do, and must hold at this scale; a *headline* check asks for the paper's advantage, which a small task need
not show. Where settings are tuned, this is done per arm on seeds of their own, with the same number of runs. A claim
that did not show is listed as such, with its figures. *Spread* is the standard deviation over seeds; of the difference,
where a method is compared with a baseline. `guerdon reproduce SLUG --budget full` measures one again.
"""

_BEGIN, _END = "<!-- guerdon reproduce: begin -->", "<!-- guerdon reproduce: end -->"


def save(evidence: Evidence, folder: Path) -> bool:
    """Write the record and the picture; a smoke run does not replace a full one.

    Returns:
        Whether it was written.

    Raises:
        EvidenceError: the file in its place is no record of a claim test.
        MissingExtraError: matplotlib is not installed.
    """
    record = folder / f"{evidence.slug}.json"
    if evidence.budget == "smoke" and record.is_file() and load(record).budget == "full":
        return False
    picture = draw(evidence)
    cache.replace(record, evidence.to_json().encode())
    cache.replace(record.with_suffix(".svg"), picture)
    return True


def load(path: Path) -> Evidence:
    """Read a record.

    Raises:
        EvidenceError: naming the file that is none.
    """
    try:
        return Evidence.from_json(path.read_text(encoding="utf-8"))
    except (EvidenceError, UnicodeDecodeError) as error:
        raise EvidenceError(f"{path}: {error}") from error


def write_page(folder: Path) -> Path:
    """Write the page of all records in a folder, beside it: `docs/evidence` gives `docs/evidence.md`.

    What it writes stands between two comments; the text around them is kept, so the page can have an introduction.
    """
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    page = folder.with_name(f"{folder.name}.md")
    rows = [(f"[{e.slug}](#{e.slug})", e.title, _mechanism(e), e.headline or "–", facts(e)) for e in found]
    overview = markdown(["slug", "method", "mechanism", "headline", "measured with"], rows)
    sections = [_section(evidence, folder.name) for evidence in found]
    text = page.read_text(encoding="utf-8") if page.is_file() else _HEAD
    if _BEGIN in text and _END in text:
        before, after = text.split(_BEGIN, 1)[0], text.split(_END, 1)[1]
    else:
        before, after = f"{text.rstrip()}\n\n", "\n"
    written = "\n".join([_BEGIN, "", overview, *sections, _END])
    cache.replace(page, f"{before}{written}{after}".encode())
    return page


def _mechanism(evidence: Evidence) -> str:
    return "holds" if evidence.holds else "does not hold"


def _section(evidence: Evidence, folder: str) -> str:
    checks = markdown(list(COLUMNS), [cells(check) for check in evidence.checks])
    metrics = evidence.table
    header = ["arm", "role", *(name.replace("_", " ") for name in metrics), "settings"]
    arms = markdown(header, [(*arm_cells(arm, metrics), _settings(arm.settings)) for arm in evidence.arms])
    notes = "\n".join(f"- {note}" for note in evidence.notes)
    parts = [
        f"\n## {evidence.slug}",
        f"**{evidence.title}.** {evidence.claim}",
        f"Source: {evidence.paper}",
        f"Result: {evidence.verdict} ({facts(evidence)}).",
        checks,
        f"![{evidence.title}: {evidence.verdict}]({folder}/{evidence.slug}.svg)",
        arms,
        notes,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
