"""compare: each unit tuned for itself, repeated over shared seeds, and an honest word on which differences are real."""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pondera._losses import check_fit, given_scores
from pondera._versions import versions
from pondera.errors import BadInput
from pondera.lab.data import head, some
from pondera.lab.execute import Executor, executor, visible_gpus, warm
from pondera.lab.loggers import Log, Logger, logger
from pondera.lab.loop import Diverged, by_the_user
from pondera.lab.plan import TRIALS, Block, Design, Plan, Unit
from pondera.lab.recipe import Recipe, as_recipe
from pondera.lab.results import Comparison, Row, Size
from pondera.lab.space import grid, points
from pondera.lab.stats import LEVEL, NONE, STEPS_SHARE, Difference, difference, family, ladder_step, nominal_level
from pondera.lab.store import Store
from pondera.lab.task import Task, _one_line, load_task
from pondera.lab.train import prepare, run, stream

MOST = 1_000_000  # seeds
SAID = 30.0  # seconds between lines of progress where there is no terminal

Say = Callable[[int, int, str], None]


class Stopped(KeyboardInterrupt):
    """A comparison stopped by hand: how many of its runs are finished and kept, of how many known."""

    def __init__(self, kept: int, known: int):
        super().__init__(f"stopped: {kept} of {known} runs are finished and kept; the same command goes on from there")


