"""What a claim test is made of. Nothing here imports torch.

A module `evidence/<slug>.py` tests one claim. It defines

    SLUG, TITLE, PAPER, CLAIM    literal strings; CLAIM is one sentence with the paper's figure
    plan(budget, seeds, tuned=None) -> list[Unit]
    measure(unit) -> {"figures": {name: number}, "curves": {name: [(x, y), ...]}}
    conclude(results) -> Evidence

and, where settings are tuned first,

    tune(results) -> {arm: settings}     usually `return results.best("sampled_after")`

`plan` is called with `tuned=None` first; its units with role `tune` are run, `tune` picks from them, and `plan` is
called again with what was picked. Tuning seeds (`tuning_seeds`) are never measuring seeds, and every tuned arm gets the
same number of tuning runs; the runner refuses a plan that breaks either rule. `SEEDS = {"smoke": 1, "full": 3}` sets
default numbers of seeds other than 1 and 5. `measure` is a pure function of its unit, since its result is kept on disk.
Where many small nets train faster as one batched tensor, define `measure_all(units) -> [one result per unit]` in place
of `measure`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from guerdon.errors import GuerdonError, nearest

Budget = Literal["smoke", "full"]
Role = Literal["method", "baseline", "ablation"]
Setting = float | int | str | bool
Settings = dict[str, Setting]
Points = list[tuple[float, float]]

BUDGETS: tuple[Budget, ...] = ("smoke", "full")
DEFAULT_SEEDS: dict[Budget, int] = {"smoke": 1, "full": 5}


class EvidenceError(GuerdonError, RuntimeError):
    """A claim test is not well-formed, or one of its runs failed."""


def tuning_seeds(count: int) -> list[int]:
    """Seeds for tuning runs: 100, 101, ...; measuring runs use 0, 1, ..."""
    return list(range(100, 100 + count))


@dataclass(frozen=True)
class Unit:
    """One training run.

    Attributes:
        arm: the variant it belongs to, such as `grpo`.
        seed: of everything random in it.
        settings: what else decides it, as plain numbers and texts: steps, learning rate, ...
        role: `measure`, or `tune` for runs that only serve to pick settings.
    """

    arm: str
    seed: int
    settings: Settings = field(default_factory=dict, hash=False)
    role: Literal["tune", "measure"] = "measure"

    def key(self, context: str = "") -> str:
        """Name of its cached result; `context` stands for the code that measures it."""
        text = json.dumps([asdict(self), context], sort_keys=True)
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def __str__(self) -> str:
        settings = "".join(
            f", {name} {value:g}" if _is_number(value) else f", {name} {value}" for name, value in self.settings.items()
        )
        return f"{self.arm} ({self.role}, seed {self.seed}{settings})"


def rate_plan(
    arms: Iterable[str],
    settings: Settings,
    rates: Sequence[float],
    seeds: int,
    *,
    trials: int,
    tuned: Mapping[str, Settings] | None = None,
    default: float,
) -> list[Unit]:
    """The usual plan: each arm at every learning rate on seeds of its own, then each arm on every seed.

    Args:
        arms: their names.
        settings: of every run, beside `lr`.
        rates: the grid.
        seeds: number of measuring seeds.
        trials: number of tuning seeds; 0 = no tuning.
        tuned: what the tuning runs chose.
        default: the rate of an arm that was not tuned.
    """
    arms = tuple(arms)
    tries = [
        Unit(arm, seed, {**settings, "lr": rate}, "tune")
        for arm in arms
        for rate in rates
        for seed in tuning_seeds(trials)
    ]
    chosen = {arm: (tuned or {}).get(arm, {**settings, "lr": default}) for arm in arms}
    return tries + [Unit(arm, seed, chosen[arm]) for arm in arms for seed in range(seeds)]


@dataclass(frozen=True)
class Result:
    """What a unit gave: named figures, named curves of (x, y) points, and the CPU seconds it took."""

    unit: Unit
    figures: dict[str, float]
    curves: dict[str, Points] = field(default_factory=dict)
    seconds: float = 0.0


class Results(Sequence[Result]):
    """All results of a plan, in its order.

    Args:
        results: one per unit.
        budget: what the plan was made for.
    """

    def __init__(self, results: Sequence[Result], budget: Budget = "smoke") -> None:
        self.all = list(results)
        self.budget: Budget = budget

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: Any) -> Any:
        return self.all[index]

    def __iter__(self) -> Iterator[Result]:
        return iter(self.all)

    def of(self, arm: str, role: Literal["tune", "measure"] = "measure") -> list[Result]:
        """The results of one arm, by seed.

        Raises:
            EvidenceError: it has none.
        """
        found = [result for result in self.all if (result.unit.arm, result.unit.role) == (arm, role)]
        if not found:
            known = {result.unit.arm for result in self.all if result.unit.role == role}
            raise EvidenceError(
                f"evidence: no {role} results of arm {arm!r}.{nearest(arm, known)} There are: {sorted(known)}."
            )
        return sorted(found, key=lambda result: result.unit.seed)

    def values(self, arm: str, figure: str) -> list[float]:
        """One figure of an arm's measuring runs, by seed.

        Raises:
            EvidenceError: a run did not give it.
        """
        return [_figure(result, figure) for result in self.of(arm)]

    def arm(self, name: str, role: Role, settings: Settings | None = None) -> Arm:
        """The measuring runs of one arm, gathered.

        Args:
            name: of the arm.
            role: what it is in the comparison.
            settings: to be shown with it; by default those of its units.
        """
        found = self.of(name)
        figures = {key: [_figure(result, key) for result in found] for key in found[0].figures}
        curves = {key: [result.curves[key] for result in found if key in result.curves] for key in found[0].curves}
        shown = dict(found[0].unit.settings) if settings is None else settings
        return Arm(name, role, figures, curves, shown)

    def best(
        self, figure: str, *, better: Literal["high", "low"] = "high", keep: Sequence[str] | None = None
    ) -> dict[str, Settings]:
        """For each arm with tuning runs, the settings with the best mean figure over its seeds; the first of equals.

        Args:
            figure: that decides.
            better: whether a high or a low one is good.
            keep: the settings to return, where measuring runs take only those over; by default all.
        """
        picked: dict[str, Settings] = {}
        sign = 1.0 if better == "high" else -1.0
        for arm in dict.fromkeys(result.unit.arm for result in self.all if result.unit.role == "tune"):
            grid: dict[str, list[Result]] = {}
            for result in self.of(arm, "tune"):
                grid.setdefault(json.dumps(result.unit.settings, sort_keys=True), []).append(result)
            # a run that diverged (NaN) is the worst there is
            means = {key: sign * statistics.fmean(_figure(r, figure) for r in runs) for key, runs in grid.items()}
            winner = max(means, key=lambda key: -math.inf if math.isnan(means[key]) else means[key])
            settings = grid[winner][0].unit.settings
            picked[arm] = {name: value for name, value in settings.items() if keep is None or name in keep}
        return picked


def mean(values: Sequence[float]) -> float:
    """Mean; NaN of nothing."""
    return statistics.fmean(values) if values else math.nan


def sd(values: Sequence[float]) -> float:
    """Standard deviation with n - 1; NaN for fewer than two values, and where one is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def first_reach(level: float, points: Points) -> float:
    """Where a curve first reaches a level, on a straight line between its points; infinity if it never does.

    Example:
        >>> first_reach(0.2, [(0.0, 0.0), (100.0, 0.1), (200.0, 0.3)])
        150.0
    """
    before = points[0]
    for x, y in points:
        if y >= level:
            return x if y == before[1] else before[0] + (x - before[0]) * max(level - before[1], 0) / (y - before[1])
        before = (x, y)
    return math.inf


