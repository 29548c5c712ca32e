"""`guerdon compare RUN RUN ...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from guerdon.cli.parser import Parser
from guerdon.cli.resume import run_folder


def run(words: Sequence[str]) -> int:
    """Write one page that compares runs."""
    parser = Parser("compare", "Write one page that overlays runs and lists the settings in which they differ.")
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of two or more runs")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="the page [comparison.html]")
    args = parser.parse_args(list(words))
    if len(args.runs) < 2:
        parser.error(f"two or more runs are needed to compare; got {len(args.runs)}")
    folders = [run_folder(path) for path in args.runs]
    from guerdon.report import write_comparison

    write_comparison(folders, args.out)
    print(args.out)
    return 0
