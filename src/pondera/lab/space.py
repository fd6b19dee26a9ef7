"""What a recipe searches besides the learning rate, and the points every unit tries.

A value in a recipe may be a space: ``AdamW(weight_decay=log(1e-3,1))``, ``norm_loss(factor=log(1e-4,1))``,
``Lora(r=choice(4,8,16))``. The points are a Latin hypercube (McKay et al. 1979): with T trials every axis is cut into T
strata and each stratum is tried once, in an order that the unit's seed draws anew; the learning rate takes the grid itself.
So a recipe that searches nothing else tries the grid, and one that searches more has not one trial more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pondera.errors import BadInput

Axis = tuple[str, str]  # room and argument, as ("optim", "weight_decay")
RATE: Axis = ("rate", "")


@dataclass(frozen=True)
class Log:
    """Positive numbers, even in their logarithm: ``log(1e-3,1)``. Extended by itself where the best lies at its end."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """The value at a share of the way from low to high, to three digits.

        >>> Log(0.01, 1).at(0.5)
        0.1
        """
        return float(f"{self.low * (self.high / self.low) ** share:.3g}")

    def __repr__(self) -> str:
        return f"log({self.low!r},{self.high!r})"


@dataclass(frozen=True)
class Uniform:
    """Numbers, evenly: ``uniform(0.8,0.99)``."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """
        >>> Uniform(0, 2).at(0.25)
        0.5
        """
        return float(f"{self.low + (self.high - self.low) * share:.4g}")

    def __repr__(self) -> str:
        return f"uniform({self.low!r},{self.high!r})"


@dataclass(frozen=True)
class OneOf:
    """One of the values given: ``choice(4,8,16)``."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """
        >>> OneOf((4, 8, 16)).at(0.5)
        8
        """
        return self.values[min(len(self.values) - 1, int(share * len(self.values)))]

    def __repr__(self) -> str:
        return f"choice({','.join(map(repr, self.values))})"


Space = Log | Uniform | OneOf


def make(kind: str, args: Sequence[Any], where: str) -> Space:
    """The space that a call in a recipe's text stands for.

    Raises: BadInput: for another name, or numbers that make no space.

    >>> make("log", [0.001, 1], "optim=AdamW")
    log(0.001,1)
    """
    if kind == "choice":
        if len(args) < 2 or len(set(map(repr, args))) < len(args):
            raise BadInput(f"choice(...) in {where} needs at least two different values, got {len(args)}: {list(args)}")
        if not all(isinstance(a, (int, float, str, bool, type(None))) for a in args):
            raise BadInput(f"choice(...) in {where} takes numbers, text, True, False or None, got {list(args)}")
        return OneOf(tuple(args))
    if kind not in ("log", "uniform"):
        raise BadInput(f"a space in {where} is log(low,high), uniform(low,high) or choice(a,b,...), got {kind}(...)")
    numbers = [a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool) and math.isfinite(a)]
    if len(args) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1] or (kind == "log" and numbers[0] <= 0):
        positive = "two positive numbers" if kind == "log" else "two numbers"
        raise BadInput(f"{kind}(low,high) in {where} needs {positive}, low below high, got {list(args)}")
    return Log(*numbers) if kind == "log" else Uniform(*numbers)


@dataclass(frozen=True)
class Point:
    """One trial: a learning rate and a value for every other axis of the recipe's space."""

    rate: float
    values: tuple[tuple[Axis, Any], ...] = ()

    def __getitem__(self, axis: Axis) -> Any:
        return self.rate if axis == RATE else dict(self.values)[axis]

    def at(self, axis: Axis, value: Any) -> "Point":
        """This point moved along one axis."""
        if axis == RATE:
            return replace(self, rate=value)
        return replace(self, values=tuple((a, value if a == axis else v) for a, v in self.values))


def grid(rates: Sequence[float], trials: int) -> tuple[float, ...]:
    """As many rates as there are trials: the grid itself, or as many even steps (in the logarithm) over its range.

    >>> grid([0.01, 0.1, 1.0], 3), grid([0.01, 1.0], 3)
    ((0.01, 0.1, 1.0), (0.01, 0.1, 1.0))
    """
    if len(rates) in (1, trials):
        return tuple(rates)
    if trials == 1:
        raise BadInput(f"one trial cannot choose between {len(rates)} rates; give one rate, or more trials")
    whole = Log(rates[0], rates[-1])
    return tuple(whole.at(k / (trials - 1)) for k in range(trials))


def points(rates: Sequence[float], trials: int, spaces: Mapping[Axis, Space], seed: int) -> list[Point]:
    """The points one unit tries: distinct, at most `trials`, in the order of the rates.

    >>> [p.rate for p in points([0.01, 0.1], 2, {}, 0)]
    [0.01, 0.1]
    >>> len(points([0.1], 9, {("adapter", "r"): OneOf((4, 8, 16))}, 0))
    3
    """
    rng = np.random.default_rng(seed)
    along = grid(rates, trials)
    found = [Point(r) for r in (along if len(along) > 1 else along * trials)]
    for axis, space in spaces.items():
        order = rng.permutation(trials)
        within = rng.random(trials)
        if isinstance(space, OneOf):  # as evenly as the trials allow, and one trial a value where there are as many
            values = [space.values[k % len(space.values)] for k in order]
        else:
            values = [space.at((k + u) / trials) for k, u in zip(order, within)]
        found = [replace(p, values=(*p.values, (axis, v))) for p, v in zip(found, values)]
    return list(dict.fromkeys(found))


def ends(chosen: Point, tried: Sequence[Point], spaces: Mapping[Axis, Space]) -> dict[Axis, int]:
    """Axes along which the chosen point is the outermost of those tried: -1 at the low end, +1 at the high end.

    Values to choose from have ends where they are numbers.

    >>> ends(Point(0.1), [Point(0.01), Point(0.1)], {})
    {('rate', ''): 1}
    """
    found: dict[Axis, int] = {}
    for axis in (RATE, *spaces):
        values = [p[axis] for p in tried]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values) or len(set(values)) < 2:
            continue
        space = spaces.get(axis)
        if isinstance(space, OneOf):
            values = list(space.values)
        if chosen[axis] in (min(values), max(values)):
            found[axis] = -1 if chosen[axis] == min(values) else 1
    return found


def beyond(
    chosen: Point, at: Mapping[Axis, int], spaces: Mapping[Axis, Space], rates: Sequence[float], trials: int
) -> Point:
    """One step further out along the axes that can be extended (the rate and spaces of `log`).

    >>> beyond(Point(1.0), {RATE: 1}, {}, [0.1, 1.0], 2).rate
    10.0
    """
    for axis, way in at.items():
        space = Log(rates[0], rates[-1]) if axis == RATE else spaces[axis]
        if isinstance(space, Log):
            step = (space.high / space.low) ** (1 / max(1, trials - 1))
            chosen = chosen.at(axis, float(f"{chosen[axis] * step**way:.2g}"))
    return chosen


def extendable(at: Mapping[Axis, int], spaces: Mapping[Axis, Space]) -> dict[Axis, int]:
    """Those ends beyond which a space may be searched."""
    return {a: way for a, way in at.items() if a == RATE or isinstance(spaces[a], Log)}