@dataclass(frozen=True)
class Arm:
    """One variant of a comparison over its seeds.

    Attributes:
        name: of the variant.
        role: `method`, `baseline` or `ablation`.
        figures: metric -> one number per seed.
        curves: metric -> one list of (x, y) per seed.
        settings: what it ran with, the tuned ones included.
    """

    name: str
    role: Role
    figures: dict[str, list[float]]
    curves: dict[str, list[Points]] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)

    def mean(self, metric: str) -> float:
        """Mean over seeds."""
        return mean(self.figures[metric])

    def sd(self, metric: str) -> float:
        """Standard deviation over seeds; NaN for one seed."""
        return sd(self.figures[metric])

    @property
    def n(self) -> int:
        """Number of seeds."""
        return max((len(values) for values in self.figures.values()), default=0)


@dataclass(frozen=True)
class Check:
    """One condition, decided by figures.

    Attributes:
        name: what is checked, in a few words.
        condition: the inequality with its numbers, written before the result was known.
        holds: whether the figures satisfy it.
        kind: `mechanism`: what the method is said to do; must hold at this scale. `headline`: the paper's advantage,
            which a small task may or may not show.
        figures: the numbers that decided; `method`, `baseline` and `spread` have columns of their own in tables.
    """

    name: str
    condition: str
    holds: bool
    kind: Literal["mechanism", "headline"] = "mechanism"
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.kind == "mechanism":
            return "holds" if self.holds else "does not hold"
        return "shown" if self.holds else "not shown at this scale"


