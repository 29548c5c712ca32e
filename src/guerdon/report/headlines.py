"""The few figures that say how a run went, before and after."""

from __future__ import annotations

from dataclasses import dataclass

from guerdon.report.records import Run
from guerdon.report.words import Style, change, figure

HELD_OUT = {"greedy": "eval/greedy/", "sampled": "eval/sampled/"}
MANY = 3  # more held-out scores than this are shown greedy only; the charts have both
TRAINED: dict[str, tuple[str, str, Style]] = {  # metric -> label, unit, style
    "reward": ("Reward in training", "", "plain"),
    "eval/loss": ("Held-out loss", "nats", "plain"),
    "eval/nll": ("Held-out negative log-likelihood", "nats", "plain"),
    "loss": ("Loss", "nats", "plain"),
    "constant_groups": ("Constant groups", "", "share"),
    "length": ("Length", "{steps}", "plain"),
    "tokens_per_s": ("Speed", "{steps}/s", "plain"),
}


@dataclass
class Headline:
    """One figure at the start and at the end of a run.

    Attributes:
        key: the metric.
        label: its name for a reader.
        before: at the first evaluation, or the mean of the first training steps; None if there is only one value.
        after: at the last evaluation, or the mean of the last training steps.
        unit: of both, may be empty.
        style: how the numbers are written.
        when: which steps `before` and `after` stand for.
        curve: all values, for a small curve.
    """

    key: str
    label: str
    before: float | None
    after: float
    unit: str
    style: Style
    when: str
    curve: list[float]

    def texts(self) -> tuple[str, str, str]:
        """Before, after and the change between them as text."""
        return (
            figure(self.before, self.style),
            figure(self.after, self.style),
            change(self.before, self.after, self.style),
        )


def step_unit(run: Run) -> str:
    """What a step of a sample is called: a token for a language model, a step for anything else."""
    policy = run.recipe.get("policy")
    return "tokens" if isinstance(policy, dict) and policy.get("kind") == "language" else "steps"


def headlines(run: Run) -> list[Headline]:
    """Held-out rewards, then training's own figures, each where the run has it.

    Args:
        run: the run.

    Returns:
        The figures in the order of the page. Training metrics are noisy, so each end is the mean of a tenth of the
        steps, at least one and at most ten.
    """
    keys = run.metric_names()
    found: list[Headline | None] = []
    greedy = sum(key.startswith(HELD_OUT["greedy"]) for key in keys)
    for mode, prefix in HELD_OUT.items():
        for key in keys:
            if key.startswith(prefix) and (mode == "greedy" or greedy <= MANY):
                found.append(_held_out(run, key, f"Held-out {key.removeprefix(prefix)}, {mode}"))
    for key, (label, unit, style) in TRAINED.items():
        if key == "loss" and "reward" in keys:
            continue  # a policy gradient's loss says nothing about how well it does
        if key != "reward" or not any(found):
            found.append(_trained(run, key, label, unit.format(steps=step_unit(run)), style))
    return [headline for headline in found if headline is not None and not _fixed_length(headline)]


def _fixed_length(headline: Headline) -> bool:
    """Samples of a fixed number of steps, such as images: their length tells nothing."""
    return headline.key.rpartition("/")[2] == "length" and len(set(headline.curve)) == 1 and len(headline.curve) > 1


def _present(run: Run, key: str) -> tuple[list[int], list[float]]:
    pairs = [(step, value) for step, value in zip(*run.series(key), strict=True) if value is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _held_out(run: Run, key: str, label: str) -> Headline | None:
    steps, values = _present(run, key)
    if not values:
        return None
    if len(values) == 1:
        return Headline(key, label, None, values[0], "", "plain", f"step {steps[0]}", values)
    return Headline(key, label, values[0], values[-1], "", "plain", f"step {steps[0]} → {steps[-1]}", values)


def _trained(run: Run, key: str, label: str, unit: str, style: Style) -> Headline | None:
    _, values = _present(run, key)
    if not values:
        return None
    width = max(1, min(10, len(values) // 10))
    if len(values) == 1:
        return Headline(key, label, None, values[0], unit, style, "one step", values)
    first, last = sum(values[:width]) / width, sum(values[-width:]) / width
    when = "first → last step" if width == 1 else f"first → last {width} steps"
    return Headline(key, label, first, last, unit, style, when, values)
