"""What came of a comparison, as data: rows, their verdicts, and what was tried on the way."""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

from pondera._files import write_atomically
from pondera._words import DASH, decimals, num, with_interval
from pondera._words import rate as rate_in_words
from pondera.errors import BadInput
from pondera.lab.plan import Tried
from pondera.lab.recipe import Recipe
from pondera.lab.space import Axis, OneOf, Point, ends
from pondera.lab.stats import LEVEL, NONE, Difference, interval
from pondera.lab.task import Task

if TYPE_CHECKING:
    import pandas as pd

COLOURS = {"better": "#dafbe1;color:#116329", "worse": "#ffebe9;color:#a40e26"}  # they bring their own ground
OTHER = "#eaeef2;color:#32383f"
SIGNS = {"better": "▲ ", "worse": "▼ ", NONE: "○ "}


@dataclass(frozen=True)
class Size:
    """Of a trained model: numbers that are not zero, bytes to store it, multiplications over one example."""

    numbers: float
    bytes: float
    multiplications: float


@dataclass(frozen=True, repr=False)
class Row:
    """What came of one recipe.

    spec: the recipe as given. name: in tables. scores: test score a unit, nan where it failed. failed: seed -> reason.
    chosen: the point each unit was tuned to (None where it failed). edge: units whose best point still lies at an end
    of the space after it was extended. difference: to the baseline over the units where both finished (None for the
    baseline itself or fewer than two). at_equal_time: the same difference with both stopped at the baseline's seconds,
    or the recipe's if fewer. trials: a unit, every trial. curves: a unit, a list of (step, seconds, score, train loss).
    target: median (steps, seconds) at which the baseline's mean score was first reached, None where less than half
    of the units did. seeds: the units' seeds. lost: trials that did not finish, by reason. peak_memory: median over the
    units' runs, in bytes; nan where it was not measured (on the processor: above what the process held before the run).
    size: of the trained model, medians over the units; None where it could not be counted.
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
    seeds: tuple[int, ...] = ()
    peak_memory: float = math.nan
    size: Size | None = None

    def __repr__(self) -> str:
        places = decimals(_halves([self]))
        words = f"; {with_interval(self.difference, places)}" if self.difference else ""
        return f"Row({self.name!r}: {_with_spread(self, places)}{words}; {self.verdict})"

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

    def units(self) -> list[dict[str, Any]]:
        """One dict a unit: its seed, score, the point it was tuned to, at which ends of the space that lies, its trials.

        seconds: of training, at the end of its run, without the start-up. ends: by what is searched, -1 at the low end
        and 1 at the high one; empty inside. trials: each with how it validated after a quarter and at the end.
        """
        found = []
        for i, (seed, score, point, trials) in enumerate(zip(_seeds(self), self.scores, self.chosen, self.trials)):
            curve = self.curves[i] if i < len(self.curves) else []
            tried = [t.point for t in trials]
            at = ends(point, tried, self.recipe.spaces) if point is not None and len(tried) > 1 else {}
            unit: dict[str, Any] = {"seed": seed, "score": score, "failed": self.failed.get(seed, "")}
            unit |= {
                "chosen": None if point is None else _point(point),
                "ends": {_axis(a): way for a, way in at.items()},
            }
            unit |= {"seconds": curve[-1][1] if curve else math.nan}
            unit |= {
                "trials": [{**_point(t.point), "early": t.early, "late": t.late, "failed": t.failed} for t in trials]
            }
            unit |= {"curve": [dict(zip(("step", "seconds", "score", "train_loss"), c)) for c in curve]}
            found.append(unit)
        return found


@dataclass(frozen=True, repr=False)
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
    def compressed(self) -> bool:
        """Whether a recipe compresses, so that size stands beside the score."""
        return any(r.recipe.compress is not None and r.size is not None for r in self.rows)

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
            row |= asdict(r.size) if r.size else dict.fromkeys(("numbers", "bytes", "multiplications"))
            if timing:
                row |= {"step_seconds": r.step_seconds, "start_seconds": r.start_seconds}
                e = r.at_equal_time
                row |= {"equal_time_difference": e.mean if e else None, "equal_time_verdict": e.verdict if e else None}
                row |= {"steps_to_target": r.target[0] if r.target else None}
                row |= {"seconds_to_target": r.target[1] if r.target else None}
                row |= {"peak_memory": r.peak_memory if math.isfinite(r.peak_memory) else None}
            rows.append(row)
        return rows

    def report(self, path: str | Path, *, small: bool = False) -> Path:
        """Write the report, one HTML file that opens offline, by atomic rename; `small`: with still figures, about 100 kB."""
        from pondera.report._comparison import write

        return write(self, path, small=small)

    # -- for other programs -------------------------------------------------------------------------------------------

    def units(self) -> list[dict[str, Any]]:
        """One flat dict a unit: recipe, seed, score, rate and what else was searched ("optim.weight_decay"), how it ended.

        status: "ok" or "failed", with why beside it. seconds: of training at the end of its run.
        """
        axes = list(dict.fromkeys(_axis(a) for r in self.rows for a in r.recipe.spaces))
        found = []
        for r in self.rows:
            for u in r.units():
                point = u["chosen"] or {}
                unit = {"recipe": r.name, "seed": u["seed"], "score": u["score"], "rate": point.get("rate", math.nan)}
                unit |= {axis: point.get(axis) for axis in axes}
                unit |= {"status": "ok" if math.isfinite(u["score"]) else "failed", "why": u["failed"]}
                found.append(unit | {"seconds": u["seconds"]})
        return found

    def to_frame(self, *, units: bool = False) -> "pd.DataFrame":
        """A pandas data frame: a row a recipe (`table` without its lists, failures counted), or with `units` a row a unit.

        Raises: BadInput: without pandas.
        """
        try:
            import pandas
        except ImportError:
            raise BadInput("to_frame needs pandas: pip install pandas (to_csv and to_json do without)") from None
        if units:
            return pandas.DataFrame(self.units())
        rows = []
        for r, row in zip(self.rows, self.table()):
            row |= {"failed": len(r.failed), "trials_lost": sum(r.lost.values()), "units": len(r.scores)}
            row |= {"parameters": r.parameters}
            rows.append({k: math.nan if v is None else v for k, v in row.items() if not isinstance(v, (list, dict))})
        return pandas.DataFrame(rows)

    def to_csv(self, path: str | Path) -> Path:
        """Write the units, a row each, for spreadsheets and other programs; atomically. What is not known stays empty.

        Raises: BadInput: if the path is a folder, lies in a folder that does not exist, or cannot be written.
        """
        path = Path(path)
        rows = [{k: _plain(v) for k, v in u.items()} for u in self.units()]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        if path.is_dir():
            raise BadInput(f"the units need the path of a file, got the folder {path}")
        if not path.parent.is_dir():
            raise BadInput(f"the units cannot be written to {path}: there is no folder {path.parent}")
        try:
            write_atomically(path, text.getvalue())
        except OSError as error:
            raise BadInput(f"the units cannot be written to {path}: {error.strerror or error}") from None
        return path

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values: the design, a row a recipe as `table` has it, with its units, and what it took.

        What is no finite number is None.
        """
        design: dict[str, Any] = {
            "task": self.task.name,
            "fingerprint": self.task.fingerprint,
            "score": self.task.settings.score,
        }
        design |= {"steps": self.steps, "rates": self.rates, "trials": self.trials, "seeds": self.seeds}
        design |= {"looks": self.looks, "tuned": self.tuned, "level": self.level}
        rows = []
        for r, row in zip(self.rows, self.table()):
            row |= {"spec": r.spec, "parameters": r.parameters, "baseline": r.baseline, "units": r.units()}
            row |= {"searched": {_axis(a): repr(space) for a, space in r.recipe.spaces.items()}, "signal": r.signal}
            row |= {"to_the_baseline": _difference(r.difference), "at_equal_time": _difference(r.at_equal_time)}
            rows.append(row)
        return _plain(
            {
                "design": design, "rows": rows, "runs": self.runs, "repeated": self.repeated, "seconds": self.seconds,
                "repeatable": self.repeatable, "versions": self.versions, "depends": self.depends,
            }
        )  # fmt: skip

    def __repr__(self) -> str:
        counted = Counter(r.verdict if not r.failed else "failed" for r in self.rows if r.failed or not r.baseline)
        words = ", ".join(f"{n} {verdict}" for verdict, n in counted.items())
        many = ", ".join(f"{n} {what}{'' if n == 1 else 's'}" for n, what in _sizes(self))
        return f"Comparison({self.task.name}: {many}{'; ' if words else ''}{words})"

    def _repr_html_(self) -> str:
        """The table in short, for notebooks."""
        places = decimals(_halves(self.rows))
        left, cell = "text-align:left", "text-align:right;font-variant-numeric:tabular-nums"
        heads = ("recipe", "rate", f"{self.task.settings.score} [95%]", "difference to the baseline", "verdict")
        lines = ["".join(f'<th scope="col" style="{left}">{escape(h)}</th>' for h in heads)]
        for r in self.rows:
            called = "failed" if r.failed else r.verdict
            ground = COLOURS.get("worse" if r.failed else called, OTHER)
            mark = f'<span style="background:{ground};padding:0 .4em;border-radius:.3em">'
            mark += f"{SIGNS.get(called, '✕ ' if r.failed else '')}{escape(r.verdict)}</span>"
            d = with_interval(r.difference, places) if r.difference else DASH
            inside = "".join(
                f'<td style="{cell}">{v}</td>' for v in (rate_in_words(r.rate), _with_spread(r, places), d)
            )
            lines.append(f'<th scope="row" style="{left}">{escape(r.name)}</th>{inside}<td style="{left}">{mark}</td>')
        many = ", ".join(f"{n:,} {what}{'' if n == 1 else 's'}" for n, what in _sizes(self))
        head, *body = (f"<tr>{line}</tr>" for line in lines)
        return (
            f'<table><caption style="{left}">{escape(self.task.name)}: {many}</caption><thead>{head}</thead>'
            f"<tbody>{''.join(body)}</tbody></table>"
        )