def compare(
    task: str | Path | ModuleType | Task,
    recipes: Sequence[Recipe | str | dict[str, Any]],
    *,
    seeds: int = 5,
    first_seed: int = 0,
    budget: int | None = None,
    rates: Sequence[float] | None = None,
    trials: int | None = None,
    until_decided: bool = False,
    max_seeds: int = 30,
    workers: int | None = None,
    store: str | Path = "pondera.db",
    fresh: bool = False,
    ray: str | None = None,
    device: str = "cpu",
    threads: int = 1,
    run_timeout: float | None = None,
    progress: bool | Say = True,
    log: Log | None = None,
) -> Comparison:
    """Compare recipes on a task, fairly: equal steps, equal trials, everything drawn anew for every seed, the tuning too.

    A unit is a recipe at a seed, tuned for itself: all points of its grid (and of whatever else the recipe searches) run
    for a quarter of the steps, the best third by validation to the end, and the one that validates best there gives
    the unit's test score. Seeds are shared: recipes see the same split and order of the data. Differences to the first
    recipe are paired over units; their verdicts are wrong in at most 5% of tables, whatever the number of seeds.
    With one rate and nothing searched, every unit is one run on all training data: a verdict at this rate.

    Args:
        task: a built-in task's name, the path of a task file, or an imported module.
        recipes: the choices; the first is the baseline. When it is not "" (the task as built), give "" first to have it.
        seeds: units of each recipe, at least 1 (intervals need 2, and mean something from 5).
        first_seed: where the seeds begin; another one repeats the whole comparison, tuning included, on new draws.
        budget: optimisation steps of one run; None takes the task's.
        rates: the grid of learning rates; None takes the task's. Extended by itself where the best lies at an end.
        trials: points a unit tries, the same for every recipe whatever it searches; None takes one a rate (9 where there
            is one rate and a recipe searches something).
        until_decided: add seeds (to 8, 12, 18, ...) for the recipes without a verdict, up to `max_seeds`; the chance
            of a false call stays 5% over all looks.
        workers: local processes; None takes one a core, or one a visible card with ``device="cuda"``. 1 runs in this process.
        store: file of finished runs, or a database URL; ``"sqlite://"`` keeps nothing. fresh: repeat what it holds.
        ray: address of a running Ray cluster ("auto" for the one started here) instead of local processes.
        device: where the models live. threads: torch threads of one run (results may differ in the last digit).
        run_timeout: seconds after which a run is stopped and counts as lost.
        progress: show bars, or lines where there is no terminal; or a function called with (done, known so far, words).
        log: where every run that is carried out is also logged (`pondera.lab.loggers`): "mlflow", "tensorboard:FOLDER",
            or a function called with (facts of the run, its result).
    Returns: a Comparison. A unit of which no trial finishes is marked failed; a diverged rate is a trial that lost.
    Raises: BadInput: for anything that could not work, before a run is started. Stopped: on Ctrl-C; what is finished is
        kept.

    >>> c = compare("digits", ["", "optim=SGD"], seeds=2, budget=20, rates=[0.01], store="sqlite://", workers=1, progress=False)
    >>> [r.name for r in c.rows]
    ['as built', 'optim=SGD']
    """
    began = time.perf_counter()
    task = load_task(task)
    chosen = [as_recipe(r) for r in recipes]
    given = [str(r) if not isinstance(r, str) else r for r in recipes]
    design = _design(task, chosen, range(first_seed, first_seed + seeds), budget, rates, trials, device, threads)
    gpus = len(visible_gpus(device))
    workers = (gpus or os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise BadInput(f"workers must be at least 1, got {workers}")
    if run_timeout is not None and not run_timeout > 0:
        raise BadInput(f"run_timeout must be above 0 seconds, got {run_timeout}")
    if until_decided and (seeds < 2 or max_seeds < seeds):
        raise BadInput(
            f"until_decided needs at least 2 seeds to begin with and max_seeds no fewer, got {seeds} and {max_seeds}"
        )
    if ray is None and (workers > 1 or run_timeout is not None):
        warm(task.source)  # the workers' imports go on beside what follows
    _preflight(task, design)
    hash_, depends = task.depends()
    design = replace(design, depends=hash_)
    plan = Plan(design, max_seeds if until_decided else None)
    if until_decided:
        plan.decide = lambda blocks: _undecided(blocks, plan)
    logged = logger(log, task.name)
    kept = Store(store, fresh=fresh)
    hands = _Hands(lambda: executor(workers, ray=ray, threads=threads, device=device, timeout=run_timeout))
    say = _reporter(progress, task, plan)
    new = 0
    try:
        new = _carry_out(plan, kept, hands, say, -(-workers // gpus) if gpus and ray is None else 1, logged)
    except KeyboardInterrupt:
        raise Stopped(len(plan.results), plan.expected) from None
    finally:
        say(1, 1, "done")
        hands.close()
        kept.release()
        kept.close()
    rows = _rows(plan, given)
    return Comparison(
        task, rows, len(plan.blocks), design.steps, design.rates, len(plan.results), len(plan.results) - new,
        time.perf_counter() - began, versions(), design.trials, depends, plan.repeatable,
        plan.stops if until_decided else (), design.tuned,
    )  # fmt: skip


# -- carrying it out ------------------------------------------------------------------------------------------------


class _Hands:
    """An executor that begins with the first run: a table that is found in the store starts no process."""

    def __init__(self, begin: Callable[[], Executor]):
        self._begin = begin
        self._held: Executor | None = None

    @property
    def held(self) -> Executor:
        if self._held is None:
            self._held = self._begin()
        return self._held

    def close(self) -> None:
        if self._held is not None:
            self._held.close()


def _carry_out(plan: Plan, kept: Store, hands: _Hands, say: Say, share: int = 1, logged: Logger | None = None) -> int:
    """Run what is missing until the plan is complete; how many runs were carried out here.

    share: runs that share a card; where there are several, one goes alone first, and what it took is looked at.
    """
    waiting: dict[str, Any] = {}  # wanted, not started, in the order they came up
    elsewhere: dict[str, Any] = {}  # claimed by others
    flying: set[str] = set()
    new, asked = 0, 0.0
    while True:
        fresh = plan.fresh()
        if fresh:
            found = kept.results([s.key for s in fresh])  # finished earlier, or by a comparison that shares the store
            waiting |= {s.key: s for s in fresh if s.key not in found}
            for key, result in found.items():
                plan.tell(key, result)
            continue
        if plan.done:
            return new
        while waiting and hands.held.free and not (share > 1 and new == 0 and flying):
            key, spec = next(iter(waiting.items()))
            del waiting[key]
            if kept.claim(spec):
                flying.add(key)
                hands.held.submit(spec)
            else:
                elsewhere[key] = spec
        say(len(plan.results), plan.expected, _words(plan))
        if flying:
            for spec, result in hands.held.wait(0.5):
                kept.finish(spec, result)
                if logged is not None:
                    logged(spec.facts(), result)
                flying.discard(spec.key)
                plan.tell(spec.key, result)
                new += 1
                if new == 1 and share > 1:
                    _check_room(result, share)
        elif elsewhere:
            time.sleep(0.2)  # everything left is in other hands
        if elsewhere and time.monotonic() - asked > 0.5:
            asked = time.monotonic()
            found = kept.results(elsewhere)
            for key, result in found.items():
                del elsewhere[key]
                plan.tell(key, result)
            waiting |= elsewhere  # whoever had them may be gone: they are claimed again when there is room
            elsewhere = {}


def _check_room(result: dict[str, Any], share: int) -> None:
    """BadInput where so many runs as the first do not fit on one card."""
    took = result.get("peak_memory")
    if not took:
        return
    room = torch.cuda.get_device_properties(0).total_memory
    if took * share > 0.95 * room:
        raise BadInput(
            f"{share} runs do not fit on one GPU: the first took {took / 2**30:.1f} GiB of its {room / 2**30:.1f}; give at most "
            f"{max(1, int(0.95 * room // took))} workers a card (what is finished is kept)"
        )


def _words(plan: Plan) -> str:
    open_ = next((u for b in plan.blocks for u in b.units if u.stage != "done"), None)
    if open_ is None:
        return "finishing"
    doing = {"rung": "first cut", "whole": "to the end"}[open_.stage] if plan.design.tuned else "training"
    return f"seed {open_.seed}, {open_.recipe.name}: {doing}"


def _reporter(progress: bool | Say, task: Task, plan: Plan) -> Say:
    if callable(progress):
        return progress
    if not progress:
        return lambda done, known, words: None
    if not sys.stderr.isatty():
        return _lines(task)
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.fields[title]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[words]}"), transient=False, refresh_per_second=4,
        console=Console(stderr=True),
    )  # fmt: skip
    one = bars.add_task("", total=plan.expected, title=f"compare {task.name}", words="")
    bars.start()

    def say(done: int, known: int, words: str) -> None:
        if words == "done":
            bars.stop()
        else:
            bars.update(one, completed=done, total=known, words=words)

    return say


def _lines(task: Task) -> Say:
    """A line on standard error every half minute, for logs."""
    began = last = time.monotonic()
    at_first: int | None = None

    def say(done: int, known: int, words: str) -> None:
        nonlocal last, at_first
        at_first = done if at_first is None else at_first
        now = time.monotonic()
        if words == "done" or now - last < SAID:
            return
        last = now
        speed = (done - at_first) / (now - began)
        left = f", about {(known - done) / speed / 60:.0f} min left" if speed > 0 else ""
        print(f"compare {task.name}: {done} of {known} runs{left} ({words})", file=sys.stderr, flush=True)

    return say


# -- before anything runs: refuse what cannot work, and say what it would cost -----------------------------------------


def _design(
    task: Task,
    recipes: list[Recipe],
    seeds: range,
    budget: int | None,
    rates: Sequence[float] | None,
    trials: int | None,
    device: str,
    threads: int,
) -> Design:
    if not recipes:
        raise BadInput("compare needs at least one recipe, got none")
    if not seeds:
        raise BadInput(f"seeds must be at least 1, got {seeds.stop - seeds.start}")
    if not 0 <= seeds.start <= seeds.stop < MOST:
        raise BadInput(f"seeds must lie between 0 and {MOST}, got {seeds.start} to {seeds.stop}")
    steps = task.settings.steps if budget is None else budget
    if steps < 1:
        raise BadInput(f"budget is optimisation steps a run, at least 1, got {budget}")
    if threads < 1:
        raise BadInput(f"threads must be at least 1, got {threads}")
    given = tuple(sorted({float(r) for r in (task.settings.rates if rates is None else rates)}))
    if not given or not all(math.isfinite(r) and r > 0 for r in given):
        raise BadInput(f"rates must be positive learning rates, at least one, got {list(given)}")
    if trials is not None and trials < 1:
        raise BadInput(f"trials are points a unit tries, at least 1, got {trials}")
    count = trials or (len(given) if len(given) > 1 else TRIALS if any(r.spaces for r in recipes) else 1)
    along = grid(given, count)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"the device {device!r} cannot be used here: {_one_line(error)}") from None
    seen: dict[str, str] = {}
    for r in recipes:
        if str(r) in seen:
            raise BadInput(f"the recipe {str(r) or 'as built'!r} is given twice; a second one would be the same runs")
        if r.name in seen.values():
            raise BadInput(f"two recipes are called {r.name!r}; give one another label")
        seen[str(r)] = r.name
    return Design(task, tuple(recipes), seeds, steps, along, count, device, threads)


