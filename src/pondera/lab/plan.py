"""What a comparison runs: every unit, a recipe at a seed, is tuned for itself; a pure function of what is finished.

A unit tries T points of its recipe's space for a quarter of the steps, under a schedule of that length (whole runs in
little); the best third by validation is trained to the end, and the one
that validates best there is the unit: its test score is the unit's score. Ties go to the lower validation loss. Where the
best point of any recipe lies at an end of its space, that space is extended one step beyond, and every other recipe of
that seed gets a further trial too, its next best; at most twice.

Any order of work and any restart lead to the same table: a unit goes on only when all runs it waits for are finished.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pondera.lab.recipe import Recipe
from pondera.lab.space import RATE, Axis, Point, beyond, ends, extendable, points
from pondera.lab.stats import looks
from pondera.lab.task import Task
from pondera.lab.train import RunSpec, stream

RUNG = 0.25  # share of the steps at which points are first judged
KEEP = 1 / 3  # share of the points that are trained to the end
EXTENSIONS = 2  # further trials to the end, at most, where a best point lies at an end of its space
REPEATED = 20  # steps of the run that is carried out twice
TRIALS = 9  # of recipes that search something where the task gives one rate

Result = dict[str, Any]
Value = tuple[float, float]  # validation score, then minus the validation loss


def value(result: Result) -> Value | None:
    """What a finished trial is ranked by, None where it failed."""
    if result["status"] != "ok":
        return None
    return result["valid"], -result["valid_loss"]


def kept(trials: int) -> int:
    """How many of the points are trained to the end."""
    return max(1, math.ceil(KEEP * trials))


def ranked(values: "Sequence[Value | None]") -> list[int]:
    """Places of the finished trials, best first; what is tied in both goes by its place.

    >>> ranked([(0.5, -1.0), (0.9, -0.3), None, (0.9, -0.2)])
    [3, 1, 0]
    """
    return [i for _, i in sorted(((-v[0], -v[1]), i) for i, v in enumerate(values) if v is not None)]


@dataclass(frozen=True)
class Design:
    """What all units share. rates: the grid. trials: points a unit tries. depends: of the task, for the runs' keys."""

    task: Task
    recipes: tuple[Recipe, ...]
    seeds: range
    steps: int
    rates: tuple[float, ...]
    trials: int
    device: str = "cpu"
    threads: int = 1
    depends: str = ""

    @property
    def rung(self) -> int:
        return max(1, math.ceil(RUNG * self.steps))

    @property
    def tuned(self) -> bool:
        """Whether anything is tuned: otherwise every unit is one run, on all training data."""
        return len(self.rates) > 1 or any(r.spaces for r in self.recipes)

    def spec(self, recipe: Recipe, point: Point, seed: int, phase: str, **more: Any) -> RunSpec:
        steps = self.rung if phase == "rung" else self.steps
        t = self.task
        return RunSpec(
            t.name, t.path, t.source, recipe.at(point), point.rate, seed, steps, steps, phase, self.threads,
            self.device, depends=self.depends, **more,
        )  # fmt: skip

    def cost(self, arm: int) -> tuple[int, int]:
        """Runs of a quarter and runs to the end of one unit of a recipe, when nothing fails or is extended."""
        if not self.tuned:
            return 0, 1
        n = len(points(self.rates, self.trials, self.recipes[arm].spaces, 0))
        return (n, kept(n)) if n > 1 else (0, 1)


@dataclass(frozen=True)
class Tried:
    """One trial of a unit: its point, how it validated after a quarter and at the end (nan: failed or not run), and how it failed."""

    point: Point
    early: float
    late: float
    failed: str = ""


