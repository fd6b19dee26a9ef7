"""Which differences are real: paired over seeds, simultaneous over recipes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
LARGE = 0.8  # Cohen's convention for a large standardised difference


@dataclass(frozen=True)
class Difference:
    """A recipe minus the baseline, paired over seeds.

    mean, low, high: of the score, with the interval at a simultaneous 95% over the comparisons made. standardised:
    mean over the pooled standard deviation of the two arms (Cohen's d). verdict: "better", "worse" or
    "no difference shown".
    """

    mean: float
    low: float
    high: float
    standardised: float
    n: int

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"

    @property
    def large(self) -> bool:
        """Whether the difference is called and large by Cohen's convention (0.8 standard deviations)."""
        return self.verdict != "no difference shown" and abs(self.standardised) >= LARGE


def interval(x: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean and t-interval.

    >>> [round(v, 3) for v in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    from scipy import stats

    n, mean = len(x), math.fsum(x) / len(x)
    if n < 2:
        return mean, -math.inf, math.inf
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / (n - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * sd / math.sqrt(n)
    return mean, mean - half, mean + half


def difference(arm: Sequence[float], base: Sequence[float], *, comparisons: int = 1) -> Difference:
    """Paired t-interval of arm - base over shared seeds; Bonferroni over `comparisons` made at once.

    >>> difference([0.9, 0.91, 0.92], [0.8, 0.82, 0.81]).verdict
    'better'
    >>> difference([0.9, 0.91, 0.92], [0.9, 0.92, 0.91]).verdict
    'no difference shown'
    """
    d = [a - b for a, b in zip(arm, base, strict=True)]
    mean, low, high = interval(d, 1 - (1 - CONFIDENCE) / comparisons)
    spread = math.sqrt((_variance(arm) + _variance(base)) / 2)
    standardised = mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0
    return Difference(mean, low, high, standardised, len(d))


def _variance(x: Sequence[float]) -> float:
    if len(x) < 2:
        return 0.0
    mean = math.fsum(x) / len(x)
    return math.fsum((v - mean) ** 2 for v in x) / (len(x) - 1)
