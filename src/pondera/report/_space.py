"""The figures of what recipes search besides the rate: where each trial lay, how it validated, what units chose."""

import html
import math
from collections import Counter
from collections.abc import Sequence

from pondera._words import listed
from pondera.lab.plan import Tried
from pondera.lab.results import Comparison, Row
from pondera.lab.space import Axis, Log, OneOf, Point, Space
from pondera.report._drawn import log_rate, units
from pondera.report._figures import Figure, Json, axis, marked, marker

SIZES = 5.0, 15.0  # of the trial that validated worst, and best
SPREAD = 0.5  # of the room between two values to choose from, for the units to lie beside each other


def searched(c: Comparison, places: int) -> list[tuple[int, Axis, Figure]]:
    """One figure for every further axis of every recipe: (the recipe's place, the axis, rate by value)."""
    found = []
    for i, r in enumerate(c.rows):
        for k, (where, space) in enumerate(r.recipe.spaces.items()):
            found.append((i, where, _figure(r, i, where, space, f"space{i}-{k}", places, c.task.settings.score)))
    return found


def name(where: Axis) -> str:
    """An axis of a space in words.

    >>> name(("optim", "weight_decay"))
    'optim weight_decay'
    """
    return " ".join(where)


def _figure(r: Row, i: int, where: Axis, space: Space, key: str, places: int, score: str) -> Figure:
    tried = [(u, t) for u, unit in enumerate(r.trials) for t in unit]
    one_rate = len({t.point.rate for _, t in tried}) < 2  # then the other axis is free to say how it validated
    seen = [v for _, t in tried if math.isfinite(v := _valid(t))]
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    foot = low - 0.15 * ((high - low) or 1.0)  # where failed trials stand, if the axis is the score's

    def along(u: int, t: Tried) -> tuple[float, float]:
        value = _height(t.point[where], space, u, len(r.trials))
        return (value, _valid(t) if math.isfinite(_valid(t)) else foot) if one_rate else (t.point.rate, value)

    def trace(kept: Sequence[tuple[int, Tried]], look: Json, words: str) -> Json:
        at = [along(u, t) for u, t in kept]
        text = [_in_words(t, where, places) for _, t in kept]
        return marked([a for a, _ in at], [b for _, b in at], look, f"%{{text}}{words}", text=text)

    def sized(kept: Sequence[tuple[int, Tried]], hollow: bool) -> Json:
        return marker(i, hollow) | {"size": [_size(_valid(t), seen) for _, t in kept]}

    failed = [(u, t) for u, t in tried if t.failed]
    late = [(u, t) for u, t in tried if not t.failed and math.isfinite(t.late)]
    early = [(u, t) for u, t in tried if not t.failed and not math.isfinite(t.late)]
    chosen = [(u, t) for u, t in tried if t.point == r.chosen[u]]
    ring: Json = {"symbol": "circle-open", "size": 21, "color": "var(--ink)", "line": {"width": 2}}
    cross: Json = {"symbol": "x", "size": 9, "color": "var(--bad)"}
    data = [
        trace(early, sized(early, True), ", after a quarter"),
        trace(late, sized(late, False), ", at the end"),
        trace(failed, cross, ", failed"),
        trace(chosen, ring, ", chosen"),
    ]
    value_axis = _axis(where, space, [t.point[where] for _, t in tried])
    if one_rate:
        layout: Json = {"xaxis": value_axis, "yaxis": axis(f"validation {score}")}
    else:
        layout = {"xaxis": log_rate(sorted({t.point.rate for _, t in tried})), "yaxis": value_axis}
    return Figure(key, _alt(r, where, len(tried), len(failed)), data, layout, 280)


def _valid(t: Tried) -> float:
    """How a trial validated: at the end, or after a quarter where it was dropped then."""
    return t.late if math.isfinite(t.late) else t.early


def _size(value: float, seen: Sequence[float]) -> float:
    """By the share of trials it is at least as good as, so that one wild score does not make all others alike."""
    share = sum(v <= value for v in seen) / max(1, len(seen))
    return round(SIZES[0] + (SIZES[1] - SIZES[0]) * share, 1)


def _height(value: float | str | bool | None, space: Space, u: int, n: int) -> float:
    if not isinstance(space, OneOf):
        return float(value)  # type: ignore[arg-type]
    return space.values.index(value) + SPREAD * ((u + 0.5) / n - 0.5)


def _axis(where: Axis, space: Space, values: Sequence[float]) -> Json:
    title = name(where)
    if isinstance(space, OneOf):
        ticks = {"tickvals": list(range(len(space.values))), "ticktext": [html.escape(str(v)) for v in space.values]}
        return axis(title, range=[-0.6, len(space.values) - 0.4], **ticks)
    if isinstance(space, Log):
        low, high = (math.log10(f(values)) for f in (min, max))
        room = 0.08 * (high - low) or 0.1
        powers = range(math.floor(low - room), math.ceil(high + room) + 1)
        ticks = {"tickvals": [10.0**k for k in powers], "ticktext": [f"1e{k}" for k in powers]}
        return axis(title, type="log", range=[low - room, high + room], **(ticks if high - low > 1 else {}))
    return axis(title)


def _in_words(t: Tried, where: Axis, places: int) -> str:
    score = f": {_valid(t):.{places}f}" if math.isfinite(_valid(t)) else ""
    return html.escape(f"rate {t.point.rate:.1e}, {where[1]} {short(t.point[where])}{score}")


def _alt(r: Row, where: Axis, trials: int, failed: int) -> str:
    found: Counter[str] = Counter(short(p[where]) for p in r.chosen if isinstance(p, Point))
    told = listed(f"{v} by {units(n)}" for v, n in found.items()) if found else "nothing, as no trial finished"
    lost = f"; {failed} failed" if failed else ""
    return f"{r.name}: {trials} trials of {name(where)} and the learning rate; chosen {told}{lost}."


def short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
