"""What a person sees while a loop runs: a live line of figures on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SHOWN = {
    "reward": "reward {:.3f}",
    "loss": "loss {:.3f}",
    "constant_groups": "constant {:.0%}",
    "entropy": "entropy {:.2f}",
    "kl": "KL {:.4f}",
    "tokens_per_s": "{:,.0f} tok/s",
}


def _components(metrics: Mapping[str, float]) -> dict[str, str]:
    """What is watched, and of several components the score, weight and share of the advantage; six of them at most."""
    names = [name.removeprefix("score/") for name in metrics if name.startswith("score/")]
    several = names[:6] if len(names) > 1 else []
    shown: dict[str, str] = {}
    for name in several:
        literal = name.replace("{", "{{").replace("}", "}}")
        shown[f"score/{name}"] = f"{literal} {{:.3g}}"
        if metrics.get(f"shaped/{name}") != metrics[f"score/{name}"]:
            shown[f"shaped/{name}"] = "shaped {:.3g}"
        shown[f"weight/{name}"] = "x {:.2g}"
        shown[f"share/{name}"] = "({:.0%})"
    watched = [name for name in metrics if name.startswith("watch/")][:6]
    return shown | {name: name.removeprefix("watch/") + " {:.3f}" for name in watched}


class Display:
    """A progress display; use it as a context manager.

    Args:
        title: what is running.
        total: number of steps.
        done: steps made before (a resumed run).
        enabled: False on every process but the first.
        every: seconds between lines where the output is no terminal.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, enabled: bool = True, every: float = 10.0) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.title, self.total, self.done, self.enabled, self.every = title, total, done, enabled, every
        self.live = enabled and self.console.is_terminal
        self.start = self.printed = time.monotonic()
        self.first = done
        self.smooth: dict[str, float] = {}
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.live,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step's figures, smoothed over about ten steps."""
        if not self.enabled:
            return
        shown = _SHOWN | _components(metrics)
        for name in shown:
            if name in metrics:
                before = self.smooth.get(name, metrics[name])
                self.smooth[name] = 0.8 * before + 0.2 * metrics[name]
        figures = "  ".join(text.format(self.smooth[name]) for name, text in shown.items() if name in self.smooth)
        self.progress.update(self.task, completed=step, figures=figures)
        now = time.monotonic()
        if not self.live and (now - self.printed >= self.every or step in (self.first + 1, self.total)):
            self.printed = now
            left = (now - self.start) / max(step - self.first, 1) * (self.total - step)
            self.console.print(f"{self.title} {step}/{self.total}  {figures}  {left:.0f} s left", soft_wrap=True)

    def say(self, text: str) -> None:
        """A line of its own, above the display."""
        if self.enabled:
            self.console.print(text, soft_wrap=True)