def _preflight(task: Task, design: Design) -> None:
    """One step of each recipe on one batch: what cannot work is refused now, in one sentence, before anything runs."""
    train, test = task.split("final")
    fit, held = task.split("tune", MOST) if design.tuned else (train, None)
    few = _few(train, task.settings.batch)
    for given in design.recipes:
        point = points(design.rates, design.trials, given.spaces, 0)[0]
        recipe = given.at(point)
        who = f"the recipe {given.name!r}" if str(given) else f"the task {task.name}"
        state = torch.get_rng_state()
        try:
            model = prepare(task, recipe, MOST, fit)
            recipe.penalty_of(model)
            if task.own_loop:
                parts = {"test": test} | ({} if held is None else {"valid": held})
                by_the_user(
                    task, recipe, model, fit, parts, rate=point.rate, steps=1, seed=MOST, data_seed=0, device="cpu"
                )
            else:
                _first_step(task, recipe, model, few, test, point.rate)
        except BadInput as error:
            raise BadInput(f"{who} does not fit: {error}" if str(given) else str(error)) from error
        except (MemoryError, torch.OutOfMemoryError, Diverged):
            continue  # too big here, or wild at its first step, is a result, marked by its runs
        except Exception as error:
            where = "in its training loop" if task.own_loop else "on its first batch"
            raise BadInput(f"{who} raised {type(error).__name__} {where}: {_one_line(error)}") from error
        finally:
            torch.set_rng_state(state)