class Unit:
    """One recipe at one seed: which runs it waits for, and what came of it."""

    def __init__(self, design: Design, arm: int, seed: int):
        self.design, self.arm, self.seed = design, arm, seed
        self.recipe = design.recipes[arm]
        self.first = seed == design.seeds.start
        self.points: list[Point] = [Point(design.rates[0])]
        if design.tuned:
            self.points = points(design.rates, design.trials, self.recipe.spaces, stream(seed, "space"))
        self.keep = kept(len(self.points))
        self.early: dict[int, Result] = {}
        self.late: dict[int, Result] = {}
        self.order: list[int] = []  # trials by their early value, best first
        self._rung = [self._spec(i, "rung", signal=self.first and i == 0) for i in range(len(self.points))]
        self._whole: dict[int, RunSpec] = {}
        self.stage = "rung"
        if len(self.points) == 1:
            self.stage, self._rung, self.order = "whole", [], [0]
            self._send(0)

    @property
    def phase(self) -> str:
        return "tuned" if self.design.tuned else "final"

    def _spec(self, i: int, phase: str, **more: Any) -> RunSpec:
        return self.design.spec(self.recipe, self.points[i], self.seed, phase, **more)

    def _send(self, i: int) -> None:
        self._whole[i] = self._spec(i, self.phase, signal=self.first and not self._rung and i == 0)

    def specs(self) -> list[RunSpec]:
        """All runs known so far."""
        return [*self._rung, *self._whole.values()]

    def advance(self, results: dict[str, Result]) -> bool:
        """Go on if every run waited for is finished; whether it did (then there may be new ones)."""
        if self.stage == "rung":
            if not all(s.key in results for s in self._rung):
                return False
            self.early = {i: results[s.key] for i, s in enumerate(self._rung)}
            self.order = ranked([value(self.early[i]) for i in range(len(self._rung))])
            for i in self.order[: self.keep]:
                self._send(i)
            self.stage = "whole" if self._whole else "done"
            return True
        if self.stage == "whole":
            if not all(s.key in results for s in self._whole.values()):
                return False
            self.late = {i: results[s.key] for i, s in self._whole.items()}
            if self.best is None and (following := self._next()) is not None:
                self._send(following)  # everything that passed the cut failed later: the next in order
                return True
            self.stage = "done"
            return True
        return False

    def _next(self) -> int | None:
        """The next trial in order that has not been trained to the end."""
        return next((i for i in self.order if i not in self._whole), None)

    @property
    def best(self) -> int | None:
        """The trial that is the unit: of those that finished, the one that validated best at the end."""
        if self.phase == "final":
            return 0 if self.late and self.late[0]["status"] == "ok" else None
        places = sorted(self.late)
        order = ranked([value(self.late[i]) for i in places])
        return places[order[0]] if order else None

    @property
    def ends(self) -> dict[Axis, int]:
        """Where the best point is the outermost of those tried; the low end of the rates where none finished."""
        if self.phase == "final" or len(self.points) < 2:
            return {}
        if self.best is None:
            if not self.design.rates[1:] or all(r["status"] != "diverged" for r in self.early.values()):
                return {}  # what raised at every rate will raise at a smaller one
            return {RATE: -1}
        return ends(self.points[self.best], self.points, self.recipe.spaces)

    def extend(self) -> None:
        """One further trial to the end: beyond the end where the best point lies at one, else the next in order."""
        spaces, at = self.recipe.spaces, extendable(self.ends, self.recipe.spaces)
        start = self.best
        if start is None:
            start = min(range(len(self.points)), key=lambda i: self.points[i].rate)
        if at:
            new = beyond(self.points[start], at, spaces, self.design.rates, self.design.trials)
            if new not in self.points:
                self.points.append(new)
                self._send(len(self.points) - 1)
                self.stage = "whole"
        elif (i := self._next()) is not None:
            self._send(i)
            self.stage = "whole"

    # -- what came of it ----------------------------------------------------------------------------------------------

    @property
    def result(self) -> Result | None:
        """The result of the run that is the unit; None where no trial finished."""
        return None if self.best is None else self.late[self.best]

    @property
    def point(self) -> Point | None:
        return None if self.best is None else self.points[self.best]

    @property
    def why(self) -> str:
        """Why the unit failed, in words."""
        found = [r for r in (*self.early.values(), *self.late.values()) if r["status"] != "ok"]
        if not found:
            return "no run was carried out"
        first = f"{found[0]['status']}: {found[0]['reason']}"
        return first if self.phase == "final" else f"no learning rate finished ({first})"

    def history(self) -> list[Tried]:
        """Every trial, for the report."""
        rows = []
        for i, p in enumerate(self.points):
            early, late = self.early.get(i), self.late.get(i)
            bad = next((f"{r['status']}: {r['reason']}" for r in (early, late) if r and r["status"] != "ok"), "")
            seen = [r["valid"] if r and r["status"] == "ok" and "valid" in r else math.nan for r in (early, late)]
            rows.append(Tried(p, seen[0], seen[1], bad))
        return rows

    @property
    def signal(self) -> list[dict[str, Any]]:
        return next((r["signal"] for r in (*self.early.values(), *self.late.values()) if r.get("signal")), [])


@dataclass
class Block:
    """All recipes at one seed; their spaces are extended together."""

    units: list[Unit]
    rounds: int = 0

    @property
    def done(self) -> bool:
        return all(u.stage == "done" for u in self.units)

    def advance(self) -> bool:
        """When all units are done and one lies at an end that can be extended, give every one a further trial."""
        if not self.done or self.rounds >= EXTENSIONS:
            return False
        if not any(extendable(u.ends, u.recipe.spaces) for u in self.units):
            return False
        self.rounds += 1
        for u in self.units:
            u.extend()
        return not self.done


