"""judge: the lab's verdicts on results that came from elsewhere: a sweep, a paper's table, another framework.

A table has one row a run: its method, its seed, its score, and if there are several its task. The unit is a seed or,
where the column tuning is given, a tuning: seeds that share one draw of the hyper-parameters are averaged, for they are
not independent. Differences to the baseline are the lab's (see `pondera.lab.stats`): paired over the units that both
methods have; where they share fewer than two, unpaired (Welch 1947, Satterthwaite's degrees of freedom). The verdicts of a
table share 5% of error. With several tasks half of it goes to the verdicts a task and half to those over all tasks.

Over tasks there are two things, kept apart:

- Description, as in Agarwal et al. 2021 (arXiv 2108.13264): mean rank, probability of improvement and interquartile mean,
  with 95% intervals of a bootstrap that draws units anew within every task. Over few units such intervals are too
  narrow. On normal noise at 5 seeds, a nominal 95% covers 82% of the time for a mean on one task, 91% for the
  interquartile mean and 94% for the probability of improvement over ten tasks (3 seeds: 73%, 87%, 92%). So nothing is
  called by them.
- A verdict for these tasks, not for others like them: the mean over tasks of the standardised difference (Cohen's d).
  Where the same units run on every task a unit is averaged over tasks first, and the interval is Student's over units;
  else variances are added over tasks, with Satterthwaite's degrees of freedom. A standard deviation estimated from few
  runs is low by chance now and then, and its task then counts too much: without care up to 14% of tables of equals are
  called at 3 seeds and 8% at 5, not 5%. So each task's variance is inflated by nu / (nu - 2), nu being the degrees of
  freedom of the pooled variance (again Satterthwaite's). Then it is at most 5% (and 1.2% where 1% is meant) in
  simulations with 2 to 30 tasks, 4 to 10 units, equal arms and arms of which one is up to ten times as noisy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pondera._words import listed
from pondera.errors import BadInput, nearest
from pondera.lab.judgement import Gap, Judged, Judgement, counted, paired_scores
from pondera.lab.outside import NAMED, Run, read
from pondera.lab.over_tasks import DRAWS, aggregates, complete, scale
from pondera.lab.stats import LEVEL, difference, holm, ladder_step, welch

NORMALISE = ("range", "none", "baseline")
FEW = 5  # units from which on an interval means something


def judge(
    results: Any,
    *,
    baseline: str | None = None,
    lower_is_better: bool = False,
    resolution: float | None = None,
    bounds: tuple[float, float] | None = None,
    normalise: str = "range",
    columns: Mapping[str, str] | None = None,
) -> Judgement:
    """Judge a table of results: which methods differ from the baseline, and what the runs could have shown.

    Args:
        results: the path of a CSV file (commas, semicolons or tabs), a list of dicts, or a data frame; a row a run.
            Columns: method, seed, score, and where they apply task and tuning (a label shared by the runs that share
            one tuning of the hyper-parameters). A score that is no finite number is a failed run.
        baseline: the method the others are compared with; the first one by default.
        lower_is_better: for losses and errors.
        resolution: the smallest step of a score (0.01 for an accuracy over 100 examples); None: as the scores tell.
        bounds: lowest and highest possible score.
        normalise: what the interquartile mean is over, task by task: "range" runs from the worst method's mean at 0 to the
            best one's at 1, "baseline" divides by the baseline's mean, "none" leaves scores as they are.
        columns: names of columns by role, where they are not found by themselves: {"score": "final_acc"}.

    Returns: the judgement: rows, table(), summary(), to_json(), report(path).
    Raises: BadInput: if the results cannot be read or judged, in one sentence.

    >>> scores = {"adam": [0.90, 0.91, 0.92, 0.91, 0.90], "lion": [0.93, 0.95, 0.94, 0.95, 0.94]}
    >>> runs = [{"method": m, "seed": i, "score": s} for m, row in scores.items() for i, s in enumerate(row)]
    >>> found = judge(runs, resolution=0.01)
    >>> found["lion"].verdict
    'better'
    >>> print(found.summary().partition(chr(10) * 2)[0])
    results: 2 methods; the baseline is adam; higher is better
    """
    if normalise not in NORMALISE:
        raise BadInput(f"normalise is one of {', '.join(NORMALISE)}, got {normalise!r}{nearest(normalise, NORMALISE)}")
    if resolution is not None and not (math.isfinite(resolution) and resolution >= 0):
        raise BadInput(f"the resolution must be at least 0, got {resolution}")
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    if not low < high:
        raise BadInput(f"bounds are the lowest and the highest possible score, got {low:g} and {high:g}")
    runs, source, notes, unit = read(results, columns or {}, low, high)
    methods = list(dict.fromkeys(r.method for r in runs))
    tasks = list(dict.fromkeys(r.task for r in runs))
    if len(methods) < 2:
        raise BadInput(f"{source} holds one method, {methods[0]!r}, and no other to compare it with")
    base = methods[0] if baseline is None else str(baseline)
    if base not in methods:
        some = f" (methods: {', '.join(methods[:NAMED])}{', ...' if len(methods) > NAMED else ''})"
        raise BadInput(f"no method in {source} is called {base!r}{nearest(base, methods)}{some}")
    methods = [base, *(m for m in methods if m != base)]
    level = LEVEL if len(tasks) == 1 else LEVEL / 2

    rows = [r for t in tasks for r in _rows_of(t, methods, [x for x in runs if x.task == t], unit, resolution)]
    rows = [replace(r, bounds=(low, high)) for r in rows]
    bases = {r.task: r for r in rows if r.baseline}
    rows = [replace(r, opposed=r.task in bases) for r in rows]
    others = [i for i, r in enumerate(rows) if not r.baseline]
    gaps = _family([(rows[i], bases.get(rows[i].task)) for i in others], level, lower_is_better)
    for i, gap in zip(others, gaps):
        rows[i] = replace(rows[i], difference=gap)

    scales = {t: scale(t, [r for r in rows if r.task == t], normalise, lower_is_better) for t in tasks}
    found = Judgement(source, rows, base, methods, tasks, unit, lower_is_better, [], [], normalise, scales, level)
    if len(tasks) > 1:
        found = replace(found, aggregates=aggregates(found))
    return replace(found, notes=notes + _notes(found, resolution))


# -- one task ----------------------------------------------------------------------------------------------------------


def _rows_of(task: str, methods: list[str], runs: list[Run], unit: str, resolution: float | None) -> list[Judged]:
    """A row for each method that ran on the task, its units averaged, the step of its scores found."""
    step = ladder_step(r.score for r in runs) if resolution is None else resolution
    order = {u: i for i, u in enumerate(dict.fromkeys(_unit(r, unit) for r in runs))}
    smallest = math.inf
    found = []
    for method in methods:
        mine = [r for r in runs if r.method == method]
        if not mine:
            continue
        blocks: dict[str, list[float]] = {}
        for r in sorted(mine, key=lambda r: order[_unit(r, unit)]):
            blocks.setdefault(_unit(r, unit), []).append(r.score)
        fine = [[s for s in x if math.isfinite(s)] for x in blocks.values()]
        scores = tuple(math.fsum(x) / len(x) if x else math.nan for x in fine)
        smallest = min([smallest, *(len(x) for x in fine if x)])
        failed = sum(not math.isfinite(r.score) for r in mine)
        found.append(Judged(task, method, tuple(blocks), scores, len(mine), failed, unit, method == methods[0]))
    # A mean of k scores moves by a k-th of their step.
    return [replace(r, resolution=step / smallest if math.isfinite(smallest) else step) for r in found]


def _unit(run: Run, unit: str) -> str:
    return run.seed if unit == "seed" else run.tuning


def _family(pairs: Sequence[tuple[Judged, Judged | None]], level: float, lower: bool) -> list[Gap | None]:
    """Differences judged together, paired or not, as `stats.family` does those that are."""
    m = max(1, len(pairs))
    found: list[Gap | None] = []
    for row, base in pairs:
        pair = paired_scores(row, base)
        if pair is None:
            found.append(None)
            continue
        assert base is not None
        _, a, b, paired = pair
        more: dict[str, Any] = {"comparisons": m, "level": level, "resolution": row.resolution, "bounds": row.bounds}
        d = difference(a, b, **more) if paired else welch(a, b, **more)
        units = len(row.finished), len(base.finished)
        of = len({*row.units, *base.units})
        found.append(Gap(**vars(d), lower_is_better=lower, paired=paired, units=units, of=of))
    return holm(found, level)


# -- what to know -----------------------------------------------------------------------------------------------------


def _notes(j: Judgement, resolution: float | None) -> list[str]:
    """What a reader should know before believing the table."""
    notes: list[str] = []
    several = len(j.tasks) > 1

    def where(r: Judged) -> str:
        return f"{r.method} on {r.task}" if several else r.method

    def say(words: str, rows: Sequence[Judged], how: Callable[[Judged], str] = where) -> None:
        if rows:
            more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
            notes.append(f"{words}: {', '.join(how(r) for r in rows[:NAMED])}{more}")

    unpaired = [r for r in j.rows if r.difference and not r.difference.paired]
    short = [r for r in j.rows if (d := r.difference) and d.paired and d.n < d.of]
    say(f"unpaired, for fewer than two {j.unit}s are shared with the baseline (Welch)", unpaired)
    say(f"{j.unit}s paired with the baseline", short, lambda r: f"{where(r)} {r.difference.n} of {r.difference.of}")
    if j.unit == "tuning":
        say("one tuning: no interval can be honest", [r for r in j.rows if len(r.units) < 2])
    if any(r.failed for r in j.rows):
        notes.append("scores and differences are over what finished, which flatters a method that fails on the rest")
    finished = [len(r.finished) for r in j.rows if r.finished]
    if min(finished) < FEW:
        notes.append(f"as few as {counted(min(finished), j.unit)}: intervals mean something from {FEW} on")
    steps = {r.task: r.resolution for r in j.rows if r.resolution}
    if resolution is None and steps:
        said = ", ".join(f"{s:.3g}{f' on {t}' if several else ''}" for t, s in [*steps.items()][:NAMED])
        more = f" and {len(steps) - NAMED} more" if len(steps) > NAMED else ""
        one = "a score" if j.unit == "seed" else "a tuning's mean score"
        notes.append(
            f"the smallest step of {one} is taken to be {said}{more}, as the scores tell (--resolution sets it)"
        )
    if several:
        left = [m for m in j.methods if m not in complete(j)]
        if left:
            notes.append(f"left out over all tasks, for want of a finished run on some: {listed(left)}")
        flat = [t for t, s in j.scales.items() if s is None]
        if flat and j.aggregates:
            notes.append(f"left out of the interquartile mean, for there is no scale: {listed(flat)}")
        if j.aggregates:
            notes.append(
                f"rank, interquartile mean and improvement: 95% stratified bootstrap, {DRAWS:,} draws; over few "
                f"{j.unit}s it is too narrow, so that only the standardised differences are judged, for these tasks alone"
            )
    return notes
