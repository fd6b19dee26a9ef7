"""The figures of a comparison: differences, learning curves, sensitivity to the rate, signal before training."""

import html
import math
from collections.abc import Sequence

from pondera._words import num, rate, with_interval
from pondera.lab.results import Comparison, Row
from pondera.lab.stats import Difference
from pondera.report._figures import (
    DASHES,
    NARROW,
    Figure,
    Json,
    axis,
    colour,
    counts,
    label,
    line,
    marked,
    marker,
    note,
)

# -- differences to the baseline --------------------------------------------------------------------------------------


def differences(c: Comparison, places: int) -> Figure | None:
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
        notes.append(note(text, y))
        y -= 17 * (1 + text.count("<br>")) + 18
        pairs = [a - b for a, b in zip(r.scores, base.scores) if math.isfinite(a) and math.isfinite(b)]
        tick = {"symbol": "line-ns", "size": 7, "line": {"color": colour(i), "width": 1.5}}
        data.append(marked(pairs, [y] * len(pairs), tick, "one seed: %{x:+.4f}"))
        data += _whisker(i, r.name, r.difference, y, f"at equal steps: {with_interval(r.difference, places)}")
        if t := r.at_equal_time:
            data += _whisker(i, r.name, t, y - 17, f"at equal time: {with_interval(t, places)}", hollow=True)
        said.append(f"{r.name}: {with_interval(r.difference, places)}, {r.verdict}")
        y -= 36
    if not data:
        return None
    zero = {"zeroline": True, "zerolinecolor": "var(--ink)", "zerolinewidth": 1.5}
    layout = {
        "xaxis": axis(f"difference in {c.task.settings.score}; to the right is better") | zero,
        "yaxis": {"visible": False, "range": [y + 8, 4]},
        "annotations": notes,
    }
    return Figure("differences", f"Difference to {base.name}. {'; '.join(said)}.", data, layout, 60 - y)


def _whisker(i: int, name: str, d: Difference, y: float, hover: str, hollow: bool = False) -> list[Json]:
    whisker = line([d.low, d.high], [y, y], i, 1.5 if hollow else 3.5, "dot" if hollow else "solid")
    hover = f"%{{fullData.name}}<br>{hover}<br>{d.verdict}"
    return [whisker, marked([d.mean], [y], marker(i, hollow, 8 if hollow else 11), hover, name=label(name))]


# -- learning curves --------------------------------------------------------------------------------------------------

MODES = "step", "second"
ALIKE = 0.15  # of the whole range: where the recipes' means over the second half lie closer, they look like one line


