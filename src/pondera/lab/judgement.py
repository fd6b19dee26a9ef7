"""What came of judging results from elsewhere, as data: rows, methods over tasks, and their words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pondera._words import DASH, num, with_interval
from pondera.lab.stats import LEVEL, NONE, Difference, interval, undecided

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Gap(Difference):
    """A difference that knows which way is better, and how it was paired.

    paired: over units both have; else the two means are compared (Welch). units: finished ones of the method and of the
    baseline. of: units that could have been paired: those that either has.
    """

    lower_is_better: bool = False
    paired: bool = True
    units: tuple[int, int] = (0, 0)
    of: int = 0

    @property
    def verdict(self) -> str:
        """One of "better", "worse" or "no difference shown"."""
        found = super().verdict
        if found == NONE or not self.lower_is_better:
            return found
        return "worse" if found == "better" else "better"


@dataclass(frozen=True)
class Judged:
    """What came of one method on one task.

    units: labels of its seeds or tunings. scores: one a unit, nan where no run finished. runs: in all, failed: of them
    without a finite score. difference: to the baseline (None for itself, or where there are too few units).
    """

    task: str
    method: str
    units: tuple[str, ...]
    scores: tuple[float, ...]
    runs: int
    failed: int
    unit: str
    baseline: bool = False
    difference: Gap | None = None
    resolution: float = 0.0
    bounds: tuple[float, float] = (-math.inf, math.inf)
    opposed: bool = True

    @property
    def finished(self) -> list[float]:
        return [s for s in self.scores if math.isfinite(s)]

    @property
    def score(self) -> Triple:
        """Mean over the finished units with its 95% interval (by itself, not against another)."""
        if not self.finished:
            return math.nan, math.nan, math.nan
        return interval(self.finished, resolution=self.resolution, bounds=self.bounds)

    @property
    def verdict(self) -> str:
        """One of "baseline", "better", "worse", "no difference shown", "failed in k of n", or why there is none."""
        if self.failed:
            return f"failed in {self.failed} of {self.runs}"
        if self.baseline:
            return "baseline"
        if self.difference:
            return self.difference.verdict
        return f"too few {self.unit}s to say" if self.opposed else "no baseline here"


@dataclass(frozen=True)
class Aggregate:
    """One method over all tasks: (estimate, low, high) each, the interval a bootstrap's, nan where it cannot be had.

    rank: mean over tasks, 1 the best. iqm: interquartile mean of the normalised scores of all units and tasks.
    improvement: probability that a run of it beats one of the baseline (None for the baseline). overall: the mean over
    tasks of the standardised difference, judged (None where it cannot be, with why in `why`).
    """

    method: str
    rank: Triple
    iqm: Triple
    improvement: Triple | None = None
    overall: Gap | None = None
    why: str = ""
    baseline: bool = False

    @property
    def verdict(self) -> str:
        if self.baseline:
            return "baseline"
        return self.overall.verdict if self.overall else f"not judged: {self.why}"


@dataclass(frozen=True)
class Judgement:
    """The result of `judge`: a row for each method on each task, the baseline first, and methods over all tasks.

    notes: what a reader should know, a sentence each. scales: by task, the scores that count as 0 and as 1 (None where
    there are none), by which the interquartile mean and the profiles are normalised. level: of the verdicts a task.
    """

    name: str
    rows: list[Judged]
    baseline: str
    methods: list[str]
    tasks: list[str]
    unit: str
    lower_is_better: bool
    aggregates: list[Aggregate]
    notes: list[str]
    normalise: str = "range"
    scales: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    level: float = LEVEL

    @property
    def ok(self) -> bool:
        """Whether every run finished."""
        return not any(r.failed for r in self.rows)

    def __getitem__(self, key: str | tuple[str, str]) -> Judged:
        """The row of a method, or with several tasks of (task, method).

        Raises: KeyError: if there is none.
        """
        return self._by_name[key if isinstance(key, tuple) else (self.tasks[0], key)]

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], Judged]:
        return {(r.task, r.method): r for r in self.rows}

    def of(self, task: str) -> list[Judged]:
        """The rows of a task."""
        return [r for r in self.rows if r.task == task]

    def normalised(self, row: Judged) -> list[float]:
        """A row's finished scores on the scale of its task; empty where it has none."""
        scale = self.scales.get(row.task)
        return [] if scale is None else [(s - scale[0]) / (scale[1] - scale[0]) for s in row.finished]

    @property
    def higher_is_better_normalised(self) -> bool:
        """Whether a higher normalised score is better: the scale "range" runs from the worst method to the best."""
        return self.normalise == "range" or not self.lower_is_better

    def table(self) -> list[dict[str, Any]]:
        """One dict a row."""
        rows = []
        for r in self.rows:
            mean, low, high = r.score
            d = r.difference
            row: dict[str, Any] = {"task": r.task, "method": r.method, "score": mean, "low": low, "high": high}
            row |= {"difference": d.mean if d else None, "difference_low": d.low if d else None}
            row |= {"difference_high": d.high if d else None, "standardised": d.standardised if d else None}
            row |= {"verdict": r.verdict, "paired": d.paired if d else None, "n": d.n if d else None}
            row |= {"could_show": d.shown if d else None, "needed": d.needed if d else None}
            row |= {"runs": r.runs, "failed": r.failed, "scores": dict(zip(r.units, r.scores))}
            rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values; what is no finite number is None."""
        over = [asdict(a) | {"verdict": a.verdict} for a in self.aggregates]
        return _plain(
            {
                "results": self.name, "baseline": self.baseline, "lower_is_better": self.lower_is_better,
                "unit": self.unit, "level": self.level, "normalise": self.normalise, "rows": self.table(),
                "over_tasks": over, "notes": self.notes,
            }
        )  # fmt: skip

    def summary(self) -> str:
        """The tables and notes as plain text."""
        parts = [self.headline]
        for task in self.tasks:
            parts.append("\n".join([*([task] if task else []), *_lines_of(self, task)]))
        if self.aggregates:
            parts.append("\n".join(["over all tasks", *_lines_over(self)]))
        parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts)

    @property
    def headline(self) -> str:
        """What was judged, in one line."""
        on = f" on {len(self.tasks)} tasks" if len(self.tasks) > 1 else ""
        way = "lower" if self.lower_is_better else "higher"
        return f"{self.name}: {len(self.methods)} methods{on}; the baseline is {self.baseline}; {way} is better"

    def report(self, path: str | Path, *, small: bool = False) -> Path:
        """Write the report, one HTML file that opens offline, by atomic rename; `small`: with still figures, about 100 kB."""
        from pondera.report._judgement import write

        return write(self, path, small=small)


def paired_scores(row: Judged, base: Judged | None) -> tuple[list[str], list[float], list[float], bool] | None:
    """(labels, scores of the method, of the baseline, paired), or None where there are too few.

    Whether they are paired is decided by the labels alone, never by which runs finished.
    """
    if base is None:
        return None
    mine, theirs = dict(zip(row.units, row.scores)), dict(zip(base.units, base.scores))
    shared = [u for u in mine if u in theirs]
    if len(shared) < 2:
        fewer = min(len(row.finished), len(base.finished))
        return ([], row.finished, base.finished, False) if fewer > 1 else None
    both = [u for u in shared if math.isfinite(mine[u]) and math.isfinite(theirs[u])]
    return (both, [mine[u] for u in both], [theirs[u] for u in both], True) if len(both) > 1 else None


# -- in words ----------------------------------------------------------------------------------------------------------


def places(values: Iterable[float]) -> int:
    """Decimals that show two digits of the typical half-width of an interval.

    >>> places([0.012, 0.02]), places([1.3]), places([250.0]), places([])
    (3, 1, 0, 3)
    """
    known = sorted(v for v in values if math.isfinite(v) and v > 1e-12)
    return min(6, max(0, 1 - math.floor(math.log10(known[len(known) // 2])))) if known else 3


def places_of(rows: Sequence[Judged]) -> int:
    """Decimals for the scores and differences of a task."""
    halves = [(d.high - d.low) / 2 for r in rows if (d := r.difference)]
    own = [(r.score[2] - r.score[1]) / 2 for r in rows if r.finished]
    return places([h for h in halves if h > 0] or own)


def ranged(x: Triple | None, digits: int) -> str:
    """
    >>> ranged((0.5, 0.25, 0.75), 2), ranged((0.5, -math.inf, math.inf), 2), ranged(None, 2)
    ('0.50 [0.25, 0.75]', '0.50', '–')
    """
    if x is None or math.isnan(x[0]):
        return DASH
    bare = not all(map(math.isfinite, x[1:]))
    return num(x[0], digits) if bare else f"{num(x[0], digits)} [{num(x[1], digits)}, {num(x[2], digits)}]"


def could(d: Gap | None, digits: int, unit: str) -> str:
    """What a difference that was not called could have been, in words; empty for one that was."""
    return "" if d is None else undecided(d, digits, unit, each=not d.paired)


def _lines_of(j: Judgement, task: str) -> list[str]:
    rows = j.of(task)
    digits = places_of(rows)
    head = ("method", "score [95%]", f"difference to {j.baseline}", "verdict")
    cells = [head]
    for r in rows:
        cells.append(
            (r.method, ranged(r.score, digits), with_interval(r.difference, digits) if r.difference else "", r.verdict)
        )
    lines = _aligned(cells)
    for r in rows:
        words = "" if r.failed else could(r.difference, digits, j.unit)
        if words:
            lines.append(f"{r.method}: {words}")
    return lines


def _lines_over(j: Judgement) -> list[str]:
    head = ("method", "mean rank", f"beats {j.baseline}", "interquartile mean", "standardised difference", "verdict")
    digits = places((a.iqm[2] - a.iqm[1]) / 2 for a in j.aggregates)
    cells = [head]
    for a in j.aggregates:
        gap = with_interval(a.overall, 2) if a.overall else ""
        better = ranged(a.improvement, 2) if a.improvement else ""
        cells.append((a.method, ranged(a.rank, 2), better, ranged(a.iqm, digits), gap, a.verdict))
    lines = _aligned(cells)
    return lines + [f"{a.method}: {words}" for a in j.aggregates if (words := could(a.overall, 2, j.unit))]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in cells]


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