def at_least(
    name: str,
    values: Sequence[float],
    bound: float,
    *,
    kind: Literal["mechanism", "headline"] = "mechanism",
    what: str = "mean",
) -> Check:
    """A check that the mean over seeds is at least `bound`; False for NaN."""
    found = mean(values)
    return Check(name, f"{what} >= {bound:g}", bool(found >= bound), kind, {"method": found, "spread": sd(values)})


def at_most(
    name: str,
    values: Sequence[float],
    bound: float,
    *,
    kind: Literal["mechanism", "headline"] = "mechanism",
    what: str = "mean",
) -> Check:
    """A check that the mean over seeds is at most `bound`; False for NaN."""
    found = mean(values)
    return Check(name, f"{what} <= {bound:g}", bool(found <= bound), kind, {"method": found, "spread": sd(values)})


def compare(
    name: str,
    method: Sequence[float],
    baseline: Sequence[float],
    *,
    margin: float = 0.0,
    errors: float = 0.0,
    better: Literal["high", "low"] = "high",
    kind: Literal["mechanism", "headline"] = "headline",
) -> Check:
    """A check that the method beats the baseline on the same seeds.

    Holds if the mean over seeds of (method - baseline) is at least `margin`, and more than `errors` of its standard
    errors above 0. With `better="low"` the difference is baseline - method. A negative margin asks that the method is
    not worse by more than that.

    Args:
        name: what is compared.
        method: one figure per seed.
        baseline: one figure per seed, in the same order.
        margin: smallest mean difference.
        errors: smallest number of standard errors; with one seed there is none, and only the margin counts.
        better: whether a high or a low figure is good.
        kind: of the check.

    Raises:
        EvidenceError: the two have different numbers of seeds, or none.

    Example:
        >>> compare("accuracy", [0.6, 0.7], [0.5, 0.5], margin=0.1).verdict
        'shown'
    """
    if len(method) != len(baseline) or not method:
        raise EvidenceError(
            f"evidence: {name}: {len(method)} seeds of the method against {len(baseline)} of the baseline."
        )
    sign = 1.0 if better == "high" else -1.0
    differences = [sign * (m - b) for m, b in zip(method, baseline, strict=True)]
    found, spread = mean(differences), sd(differences)
    holds = found >= margin
    condition = f"mean of {'method - baseline' if better == 'high' else 'baseline - method'} >= {margin:g}"
    if errors:
        condition += f" and > {errors:g} standard errors"
        if len(differences) > 1:
            holds = holds and found > errors * spread / math.sqrt(len(differences))
    figures = {"method": mean(method), "baseline": mean(baseline), "difference": found, "spread": spread}
    return Check(name, condition, bool(holds), kind, figures)


