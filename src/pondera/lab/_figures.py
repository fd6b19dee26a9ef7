"""The figures of the report as plotly's own JSON: plain dicts; colours are names that the page's stylesheet values."""

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pondera.lab._words import num, rate, with_interval

if TYPE_CHECKING:
    from pondera.lab._compare import Comparison, Row
    from pondera.lab.stats import Difference

Json = dict[str, Any]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
COLOURS = 7  # --c0 (the baseline's, neutral) ... --c6
NARROW = 46  # characters that fit beside each other on a phone


@dataclass(frozen=True)
class Figure:
    """One plot. alt: what it shows, in words. axes: the horizontal title in each mode it can be switched to.

    closeup: the range its vertical axis can be narrowed to.
    """

    id: str
    alt: str
    data: list[Json]
    layout: Json
    height: int = 380
    axes: dict[str, str] = field(default_factory=dict)
    closeup: tuple[float, float] | None = None

    @property
    def spec(self) -> Json:
        layout = self.layout | {"height": self.height}
        return {"data": self.data, "layout": layout, "axes": self.axes, "closeup": self.closeup}


def colour(i: int) -> str:
    return f"var(--c{0 if i == 0 else 1 + (i - 1) % (COLOURS - 1)})"


def label(name: str, width: int = NARROW) -> str:
    """A name as plotly takes it: escaped, broken after '+' and where it is too long.

    >>> label("init=<b>+optim=SGD", 10)
    'init=&lt;b&gt;+<br>optim=SGD'
    """
    lines = textwrap.wrap(name.replace("+", "+ "), width)
    return "<br>".join(html.escape(line.replace("+ ", "+")) for line in lines)


def _line(x: Sequence[float], y: Sequence[float], i: int, width: float = 2, dash: str = "solid", **more: Any) -> Json:
    line = {"color": colour(i), "width": width, "dash": dash}
    return {"x": list(x), "y": list(y), "mode": "lines", "line": line, "hoverinfo": "skip"} | more


def _marked(x: Sequence[float], y: Sequence[float], marker: Json, hover: str, **more: Any) -> Json:
    skip = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}
    return {"x": list(x), "y": list(y), "mode": "markers", "marker": marker} | skip | more


def _marker(i: int, hollow: bool = False, size: int = 7) -> Json:
    fill, line = ("var(--paper)" if hollow else colour(i)), {"color": colour(i), "width": 1.5}
    return {"symbol": SYMBOLS[i % len(SYMBOLS)], "size": size, "color": fill, "opacity": 1, "line": line}


def _axis(title: str = "", **more: Any) -> Json:
    text = {"text": html.escape(title), "standoff": 8, "font": {"size": 13}}
    return {"title": text, "automargin": True, "zeroline": False} | more


# -- differences to the baseline --------------------------------------------------------------------------------------


def differences(c: "Comparison", places: int) -> Figure | None:
    """Mean and simultaneous interval a recipe: filled at equal steps, hollow at equal time; ticks are single seeds."""
    base = c.rows[0]
    data: list[Json] = []
    notes: list[Json] = []
    said: list[str] = []
    y = 0  # in pixels, from the top
    for i, r in enumerate(c.rows):
        if r.difference is None:
            continue
        text = f"{label(r.name)} <i>{html.escape(r.verdict)}</i>"
        if len(r.name) + len(r.verdict) > NARROW:
            text = text.replace(" <i>", "<br><i>")
        notes.append(_note(text, y))
        y -= 17 * (1 + text.count("<br>")) + 18
        pairs = [a - b for a, b in zip(r.scores, base.scores) if math.isfinite(a) and math.isfinite(b)]
        tick = {"symbol": "line-ns", "size": 7, "line": {"color": colour(i), "width": 1.5}}
        data.append(_marked(pairs, [y] * len(pairs), tick, "one seed: %{x:+.4f}"))
        data += _whisker(i, r.name, r.difference, y, f"at equal steps: {with_interval(r.difference, places)}")
        if t := r.at_equal_time:
            data += _whisker(i, r.name, t, y - 17, f"at equal time: {with_interval(t, places)}", hollow=True)
        said.append(f"{r.name}: {with_interval(r.difference, places)}, {r.verdict}")
        y -= 36
    if not data:
        return None
    zero = {"zeroline": True, "zerolinecolor": "var(--ink)", "zerolinewidth": 1.5}
    layout = {
        "xaxis": _axis(f"difference in {c.task.settings.score}; to the right is better") | zero,
        "yaxis": {"visible": False, "range": [y + 8, 4]},
        "annotations": notes,
    }
    return Figure("differences", f"Difference to {base.name}. {'; '.join(said)}.", data, layout, 60 - y)


def _whisker(i: int, name: str, d: "Difference", y: float, hover: str, hollow: bool = False) -> list[Json]:
    line = _line([d.low, d.high], [y, y], i, 1.5 if hollow else 3.5, "dot" if hollow else "solid")
    hover = f"%{{fullData.name}}<br>{hover}<br>{d.verdict}"
    return [line, _marked([d.mean], [y], _marker(i, hollow, 8 if hollow else 11), hover, name=label(name))]


