"""`guerdon report RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from guerdon.cli.parser import Parser
from guerdon.cli.resume import run_folder


def run(words: Sequence[str]) -> int:
    """Print the summary of a run and write its page."""
    parser = Parser("report", "Print the summary of a run and write report.html, a page that opens without network.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, such as runs/NAME")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    args = parser.parse_args(list(words))
    folder = run_folder(args.run)
    from guerdon.report import print_summary, write_report

    page = write_report(folder)
    print_summary(folder)
    print(page)
    if args.open:
        import webbrowser

        webbrowser.open(Path(page).resolve().as_uri())
    return 0