def _middle(x: list[float]) -> float:
    return sorted(x)[(len(x) - 1) // 2]


def _mean(x: list[float]) -> float:
    known = [v for v in x if math.isfinite(v)]
    return math.fsum(known) / len(known) if known else math.nan


def _seeds(row: Row) -> tuple[int, ...]:
    return row.seeds or tuple(range(len(row.scores)))


def _sizes(c: Comparison) -> list[tuple[int, str]]:
    return [(len(c.rows), "recipe"), (c.seeds, "seed"), (c.steps, "step")]


def _halves(rows: list[Row]) -> list[float]:
    """Half-widths of the differences' intervals, or of the scores' where there is none."""
    found = [(d.high - d.low) / 2 for r in rows if (d := r.difference)]
    return found or [(r.score[2] - r.score[1]) / 2 for r in rows if r.finished]


def _with_spread(row: Row, places: int) -> str:
    mean, low, high = row.score
    spread = f" [{num(low, places)}, {num(high, places)}]" if len(row.finished) > 1 else ""
    return num(mean, places) + spread


def _axis(axis: Axis) -> str:
    """
    >>> _axis(("optim", "weight_decay")), _axis(("rate", ""))
    ('optim.weight_decay', 'rate')
    """
    return ".".join(part for part in axis if part)


def _point(point: Point) -> dict[str, Any]:
    return {"rate": point.rate} | {_axis(axis): value for axis, value in point.values}


def _difference(d: Difference | None) -> dict[str, Any] | None:
    return None if d is None else asdict(d) | {"verdict": d.verdict, "large": d.large}


def _plain(value: Any) -> Any:
    """As JSON has it, when written and read back: keys are text, what is no finite number is None.

    >>> _plain({3: (1.0, math.nan)})
    {'3': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
