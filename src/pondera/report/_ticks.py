"""Where an axis of a still figure begins and ends, which numbers stand along it, and how they are written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pondera.report._figures import Json

NARROWEST = 1e-6  # of the numbers themselves: a span below it shows nothing
PAD = 0.05  # of the span, beyond the outermost mark
LETTER, LINE = 6.4, 20  # pixels: a generous mean of the width of one at 12 px, and a line of words
APART = 62, 42  # pixels between ticks, along the foot and up the side


@dataclass(frozen=True)
class Scale:
    """One axis: values to shares of its length. ticks: value and words. log: whether values are taken as logarithms."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]
    names: tuple[str, ...] = ()

    def share(self, x: float | str | None) -> float:
        """Where a value lies, from 0 to 1 (beyond for what lies outside; nan for what has no place)."""
        if x is None:
            return math.nan
        if isinstance(x, str):
            x = float(self.names.index(x))
        if self.log:
            x = math.log10(x) if x > 0 else math.nan
        return (x - self.low) / (self.high - self.low)


def scale(axis: Json, values: Sequence[float | str | None], length: float, upright: bool = False) -> Scale:
    """The scale of one axis for the values drawn along it. length: of the axis, in pixels; upright: one beside the figure."""
    log, names = axis.get("type") == "log", tuple(dict.fromkeys(v for v in values if isinstance(v, str)))
    known = [float(names.index(v)) if isinstance(v, str) else float(v) for v in values if v is not None]
    known = [math.log10(v) if log else v for v in known if math.isfinite(v) and (v > 0 or not log)] or [0.0, 1.0]
    room = max(3, int(length // (APART[1] if upright else APART[0])))
    if axis.get("range"):
        low, high = axis["range"]
    elif names:
        low, high = -0.6, len(names) - 0.4
    else:
        low, high = min(known), max(known)
        low = min(low, 0.0) if axis.get("rangemode") == "tozero" else low
        span = high - low
        if span < NARROWEST * max(1.0 if log else 0.0, abs(low), abs(high)):  # rounding, not a range
            span = 0.0
        pad = PAD * span or (0.5 if log else 0.05 * abs(high) or 0.5)
        low, high = (low if low == 0 and axis.get("rangemode") == "tozero" else low - pad), high + pad
    if names:
        every = max(1, math.ceil(len(names) / room))
        ticks = [(float(i), name) for i, name in enumerate(names) if i % every == 0]
        return Scale(low, high, log, tuple(ticks), names)
    found = [(v, words) for v, words in _ticks(axis, low, high, room) if low <= v <= high]
    if "tickvals" in axis:  # all that are given, as far as their words have room
        each = LINE if upright else LETTER * max((len(words) for _, words in found), default=0) + 14
        found = found[:: max(1, math.ceil(len(found) * each / length))]
    return Scale(low, high, log, tuple(found))


def _ticks(axis: Json, low: float, high: float, room: int) -> list[tuple[float, str]]:
    """Ticks as (place, words), the place as a logarithm on a log axis."""
    log = axis.get("type") == "log"
    if "tickvals" in axis:
        places = [math.log10(v) if log else float(v) for v in axis["tickvals"]]
        words = axis.get("ticktext") or [_number(v, 0) for v in axis["tickvals"]]
        return list(zip(places, words))
    if log and high - low > 2:
        every = max(1, math.ceil((high - low) / room))
        powers = range(math.ceil(low), math.floor(high) + 1)
        return [(float(k), _power(k)) for k in powers if k % every == 0]
    if log and high - low > 0.9:  # a decade or two
        values = (k * 10.0**d for d in range(math.floor(low), math.ceil(high) + 1) for k in (1, 2, 5))
        return [(math.log10(v), f"{v:g}".replace("-", "−")) for v in values]
    if log:  # less than a decade: round numbers between
        inner = _ticks({}, 10**low, 10**high, room)
        return [(math.log10(v), words) for v, words in inner if v > 0]
    raw = (high - low) / max(1, room)
    size = 10 ** math.floor(math.log10(raw))
    step = next(k * size for k in (1, 2, 2.5, 5, 10) if k * size >= raw * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (1 if f"{step / size:.1f}" == "2.5" else 0)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    share = "%" in axis.get("tickformat", "")
    places = [(first + i) * step for i in range(count)]
    return [(v, f"{100 * v:.0f}%" if share else _number(v, digits)) for v in places]


def _number(x: float, digits: int) -> str:
    text = f"{x:.3g}" if x and not 1e-4 <= abs(x) < 1e6 else f"{x:,.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.replace("-", "")


def _power(k: int) -> str:
    return {0: "1", 1: "10"}.get(k) or f'10<tspan dy="-5" font-size="9">{str(k).replace("-", "−")}</tspan>'
