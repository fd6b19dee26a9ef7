"""Which differences are real: paired over units, simultaneous over recipes, and over every look when seeds are added.

The unit is a seed that was tuned for itself, so that what is repeated holds everything that is drawn, the tuning too
(Bouthillier et al. 2021, arXiv 2103.03098). The rules, each chosen so that its promise can be tested by A/A tables:

- A difference is the paired t-interval of a recipe minus the baseline over the units where both finished.
- Its spread is taken to be at least one step of the score (one example, for an accuracy): seeds that differ by the
  same single example are no proof. With all n differences equal to one step it takes n = 7 to be called, the first n at
  which so many equal signs have a chance below 5%.
- 5% of error are shared by a table's verdicts: 4% by those at equal steps, 1% by those at equal time, so that what the
  clock does cannot change a verdict at equal steps. Within each family the intervals hold at once (Bonferroni) and
  the verdicts follow Holm's steps (Holm 1979), which call all that the intervals call, and sometimes more: there the
  interval is drawn up to zero, for the sign is shown and the size is not.
- When seeds are added until decided, every look is taken at one nominal level, so that the chance of a false call at
  any of them is that of the table (Pocock 1977, for t at the looks there are; found by simulation with a fixed seed).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

from pondera._words import num

LEVEL = 0.05  # chance that a table of equals holds a verdict
STEPS_SHARE = 0.8  # of it, for the verdicts at equal steps; the rest for those at equal time
CONFIDENCE = 1 - LEVEL
POWER = 0.8  # at which a difference counts as one that would have been shown
LARGE = 0.8  # Cohen's convention for a large standardised difference
GROWTH = 1.5  # of the number of seeds, from one look to the next
NONE = "no difference shown"
MOST_NEEDED = 10_000  # units; a difference that takes more is as good as none


@dataclass(frozen=True)
class Difference:
    """A recipe minus the baseline, paired over units.

    mean, low, high: of the score, with the interval that holds at once with the others of its family. standardised:
    mean over the pooled standard deviation of the two arms (Cohen's d). n: units. p: two-sided, by itself. called:
    whether Holm's steps call it (None: as the interval says). shown: the smallest difference that n units show with 80%
    power. needed: the units it would take to show the one that was seen with that power, taken at its word; None
    where there is none.
    """

    mean: float
    low: float
    high: float
    standardised: float
    n: int
    p: float = math.nan
    called: bool | None = None
    shown: float = math.nan
    needed: int | None = None

    @property
    def verdict(self) -> str:
        """One of "better", "worse" or "no difference shown"."""
        called = self.low > 0 or self.high < 0 if self.called is None else self.called
        if not called:
            return NONE
        return "better" if self.mean > 0 else "worse"

    @property
    def large(self) -> bool:
        """Whether the difference is called and large by Cohen's convention (0.8 standard deviations)."""
        return self.verdict != NONE and abs(self.standardised) >= LARGE


D = TypeVar("D", bound=Difference)


def interval(
    x: Sequence[float],
    confidence: float = CONFIDENCE,
    *,
    resolution: float = 0.0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float, float]:
    """Mean and t-interval, its spread at least `resolution`, inside `bounds`.

    >>> [round(v, 3) for v in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    >>> interval([1.0, 1.0, 1.0], resolution=0.01, bounds=(0.0, 1.0))[2]
    1.0
    """
    n, mean = len(x), math.fsum(x) / len(x)
    if n < 2:
        return mean, max(-math.inf, bounds[0]), min(math.inf, bounds[1])
    half = _t(1 - confidence, n - 1) * _spread(x, resolution) / math.sqrt(n)
    return mean, max(mean - half, bounds[0]), min(mean + half, bounds[1])


def difference(
    arm: Sequence[float],
    base: Sequence[float],
    *,
    comparisons: int = 1,
    level: float = LEVEL,
    resolution: float = 0.0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Difference:
    """Paired t-interval of arm - base over shared units; Bonferroni over `comparisons` made at once.

    Args:
        arm, base: scores, one a unit, at least 2. comparisons: of the family. level: chance of error the family may take.
        resolution: the smallest step of the score. bounds: of the score; a difference stays within their distance.
    Raises: ValueError: if the two lists differ in length or hold fewer than two scores.

    >>> difference([0.9, 0.91, 0.92], [0.8, 0.82, 0.81]).verdict
    'better'
    >>> difference([0.9, 0.91, 0.92], [0.9, 0.92, 0.91]).verdict
    'no difference shown'
    >>> difference([0.91, 0.91], [0.90, 0.90], resolution=0.01).verdict  # one example apart, twice
    'no difference shown'
    """
    d = [a - b for a, b in zip(arm, base, strict=True)]
    n = len(d)
    if n < 2:
        raise ValueError(f"a difference needs at least two units, got {n}")
    each = level / comparisons
    width = bounds[1] - bounds[0]
    mean, low, high = interval(d, 1 - each, resolution=resolution, bounds=(-width, width))
    spread = math.sqrt((_variance(arm) + _variance(base)) / 2)
    standardised = mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0
    sd = _spread(d, resolution)
    return Difference(
        mean, low, high, standardised, n, _p(mean, sd, n), None, _shown(sd, n, each), _needed(mean, sd, each)
    )


def family(
    pairs: "Sequence[tuple[Sequence[float], Sequence[float]] | None]",
    *,
    level: float = LEVEL,
    resolution: float = 0.0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> list[Difference | None]:
    """Differences judged together: simultaneous intervals (Bonferroni), verdicts by Holm's steps.

    pairs: (arm, base) each, None where there are fewer than two units to pair; those count as members all the same.

    >>> one, two = family([([3.0, 3.1, 3.2], [0, 0, 0]), ([0.2, 0.23, 0.26], [0, 0, 0])])
    >>> one.verdict, two.verdict
    ('better', 'better')
    """
    m = max(1, len(pairs))
    found = [p and difference(*p, comparisons=m, level=level, resolution=resolution, bounds=bounds) for p in pairs]
    return holm(found, level)


def holm(found: "Sequence[D | None]", level: float) -> "list[D | None]":
    """Differences with verdicts by Holm's steps over all of them, the absent ones counted.

    Where the steps call more than the (Bonferroni) interval does, the interval is drawn up to zero.
    """
    m, going = len(found), True
    judged: list[D | None] = list(found)
    for step, (p, i) in enumerate(sorted((d.p, i) for i, d in enumerate(found) if d is not None)):
        d = found[i]
        assert d is not None
        going = going and p < level / (m - step)
        low = max(d.low, 0.0) if going and d.mean > 0 else d.low
        high = min(d.high, 0.0) if going and d.mean < 0 else d.high
        judged[i] = replace(d, called=going, low=low, high=high)
    return judged


def welch(
    arm: Sequence[float],
    base: Sequence[float],
    *,
    comparisons: int = 1,
    level: float = LEVEL,
    resolution: float = 0.0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Difference:
    """Unpaired t-interval of arm - base, variances not taken to be equal; like `difference` in all else.

    Args:
        arm, base: scores, at least two each. comparisons: of the family. level: chance of error the family may take.
        resolution: the smallest step of the score; a difference of two scores is taken to spread at least so much.
        bounds: of the score; a difference stays within their distance.
    Returns: the difference; n is the smaller arm's, needed is what each arm would need.
    Raises: ValueError: if one of them has fewer than two scores.

    Student's sleep data taken as two groups (R: t.test(extra ~ group, data = sleep)):

    >>> a, b = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4], [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    >>> d = welch(a, b)
    >>> round(d.p, 5), round(d.low, 7), round(d.high, 7)
    (0.07939, -0.2054832, 3.3654832)
    """
    if min(len(arm), len(base)) < 2:
        raise ValueError(f"an unpaired difference needs at least two units of each, got {len(arm)} and {len(base)}")
    mean = math.fsum(arm) / len(arm) - math.fsum(base) / len(base)
    va, vb = (max(_variance(x), resolution**2 / 2) for x in (arm, base))

    def error(na: int, nb: int) -> tuple[float, float]:
        a, b = va / na, vb / nb
        parts = a**2 / (na - 1) + b**2 / (nb - 1)
        return math.sqrt(a + b), (a + b) ** 2 / parts if parts else na + nb - 2

    spread = math.sqrt((_variance(arm) + _variance(base)) / 2)
    standardised = mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0
    d = t_interval(mean, error(len(arm), len(base)), lambda n: error(n, n), level / comparisons)
    width = bounds[1] - bounds[0]
    return replace(
        d, standardised=standardised, n=min(len(arm), len(base)), low=max(d.low, -width), high=min(d.high, width)
    )


def t_interval(
    mean: float, error: tuple[float, float], at: Callable[[int], tuple[float, float]], each: float, most: int = 100_000
) -> Difference:
    """A difference from its standard error and degrees of freedom, and from what they would be `at` other numbers of units."""
    from scipy import stats

    def shown(se: float, df: float) -> float:
        return (_t(each, df) + _t(2 * (1 - POWER), df)) * se

    se, df = error
    half = _t(each, df) * se
    p = float(2 * stats.t.sf(abs(mean) / se, df)) if se else float(mean == 0)
    needed = None
    if mean != 0 and shown(*at(most)) <= abs(mean):
        low, high = 2, most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if shown(*at(middle)) <= abs(mean) else (middle + 1, high)
        needed = low
    return Difference(mean, mean - half, mean + half, mean, 0, p, None, shown(se, df), needed)


def ladder_step(scores: Iterable[float]) -> float:
    """The step of a score, as the scores tell: where at most half are distinct, their least distance; else 0.

    >>> round(ladder_step([0.9, 0.9, 0.91, 0.91, 0.93, 0.93]), 9), ladder_step([0.9, 0.91, 0.93])
    (0.01, 0.0)
    """
    seen = [s for s in scores if math.isfinite(s)]
    distinct = sorted(set(seen))
    if len(distinct) < 2 or len(distinct) > len(seen) / 2:
        return 0.0
    return min(b - a for a, b in pairwise(distinct))


def undecided(d: Difference | None, places: int = 4, unit: str = "seed", *, each: bool = False) -> str:
    """What a difference that was not called could have been, in words; empty for one that was.

    Args: places: decimals. unit: what is repeated. each: whether the units are of each arm, which are not paired.

    >>> undecided(Difference(0.01, -0.02, 0.04, 0.3, 5, shown=0.05, needed=40))
    '5 seeds would show a difference of 0.0500 in four of five tables; the one seen would take about 40'
    """
    if d is None or d.verdict != NONE:
        return ""
    words = f"{d.n} {unit}s{' each' * each} would show a difference of {num(d.shown, places)} in four of five tables"
    known = d.needed is not None and d.n < d.needed <= MOST_NEEDED
    return words + (f"; the one seen would take about {d.needed:,}" if known else "")


# -- seeds added until decided -----------------------------------------------------------------------------------------


def looks(first: int, last: int) -> tuple[int, ...]:
    """Numbers of seeds at which a comparison that goes on until decided is looked at.

    >>> looks(5, 30)
    (5, 8, 12, 18, 27, 30)
    """
    found = [first]
    while found[-1] < last:
        found.append(min(last, max(found[-1] + 1, math.ceil(GROWTH * found[-1]))))
    return tuple(found)


@lru_cache(maxsize=256)
def nominal_level(level: float, at: tuple[int, ...]) -> float:
    """The level of each look at which the chance that any of the looks `at` calls equals different is `level`.

    Constant over the looks (Pocock 1977), for the t-test at these numbers of units; found by simulating the null with
    a fixed seed, to about 2% of itself.

    >>> 0.012 < nominal_level(0.05, (5, 8, 12, 18, 27, 30)) < 0.0135
    True
    >>> nominal_level(0.05, (5,))
    0.05
    """
    import numpy as np
    from scipy import stats

    if len(at) == 1:
        return level
    draws, block = 400_000 if level < 0.02 else 200_000, 50_000
    rng = np.random.default_rng(0)
    grid = np.concatenate([np.linspace(0, 20, 4000), np.geomspace(20.1, 1e4, 400)])
    tails = {n: np.log(2 * stats.t.sf(grid, n - 1)) for n in at}
    smallest = np.empty(draws)
    for start in range(0, draws, block):
        x = rng.standard_normal((block, at[-1]), dtype=np.float32).astype(np.float64)
        total, square = x.cumsum(1), (x * x).cumsum(1)
        found = np.zeros(block)  # logarithm of the smallest p
        for n in at:
            mean = total[:, n - 1] / n
            variance = (square[:, n - 1] - n * mean**2) / (n - 1)
            t = np.abs(mean) / np.sqrt(variance / n)
            found = np.minimum(found, np.interp(t, grid, tails[n]))
        smallest[start : start + block] = found
    return float(np.exp(np.quantile(smallest, level)))


# -- small things ------------------------------------------------------------------------------------------------------


def _variance(x: Sequence[float]) -> float:
    if len(x) < 2:
        return 0.0
    mean = math.fsum(x) / len(x)
    return math.fsum((v - mean) ** 2 for v in x) / (len(x) - 1)


def _spread(x: Sequence[float], resolution: float) -> float:
    """Standard deviation, at least one step of the score."""
    return max(math.sqrt(_variance(x)), resolution)


@lru_cache(maxsize=4096)
def _t(level: float, df: float) -> float:
    """Two-sided critical value of Student's t."""
    from scipy import stats

    return float(stats.t.isf(level / 2, df))


def _p(mean: float, sd: float, n: int) -> float:
    from scipy import stats

    if sd == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / (sd / math.sqrt(n)), n - 1))


def _shown(sd: float, n: int, level: float) -> float:
    """The difference whose t-test at `level` has power 0.8 with n units (central t in both places)."""
    return (_t(level, n - 1) + _t(2 * (1 - POWER), n - 1)) * sd / math.sqrt(n)


def _needed(mean: float, sd: float, level: float, most: int = 100_000) -> int | None:
    if mean == 0:
        return None
    low, high = 2, most
    if _shown(sd, most, level) > abs(mean):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _shown(sd, middle, level) <= abs(mean) else (middle + 1, high)
    return low