def _few(train: Any, size: int) -> Any:
    """A first batch; of tensors with one target an example with the largest and smallest, so that no class is overlooked."""
    if isinstance(train, tuple) and len(train) == 2 and train[1].ndim == 1:
        order = train[1].argsort()
        pick = torch.cat([order[:1], order[-1:], torch.arange(len(order))[: max(0, size - 2)]])
        return tuple(t[pick] for t in train)
    return some(train, size)


def _first_step(task: Task, recipe: Recipe, model: Any, few: Any, test: Any, rate: float) -> None:
    if not hasattr(task.module, "loss") and isinstance(few, tuple) and len(few) == 2:
        check_fit(given_scores(model(few[0])), few[1])
    loss = task.loss(model, few)
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise BadInput(f"the loss of the task {task.name} must be a scalar tensor, got {got}")
    optimizers = recipe.optimizers(model, rate, task.settings.optim)
    for o in optimizers:
        if isinstance(o, torch.optim.LBFGS):
            raise BadInput(
                "optim=LBFGS evaluates the loss several times a step, which equal steps do not allow; choose another"
            )
    loss.backward()
    model.eval()
    float(task.score(model, head(test, task.settings.batch)))
    for o in optimizers:
        if type(o).__module__.startswith("torch."):  # SparseAdam wants sparse gradients; one's own may do anything
            o.step()


@dataclass(frozen=True)
class Cost:
    """What a comparison would take: runs and their hours, least and most (spaces extended, seeds added), a recipe."""

    recipe: str
    short: int
    whole: int
    most: int
    step_seconds: float
    start_seconds: float
    hours: float
    most_hours: float


