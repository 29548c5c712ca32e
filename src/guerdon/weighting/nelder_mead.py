"""A Nelder-Mead search that asks for one point at a time and can be put down and taken up again.

It is the variant of Confronting Reward Model Overoptimization with Constrained RLHF, 2023, arXiv 2310.04373: contraction
inside only, a cache of points that were tried, and a stop that is looked for after a shrink.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Sequence

from guerdon.errors import RecipeError

Point = list[float]


class NelderMead:
    """Minimise a function without its gradient.

    The algorithm is run again from its start with the values that are known; it asks for the first one that is not. So the
    list of evaluations is the whole state.

    Args:
        simplex: K + 1 points [K], not all equal.
        alpha, gamma, rho, sigma: how far reflection, expansion, contraction and shrink go.
        tolerance: the search is over if the values' standard deviation is below it after a shrink.
        cache: a point within this of a known one in every coordinate has that one's value.

    Raises:
        RecipeError: the simplex has another shape, or is degenerate.

    Example:
        >>> search = NelderMead([[0.0], [1.0]])
        >>> search.minimise(lambda x: (x[0] - 0.3) ** 2, passes=8)
        >>> round(search.best[0][0], 2)
        0.3
    """

    def __init__(
        self,
        simplex: Sequence[Sequence[float]],
        *,
        alpha: float = 1.0,
        gamma: float = 2.0,
        rho: float = 0.5,
        sigma: float = 0.5,
        tolerance: float = 0.01,
        cache: float = 5e-3,
    ) -> None:
        self.start = [list(map(float, point)) for point in simplex]
        size = len(self.start) - 1
        if size < 1 or any(len(point) != size for point in self.start):
            raise RecipeError(f"nelder_mead: the simplex must be K + 1 points of K coordinates; got {simplex}.")
        if all(point == self.start[0] for point in self.start):
            raise RecipeError(f"nelder_mead: all points of the simplex are equal: {self.start[0]}. Draw them apart.")
        self.alpha, self.gamma, self.rho, self.sigma = alpha, gamma, rho, sigma
        self.tolerance, self.cache = tolerance, cache
        self.evaluated: list[tuple[Point, float]] = []
        self.simplex: list[tuple[float, Point]] = []
        self.steps: list[str] = []

    @property
    def best(self) -> tuple[Point, float]:
        """The point with the least value so far, and that value."""
        return min(self.evaluated, key=lambda pair: pair[1])

    def ask(self, passes: int | None = None) -> Point | None:
        """The next point whose value is wanted; None when the search is over, or `passes` passes are made."""
        self.steps, self.simplex = [], []
        known = iter(self.evaluated)
        search = self._search(passes)
        try:
            point = next(search)
            while True:
                found = self._cached(point)
                if found is None:
                    found = next(known, (None, None))[1]
                    if found is None:
                        return point
                    self._seen.append((point, found))
                point = search.send(found)
        except StopIteration:
            return None

    def tell(self, point: Point, value: float) -> None:
        """The value of the point that was asked for; NaN counts as infinity."""
        self.evaluated.append((list(point), math.inf if math.isnan(value) else float(value)))

    def minimise(self, function: Callable[[Point], float], passes: int) -> None:
        """Make so many passes with a function at hand."""
        while (point := self.ask(passes)) is not None:
            self.tell(point, function(point))

    def _cached(self, point: Point) -> float | None:
        for other, value in self._seen:
            if all(abs(a - b) <= self.cache for a, b in zip(point, other, strict=True)):
                return value
        return None

    def _search(self, passes: int | None) -> Generator[Point, float, None]:
        self._seen: list[tuple[Point, float]] = []
        simplex = []
        for point in self.start:
            simplex.append(((yield point), point))
        while passes is None or len(self.steps) < passes:
            simplex.sort(key=lambda pair: pair[0])
            self.simplex = list(simplex)
            (least, top), (second, _), (most, worst) = simplex[0], simplex[-2], simplex[-1]
            middle = [statistics.fmean(column) for column in zip(*(point for _, point in simplex[:-1]), strict=True)]
            mirrored = _along(middle, worst, -self.alpha)
            value = yield mirrored
            if least <= value < second:
                simplex[-1] = (value, mirrored)
                self.steps.append("reflect")
            elif value < least:
                further = _along(middle, mirrored, self.gamma)
                beyond = yield further
                simplex[-1] = (beyond, further) if beyond < least and beyond < value else (value, mirrored)
                self.steps.append("expand")
            else:
                nearer = _along(middle, worst, self.rho)
                inside = yield nearer
                if inside < most:
                    simplex[-1] = (inside, nearer)
                    self.steps.append("contract")
                else:
                    self.steps.append("shrink")
                    for i in range(1, len(simplex)):
                        point = _along(top, simplex[i][1], self.sigma)
                        simplex[i] = ((yield point), point)
                    if statistics.pstdev([v for v, _ in simplex if math.isfinite(v)] or [0.0]) < self.tolerance:
                        break
        simplex.sort(key=lambda pair: pair[0])
        self.simplex = simplex


def _along(origin: Point, towards: Point, share: float) -> Point:
    return [a + share * (b - a) for a, b in zip(origin, towards, strict=True)]
