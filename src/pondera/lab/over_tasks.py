"""Methods over several tasks: described by a stratified bootstrap, judged by the mean standardised difference."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pondera.errors import BadInput
from pondera.lab.judgement import Aggregate, Gap, Judged, Judgement, Triple, paired_scores
from pondera.lab.stats import LEVEL, _spread, _variance, holm, t_interval

if TYPE_CHECKING:
    import numpy as np

DRAWS = 2000  # of the bootstrap
CELLS = 4_000_000  # numbers the bootstrap holds at a time
OVERALL_UNITS = 4  # fewer leave the spread too uncertain to standardise by


def scale(task: str, rows: list[Judged], normalise: str, lower: bool) -> tuple[float, float] | None:
    """The scores that count as 0 and as 1 on a task."""
    if normalise == "none":
        return 0.0, 1.0
    means = {r.method: r.score[0] for r in rows if r.finished}
    if normalise == "baseline":
        mean = next((r.score[0] for r in rows if r.baseline and r.finished), None)
        if mean is not None and not mean > 0:
            on = f" on the task {task}" if task else ""
            raise BadInput(
                f"scores can be divided by the baseline's mean only where it is positive; it is {mean:g}{on}"
            )
        return None if mean is None else (0.0, mean)
    if not means or min(means.values()) == max(means.values()):
        return None
    ends = min(means.values()), max(means.values())
    return (ends[1], ends[0]) if lower else ends


def complete(j: Judgement) -> list[str]:
    """The methods that finished a unit on every task."""
    ran = Counter(r.method for r in j.rows if r.finished)
    return [m for m in j.methods if ran[m] == len(j.tasks)]


def aggregates(j: Judgement) -> list[Aggregate]:
    """The complete methods over tasks: described by a bootstrap, judged by a t-interval. None if fewer than two."""
    methods = complete(j)
    if len(methods) < 2:
        return []
    described = _bootstrap(j, methods)
    judged: dict[str, tuple[Gap | None, str]] = {}
    if j.baseline in methods:
        raw = {m: _overall(j, m) for m in methods if m != j.baseline}
        gaps = holm([_gap_over(found, LEVEL - j.level, len(raw), j.lower_is_better) for found, _ in raw.values()],
                     LEVEL - j.level)  # fmt: skip
        judged = {m: (gap, why) for gap, (m, (_, why)) in zip(gaps, raw.items())}
    found = []
    for m in methods:
        gap, why = judged.get(m, (None, "the baseline did not finish on every task"))
        base = m == j.baseline
        improvement = None if base or j.baseline not in methods else described["improvement"][m]
        found.append(
            Aggregate(
                m,
                described["rank"][m],
                described["iqm"][m],
                improvement,
                gap,
                "" if base or gap else why,
                baseline=base,
            )
        )
    return found


@dataclass(frozen=True)
class _Over:
    """A mean standardised difference: its standard error and degrees of freedom, now and at other numbers of units."""

    mean: float
    error: tuple[float, float]
    at: Callable[[int], tuple[float, float]]
    n: int
    shared: bool


def _gap_over(found: _Over | None, level: float, m: int, lower: bool) -> Gap | None:
    if found is None:
        return None
    d = t_interval(found.mean, found.error, found.at, level / m)
    return Gap(**vars(replace(d, n=found.n)), lower_is_better=lower, paired=found.shared)


def _overall(j: Judgement, method: str) -> tuple[_Over | None, str]:
    """The mean over tasks of the standardised difference, or why there is none. The module's docstring says how."""
    pairs = []
    for task in j.tasks:
        row, base = j[task, method], j[task, j.baseline]
        pair = paired_scores(row, base)
        if pair is None or min(len(pair[1]), len(pair[2])) < OVERALL_UNITS:
            return None, f"fewer than {OVERALL_UNITS} {j.unit}s on {task}"
        pairs.append((pair, row, base))
    designed = [({*row.units} & {*base.units}) for _, row, base in pairs]
    shared = all(p[3] for p, _, _ in pairs) and all(d == designed[0] for d in designed)
    if shared:  # a unit that failed on one task is left out on all
        kept = [u for u in pairs[0][0][0] if all(u in p[0] for p, _, _ in pairs)]
        if len(kept) < OVERALL_UNITS:
            return None, f"fewer than {OVERALL_UNITS} {j.unit}s finished on all tasks"
    each: list[float] = [0.0] * (len(kept) if shared else 0)
    means, inflations, variances, freedoms, floors, sizes = [], [], [], [], [], []
    for (labels, a, b, paired), row, _ in pairs:
        if shared:
            at = [labels.index(u) for u in kept]
            a, b = [a[i] for i in at], [b[i] for i in at]
        va, vb = _variance(a), _variance(b)
        sd = max(math.sqrt((va + vb) / 2), row.resolution)
        if sd == 0:
            return None, f"no spread on {row.task} to standardise by"
        nu = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)) if va + vb else len(a) + len(b) - 2.0
        inflation = nu / (nu - 2)
        if paired:
            d = [x - y for x, y in zip(a, b)]
            variance, freedom = _spread(d, row.resolution) ** 2 / len(d), len(d) - 1.0
        else:
            half = row.resolution**2 / 2
            halves = max(va, half) / len(a), max(vb, half) / len(b)
            variance = sum(halves)
            freedom = variance**2 / (halves[0] ** 2 / (len(a) - 1) + halves[1] ** 2 / (len(b) - 1))
        means.append((math.fsum(a) / len(a) - math.fsum(b) / len(b)) / sd)
        inflations.append(inflation)
        variances.append(variance / sd**2)
        freedoms.append(freedom)
        floors.append(row.resolution / sd)
        sizes.append(min(len(a), len(b)))
        each = [u + (x - y) / sd / len(pairs) for u, x, y in zip(each, a, b)]
    count, mean, n = len(pairs), math.fsum(means) / len(pairs), min(sizes)
    if shared:
        floor = math.sqrt(math.fsum(f * f for f in floors)) / count
        sd = math.sqrt(math.fsum(inflations) / count) * _spread(each, floor)

        def at_n(k: int) -> tuple[float, float]:
            return sd / math.sqrt(k), k - 1.0

        return _Over(mean, at_n(n), at_n, n, True), ""
    parts = [k * v / count**2 for k, v in zip(inflations, variances)]
    total = math.fsum(parts)
    freedom = total**2 / math.fsum(p * p / f for p, f in zip(parts, freedoms)) if total else math.fsum(freedoms)

    def scaled(k: int) -> tuple[float, float]:
        return math.sqrt(total * n / k), freedom * (k - 1) / (n - 1)

    return _Over(mean, (math.sqrt(total), freedom), scaled, n, False), ""


