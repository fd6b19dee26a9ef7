"""What a claim's run can come to, and how figures decide it: four outcomes, by part.

An exact property is met or not (`met`). A figure that chance has a hand in is an interval, weighed against the criterion's
threshold (`weigh`): it lies beyond it on the claim's side, beyond it on the other, or across it, and what lies across is
undecided. `conclude` puts the parts of a claim together, `not_testable` says why one could not be tried.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch

from pondera.errors import BadInput

Outcome = Literal["holds", "refuted", "undecided", "not testable here"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
POWER = 0.8  # of "so many seeds would have shown": four of five tables


@dataclass(frozen=True)
class Part:
    """One condition of a criterion. says: how the figure stands to it, and what would decide one that is open."""

    outcome: Outcome
    says: str = ""


@dataclass(frozen=True)
class Finding:
    """What one claim's run found. measured: the figures the verdict rests on. note: the explanation, if one is owed.
    parts: each condition by its name, with its own outcome."""

    verdict: str
    measured: dict[str, Any]
    note: str = ""
    parts: dict[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class Effect:
    """Mean of paired differences a - b with a t-interval.

    size: mean difference over its standard deviation (Cohen's d for pairs; infinite when the spread is zero). n: how many
    independent differences. level: the error of the interval, 0.05 for one look at 95%."""

    mean: float
    low: float
    high: float
    size: float
    n: int
    level: float = 0.05

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high < 0


def effect(a: Sequence[float], b: Sequence[float] | None = None, *, confidence: float = 0.95) -> Effect:
    """Paired difference a - b over the same seeds (or `a` itself, differences already), with a t-interval.

    Raises: BadInput: if the lengths differ or are below 2, or a number is not finite.

    >>> e = effect([3.0, 4.0, 5.0], [1.0, 1.0, 3.0])
    >>> round(e.mean, 4), e.above
    (2.3333, True)
    """
    from scipy import stats

    b = [0.0] * len(a) if b is None else b
    if len(a) != len(b) or len(a) < 2:
        raise BadInput(f"effect needs two lists of the same length, at least 2; got {len(a)} and {len(b)}")
    d = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    if not all(math.isfinite(x) for x in d):
        raise BadInput("effect needs finite numbers; treat a diverged run before comparing")
    n, mean = len(d), sum(d) / len(d)
    sd = (sum((x - mean) ** 2 for x in d) / (n - 1)) ** 0.5
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * sd / n**0.5
    size = mean / sd if sd else (math.copysign(math.inf, mean) if mean else 0.0)
    return Effect(mean, mean - half, mean + half, size, n, 1 - confidence)


def nested(groups: Iterable[Sequence[float]], *, confidence: float = 0.95) -> Effect:
    """The effect of differences drawn in groups, such as several seeds of each concept: the groups are what is independent.

    The mean of each group is one observation, so the interval speaks of new groups, not only of new seeds of these.

    >>> nested([[1.0, 3.0], [2.0, 2.0], [0.0, 6.0]]).n
    3
    """
    return effect([sum(g) / len(g) for g in groups], confidence=confidence)


def met(condition: bool, says: str = "") -> Part:
    """A condition without chance in it, or one every seed must meet: it holds or is refuted.

    >>> met(2 > 1).outcome
    'holds'
    """
    return Part("holds" if bool(condition) else "refuted", says)


def weigh(
    found: Effect, *, above: float | None = None, below: float | None = None, within: float | None = None
) -> Part:
    """An interval against a threshold: `holds` beyond it, `refuted` beyond it on the other side, `undecided` across it.

    Args:
        found: the effect with its interval.
        above: the claim is that the effect is larger than this.
        below: that it is smaller than this.
        within: that its size is at most this, either way.
    Raises: BadInput: unless exactly one threshold is given.

    >>> weigh(effect([1.0, 1.2, 0.9]), above=0).outcome
    'holds'
    >>> weigh(effect([1.0, -1.2, 0.9]), above=0).outcome
    'undecided'
    >>> weigh(effect([1.0, 1.2, 0.9]), within=0.5).outcome
    'refuted'
    """
    if sum(t is not None for t in (above, below, within)) != 1:
        raise BadInput("weigh needs one of above, below and within")
    low, high, outcome = found.low, found.high, "undecided"
    if above is not None:
        words, edge = f"above {above:g}", above
        outcome = "holds" if low > above else "refuted" if high <= above else outcome
    elif below is not None:
        words, edge = f"below {below:g}", below
        outcome = "holds" if high < below else "refuted" if low >= below else outcome
    else:
        assert within is not None
        words, edge = f"within {within:g}", math.copysign(within, found.mean)
        if -within <= low and high <= within:
            outcome = "holds"
        elif low > within or high < -within:
            outcome = "refuted"
    says = f"{found.mean:+.3g} [{low:+.3g}, {high:+.3g}], n = {found.n}; asked for {words}"
    if outcome == "undecided":
        says += _open(found, found.mean - edge)
    return Part(outcome, says)  # type: ignore[arg-type]


def _open(found: Effect, distance: float) -> str:
    """What so many seeds could have shown, and how many would decide a distance like the one seen."""
    from scipy import stats

    if found.n < 2 or not math.isfinite(found.size) or not found.size:
        return ""
    sd = abs(found.mean / found.size)

    def shown(n: int) -> float:
        t = stats.t.isf(found.level / 2, n - 1) + stats.t.isf(1 - POWER, n - 1)
        return float(t) * sd / math.sqrt(n)

    words = f"; {found.n} would show a distance of {shown(found.n):.2g} from it in four of five runs"
    needed = next((n for n in (*range(found.n + 1, 200), *range(200, 2001, 50)) if shown(n) <= abs(distance)), None)
    return words + (f", the one seen takes about {needed}" if needed else ", the one seen takes more than 2,000")


def conclude(
    parts: Mapping[str, Part | bool] | Part | bool,
    *,
    central: Iterable[str] | None = None,
    note: str = "",
    **measured: Any,
) -> Finding:
    """A claim's verdict from its parts, with the figures.

    All central parts hold: `holds`. One of them is refuted: `refuted`, and the parts say which. Else, where one is open,
    `undecided`; where some could not be tried and the rest holds, `not testable here`.

    Args:
        parts: conditions by their names, each as `met` or `weigh` has it; True and False are taken as `met` takes them.
        central: names of the parts that the verdict rests on, as the criterion says; all of them by default. The others
            are recorded beside them.
        note: an explanation of these figures, written for this run.
        measured: the figures.
    Raises: BadInput: if there is no part, or `central` names none of them.

    >>> conclude({"unit norm": True, "cheap": Part("undecided")}).verdict
    'undecided'
    >>> conclude({"unit norm": True, "cheap": False}, central=["unit norm"]).verdict
    'holds'
    """
    named = parts if isinstance(parts, Mapping) else {"": parts}
    done = {name: p if isinstance(p, Part) else met(p) for name, p in named.items()}
    decisive = tuple(done) if central is None else tuple(central)
    unknown = [name for name in decisive if name not in done]
    if not decisive or unknown:
        raise BadInput(f"conclude needs central parts among {', '.join(done) or 'none given'}, got {unknown or 'none'}")
    seen = {done[name].outcome for name in decisive}
    verdict = next((o for o in ("refuted", "undecided", "not testable here") if o in seen), "holds")
    shown = {} if list(done) == [""] and not done[""].says else done
    return Finding(verdict, {k: plain(v) for k, v in measured.items()}, note, shown)


def not_testable(reason: str, **measured: Any) -> Finding:
    """`not testable here`, with the reason: scale, data or hardware."""
    return Finding("not testable here", {k: plain(v) for k, v in measured.items()}, reason)


def plain(value: Any) -> Any:
    """A figure as JSON has it: six digits, and words for what is not finite."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, (Effect, Part)):
        return {k: plain(v) for k, v in asdict(value).items()}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else str(number)
