"""The report of a judgement: results from elsewhere, judged, as one HTML file that opens offline."""

import html
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pondera._words import DASH, listed, num, signed, with_interval
from pondera.lab._judge import NORMALISE
from pondera.lab.judgement import Aggregate, Gap, Judged, Judgement, could, places, places_of, ranged
from pondera.lab.over_tasks import DRAWS, OVERALL_UNITS
from pondera.lab.stats import NONE
from pondera.report._figures import DASHES, Figure, Json, axis, colour, label, line, marked, marker, note
from pondera.report._shell import keys, plot, put, shell

GROUPS = (  # class, heading, sign
    ("better", "Better than the baseline", "▲"),
    ("worse", "Worse than the baseline", "▼"),
    ("none", "No difference shown", "○"),
    ("unsure", "Not judged", "?"),
    ("failed", "Failed", "✕"),
)
SIGNS = {kind: sign for kind, _, sign in GROUPS}
DRAWN = 12  # tasks that get a figure each; the table holds all
Entries = list[tuple[str, tuple[float, float, float], str, list[float]]]  # name, estimate, in words, single units
STEPS = 101  # points of a performance profile
CAPTIONS = {
    "differences": "Marker and thick line: mean difference to the baseline, with the interval that holds together with all "
    "others. Short ticks: single {unit}s, where they are paired. An interval that crosses the vertical line shows no "
    "difference.",
    "over": "Marker and line: estimate over all tasks. The intervals of mean rank, probability and interquartile mean come "
    "from a bootstrap and describe; the standardised difference is what is judged.",
    "profiles": "Share of all runs and tasks whose normalised score lies {way} the value below. A line that stays above "
    "another is better at every value.",
}


def write(found: "Judgement", path: str | Path, *, small: bool = False) -> Path:
    """Write the page to `path`: a reader finds the old file or the whole new one.

    Raises: BadInput: if the path is a folder, lies in a folder that does not exist, or cannot be written.
    """
    return put(path, lambda: render(found, small=small))


def render(j: "Judgement", *, small: bool = False) -> str:
    """The page as text: equal judgements give equal text, and nothing in it is loaded from elsewhere."""
    from pondera import __version__

    plots: list[Figure] = []
    sections = []
    if j.aggregates:
        sections.append(("over", "Over all tasks", _over(j, plots)))
        sections.append(("profiles", "Performance profiles", _profiles(j, plots, small)))
    sections += [
        ("table", "Task by task" if len(j.tasks) > 1 else "Results", _table(j)),
        ("intervals", "Differences to the baseline", _differences(j, plots)),
        ("method", "How it was judged", _method(j)),
    ]
    over = f"pondera judge · {escape(j.headline)}"
    return shell(_title(j), over, _lead(j), sections, plots, __version__, small)


# -- the headline ------------------------------------------------------------------------------------------------------


def kind(x: "Judged | Aggregate") -> str:
    """Where a row belongs: one of GROUPS, or "baseline"."""
    words = x.verdict
    if words.startswith("failed"):
        return "failed"
    return {"better": "better", "worse": "worse", NONE: "none", "baseline": "baseline"}.get(words, "unsure")


def _judged(j: "Judgement") -> "Sequence[Judged | Aggregate]":
    """What the headline is about: methods over all tasks, else on the one."""
    return j.aggregates if j.aggregates else j.rows if len(j.tasks) == 1 else []


def _title(j: "Judgement") -> str:
    rows = [x for x in _judged(j) if x.method != j.baseline]
    better = [x for x in rows if kind(x) == "better"]
    where = f" over {len(j.tasks)} tasks" if len(j.tasks) > 1 else ""
    if not rows:
        told = f"{len(j.methods)} methods on {len(j.tasks)} tasks"
    elif better:
        told = f"{len(better)} of {_count(len(rows), 'method')} better than the baseline{where}"
    elif all(kind(x) in ("unsure", "failed") for x in rows):
        told = f"no method could be judged{where}"
    else:
        told = f"no method shown to be better than the baseline{where}"
    return f"{j.name}: {told}"