def _bootstrap(j: Judgement, methods: list[str]) -> dict[str, dict[str, Triple]]:
    """Mean rank, interquartile mean and probability of improvement, each with the percentiles of a stratified bootstrap.

    Units are drawn anew within every task and method; methods that have the same units on a task share the draw. The
    first draw takes every unit once, which gives the estimates themselves.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    rows = {(t, m): j[t, m] for t in j.tasks for m in methods}
    units = {k: tuple(u for u, s in zip(r.units, r.scores) if math.isfinite(s)) for k, r in rows.items()}
    total = sum(map(len, units.values()))
    block = max(1, CELLS // total)
    found: dict[str, list[np.ndarray]] = {"rank": [], "iqm": [], "improvement": []}
    scaled = {k: np.array(j.normalised(r)) for k, r in rows.items()}
    for start in range(0, DRAWS + 1, block):
        draws = min(block, DRAWS + 1 - start)
        counts: dict[tuple[str, str], np.ndarray] = {}
        for task in j.tasks:
            alike: dict[tuple[str, ...], np.ndarray] = {}
            for m in methods:
                own = units[task, m]
                if own not in alike:
                    n = len(own)
                    drawn = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
                    alike[own] = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n).astype(float)
                    if start == 0:
                        alike[own][0] = 1.0
                counts[task, m] = alike[own]
        ranks = np.zeros((draws, len(methods)))
        for task in j.tasks:
            means = np.stack(
                [counts[task, m] @ np.array(rows[task, m].finished) / len(units[task, m]) for m in methods], 1
            )
            ranks += mean_ranks(means if j.lower_is_better else -means) / len(j.tasks)
        found["rank"].append(ranks)
        iqms = []
        for m in methods:
            parts = [t for t in j.tasks if j.scales[t] is not None]
            x = np.concatenate([scaled[t, m] for t in parts]) if parts else np.zeros(0)
            w = np.concatenate([counts[t, m] for t in parts], 1) if parts else np.zeros((draws, 0))
            iqms.append(interquartile_mean(x, w))
        found["iqm"].append(np.stack(iqms, 1))
        if j.baseline in methods:
            chance = np.zeros((draws, len(methods)))
            for i, m in enumerate(methods):
                for task in j.tasks:
                    mine, theirs = rows[task, m], rows[task, j.baseline]
                    wx, wy = counts[task, m], counts[task, j.baseline]
                    p = probability_of_improvement(np.array(mine.finished), np.array(theirs.finished), wx, wy)
                    chance[:, i] += (1 - p if j.lower_is_better else p) / len(j.tasks)
            found["improvement"].append(chance)
    alone = min(map(len, units.values())) < 2
    result: dict[str, dict[str, Triple]] = {}
    for key, pieces in found.items():
        if not pieces:
            continue
        values = np.concatenate(pieces)
        ends = np.full((2, len(methods)), math.nan) if alone else np.quantile(values[1:], (0.025, 0.975), axis=0)
        result[key] = {m: (float(values[0, i]), float(ends[0, i]), float(ends[1, i])) for i, m in enumerate(methods)}
    return result


def mean_ranks(cost: "np.ndarray") -> "np.ndarray":
    """Ranks along the last axis, the lowest cost first, ties sharing the mean of their ranks.

    >>> import numpy as np
    >>> mean_ranks(np.array([[0.2, 0.1, 0.2]]))
    array([[2.5, 1. , 2.5]])
    """
    import numpy as np

    columns = [((cost < c).sum(-1) + 0.5 * ((cost == c).sum(-1) + 1)) for c in np.moveaxis(cost, -1, 0)[..., None]]
    return np.stack(columns, -1)


def interquartile_mean(x: "np.ndarray", counts: "np.ndarray") -> "np.ndarray":
    """Mean of the middle half of `x`, each value taken as often as `counts` (draws, len(x)) says; one a draw.

    As Agarwal et al. 2021: of N values the lowest and the highest floor(N / 4) are left out.

    >>> import numpy as np
    >>> interquartile_mean(np.array([9.0, 1.0, 2.0, 3.0]), np.array([[1, 1, 1, 1], [0, 4, 0, 0]]))
    array([2.5, 1. ])
    """
    import numpy as np

    if not len(x):
        return np.full(len(counts), math.nan)
    order = np.argsort(x, kind="stable")
    upto = np.cumsum(counts[:, order], 1)
    n = round(float(upto[0, -1]))
    cut = n // 4
    inside = np.clip(upto, cut, n - cut) - cut
    return np.diff(inside, axis=1, prepend=0.0) @ x[order] / (n - 2 * cut)


def probability_of_improvement(
    x: "np.ndarray", y: "np.ndarray", x_counts: "np.ndarray", y_counts: "np.ndarray"
) -> "np.ndarray":
    """P(X > Y) + P(X = Y) / 2 over all pairs of a score of `x` and one of `y`, each as often as its counts say.

    >>> import numpy as np
    >>> probability_of_improvement(np.array([1.0, 3.0]), np.array([1.0, 2.0]), np.ones((1, 2)), np.ones((1, 2)))
    array([0.625])
    """
    import numpy as np

    order = np.argsort(y, kind="stable")
    upto = np.concatenate([np.zeros((len(y_counts), 1)), np.cumsum(y_counts[:, order], 1)], 1)
    below, within = (upto[:, np.searchsorted(y[order], x, side)] for side in ("left", "right"))
    return (x_counts * (below + within)).sum(1) / 2 / (x_counts.sum(1) * y_counts.sum(1))