def _note(text: str, y: float) -> Json:
    """Words at the left edge, over the grid."""
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": y, "yanchor": "top", "align": "left", "showarrow": False}
    return {"text": text, "font": {"size": 13}, "bgcolor": "var(--paper)", "borderpad": 1} | place


# -- learning curves --------------------------------------------------------------------------------------------------

AXES = {"step": "optimisation steps", "second": "seconds, start-up counted"}


def curves(c: "Comparison", places: int) -> Figure | None:
    """Score over steps and over seconds: mean over finished seeds with a band; failed runs each by itself."""
    data: list[Json] = []
    ends: list[tuple[float, str]] = []
    late: list[float] = []  # scores of the second half
    for i, r in enumerate(c.rows):
        fine = [k for k, score in zip(r.curves, r.scores) if math.isfinite(score) and k]
        broken = [k for k, score in zip(r.curves, r.scores) if not math.isfinite(score)]
        points = list(zip(*fine))  # every seed's k-th point (step, seconds, score, loss)
        scores = [[p[2] for p in at] for at in points]
        mean = [math.fsum(v) / len(v) for v in scores]
        late += [v for at, seeds in zip(points, scores) if 2 * at[0][0] >= c.steps for v in seeds]
        if points:
            ends.append((mean[-1], f"{r.name} {num(mean[-1], places)}"))
        for mode in AXES:
            trace: Json = {"meta": {"recipe": i, "mode": mode}, "visible": mode == "step", "name": label(r.name)}
            if points:
                x = [_across(r, at, mode) for at in points]
                data += [_band(x, scores, i) | trace] if len(fine) > 1 else []
                hover = f"%{{fullData.name}}<br>{_unit(mode)}: %{{y:.{places}f}}<extra></extra>"
                line = _line(x, mean, i, 2, DASHES[i % len(DASHES)], mode="lines+markers", marker=_marker(i))
                data.append(line | {"hoverinfo": "all", "hovertemplate": hover} | trace)
            data += [_broken(r, k, seed, mode, i) | trace for seed, k in zip(r.failed, broken) if k]
    if not data:
        return None
    room = 0.08 * (max(late) - min(late)) if late else 0.0
    closeup = (min(late) - room, max(late) + room) if room else None
    layout = {"xaxis": _axis(AXES["step"], rangemode="tozero"), "yaxis": _axis(f"test {c.task.settings.score}")}
    told = ", ".join(text for _, text in sorted(ends, reverse=True)) or "no run finished"
    alt = f"Learning curves. Mean {c.task.settings.score} at the end: {told}."
    return Figure("curves", alt, data, layout, 420, AXES, closeup)


def _across(r: "Row", at: Sequence[Sequence[float]], mode: str) -> float:
    """Where a point of the curve lies: its step, or the mean of the seeds' seconds with the start-up."""
    start = r.start_seconds if math.isfinite(r.start_seconds) else 0.0
    return at[0][0] if mode == "step" else start + math.fsum(p[1] for p in at) / len(at)


def _unit(mode: str) -> str:
    return "step %{x}" if mode == "step" else "%{x:.3g} s"


def _band(x: list[float], scores: list[list[float]], i: int) -> Json:
    edge = [*map(max, scores), *reversed([*map(min, scores)])]
    return _line([*x, *reversed(x)], edge, i, 0, fill="toself", fillcolor=f"band({colour(i)})")


def _broken(r: "Row", curve: list[list[float]], seed: int, mode: str, i: int) -> Json:
    """A failed run as far as it got, with a cross at its end."""
    known = [p for p in curve if math.isfinite(p[2])]
    x, y = [_across(r, [p], mode) for p in known], [p[2] for p in known]
    rest = max(0, len(known) - 1)
    marker = {"symbol": ["circle"] * rest + ["x"], "size": [1] * rest + [9], "color": colour(i), "opacity": 1}
    hover = f"%{{fullData.name}}<br>seed {seed} failed after {_unit(mode)}<extra></extra>"
    return _line(x, y, i, 1, "dot", mode="lines+markers", marker=marker, hoverinfo="all", hovertemplate=hover)


# -- sensitivity to the learning rate ---------------------------------------------------------------------------------