def _lead(j: "Judgement") -> str:
    cards = []
    for key, heading, sign in GROUPS:
        rows = [x for x in _judged(j) if kind(x) == key]
        items = "".join(f"<li>{_name(x.method)}<br><span class='soft'>{_in_words(j, x)}</span></li>" for x in rows)
        if rows:
            head = f'<h2><span aria-hidden="true">{sign} </span>{heading}</h2>'
            cards.append(f'<div class="card {key}">{head}<ul>{items}</ul></div>')
    notes = "".join(f"<li>{escape(n[:1].upper() + n[1:])}.</li>" for n in j.notes)
    on = "" if len(j.tasks) == 1 else " Cards: the standardised difference averaged over these tasks."
    return (
        f"<p class='lead'>The baseline is {_name(j.baseline)}; {'lower' if j.lower_is_better else 'higher'} scores are "
        f"better.{on if j.aggregates else ''}</p>"
        + (f'<div class="cards">{"".join(cards)}</div>' if cards else "")
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _in_words(j: "Judgement", x: "Judged | Aggregate") -> str:
    gap, digits = _gap(x), 2 if j.aggregates else places_of(j.rows)
    if kind(x) == "failed":
        over = f"; over those that finished {with_interval(gap, digits)}" if gap else ""
        return f"{escape(x.verdict.removeprefix('failed in '))} runs{over}"
    return with_interval(gap, digits) if gap else escape(x.verdict)


def _gap(x: "Judged | Aggregate") -> "Gap | None":
    return x.overall if hasattr(x, "overall") else x.difference


# -- tables ------------------------------------------------------------------------------------------------------------


def _table(j: "Judgement") -> str:
    several = len(j.tasks) > 1
    heads = ["Method", "Score (95%)", "Difference to the baseline", "Standardised difference", f"{j.unit.title()}s"]
    heads += ["What could have been shown"]
    if several:
        heads.insert(1, "Task")
    body = "".join(_row(j, r, several, places_of(rows)) for t in j.tasks for rows in [j.of(t)] for r in rows)
    caption = (
        "Mean with its own 95% interval; the difference with the interval that holds together with all others of the "
        "table. Verdicts follow Holm’s steps."
    )
    return _framed("Results", caption, heads, body)


def _row(j: "Judgement", r: "Judged", several: bool, digits: int) -> str:
    mean, low, high = r.score
    d = r.difference
    spread = f"<small>[{num(low, digits)}, {num(high, digits)}]</small>" if math.isfinite(low) else ""
    key = kind(r)
    mark = "baseline" if key == "baseline" else _mark(key, r.verdict)
    gap = f"{signed(d.mean, digits)}<small>[{signed(d.low, digits)}, {signed(d.high, digits)}]</small>" if d else ""
    shown = "" if r.failed else could(d, digits, j.unit)
    if d is None or not d.paired:
        n = f"{len(r.finished)}<small>{'' if d is None else 'unpaired'}</small>"
    else:
        n = f"{d.n}<small>paired{f' of {d.of}' if d.of != d.n else ''}</small>"
    cells = [
        f"{num(mean, digits)}{spread}",
        gap + mark,
        (num(d.standardised, 2) if d else DASH) + ("<small>large</small>" if d and d.large else ""),
        n,
        "<br>".join(escape(shown).split("; ")) or DASH,
    ]
    if several:
        cells.insert(0, _name(r.task))
    head = f'<th scope="row">{_name(r.method)}</th>'
    return f"<tr{' class=base' if r.baseline else ''}>{head}{''.join(f'<td>{c}</td>' for c in cells)}</tr>"


def _over(j: "Judgement", plots: list[Figure]) -> str:
    digits = _iqm_digits(j)
    heads = ["Method", "Standardised difference", "Mean rank", "Beats the baseline", "Interquartile mean"]
    rows = []
    for a in j.aggregates:
        gap, key = a.overall, kind(a)
        told = f"{signed(gap.mean, 2)}<small>[{signed(gap.low, 2)}, {signed(gap.high, 2)}]</small>" if gap else ""
        mark = "baseline" if a.baseline else _mark(key, a.verdict)
        words = could(gap, 2, j.unit)
        cells = [told + mark + (f"<small>{'<br>'.join(escape(words).split('; '))}</small>" if words else "")]
        cells += [_stacked(x, k) for x, k in ((a.rank, 2), (a.improvement, 2), (a.iqm, digits))]
        head = f'<th scope="row">{_name(a.method)}</th>'
        rows.append(f"<tr{' class=base' if a.baseline else ''}>{head}{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    caption = f"Over {len(j.tasks)} tasks, taken as given: nothing is said of other tasks."
    table = _framed("Over all tasks", caption, heads, "".join(rows))
    figures = _panels(j)
    plots += [f for _, f in figures]
    parts = "".join(f"<div><h3>{heading}</h3>{plot(f)}</div>" for heading, f in figures)
    return f'{table}<figure><div class="small">{parts}</div><figcaption>{CAPTIONS["over"]}</figcaption></figure>'


def _stacked(x: "tuple[float, float, float] | None", digits: int) -> str:
    head, _, spread = ranged(x, digits).partition(" ")
    return head + (f"<small>{spread}</small>" if spread else "")


def _framed(name: str, caption: str, heads: Sequence[str], body: str) -> str:
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}, scrolls sideways">'
        f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _mark(key: str, words: str) -> str:
    sign = f'<span aria-hidden="true">{SIGNS[key]} </span>'
    return f'<span class="mark {key}">{sign}{escape(words)}</span>'


# -- figures -----------------------------------------------------------------------------------------------------------


def _differences(j: "Judgement", plots: list[Figure]) -> str:
    drawn = [(t, f) for t in j.tasks if (f := differences(j, t, f"differences{len(plots)}-{j.tasks.index(t)}"))]
    if not drawn:
        return f"<p>Nothing to draw: no method has two {j.unit}s to compare with the baseline.</p>"
    plots += [f for _, f in drawn[:DRAWN]]
    caption = CAPTIONS["differences"].format(unit=j.unit)
    if len(drawn) > DRAWN:
        caption += f" The first {DRAWN} of {len(drawn)} tasks are drawn; the table holds all."
    if len(j.tasks) == 1:
        body = plot(drawn[0][1])
    else:
        parts = "".join(f"<div><h3>{_name(t)}</h3>{plot(f)}</div>" for t, f in drawn[:DRAWN])
        body = f'<div class="small">{parts}</div>'
    return f"<figure>{body}<figcaption>{caption}</figcaption></figure>"


def differences(j: "Judgement", task: str, key: str = "differences") -> Figure | None:
    """Differences to the baseline on a task with their intervals and, where paired, each unit."""
    rows = [r for r in j.of(task) if r.difference]
    base = next((r for r in j.of(task) if r.baseline), None)
    if not rows or base is None:
        return None
    digits = places_of(j.of(task))
    theirs = dict(zip(base.units, base.scores))
    entries: Entries = []
    for r in rows:
        d = r.difference
        assert d is not None
        each = [s - theirs[u] for u, s in zip(r.units, r.scores) if u in theirs] if d.paired else []
        each = [x for x in each if math.isfinite(x)]
        words = f"{signed(d.mean, digits)} [{signed(d.low, digits)}, {signed(d.high, digits)}], {r.verdict}"
        entries.append((r.method, (d.mean, d.low, d.high), words, each))
    way = "lower" if j.lower_is_better else "higher"
    title = f"difference to the baseline ({way} is better)"
    where = f" on {task}" if task else ""
    return _forest(key, f"Differences to {j.baseline}{where}", title, entries, j.methods, 0.0)


def _panels(j: "Judgement") -> list[tuple[str, Figure]]:
    digits = _iqm_digits(j)
    overall: Entries = [
        (a.method, (a.overall.mean, a.overall.low, a.overall.high), f"{with_interval(a.overall, 2)}, {a.verdict}", [])
        for a in j.aggregates
        if a.overall
    ]
    chance: Entries = [(a.method, a.improvement, ranged(a.improvement, 2), []) for a in j.aggregates if a.improvement]
    rank: Entries = [(a.method, a.rank, ranged(a.rank, 2), []) for a in j.aggregates]
    middle: Entries = [(a.method, a.iqm, ranged(a.iqm, digits), []) for a in j.aggregates if math.isfinite(a.iqm[0])]
    way = "higher" if j.higher_is_better_normalised else "lower"
    sd = "lower" if j.lower_is_better else "higher"
    asked: list[tuple[str, str, str, Entries, float | None]] = [
        ("Standardised difference (judged)", "overall", f"standard deviations; {sd} is better", overall, 0.0),
        ("Probability of beating the baseline", "chance", "probability; higher is better", chance, 0.5),
        ("Mean rank", "rank", "mean rank; 1 is best", rank, None),
        ("Interquartile mean", "middle", f"normalised score; {way} is better", middle, None),
    ]
    return [(h, _forest(key, h, title, e, j.methods, at)) for h, key, title, e, at in asked if e]


def _forest(
    key: str,
    alt: str,
    title: str,
    entries: Entries,
    methods: Sequence[str],
    zero: float | None,
) -> Figure:
    """Estimates with intervals, a line each; the name stands over its line, so that a phone has room for both."""
    data: list[Json] = []
    notes = []
    for y, (method, (mean, low, high), words, each) in zip(range(0, -len(entries), -1), entries):
        i = methods.index(method)
        if each:
            tick = {"symbol": "line-ns-open", "size": 9, "color": colour(i), "opacity": 0.55, "line": {"width": 1.5}}
            data.append(marked(each, [y - 0.25] * len(each), tick, ""))
        if math.isfinite(low) and math.isfinite(high):
            data.append(line([low, high], [y, y], i, width=4))
        hover = f"{html.escape(method)}<br>{html.escape(words)}"
        data.append(marked([mean], [y], marker(i, size=10), hover))
        notes.append(note(label(method, 40).split("<br>")[0] + ("…" if "<br>" in label(method, 40) else ""), y + 0.55))
    y_axis = {"range": [-len(entries) + 0.35, 0.65], "visible": False, "zeroline": False}
    ends = [v for _, estimate, _, each in entries for v in (*estimate, *each) if math.isfinite(v)]
    ends += [] if zero is None else [zero]
    pad = 0.04 * (max(ends) - min(ends)) or 1.0
    x_axis = axis(title, range=[min(ends) - pad, max(ends) + pad])
    layout: Json = {"xaxis": x_axis, "yaxis": y_axis, "annotations": notes}
    if zero is not None:
        edge = {"type": "line", "x0": zero, "x1": zero, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
        layout["shapes"] = [edge | {"line": {"color": "var(--soft)", "width": 1}}]
    said = "; ".join(f"{m}: {words}" for m, _, words, _ in entries)
    return Figure(key, f"{alt}. {said}.", data, layout, 70 + 52 * len(entries))


def _profiles(j: "Judgement", plots: list[Figure], small: bool) -> str:
    figure = profiles(j)
    if figure is None:
        return "<p>Nothing to draw: no task tells the methods apart.</p>"
    plots.append(figure)
    names = [a.method for a in j.aggregates]
    legend = keys([(j.methods.index(m), _swatch(j.methods.index(m)), _name(m)) for m in names], "Methods", small)
    caption = CAPTIONS["profiles"].format(way="above" if j.higher_is_better_normalised else "below")
    return f"<figure>{legend}{plot(figure)}<figcaption>{caption}</figcaption></figure>"


def profiles(j: "Judgement") -> Figure | None:
    """Share of runs over all tasks beyond each score: the score distributions of Agarwal et al. 2021, section 4.1."""
    scores = {a.method: [s for t in j.tasks for s in j.normalised(j[t, a.method])] for a in j.aggregates}
    known = [s for x in scores.values() for s in x]
    if not known or min(known) == max(known):
        return None
    first, last = min(known), max(known)
    at = [first + (last - first) * i / (STEPS - 1) for i in range(STEPS)]
    data, said = [], []
    for m, x in scores.items():
        i = j.methods.index(m)
        higher = j.higher_is_better_normalised
        share = [sum((s > t) if higher else (s < t) for s in x) / len(x) for t in at]
        about = {"meta": {"recipe": i}, "hoverinfo": "all"}
        about["hovertemplate"] = f"{html.escape(m)}: %{{y:.0%}} at %{{x:.3g}}<extra></extra>"
        data.append(line(at, share, i, dash=DASHES[i % len(DASHES)], **about))
        said.append(f"{m}: {share[STEPS // 2]:.0%}")
    beyond = "above" if j.higher_is_better_normalised else "below"
    layout = {
        "xaxis": axis("normalised score"),
        "yaxis": axis(f"share of runs {beyond} it", tickformat=".0%", rangemode="tozero"),
    }
    alt = f"Performance profiles; at a normalised score of {at[STEPS // 2]:.3g} {'; '.join(said)}."
    return Figure("profile", alt, data, layout)


def _swatch(i: int) -> str:
    stroke = {"solid": "", "dash": "6 3", "dot": "2 2", "dashdot": "6 2 2 2", "longdash": "9 3"}[
        DASHES[i % len(DASHES)]
    ]
    path = f'<path d="M0 7h30" fill="none" stroke-width="3" stroke-dasharray="{stroke}"/>'
    return f'<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true" style="stroke:{colour(i)}">{path}</svg>'


# -- how it was done ---------------------------------------------------------------------------------------------------


def _method(j: "Judgement") -> str:
    several = len(j.tasks) > 1
    sentences = [
        f"The unit is a {j.unit}"
        + (": runs that share a tuning are averaged." if j.unit == "tuning" else ", taken to be tuned for itself."),
        "Differences are the method minus the baseline, paired over the units both have. Where they share fewer than "
        "two the means are compared (Welch).",
        f"Intervals hold at {100 * (1 - j.level):g}% for all differences of the table at once (Bonferroni), and verdicts follow "
        "Holm’s steps.",
        "“No difference shown” says that zero cannot be ruled out, not that methods are equal.",
    ]
    if several:
        sentences += [
            "The other half of the 5% of error goes to the verdicts over all tasks: the standardised "
            "difference averaged over the tasks as given, with the variance inflated for the standard deviations that are "
            f"themselves estimated; at least {OVERALL_UNITS} units on each task."
        ]
        if j.aggregates:
            how = {
                "range": "runs from the worst method’s mean at 0 to the best one’s at 1",
                "baseline": "is the score over the baseline’s mean",
                "none": "is the score as it is",
            }
            assert set(how) == set(NORMALISE)
            sentences += [
                f"A normalised score {how[j.normalise]}, task by task. Mean rank, probability of improvement and "
                f"interquartile mean have stratified bootstrap intervals of {DRAWS:,} draws (Agarwal et al. 2021); over few "
                "units these are too narrow, and nothing is called by them."
            ]
    failed = [f"{r.method}{f' on {r.task}' if several else ''} ({r.failed} of {r.runs})" for r in j.rows if r.failed]
    facts = {
        "Results": j.name,
        "Methods": f"{len(j.methods):,}" + (f", on {len(j.tasks):,} tasks" if several else ""),
        "Runs": f"{sum(r.runs for r in j.rows):,}, failed {sum(r.failed for r in j.rows):,}",
        "Failed": listed(failed) if failed else "none",
    }
    listing = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<ul>{''.join(f'<li>{escape(s)}</li>' for s in sentences)}</ul><dl>{listing}</dl>"


# -- small things ------------------------------------------------------------------------------------------------------


def _iqm_digits(j: "Judgement") -> int:
    return places((a.iqm[2] - a.iqm[1]) / 2 for a in j.aggregates)


def _name(name: str) -> str:
    """A name, to be broken where it is made of parts."""
    return f'<span class="name">{"<wbr>".join(escape(part) for part in re.split("(?<=[+(,_])", name))}</span>'


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
