"""compare: each recipe tuned alike, repeated over shared seeds, and an honest word on which differences are real."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pondera.errors import BadInput
from pondera.lab.execute import Executor, executor
from pondera.lab.recipe import Recipe, as_recipe
from pondera.lab.stats import Difference, difference, interval
from pondera.lab.store import LEASE, Store
from pondera.lab.task import Task, _one_line, check_fit, load_task
from pondera.lab.train import RunSpec, prepare

RUNG = 0.25  # share of the steps after which hopeless rates are dropped
KEEP = 1 / 3  # share of the rates that go on
TUNE_SEED = 1_000_000  # seeds of tuning runs start here, so that final seeds are fresh
TUNE_SEEDS = 2


@dataclass(frozen=True)
class Row:
    """What came of one recipe.

    spec: the recipe as given. name: in tables. rate: the tuned learning rate (nan when none finished). edge: the best
    rate lies at the end of the grid. scores: test score a seed, nan where the run failed. failed: seed -> reason.
    difference: to the baseline over the seeds where both finished (None for the baseline itself or fewer than two).
    at_equal_time: the same difference with both stopped at the baseline's seconds, or the recipe's if fewer.
    tuning: (rate, validation score after a quarter, at the end) with nan where it failed or was dropped.
    curves: a seed, a list of (step, seconds, score, train loss).
    """

    spec: str
    name: str
    recipe: Recipe
    rate: float
    edge: bool
    scores: list[float]
    failed: dict[int, str]
    difference: Difference | None
    at_equal_time: Difference | None
    step_seconds: float
    start_seconds: float
    parameters: int
    tuning: list[tuple[float, float, float]]
    curves: list[list[list[float]]]
    signal: list[dict[str, Any]]
    baseline: bool = False

    @property
    def finished(self) -> list[float]:
        return [s for s in self.scores if math.isfinite(s)]

    @property
    def score(self) -> tuple[float, float, float]:
        """Mean test score over the finished seeds with its 95% interval."""
        return interval(self.finished) if self.finished else (math.nan, math.nan, math.nan)

    @property
    def verdict(self) -> str:
        """One of "baseline", "better", "worse", "no difference shown", or "failed in k of n runs"."""
        if self.failed:
            return f"failed in {len(self.failed)} of {len(self.scores)} runs"
        if self.baseline:
            return "baseline"
        return self.difference.verdict if self.difference else "too few seeds to say"


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: rows in the order given, the baseline first."""

    task: Task
    rows: list[Row]
    seeds: int
    steps: int
    rates: tuple[float, ...]
    runs: int
    repeated: int
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every recipe finished all its seeds."""
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
            row |= {"verdict": r.verdict, "scores": r.scores, "failed": r.failed}
            if timing:
                row |= {"step_seconds": r.step_seconds, "start_seconds": r.start_seconds}
                e = r.at_equal_time
                row |= {"equal_time_difference": e.mean if e else None, "equal_time_verdict": e.verdict if e else None}
            rows.append(row)
        return rows

    def report(self, path: str | Path) -> Path:
        """Write the report, one HTML file that opens offline; atomically."""
        from pondera.lab.report import write

        return write(self, path)


def compare(
    task: str | Path | ModuleType | Task,
    recipes: Sequence[Recipe | str | dict[str, Any]],
    *,
    seeds: int = 5,
    first_seed: int = 0,
    budget: int | None = None,
    rates: Sequence[float] | None = None,
    workers: int | None = None,
    store: str | Path = "pondera.db",
    ray: str | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: bool | Callable[[int, int, str], None] = True,
) -> Comparison:
    """Compare recipes on a task, fairly: equal budget, equal tuning, shared fresh seeds, paired intervals.

    Every recipe's learning rate is tuned on the same grid: all rates run for a quarter of the steps on two tuning seeds,
    the best third goes on to the end, and the best mean validation score wins. Then fresh seeds, the same for all
    recipes, train on all training data and are scored on test. Differences to the first recipe are paired over seeds,
    their intervals hold at 95% over all recipes at once (Bonferroni).

    Args:
        task: a built-in task's name, the path of a task file, or an imported module.
        recipes: the choices; the first is the baseline. When it is not "" (the task as built), give "" first to have it.
        seeds: fresh repeats of each recipe, at least 1 (intervals need 2, and mean something from 5).
        first_seed: where the seeds begin; another one repeats the whole comparison, tuning included, on new draws.
        budget: optimisation steps of one run; None takes the task's.
        rates: the grid of learning rates; None takes the task's.
        workers: local processes; None takes one a core. 1 runs in this process.
        store: file of finished runs, or a database URL; ``"sqlite://"`` keeps nothing.
        ray: address of a running Ray cluster ("auto" for the one started here) instead of local processes.
        device: where the models live. threads: torch threads of one run (results may differ in the last digit).
        progress: show bars; or a function called with (done, known so far, words).
    Returns: a Comparison. A run that diverges, raises or dies is a row marked so.
    Raises: BadInput: for anything that could not work, before a run is started.

    >>> c = compare("digits", ["", "optim=SGD"], seeds=2, budget=20, rates=[0.01], store="sqlite://", workers=1, progress=False)
    >>> [r.name for r in c.rows]
    ['as built', 'optim=SGD']
    """
    began = time.perf_counter()
    task = load_task(task)
    chosen = [as_recipe(r) for r in recipes]
    given = [str(r) if not isinstance(r, str) else r for r in recipes]
    plans = _checked_plans(task, chosen, range(first_seed, first_seed + seeds), budget, rates, device, threads)
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise BadInput(f"workers must be at least 1, got {workers}")
    _preflight(task, plans)
    kept = Store(store)
    hands: Executor | None = None
    try:
        hands = executor(workers, ray=ray, threads=threads, device=device)
        results, fresh = _carry_out(plans, kept, hands, _reporter(progress, task, plans))
    finally:
        if hands is not None:
            hands.close()
        kept.release()
        kept.close()
    rows = _rows(plans, given, results)
    from pondera.replications._claims import versions

    p = plans[0]
    done = len({s.key for q in plans for s in q.specs(results)})
    return Comparison(task, rows, seeds, p.steps, p.rates, done, done - fresh, time.perf_counter() - began, versions())


# -- the plan: a pure function of what is finished, so that any order of work and any restart lead to the same table --


@dataclass(frozen=True)
class Plan:
    """The runs one recipe needs, given the results so far."""

    task: Task
    recipe: Recipe
    seeds: range
    steps: int
    rates: tuple[float, ...]
    device: str
    threads: int

    def spec(self, rate: float, seed: int, stop: int, phase: str, signal: bool = False) -> RunSpec:
        t = self.task
        return RunSpec(
            t.name, t.path, t.source, self.recipe, rate, seed, self.steps, stop, phase, self.threads, self.device, signal
        )  # fmt: skip

    @property
    def rung(self) -> int:
        return max(1, math.ceil(RUNG * self.steps))

    def trials(self, rates: Sequence[float], stop: int) -> list[RunSpec]:
        return [
            self.spec(r, TUNE_SEED + TUNE_SEEDS * self.seeds.start + s, stop, "tune")
            for r in rates
            for s in range(TUNE_SEEDS)
        ]

    def finals(self, rate: float) -> list[RunSpec]:
        return [self.spec(rate, s, self.steps, "final", signal=s == self.seeds.start) for s in self.seeds]

    def stages(self, results: dict[str, dict[str, Any]]) -> tuple[list[list[RunSpec]], "Tuning | None"]:
        """The stages known so far, each waiting for the one before; and the tuning once its first rung is finished."""
        if len(self.rates) == 1:
            return [self.finals(self.rates[0])], Tuning(self.rates, [], [], self.rates[0])
        first = self.trials(self.rates, self.rung)
        if not all(s.key in results for s in first):
            return [first], None
        early = [_mean_score([results[s.key] for s in self.trials([r], self.rung)]) for r in self.rates]
        alive = halving(self.rates, early)
        second = self.trials(alive, self.steps)
        if not all(s.key in results for s in second):
            return [first, second], None
        late = [
            _mean_score([results[s.key] for s in self.trials([r], self.steps)]) if r in alive else None
            for r in self.rates
        ]
        finished = {r: v for r, v in zip(self.rates, late) if v}
        best = max(finished, key=lambda r: finished[r], default=None)
        tuning = Tuning(self.rates, early, late, best)
        return [first, second] + ([self.finals(best)] if best is not None else []), tuning

    def missing(self, results: dict[str, dict[str, Any]]) -> list[RunSpec]:
        return [s for s in self.stages(results)[0][-1] if s.key not in results]

    def specs(self, results: dict[str, dict[str, Any]]) -> list[RunSpec]:
        return [s for stage in self.stages(results)[0] for s in stage]

    @property
    def expected(self) -> int:
        """Runs in all when nothing fails."""
        if len(self.rates) == 1:
            return len(self.seeds)
        return TUNE_SEEDS * (len(self.rates) + _kept(len(self.rates))) + len(self.seeds)


Value = tuple[float, float]  # mean validation score, then minus the training loss to break ties


@dataclass(frozen=True)
class Tuning:
    rates: tuple[float, ...]
    early: "list[Value | None]"
    late: "list[Value | None]"
    best: float | None


def halving(rates: Sequence[float], values: "Sequence[Value | None]") -> list[float]:
    """The rates that go on after the first rung: an Optuna study over the grid, pruned once all have reported.

    Synchronous on purpose: an asynchronous pruner's choice would depend on which run finished first, and the same
    command would give another table on another number of workers.

    >>> halving([0.1, 0.2, 0.3], [(0.5, 0.0), (0.9, 0.0), None])
    [0.2]
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    order = sorted((v for v in values if v is not None), reverse=True)[: _kept(len(rates))]

    class Pruner(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.user_attrs["value"] not in order

    study = optuna.create_study(
        direction="maximize", pruner=Pruner(), sampler=optuna.samplers.GridSampler({"lr": list(rates)}, seed=0)
    )
    alive = []
    for rate, value in zip(rates, values):
        study.enqueue_trial({"lr": rate})
        trial = study.ask({"lr": optuna.distributions.FloatDistribution(min(rates), max(rates))})
        trial.set_user_attr("value", value)
        if value is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        trial.report(value[0], step=1)
        if trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, value[0])
            alive.append(rate)
    return alive