@dataclass
class Plan:
    """The whole comparison: which runs are wanted next, told one finished run after the other.

    decide: for comparisons that go on until decided, called at every look with the blocks so far; it gives the places of
    the recipes that still need seeds (the baseline always comes along), none to stop.
    """

    design: Design
    most: int | None = None
    decide: "Callable[[list[Block]], list[int]] | None" = None
    blocks: list[Block] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    looked: int = 0

    def __post_init__(self) -> None:
        self._waiting: dict[str, list[tuple[Block, Unit]]] = {}
        self._left: dict[int, int] = {}
        self._fresh: list[RunSpec] = []
        self.known: dict[str, RunSpec] = {}
        self.stops = looks(len(self.design.seeds), self.most) if self.most else (len(self.design.seeds),)
        self.repeats: list[RunSpec] = []  # a short run carried out twice, to see whether the task gives the same again
        self._open(self.design.seeds, range(len(self.design.recipes)))

    def _open(self, seeds: Iterable[int], arms: Iterable[int]) -> None:
        arms = list(arms)
        for seed in seeds:
            block = Block([Unit(self.design, a, seed) for a in arms])
            self.blocks.append(block)
            for u in block.units:
                self._want(block, u)
        if not self.repeats:
            first, steps = self.blocks[0].units[0].specs()[0], min(REPEATED, self.design.steps)
            short = replace(first, steps=steps, stop=steps, signal=False)
            self.repeats = [replace(short, again=1), replace(short, again=2)]
            for spec in self.repeats:
                self._add(spec)

    def _add(self, spec: RunSpec) -> None:
        if spec.key not in self.known:
            self.known[spec.key] = spec
            self._fresh.append(spec)

    def _want(self, block: Block, unit: Unit) -> None:
        """Wait for the unit's unfinished runs; go on at once where there are none."""
        while True:
            missing = [s for s in unit.specs() if s.key not in self.results]
            for s in missing:
                self._add(s)
                self._waiting.setdefault(s.key, []).append((block, unit))
            self._left[id(unit)] = len(missing)
            if missing or not unit.advance(self.results):
                break
        if block.done and block.advance():
            for u in block.units:
                if u.stage != "done":
                    self._want(block, u)

    def fresh(self) -> list[RunSpec]:
        """Runs that have become wanted since the last call."""
        found, self._fresh = self._fresh, []
        return found

    def tell(self, key: str, result: Result) -> None:
        """A run is finished."""
        if key in self.results:
            return
        self.results[key] = result
        for block, unit in self._waiting.pop(key, ()):
            self._left[id(unit)] -= 1
            if self._left[id(unit)] == 0 and unit.stage != "done":
                self._want(block, unit)
        self._look()

    def _look(self) -> None:
        """At a look, all units being done: add seeds for the recipes that are not decided."""
        while (
            self.decide
            and len(self.results) == len(self.known)
            and self.looked < len(self.stops) - 1
            and len(self.blocks) == self.stops[self.looked]
        ):
            if not all(b.done for b in self.blocks):
                return
            open_ = self.decide(self.blocks)
            self.looked += 1
            if not open_:
                self.looked = len(self.stops)
                return
            start = self.design.seeds.start
            new = range(start + self.stops[self.looked - 1], start + self.stops[self.looked])
            self._open(new, sorted({0, *open_}))

    @property
    def done(self) -> bool:
        return len(self.results) == len(self.known) and not self._fresh and all(b.done for b in self.blocks)

    @property
    def repeatable(self) -> bool | None:
        """Whether the run that was carried out twice gave the same; None where either failed or is not known."""
        one, two = (self.results.get(spec.key, {"status": "missing"}) for spec in self.repeats)
        if one["status"] != "ok" or two["status"] != "ok":
            return None
        return all(_same(one[k], two[k]) for k in ("valid", "valid_loss", "train_loss"))

    @property
    def expected(self) -> int:
        """Runs in all as far as can be seen: those known, and those that units still at their first cut will add."""
        coming = 0
        for b in self.blocks:
            coming += sum(u.keep for u in b.units if u.stage == "rung")
        return len(self.known) + coming

    def of(self, arm: int) -> Iterator[Unit]:
        """The units of one recipe, in the order of the seeds."""
        for b in self.blocks:
            yield from (u for u in b.units if u.arm == arm)


def _same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