def plan_of(
    task: str | Path | ModuleType | Task,
    recipes: Sequence[Recipe | str | dict[str, Any]],
    *,
    seeds: int = 5,
    budget: int | None = None,
    rates: Sequence[float] | None = None,
    trials: int | None = None,
    until_decided: bool = False,
    max_seeds: int = 30,
    device: str = "cpu",
    threads: int = 1,
) -> tuple[Design, list[Cost]]:
    """What `compare` with the same arguments would run, one row a recipe; nothing is started but a few timed steps.

    Returns: the design (trials, rates, steps) and the costs, hours on one process as it is now.
    Raises: BadInput: as `compare`.

    >>> design, costs = plan_of("digits", ["", "optim=SGD"], seeds=5)
    >>> costs[0].short, costs[0].whole, costs[0].most
    (45, 15, 70)
    """
    task = load_task(task)
    design = _design(task, [as_recipe(r) for r in recipes], range(seeds), budget, rates, trials, device, threads)
    _preflight(task, design)
    costs = []
    for arm, recipe in enumerate(design.recipes):
        short, whole = design.cost(arm)
        first = points(design.rates, design.trials, recipe.spaces, stream(0, "space"))[0]
        steps = min(design.steps, 8)
        timed = run(replace(design.spec(recipe, first, 0, "rung"), steps=steps, stop=steps))
        step, start = (timed.get(k, math.nan) for k in ("step_seconds", "start_seconds"))
        scoring = max(0.0, timed["wall"] - start - steps * step) if timed["status"] == "ok" else 0.0
        one = short * (start + design.rung * step + scoring)
        whole_seconds = start + design.steps * step + scoring * (1 + task.settings.evaluations)
        count = max_seeds if until_decided else seeds
        further = 2 if design.tuned else 0
        costs.append(
            Cost(
                recipe.name, seeds * short, seeds * whole, count * (short + whole + further), step, start,
                seeds * (one + whole * whole_seconds) / 3600, count * (one + (whole + further) * whole_seconds) / 3600,
            )
        )  # fmt: skip
    return design, costs


# -- after: rows -------------------------------------------------------------------------------------------------------


def _rows(plan: Plan, given: Sequence[str]) -> list[Row]:
    design, task = plan.design, plan.design.task
    resolution = _resolution(plan)
    rows = []
    for arm, text in enumerate(given):
        units = list(plan.of(arm))
        ends = [u.result for u in units]
        fine = [e for e in ends if e is not None]
        rows.append(
            Row(
                spec=text,
                name=design.recipes[arm].name,
                recipe=design.recipes[arm],
                scores=[e["score"] if e else math.nan for e in ends],
                failed={u.seed: u.why for u, e in zip(units, ends) if e is None},
                chosen=[u.point for u in units],
                edge=sum(bool(u.ends) and u.best is not None for u in units),
                difference=None,
                at_equal_time=None,
                step_seconds=_median([e["step_seconds"] for e in fine]),
                start_seconds=_median([e["start_seconds"] for e in fine]),
                parameters=fine[0]["parameters"] if fine else 0,
                trials=[u.history() for u in units],
                curves=[e["curve"] if e else _longest(u) for u, e in zip(units, ends)],
                signal=next((u.signal for u in units if u.signal), []),
                baseline=arm == 0,
                resolution=resolution,
                bounds=task.bounds,
                seeds=tuple(u.seed for u in units),
                peak_memory=_median([m for e in fine if (m := e.get("peak_memory")) is not None]),
                size=_size([c for e in fine if (c := e.get("cost"))]),
            )
        )
    return _judged(rows, plan)


def _size(costs: list[dict[str, float]]) -> Size | None:
    return Size(**{k: _median([c[k] for c in costs]) for k in costs[0]}) if costs else None


def _judged(rows: list[Row], plan: Plan) -> list[Row]:
    """The rows with their differences: two families, at equal steps and at equal time."""
    base, others = rows[0], rows[1:]
    pairs = [[_pairs(r, base) for r in others], [_timed(r, base) for r in others]]
    shares = (STEPS_SHARE * LEVEL, (1 - STEPS_SHARE) * LEVEL)
    more: dict[str, Any] = {"resolution": base.resolution, "bounds": base.bounds}
    found: list[list[Difference | None]] = []
    for these, share in zip(pairs, shares):
        if plan.decide is None:
            found.append(family(these, level=share, **more))
        else:  # recipes are looked at one by one, at as many looks: the level of each is shared out (Bonferroni)
            each = nominal_level(share / max(1, len(others)), plan.stops)
            found.append([p and difference(*p, level=each, **more) for p in these])
    goal = base.score[0]
    judged = [replace(r, difference=d, at_equal_time=t) for r, d, t in zip(others, *found)]
    return [replace(r, target=_reached(r, goal)) for r in (base, *judged)]


