"""What came of a comparison, as data: rows, their verdicts, and what was tried on the way."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mode
from typing import Any

from pondera.lab.plan import Tried
from pondera.lab.recipe import Recipe
from pondera.lab.space import OneOf, Point
from pondera.lab.stats import LEVEL, NONE, Difference, interval
from pondera.lab.task import Task


@dataclass(frozen=True)
class Row:
    """What came of one recipe.

    spec: the recipe as given. name: in tables. scores: test score a unit, nan where it failed. failed: seed -> reason.
    chosen: the point each unit was tuned to (None where it failed). edge: units whose best point still lies at an end
    of the space after it was extended. difference: to the baseline over the units where both finished (None for the
    baseline itself or fewer than two). at_equal_time: the same difference with both stopped at the baseline's seconds,
    or the recipe's if fewer. trials: a unit, every trial. curves: a unit, a list of (step, seconds, score, train loss).
    target: median (steps, seconds) at which the baseline's mean score was first reached, None where less than half
    of the units did. seeds: the unit's seeds. lost: trials that did not finish, by reason.
    """

    spec: str
    name: str
    recipe: Recipe
    scores: list[float]
    failed: dict[int, str]
    chosen: list[Point | None]
    edge: int
    difference: Difference | None
    at_equal_time: Difference | None
    step_seconds: float
    start_seconds: float
    parameters: int
    trials: list[list[Tried]]
    curves: list[list[list[float]]]
    signal: list[dict[str, Any]]
    baseline: bool = False
    target: tuple[float, float] | None = None
    resolution: float = 0.0
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def finished(self) -> list[float]:
        return [s for s in self.scores if math.isfinite(s)]

    @property
    def score(self) -> tuple[float, float, float]:
        """Mean test score over the finished units with its 95% interval (by itself, not against another)."""
        if not self.finished:
            return math.nan, math.nan, math.nan
        return interval(self.finished, resolution=self.resolution, bounds=self.bounds)

    @property
    def verdict(self) -> str:
        """One of "baseline", "better", "worse", "no difference shown", or "failed in k of n units"."""
        if self.failed:
            return f"failed in {len(self.failed)} of {len(self.scores)} units"
        if self.baseline:
            return "baseline"
        return self.difference.verdict if self.difference else "too few seeds to say"

    @property
    def point(self) -> Point | None:
        """The middle of what the units were tuned to: medians of numbers, the most frequent of values chosen from."""
        found = [p for p in self.chosen if p is not None]
        if not found:
            return None
        spaces = self.recipe.spaces
        values = []
        for axis, _ in found[0].values:
            seen = [p[axis] for p in found]
            values.append((axis, mode(seen) if isinstance(spaces.get(axis), OneOf) else _middle(seen)))
        return Point(_middle([p.rate for p in found]), tuple(values))

    @property
    def rate(self) -> float:
        """Median of the learning rates the units were tuned to (nan when none finished)."""
        return math.nan if self.point is None else self.point.rate

    @property
    def setting(self) -> Recipe:
        """The recipe with the middle of what was chosen in the place of its spaces."""
        return self.recipe if self.point is None else self.recipe.at(self.point)

    @property
    def tuning(self) -> list[tuple[float, float, float]]:
        """(rate, mean validation score after a quarter, at the end) over the units; nan where no unit has it."""
        rates = sorted({t.point.rate for unit in self.trials for t in unit})
        found = []
        for rate in rates:
            here = [t for unit in self.trials for t in unit if t.point.rate == rate]
            found.append((rate, _mean([t.early for t in here]), _mean([t.late for t in here])))
        return found

    @property
    def lost(self) -> dict[str, int]:
        """How many trials did not finish, by how."""
        found: dict[str, int] = {}
        for unit in self.trials:
            for t in unit:
                if t.failed:
                    why = t.failed.partition(":")[0]
                    found[why] = found.get(why, 0) + 1
        return found


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: rows in the order given, the baseline first.

    seeds: units of the recipe that has most. rates: the grid. trials: points a unit tries. runs: carried out for this
    table, repeated: of them found in the store. depends: what else the results depend on, by name. repeatable: whether a
    run carried out twice gave the same (None: not known). looks: numbers of seeds at which a comparison that goes on
    until decided was looked at.
    """

    task: Task
    rows: list[Row]
    seeds: int
    steps: int
    rates: tuple[float, ...]
    runs: int
    repeated: int
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    trials: int = 1
    depends: dict[str, str] = field(default_factory=dict)
    repeatable: bool | None = None
    looks: tuple[int, ...] = ()
    tuned: bool = True
    level: float = LEVEL

    @property
    def ok(self) -> bool:
        """Whether every recipe finished all its units."""
        return not any(r.failed for r in self.rows)

    def __getitem__(self, name: str) -> Row:
        return next(r for r in self.rows if name in (r.spec, r.name))

    def table(self, *, timing: bool = True) -> list[dict[str, Any]]:
        """One dict a row; without `timing` it holds nothing that depends on the clock, so equal runs give equal tables."""
        rows = []
        for r in self.rows:
            mean, low, high = r.score
            d = r.difference
            row: dict[str, Any] = {"recipe": r.name, "rate": r.rate, "score": mean, "low": low, "high": high}
            row |= {"difference": d.mean if d else None, "difference_low": d.low if d else None}
            row |= {"difference_high": d.high if d else None, "standardised": d.standardised if d else None}
            row |= {"verdict": r.verdict, "could_show": d.shown if d else None, "seeds_needed": d.needed if d else None}
            row |= {"scores": r.scores, "failed": r.failed, "setting": str(r.setting), "at_an_edge": r.edge}
            row |= {"rates": [None if p is None else p.rate for p in r.chosen], "trials_lost": r.lost}
            if timing:
                row |= {"step_seconds": r.step_seconds, "start_seconds": r.start_seconds}
                e = r.at_equal_time
                row |= {"equal_time_difference": e.mean if e else None, "equal_time_verdict": e.verdict if e else None}
                row |= {"steps_to_target": r.target[0] if r.target else None}
                row |= {"seconds_to_target": r.target[1] if r.target else None}
            rows.append(row)
        return rows

    def report(self, path: str | Path) -> Path:
        """Write the report, one HTML file that opens offline; atomically."""
        from pondera.report._comparison import write

        return write(self, path)


def undecided(d: Difference | None, places: int = 4) -> str:
    """What a difference that was not called could have been, in words; empty for one that was.

    >>> undecided(Difference(0.01, -0.02, 0.04, 0.3, 5, shown=0.05, needed=40))
    '5 seeds would show a difference of 0.0500 in four of five tables; the one seen would take about 40'
    """
    if d is None or d.verdict != NONE:
        return ""
    words = f"{d.n} seeds would show a difference of {d.shown:.{places}f} in four of five tables"
    return words + (f"; the one seen would take about {d.needed:,}" if d.needed and d.needed > d.n else "")


def _middle(x: list[float]) -> float:
    return sorted(x)[(len(x) - 1) // 2]


def _mean(x: list[float]) -> float:
    known = [v for v in x if math.isfinite(v)]
    return math.fsum(known) / len(known) if known else math.nan