def sensitivity(c: "Comparison", places: int) -> list[Figure]:
    """One small plot a recipe, all on the same axes: validation score over the grid, after a quarter and at the end."""
    if len(c.rates) < 2:
        return []
    seen = [v for r in c.rows for _, *values in r.tuning for v in values if math.isfinite(v)] or [0.0, 1.0]
    room = 0.08 * (max(seen) - min(seen)) or 0.1
    floor = min(seen) - 1.4 * room  # where failed rates are marked
    span = [floor - room, max(seen) + room]
    figures = []
    for i, r in enumerate(c.rows):
        fates = fate(r)
        dead = [x for x, f in fates.items() if f == "failed"]
        chosen = [(x, b) for x, _, b in r.tuning if x == r.rate and math.isfinite(b)]
        ring = {"symbol": "circle-open", "size": 17, "color": "var(--ink)", "line": {"width": 2}}
        data = [
            _over_grid([(x, a) for x, a, _ in r.tuning], i, "after a quarter", hollow=True),
            _over_grid([(x, b) for x, _, b in r.tuning if math.isfinite(b)], i, "at the end"),
            _marked(dead, [floor] * len(dead), {"symbol": "x", "size": 9, "color": "var(--bad)"}, "%{x:.1e}: failed"),
            _marked([x for x, _ in chosen], [v for _, v in chosen], ring, ""),
        ]
        layout = {"xaxis": _log_rate(c.rates), "yaxis": _axis(f"validation {c.task.settings.score}", range=span)}
        figures.append(Figure(f"rate{i}", _rate_words(r, fates, places), data, layout, 260))
    return figures


def fate(r: "Row") -> dict[float, str]:
    """What became of each rate: "chosen", "finished", "dropped" after a quarter, or "failed"; empty without tuning."""
    from pondera.lab._compare import _kept

    if not any(math.isfinite(a) for _, a, _ in r.tuning) and math.isfinite(r.rate):
        return {}
    ranked = sorted((-a, x) for x, a, _ in r.tuning if math.isfinite(a))[: _kept(len(r.tuning))]
    finished = sum(math.isfinite(b) for *_, b in r.tuning)
    lost = {x for _, x in ranked} if finished < len(ranked) else set()  # went on; those without a score failed there
    found = {}
    for x, a, b in r.tuning:
        if math.isfinite(b):
            found[x] = "chosen" if x == r.rate else "finished"
        else:
            found[x] = "failed" if x in lost or not math.isfinite(a) else "dropped"
    return found


def _rate_words(r: "Row", fates: dict[float, str], places: int) -> str:
    if not math.isfinite(r.rate):
        return f"{r.name}: no learning rate finished."
    best = next((b for x, _, b in r.tuning if x == r.rate), math.nan)
    counts = {f: list(fates.values()).count(f) for f in ("dropped", "failed")}
    lost = ", ".join(f"{n} {f}" for f, n in counts.items() if n) or "none dropped"
    where = ", at the end of the grid" if r.edge else ""
    return f"{r.name}: best at {rate(r.rate)}{where} with {num(best, places)}; of {len(fates)} rates {lost}."


def _over_grid(points: list[tuple[float, float]], i: int, when: str, hollow: bool = False) -> Json:
    x, y = [x for x, _ in points], [v for _, v in points]
    line = _line(x, y, i, 1.5 if hollow else 2.5, "dot" if hollow else "solid", marker=_marker(i, hollow, 8))
    hover = f"%{{x:.1e}}, {when}: %{{y:.3f}}<extra></extra>"
    return line | {"mode": "lines+markers", "hoverinfo": "all", "hovertemplate": hover}


def _log_rate(rates: Sequence[float]) -> Json:
    low, high = math.log10(min(rates)), math.log10(max(rates))
    room = 0.06 * (high - low)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = {"tickvals": [10.0**k for k in powers], "ticktext": [f"1e{k}" for k in powers]}
    return _axis("learning rate", type="log", range=[low - room, high + room], **ticks)


# -- signal before training -------------------------------------------------------------------------------------------


def signal(c: "Comparison") -> Figure | None:
    """Variance over examples of what each weight layer puts out before the first step, on a log axis."""
    data: list[Json] = []
    said: list[str] = []
    for i, r in enumerate(c.rows):
        layers = [s for s in r.signal if s.get("role") == "weight"]
        y = [s["signal"] if s["signal"] > 0 else math.nan for s in layers]  # a signal of zero has no place on the axis
        known = [v for v in y if math.isfinite(v)]
        if not known:
            continue
        line = _line(range(1, len(y) + 1), y, i, 2, DASHES[i % len(DASHES)], mode="lines+markers", marker=_marker(i))
        hover = "%{fullData.name}<br>%{text}: %{y:.3g}<extra></extra>"
        names = [html.escape(f"{s['layer']} ({s['kind']})") for s in layers]
        about = {"name": label(r.name), "text": names, "meta": {"recipe": i}}
        data.append(line | about | {"hoverinfo": "all", "hovertemplate": hover})
        said.append(f"{r.name} {known[0]:.2g} to {known[-1]:.2g}")
    if not data:
        return None
    decades = [math.log10(v) for d in data for v in d["y"] if math.isfinite(v)]
    every = max(1, math.ceil((max(decades) - min(decades)) / 8))
    layout = {
        "xaxis": _axis("weight layer, from input to output", tickformat="d"),
        "yaxis": _axis("variance over examples", type="log", exponentformat="power", dtick=every),
    }
    alt = f"Variance of the layers' outputs before training, from the first layer to the last: {'; '.join(said)}."
    return Figure("signal", alt, data, layout)