def _undecided(blocks: list[Block], plan: Plan) -> list[int]:
    """The recipes without a verdict over the units so far."""
    others = len(plan.design.recipes) - 1
    if not others:
        return []
    each = nominal_level(STEPS_SHARE * LEVEL / others, plan.stops)
    resolution = _resolution(plan)

    def scores(arm: int) -> dict[int, float]:
        units = [u for b in blocks for u in b.units if u.arm == arm]
        return {u.seed: u.result["score"] for u in units if u.result is not None}

    base, left = scores(0), []
    for arm in range(1, others + 1):
        mine = scores(arm)
        shared = [s for s in base if s in mine]
        active = any(u.arm == arm for u in blocks[-1].units)
        if not active:  # decided at an earlier look
            continue
        if len(shared) < 2:
            left.append(arm)
            continue
        d = difference([mine[s] for s in shared], [base[s] for s in shared], level=each, resolution=resolution)
        if d.verdict == NONE:
            left.append(arm)
    return left


Pair = tuple[list[float], list[float]]


def _pairs(row: Row, base: Row) -> Pair | None:
    """Scores of the units where both finished; units are in the order of the seeds, and a recipe may have fewer."""
    both = [i for i, (a, b) in enumerate(zip(row.scores, base.scores)) if math.isfinite(a) and math.isfinite(b)]
    return ([row.scores[i] for i in both], [base.scores[i] for i in both]) if len(both) > 1 else None


def _timed(row: Row, base: Row) -> Pair | None:
    """The same at equal seconds: both read where the first of the two would be done."""
    both = [i for i, (a, b) in enumerate(zip(row.scores, base.scores)) if math.isfinite(a) and math.isfinite(b)]
    if len(both) < 2:
        return None
    found: list[list[float]] = []
    for i in both:
        end = min(r.start_seconds + r.curves[i][-1][1] for r in (row, base))
        found.append([_score_at(r, i, end) for r in (row, base)])
    return [a for a, _ in found], [b for _, b in found]


def _score_at(row: Row, unit: int, seconds: float) -> float:
    """Score of a run `seconds` after its start was begun, between the points of its curve."""
    import numpy as np

    curve = row.curves[unit]
    return float(np.interp(seconds, [row.start_seconds + c[1] for c in curve], [c[2] for c in curve]))


def _reached(row: Row, goal: float) -> tuple[float, float] | None:
    """Median (steps, seconds) at which the units first reached a score, where at least half of them did."""
    found = []
    for curve, score in zip(row.curves, row.scores):
        if math.isfinite(score):
            at = next((c for c in curve if c[2] >= goal), None)
            found.append((math.inf, math.inf) if at is None else (at[0], row.start_seconds + at[1]))
    steps, seconds = (_median([f[i] for f in found]) for i in (0, 1))
    return (steps, seconds) if math.isfinite(steps) and math.isfinite(seconds) else None


def _resolution(plan: Plan) -> float:
    """The smallest step of the score: as the task says, or as the scores tell.

    Scores of which at most half are distinct are steps on a ladder, and their least distance is its step; else 0.
    """
    known = plan.design.task.resolution
    if known is not None:
        return known
    return ladder_step(c[2] for r in plan.results.values() for c in r.get("curve", []))


def _longest(unit: Unit) -> list[list[float]]:
    """The curve of the failed run that got furthest."""
    found = [r.get("curve", []) for r in (*unit.early.values(), *unit.late.values())]
    return max(found, key=len, default=[])


def _median(x: Sequence[float]) -> float:
    return sorted(x)[len(x) // 2] if x else math.nan
