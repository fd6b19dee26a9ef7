"""Numbers as a reader wants them: a fixed number of decimals, a true minus, a dash for what is not there."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pondera.lab.stats import Difference

DASH = "–"


def num(x: float | None, places: int = 3) -> str:
    """
    >>> num(0.98123), num(-1.5, 1), num(float("nan")), num(123456789.0)
    ('0.981', '−1.5', '–', '1.23e+08')
    """
    if x is None or math.isnan(x):
        return DASH
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    text = f"{x:.3g}" if abs(x) >= 1e6 else f"{x:.{places}f}"
    digits = text.removeprefix("-")
    return f"−{digits}" if digits != text and float(text) != 0 else digits


def signed(x: float | None, places: int = 3) -> str:
    """
    >>> signed(0.0123), signed(-0.0123), signed(0.0), signed(None)
    ('+0.012', '−0.012', '0.000', '–')
    """
    text = num(x, places)
    return f"+{text}" if x is not None and x > 0 and text != num(0.0, places) else text


def with_interval(d: "Difference", places: int = 3) -> str:
    """
    >>> from pondera.lab import Difference
    >>> with_interval(Difference(0.012, -0.001, 0.025, 1.2, 5))
    '+0.012 [−0.001, +0.025]'
    """
    return f"{signed(d.mean, places)} [{signed(d.low, places)}, {signed(d.high, places)}]"


def rate(x: float) -> str:
    """
    >>> rate(0.0031622776601683794)
    '3.2e-03'
    """
    return f"{x:.1e}" if math.isfinite(x) else DASH


def seconds(x: float) -> str:
    """
    >>> seconds(0.00142), seconds(0.0421), seconds(12.3), seconds(4000.0)
    ('1.42 ms', '42.1 ms', '12.3 s', '66.7 min')
    """
    if not math.isfinite(x):
        return DASH
    if x < 1:
        places = 2 if x < 0.01 else 1 if x < 0.1 else 0
        return f"{1000 * x:.{places}f} ms"
    return f"{x:.3g} s" if x < 600 else f"{x / 60:.3g} min"


def size_in_words(n: float) -> str:
    """
    >>> size_in_words(812.0), size_in_words(45_300.0), size_in_words(2.5e9)
    ('812 B', '45.3 kB', '2.5 GB')
    """
    if not math.isfinite(n):
        return DASH
    unit = min(int(math.log10(max(n, 1)) // 3), 4)
    return f"{n / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def decimals(halves: Iterable[float]) -> int:
    """Decimals that show the first digit of the typical half-width of an interval, between 3 and 6.

    >>> decimals([0.004, 0.02]), decimals([0.0004]), decimals([])
    (3, 4, 3)
    """
    known = sorted(h for h in halves if math.isfinite(h) and h > 1e-12)
    if not known:
        return 3
    return min(6, max(3, -math.floor(math.log10(known[len(known) // 2]))))


def listed(names: Iterable[str]) -> str:
    """
    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last