@dataclass(frozen=True)
class Evidence:
    """What came of a claim test.

    `conclude` gives those up to `x`; the runner adds the rest.

    Attributes:
        slug: the method's name in the catalogue.
        title: what it is called.
        claim: the paper's claim in one sentence, with its figure.
        paper: authors, title, arXiv id.
        arms: the variants with their figures per seed.
        checks: the conditions; at least one mechanism check.
        notes: what a reader must know: what differs from the paper, what was not tested.
        shown: the metrics a reader should see. Those that are curves are drawn, those that are figures stand in the
            table of the arms, and are drawn per seed if no curve is. By default the first few of each.
        x: what the curves run over.
        budget: `smoke` or `full`.
        seeds: those that were measured.
        seconds: CPU seconds of all runs together, the cached ones included.
        environment: versions of the packages used.
    """

    slug: str
    title: str
    claim: str
    paper: str
    arms: tuple[Arm, ...]
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    x: str = "step"
    budget: Budget = "smoke"
    seeds: tuple[int, ...] = ()
    seconds: float = math.nan
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(check.kind == "mechanism" for check in self.checks):
            raise EvidenceError(f"evidence {self.slug}: there must be at least one mechanism check.")

    @property
    def table(self) -> list[str]:
        """The figures to tabulate per arm."""
        there = list(dict.fromkeys(name for arm in self.arms for name in arm.figures))
        return [name for name in self.shown if name in there] or there[:5]

    @property
    def drawn(self) -> list[str]:
        """The curves to draw; empty if there are none to be drawn."""
        there = list(dict.fromkeys(name for arm in self.arms for name in arm.curves))
        chosen = [name for name in self.shown if name in there]
        return chosen if chosen or self.shown else there[:4]

    @property
    def holds(self) -> bool:
        """Whether all mechanism checks hold."""
        return all(check.holds for check in self.checks if check.kind == "mechanism")

    @property
    def headline(self) -> str:
        """`shown`, `not shown at this scale`, or empty without headline checks."""
        found = [check for check in self.checks if check.kind == "headline"]
        if not found:
            return ""
        return "shown" if all(check.holds for check in found) else "not shown at this scale"

    @property
    def verdict(self) -> str:
        """Both results in words."""
        mechanism = "mechanism holds" if self.holds else "mechanism does not hold"
        return f"{mechanism}, headline {self.headline}" if self.headline else mechanism

    def to_json(self) -> str:
        """As JSON text; a number that is not finite becomes null."""
        record = {**asdict(self), "holds": self.holds, "headline": self.headline}
        return json.dumps(plain(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Evidence:
        """Read back what `to_json` wrote.

        Raises:
            EvidenceError: it is something else.
        """
        try:
            record = json.loads(text)
            del record["holds"], record["headline"]  # computed
            record["arms"] = tuple(_arm(arm) for arm in record["arms"])
            record["checks"] = tuple(
                Check(**{**check, "figures": _read(check["figures"])}) for check in record["checks"]
            )
            for name in ("notes", "shown", "seeds"):
                record[name] = tuple(record[name])
            record["seconds"] = _read(record["seconds"])
            return Evidence(**record)
        except (ValueError, KeyError, TypeError) as error:
            raise EvidenceError(
                f"evidence: this is not the record of a claim test: {type(error).__name__}: {error}"
            ) from error


def plain(value: Any) -> Any:
    """Numbers of any kind as plain ones, those that are not finite as None; containers likewise."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _read(value: Any) -> Any:
    """Undo what `plain` did to numbers: None is NaN."""
    if isinstance(value, dict):
        return {key: _read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read(item) for item in value]
    return math.nan if value is None else value


def _arm(record: dict[str, Any]) -> Arm:
    curves = {name: [[(x, y) for x, y in _read(seed)] for seed in seeds] for name, seeds in record["curves"].items()}
    return Arm(record["name"], record["role"], _read(record["figures"]), curves, record["settings"])


def _figure(result: Result, name: str) -> float:
    if name not in result.figures:
        raise EvidenceError(
            f"evidence: {result.unit} gave no figure {name!r}.{nearest(name, result.figures)} "
            f"It gave: {', '.join(result.figures)}."
        )
    return result.figures[name]


def _is_number(value: Setting) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