def curves(c: Comparison, places: int) -> Figure | None:
    """Score over steps and over seconds: mean over finished seeds with a band; failed runs each by itself."""
    data: list[Json] = []
    ends: list[tuple[float, str]] = []
    late: list[float] = []  # scores of the second half
    means: dict[int, dict[float, float]] = {}  # recipe -> step -> mean
    for i, r in enumerate(c.rows):
        fine = [k for k, score in zip(r.curves, r.scores) if math.isfinite(score) and k]
        broken = [k for k, score in zip(r.curves, r.scores) if not math.isfinite(score)]
        points = list(zip(*fine))  # every seed's k-th point (step, seconds, score, loss)
        scores = [[p[2] for p in at] for at in points]
        mean = [math.fsum(v) / len(v) for v in scores]
        if points:
            means[i] = {at[0][0]: m for at, m in zip(points, mean)}
        late += [v for at, seeds in zip(points, scores) if 2 * at[0][0] >= c.steps for v in seeds]
        if points:
            ends.append((mean[-1], f"{r.name} {num(mean[-1], places)}"))
        for mode in MODES:
            trace: Json = {"meta": {"recipe": i, "mode": mode}, "visible": mode == "step", "name": label(r.name)}
            if points:
                x = [_across(r, at, mode) for at in points]
                data += [_band(x, scores, i) | trace] if len(fine) > 1 else []
                hover = f"%{{fullData.name}}<br>{_unit(mode)}: %{{y:.{places}f}}<extra></extra>"
                curve = line(x, mean, i, 2, DASHES[i % len(DASHES)], mode="lines+markers", marker=marker(i))
                data.append(curve | {"hoverinfo": "all", "hovertemplate": hover} | trace)
            data += [_broken(r, k, seed, mode, i) | trace for seed, k in zip(r.failed, broken) if k]
    if not data:
        return None
    room = 0.08 * (max(late) - min(late)) if late else 0.0
    closeup = (min(late) - room, max(late) + room) if room else None
    axes = {
        "step": counts(
            "optimisation steps",
            0,
            int(max(x for t in data for x in t["x"] if t["meta"]["mode"] == "step")),
            rangemode="tozero",
        ),
        "second": axis("seconds, start-up counted", rangemode="tozero"),
    }
    layout = {"xaxis": axes["step"], "yaxis": axis(f"test {c.task.settings.score}")}
    told = ", ".join(text for _, text in sorted(ends, reverse=True)) or "no run finished"
    alt = f"Learning curves. Mean {c.task.settings.score} at the end: {told}."
    return Figure("curves", alt, data, layout, 420, axes, closeup, closeup is not None and _coincide(means, c.steps))


def _coincide(means: dict[int, dict[float, float]], steps: int) -> bool:
    """Whether the recipes' means over the second half lie close together, seen against the range of the whole run."""
    known = [v for m in means.values() for v in m.values() if math.isfinite(v)]
    late = [[m[k] for m in means.values() if k in m] for k in {k for m in means.values() for k in m} if 2 * k >= steps]
    apart = [max(v) - min(v) for v in late if len(v) > 1]
    return bool(apart) and max(apart) < ALIKE * (max(known) - min(known))


def _across(r: Row, at: Sequence[Sequence[float]], mode: str) -> float:
    """Where a point of the curve lies: its step, or the mean of the seeds' seconds with the start-up."""
    start = r.start_seconds if math.isfinite(r.start_seconds) else 0.0
    return at[0][0] if mode == "step" else start + math.fsum(p[1] for p in at) / len(at)


def _unit(mode: str) -> str:
    return "step %{x}" if mode == "step" else "%{x:.3g} s"


def _band(x: list[float], scores: list[list[float]], i: int) -> Json:
    edge = [*map(max, scores), *reversed([*map(min, scores)])]
    return line([*x, *reversed(x)], edge, i, 0, fill="toself", fillcolor=f"band({colour(i)})")


def _broken(r: Row, curve: list[list[float]], seed: int, mode: str, i: int) -> Json:
    """A failed run as far as it got, with a cross at its end."""
    known = [p for p in curve if math.isfinite(p[2])]
    x, y = [_across(r, [p], mode) for p in known], [p[2] for p in known]
    rest = max(0, len(known) - 1)
    spots = {"symbol": ["circle"] * rest + ["x"], "size": [1] * rest + [9], "color": colour(i), "opacity": 1}
    hover = f"%{{fullData.name}}<br>seed {seed} failed after {_unit(mode)}<extra></extra>"
    return line(x, y, i, 1, "dot", mode="lines+markers", marker=spots, hoverinfo="all", hovertemplate=hover)


# -- score against size ------------------------------------------------------------------------------------------------


