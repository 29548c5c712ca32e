"""A run directory as something a person can read: one page that opens offline, a comparison, a terminal summary.

| function | gives |
|---|---|
| `write_report(run)` | `report.html` in the run directory: curves, ledger, samples before and after, recipe, machine |
| `write_comparison(runs, out)` | one page that overlays several runs and lists the settings they differ in |
| `print_summary(run)`, `summary_table(run)` | the figures before and after, in the terminal |
| `print_samples(run)` | a few samples before and after, in the terminal |
| `read_run(run)` | the run's recipe, state and metrics as plain Python |

Only files are read, so a run can be looked at while it trains and on a machine that has neither torch nor a GPU.
"""

from __future__ import annotations

from guerdon.report.page import write_comparison, write_report
from guerdon.report.records import Run, read_run
from guerdon.report.terminal import print_samples, print_summary, summary_table

__all__ = ["Run", "print_samples", "print_summary", "read_run", "summary_table", "write_comparison", "write_report"]