def _kept(n: int) -> int:
    return max(1, math.ceil(KEEP * n))


def _mean_score(results: Sequence[dict[str, Any]]) -> Value | None:
    """Mean over tuning seeds, or None when a run failed."""
    if any(r["status"] != "ok" for r in results):
        return None
    n = len(results)
    return math.fsum(r["score"] for r in results) / n, -math.fsum(r["train_loss"] for r in results) / n


# -- carrying it out ------------------------------------------------------------------------------------------------


def _carry_out(
    plans: Sequence[Plan], kept: Store, hands: Executor, say: Callable[[int, int, str], None]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Run what is missing until every plan is complete; results by key, and how many of them were run here."""
    results: dict[str, dict[str, Any]] = {}
    flying: set[str] = set()
    known: set[str] = set()
    fresh, beaten = 0, time.monotonic()
    while True:
        missing = {s.key: s for p in plans for s in p.missing(results)}
        new = [k for k in missing if k not in known]
        if new or not flying:
            results |= kept.results(missing)  # finished earlier, or by a comparison that shares the store
            known |= set(missing)
            missing = {s.key: s for p in plans for s in p.missing(results)}
            if any(k not in known for k in missing):
                continue
        if not missing:
            break
        others = False
        for key, spec in missing.items():
            if not hands.free:
                break
            if key not in flying:
                if kept.claim(spec):
                    flying.add(key)
                    hands.submit(spec)
                else:
                    others = True
        say(sum(len([s for s in p.specs(results) if s.key in results]) for p in plans),
            sum(p.expected for p in plans), _words(plans, results))  # fmt: skip
        if flying or not others:
            for spec, result in hands.wait(0.5):
                kept.finish(spec, result)
                results[spec.key] = result
                flying.discard(spec.key)
                fresh += 1
        else:
            time.sleep(0.2)  # everything left is in other hands
        if others:
            results |= kept.results(k for k in missing if k not in flying)
        if time.monotonic() - beaten > LEASE / 6:
            kept.beat()
            beaten = time.monotonic()
    say(1, 1, "done")
    return results, fresh


def _words(plans: Sequence[Plan], results: dict[str, dict[str, Any]]) -> str:
    for p in plans:
        stages, _ = p.stages(results)
        left = sum(s.key not in results for s in stages[-1])
        if left:
            doing = "fresh seeds" if stages[-1][0].phase == "final" else f"tuning, rung {len(stages)}"
            return f"{p.recipe.name}: {doing}, {left} runs left"
    return "finishing"


def _reporter(
    progress: bool | Callable[[int, int, str], None], task: Task, plans: Sequence[Plan]
) -> Callable[[int, int, str], None]:
    if callable(progress):
        return progress
    if not progress:
        return lambda done, known, words: None
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
    )  # fmt: skip
    one = bars.add_task("", total=sum(p.expected for p in plans), title=f"compare {task.name}", words="")
    bars.start()

    def say(done: int, known: int, words: str) -> None:
        if words == "done":
            bars.update(one, completed=bars.tasks[0].total, words=words)
            bars.stop()
        else:
            bars.update(one, completed=done, total=known, words=words)

    return say


# -- before: refuse what cannot work; after: rows ----------------------------------------------------------------------


def _checked_plans(
    task: Task,
    recipes: list[Recipe],
    seeds: range,
    budget: int | None,
    rates: Sequence[float] | None,
    device: str,
    threads: int,
) -> list[Plan]:
    if not recipes:
        raise BadInput("compare needs at least one recipe, got none")
    if not seeds:
        raise BadInput(f"seeds must be at least 1, got {seeds.stop - seeds.start}")
    if not 0 <= seeds.start <= seeds.stop < TUNE_SEED:
        raise BadInput(f"seeds must lie between 0 and {TUNE_SEED}, got {seeds.start} to {seeds.stop}")
    steps = task.settings.steps if budget is None else budget
    if steps < 1:
        raise BadInput(f"budget is optimisation steps a run, at least 1, got {budget}")
    if threads < 1:
        raise BadInput(f"threads must be at least 1, got {threads}")
    grid = tuple(float(r) for r in (task.settings.rates if rates is None else rates))
    if not grid or not all(math.isfinite(r) and r > 0 for r in grid):
        raise BadInput(f"rates must be positive learning rates, at least one, got {list(grid)}")
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
    return [Plan(task, r, seeds, steps, tuple(sorted(set(grid))), device, threads) for r in recipes]


def _preflight(task: Task, plans: Sequence[Plan]) -> None:
    """One step of each recipe on one batch: what cannot work is refused now, in one sentence, before anything runs."""
    train, test = task.split("final")
    few = tuple(t[: task.settings.batch] for t in train)
    if len(train) == 2 and train[1].ndim == 1:  # with the largest and smallest target, so that no class is overlooked
        order = train[1].argsort()
        pick = torch.cat([order[:1], order[-1:], torch.arange(len(order))[: max(0, task.settings.batch - 2)]])
        few = tuple(t[pick] for t in train)
    for p in plans:
        who = f"the recipe {p.recipe.name!r}" if str(p.recipe) else f"the task {task.name}"
        state = torch.get_rng_state()
        try:
            model = prepare(task, p.recipe, TUNE_SEED, train)
            if not hasattr(task.module, "loss"):
                check_fit(model(few[0]), few[1])
            loss = task.loss(model, few)
            if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise BadInput(f"the loss of the task {task.name} must be a scalar tensor, got {got}")
            p.recipe.penalty_of(model)
            p.recipe.optimizers(model, p.rates[0], task.settings.optim)
            loss.backward()
            model.eval()
            float(task.score(model, tuple(t[: task.settings.batch] for t in test)))
        except BadInput as error:
            raise BadInput(f"{who} does not fit: {error}" if str(p.recipe) else str(error)) from error
        except (MemoryError, torch.OutOfMemoryError):
            continue  # too big here is a result, marked by its runs
        except Exception as error:
            raise BadInput(f"{who} raised {type(error).__name__} on its first batch: {_one_line(error)}") from error
        finally:
            torch.set_rng_state(state)


def _rows(plans: Sequence[Plan], given: Sequence[str], results: dict[str, dict[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    base: Row | None = None
    for p, text in zip(plans, given):
        stages, tuning = p.stages(results)
        assert tuning is not None
        rate = tuning.best
        if rate is None:
            first = next(results[s.key] for s in stages[0] if results[s.key]["status"] != "ok")
            why = dict.fromkeys(p.seeds, f"no learning rate finished ({first['status']}: {first['reason']})")
            ends: list[dict[str, Any]] = [{"status": "none", "curve": []}] * len(p.seeds)
        else:
            ends = [results[s.key] for s in stages[-1]]
            why = {i: f"{e['status']}: {e['reason']}" for i, e in zip(p.seeds, ends) if e["status"] != "ok"}
        fine = [e for e in ends if e["status"] == "ok"]
        row = Row(
            spec=text,
            name=p.recipe.name,
            recipe=p.recipe,
            rate=math.nan if rate is None else rate,
            edge=rate is not None and len(p.rates) > 1 and rate in (p.rates[0], p.rates[-1]),
            scores=[e["score"] if e["status"] == "ok" else math.nan for e in ends],
            failed=why,
            difference=None,
            at_equal_time=None,
            step_seconds=_median([e["step_seconds"] for e in fine]),
            start_seconds=_median([e["start_seconds"] for e in fine]),
            parameters=fine[0]["parameters"] if fine else 0,
            tuning=[
                (r, a[0] if a else math.nan, b[0] if b else math.nan)
                for r, a, b in zip(tuning.rates, tuning.early or [None] * 99, tuning.late or [None] * 99)
            ],
            curves=[e.get("curve", []) for e in ends],
            signal=next((e["signal"] for e in ends if e.get("signal")), []),
            baseline=base is None,
        )
        if base is None:
            base = row
        else:
            row = _against(row, base, len(plans) - 1)
        rows.append(row)
    return rows


def _against(row: Row, base: Row, comparisons: int) -> Row:
    from dataclasses import replace

    both = [i for i, (a, b) in enumerate(zip(row.scores, base.scores)) if math.isfinite(a) and math.isfinite(b)]
    if len(both) < 2:
        return row
    plain = difference([row.scores[i] for i in both], [base.scores[i] for i in both], comparisons=comparisons)
    timed = []
    for i in both:
        ends = [r.start_seconds + r.curves[i][-1][1] for r in (row, base)]
        timed.append([_score_at(r, i, min(ends)) for r in (row, base)])
    at_time = difference([a for a, _ in timed], [b for _, b in timed], comparisons=comparisons)
    return replace(row, difference=plain, at_equal_time=at_time)


def _score_at(row: Row, seed: int, seconds: float) -> float:
    """Score of a run `seconds` after its start was begun, between the points of its curve."""
    import numpy as np

    curve = row.curves[seed]
    return float(np.interp(seconds, [row.start_seconds + c[1] for c in curve], [c[2] for c in curve]))


def _median(x: Sequence[float]) -> float:
    return sorted(x)[len(x) // 2] if x else math.nan