def sizes(c: Comparison, places: int) -> list[Figure]:
    """Score with its interval against bytes, and against multiplications; the line joins what nothing beats in both."""
    found = []
    for what, title in (("bytes", "bytes to store"), ("multiplications", "multiplications on one example")):
        points = [(i, r, getattr(r.size, what)) for i, r in enumerate(c.rows) if r.size and r.finished]
        points = [(i, r, x) for i, r, x in points if x > 0]
        if len(points) < 2:
            continue
        data: list[Json] = []
        best = front([(x, r.score[0]) for _, r, x in points])
        edge = sorted((points[k][2], points[k][1].score[0]) for k in best)
        data.append(
            line([x for x, _ in edge], [y for _, y in edge], 0, name="front")
            | {"line": {"color": "var(--soft)", "width": 1.5, "dash": "dot", "shape": "hv"}}
        )
        for i, r, x in points:
            mean, low, high = r.score
            if math.isfinite(low):
                data.append(line([x, x], [low, high], i, 2))
            hover = f"{label(r.name)}<br>{x:,.0f} {what}: {num(mean, places)}"
            data.append(marked([x], [mean], marker(i, size=10), hover, name=label(r.name)))
        low, high = (math.log10(f(x for _, _, x in points)) for f in (min, max))
        room = 0.1 * (high - low) or 0.1
        layout = {
            "xaxis": axis(title, type="log", range=[low - room, high + room], exponentformat="power", dtick=1),
            "yaxis": axis(c.task.settings.score),
        }
        said = "; ".join(f"{r.name} {num(r.score[0], places)} at {x:,.0f}" for _, r, x in points)
        found.append(Figure(what, f"Score against {title}: {said}.", data, layout, 320))
    return found


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (cost, score) no other beats: none is as cheap with a better score, or cheaper with as good a one.

    >>> front([(1.0, 0.5), (2.0, 0.4), (2.0, 0.9)])
    [0, 2]
    """
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any((a <= x and b > y) or (a < x and b >= y) for k, (a, b) in enumerate(points) if k != i)
    ]


# -- sensitivity to the learning rate ---------------------------------------------------------------------------------


def sensitivity(c: Comparison, places: int) -> list[Figure]:
    """One small plot a recipe, all on the same axes: validation score over the grid, after a quarter and at the end."""
    rates = sorted({x for r in c.rows for x, *_ in r.tuning})
    if len(rates) < 2:
        return []
    seen = [v for r in c.rows for _, *values in r.tuning for v in values if math.isfinite(v)] or [0.0, 1.0]
    room = 0.08 * (max(seen) - min(seen)) or 0.1
    floor = min(seen) - 1.4 * room  # where failed rates are marked
    span = [floor - room, max(seen) + room]
    figures = []
    for i, r in enumerate(c.rows):
        fates = fate(r)
        dead = [x for x, f in fates.items() if f["failed"] and not f["finished"] and not f["dropped"]]
        late = {x: b for x, _, b in r.tuning if math.isfinite(b)}
        won = [(x, f["chosen"]) for x, f in fates.items() if f["chosen"] and x in late]
        most = max((n for _, n in won), default=1)
        ring = {"symbol": "circle-open", "size": [10 + 9 * n / most for _, n in won], "color": "var(--ink)"}
        data = [
            _over_grid([(x, a) for x, a, _ in r.tuning if math.isfinite(a)], i, "after a quarter", hollow=True),
            _over_grid(sorted(late.items()), i, "at the end"),
            marked(dead, [floor] * len(dead), {"symbol": "x", "size": 9, "color": "var(--bad)"}, "%{x:.1e}: failed"),
            marked(
                [x for x, _ in won], [late[x] for x, _ in won], ring | {"line": {"width": 2}},
                "%{x:.1e}: chosen by %{text}", text=[units(n) for _, n in won],
            ),
        ]  # fmt: skip
        layout = {"xaxis": log_rate(rates), "yaxis": axis(f"validation {c.task.settings.score}", range=span)}
        figures.append(Figure(f"rate{i}", _rate_words(r, fates, places), data, layout, 260))
    return figures


def fate(r: Row) -> dict[float, dict[str, int]]:
    """What became of each rate, counted over units: "chosen", "finished" (to the end), "dropped" after a quarter, "failed"."""
    found: dict[float, dict[str, int]] = {}
    for unit, point in zip(r.trials, r.chosen):
        for t in unit:
            here = found.setdefault(t.point.rate, dict.fromkeys(("chosen", "finished", "dropped", "failed"), 0))
            if t.failed:
                here["failed"] += 1
            elif math.isfinite(t.late) or t.point == point:
                here["finished"] += 1
                here["chosen"] += t.point == point
            else:
                here["dropped"] += 1
    return dict(sorted(found.items()))


def units(n: int) -> str:
    return f"{n} unit{'' if n == 1 else 's'}"


def _rate_words(r: Row, fates: dict[float, dict[str, int]], places: int) -> str:
    if not math.isfinite(r.rate):
        return f"{r.name}: no learning rate finished."
    chosen = ", ".join(f"{rate(x)} by {units(f['chosen'])}" for x, f in fates.items() if f["chosen"])
    lost = sum(f["failed"] for f in fates.values())
    words = f"; {lost} trials failed" if lost else ""
    where = f"; at an end of the space in {units(r.edge)}" if r.edge else ""
    return f"{r.name}: of {len(fates)} rates chosen {chosen}{where}{words}."


def _over_grid(points: list[tuple[float, float]], i: int, when: str, hollow: bool = False) -> Json:
    x, y = [x for x, _ in points], [v for _, v in points]
    curve = line(x, y, i, 1.5 if hollow else 2.5, "dot" if hollow else "solid", marker=marker(i, hollow, 8))
    hover = f"%{{x:.1e}}, {when}: %{{y:.3f}}<extra></extra>"
    return curve | {"mode": "lines+markers", "hoverinfo": "all", "hovertemplate": hover}


def log_rate(rates: Sequence[float]) -> Json:
    low, high = math.log10(min(rates)), math.log10(max(rates))
    room = 0.06 * (high - low)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = {"tickvals": [10.0**k for k in powers], "ticktext": [f"1e{k}" for k in powers]}
    return axis("learning rate", type="log", range=[low - room, high + room], **ticks)


# -- signal before training -------------------------------------------------------------------------------------------


def signal(c: Comparison) -> Figure | None:
    """Variance over examples of what each weight layer puts out before the first step, on a log axis."""
    data: list[Json] = []
    said: list[str] = []
    for i, r in enumerate(c.rows):
        numbered = [(k, s) for k, s in enumerate(r.signal, 1) if s.get("role") == "weight"]  # as `inspect` numbers them
        layers = [s for _, s in numbered]
        y = [s["signal"] if s["signal"] > 0 else math.nan for s in layers]  # a signal of zero has no place on the axis
        known = [v for v in y if math.isfinite(v)]
        if not known:
            continue
        curve = line([k for k, _ in numbered], y, i, 2, DASHES[i % len(DASHES)], mode="lines+markers", marker=marker(i))
        hover = "%{fullData.name}<br>%{text}: %{y:.3g}<extra></extra>"
        names = [html.escape(f'layer {k} ("{s["layer"]}", {s["kind"]})', quote=False) for k, s in numbered]
        about = {"name": label(r.name), "text": names, "meta": {"recipe": i}}
        data.append(curve | about | {"hoverinfo": "all", "hovertemplate": hover})
        said.append(f"{r.name} {known[0]:.2g} to {known[-1]:.2g}")
    if not data:
        return None
    decades = [math.log10(v) for d in data for v in d["y"] if math.isfinite(v)]
    every = max(1, math.ceil((max(decades) - min(decades)) / 8))
    layout = {
        "xaxis": counts("layer, from input to output", *_ends([k for d in data for k in d["x"]])),
        "yaxis": axis("variance over examples", type="log", exponentformat="power", dtick=every),
    }
    alt = f"Variance of the layers' outputs before training, from the first layer to the last: {'; '.join(said)}."
    return Figure("signal", alt, data, layout)


def _ends(x: Sequence[int]) -> tuple[int, int]:
    return min(x), max(x)
