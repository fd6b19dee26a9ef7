"""The report of a comparison: one HTML file that opens offline, for eyes, keyboards and screen readers."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from html import escape
from pathlib import Path

from pondera._words import DASH, decimals, listed, num, rate, seconds, signed, size_in_words, with_interval
from pondera.doctor._snippet import snippet
from pondera.errors import BadInput
from pondera.lab.results import Comparison, Row
from pondera.lab.stats import Difference, undecided
from pondera.report import _drawn as figures
from pondera.report._figures import DASHES, SYMBOLS, Figure, colour
from pondera.report._method import count, method
from pondera.report._shell import keys, plot, put, shell
from pondera.report._space import name as axis_name
from pondera.report._space import searched, short

GROUPS = (  # class, heading, sign
    ("better", "Better than the baseline", "▲"),
    ("worse", "Worse than the baseline", "▼"),
    ("none", "No difference shown", "○"),
    ("unsure", "Too few seeds to say", "?"),
    ("failed", "Failed", "✕"),
)
SIGNS = {kind: sign for kind, _, sign in GROUPS}
FEW_SEEDS = 5
SHAPES = {  # the figures' markers, drawn in a box of 30 x 14
    "circle": '<circle cx="15" cy="7" r="4"/>',
    "square": '<rect x="11" y="3" width="8" height="8"/>',
    "diamond": '<path d="M15 2l5 5-5 5-5-5z"/>',
    "triangle-up": '<path d="M15 2l5 9H10z"/>',
    "cross": '<path d="M13.3 2h3.4v3.3H20v3.4h-3.3V12h-3.4V8.700H10V5.300h3.300z"/>',
    "triangle-down": '<path d="M15 12l5-9H10z"/>',
    "pentagon": '<path d="M15 2l5 3.700-1.900 5.800h-6.200L10 5.700z"/>',
    "star": '<path d="M15 1.500l1.500 3.800 4 .3-3.100 2.600 1 4L15 10l-3.400 2.200 1-4L9.500 5.600l4-.3z"/>',
}
COLUMNS = (
    *("Recipe", "Tuned rate", "Score (95%)", "Difference to the baseline", "Standardised difference"),
    *("Difference at equal time", "To the baseline’s score", "Time a step, start-up"),
)
CAPTIONS = {
    "differences": "Filled marker and thick line: mean difference at an equal number of steps, with its interval. "
    "Hollow marker and dotted line: at equal seconds. Short ticks: single seeds. An interval that crosses the vertical "
    "line shows no difference.",
    "curves": "Mean over the seeds that finished; the band runs from the lowest seed to the highest. A thin line that "
    "ends in a cross is a run that failed.",
    "rates": "Mean validation score at each learning rate. Hollow markers on a dotted line: after a quarter of the steps, "
    "over all units; filled on a solid line: at the end, over the units that trained it so far. A cross at the foot: failed "
    "in every unit. Rings mark what units chose, larger for more units.",
    "space": "Every trial of every unit at its learning rate and its value; the larger a marker, the better it validated. "
    "Hollow: dropped after a quarter of the steps. Filled: trained to the end. Crosses: failed. Rings: what units chose. "
    "Where there are few values to choose from, the units of one value lie beside each other.",
    "size": "Mean test score with its own 95% interval, against what the trained model takes. A pruned weight counts its "
    "values and a bit for each place, a quantised one its codes and scales, a factored one its factors; multiplications by "
    "zero are left out. The dotted line joins the recipes that no other beats in score without taking more. What hardware "
    "makes of zeros and of few bits is another matter.",
    "signal": "What tells examples apart: the variance over a batch of each unit a layer puts out, averaged over its units, "
    "at the first seed and before the first step. Layers are numbered in the order they run, activations counted. A line "
    "that falls or climbs by decades is a signal that fades or explodes.",
}
STROKES = {"solid": "", "dash": "6 3", "dot": "2 2", "dashdot": "6 2 2 2", "longdash": "9 3"}


def write(comparison: Comparison, path: str | Path, *, small: bool = False) -> Path:
    """Write the report to `path`: a reader finds the old file or the whole new one.

    small: with still figures, for a file of at most some hundred kB rather than 5 MB.
    Raises: BadInput: if the path is a folder, lies in a folder that does not exist, or cannot be written.
    """
    return put(path, lambda: render(comparison, small=small))


def render(comparison: Comparison, *, small: bool = False) -> str:
    """The report as text: equal comparisons give equal text, and nothing in it is loaded from elsewhere."""
    c = comparison
    halves = [(d.high - d.low) / 2 for r in c.rows if (d := r.difference)]
    places = decimals(halves or [(r.score[2] - r.score[1]) / 2 for r in c.rows if r.finished])
    plots: list[Figure] = []
    sections = [
        ("table", "Results", _table(c, places)),
        ("intervals", "Difference to the baseline", _differences(c, places, plots)),
        *([("size", "Score against size", _sizes(c, places, plots))] if c.compressed else []),
        ("learning", "Learning curves", _curves(c, places, plots, small)),
        ("rates", "Sensitivity to the learning rate", _sensitivity(c, places, plots)),
        *(
            [("space", "What else was searched", _searched(c, places, plots))]
            if any(r.recipe.spaces for r in c.rows)
            else []
        ),
        ("start", "Signal before training", _signal(c, plots, small)),
        ("failures", "Failures", _failures(c)),
        ("code", "Code to paste", _code(c)),
        ("method", "How it was done", method(c)),
    ]
    over = f"pondera compare · {count(c.seeds, 'seed')} · {count(c.steps, 'step')}"
    return shell(_title(c), over, _headline(c, places), sections, plots, c.versions.get("pondera", ""), small)


# -- the headline -----------------------------------------------------------------------------------------------------


def kind(r: Row) -> str:
    """Where a row belongs in the headline: one of GROUPS, or "baseline"."""
    if r.failed:
        return "failed"
    if r.baseline:
        return "baseline"
    if r.difference is None:
        return "unsure"
    return r.difference.verdict if r.difference.verdict != "no difference shown" else "none"


def _of_kind(c: Comparison, key: str) -> list[Row]:
    """The rows of a group; those that are better, the best first."""
    rows = [r for r in c.rows if kind(r) == key]
    return sorted(rows, key=lambda r: -r.difference.mean if r.difference else 0.0) if key == "better" else rows


def _title(c: Comparison) -> str:
    base, others = c.rows[0], c.rows[1:]
    better = [r for r in others if kind(r) == "better"]
    if not others:
        told = "one recipe, and no other to compare it with" if base.finished else "the one recipe failed"
    elif not base.finished:
        told = "the baseline failed, so nothing can be compared with it"
    elif better:
        told = f"{len(better)} of {count(len(others), 'recipe')} better than the baseline"
    elif all(r.failed for r in others):
        told = "every recipe but the baseline failed"
    elif all(kind(r) in ("unsure", "failed") for r in others):
        told = "too few seeds to tell recipes apart"
    else:
        told = "no recipe shown to be better than the baseline"
    return f"{c.task.name}: {told}"


def _headline(c: Comparison, places: int) -> str:
    base = c.rows[0]
    mean, low, high = base.score
    spread = f" [{num(low, places)}, {num(high, places)}]" if math.isfinite(low) else ""
    score = f"{num(mean, places)}{spread} {escape(c.task.settings.score)}, where higher is better"
    told = f"reaches {score}" if base.finished else "did not finish a single run"
    cards = []
    for key, heading, sign in GROUPS:
        rows = _of_kind(c, key)
        items = "".join(f"<li>{_name(r)}<br><span class='soft'>{_in_words(r, places)}</span></li>" for r in rows)
        if key == "none" and rows:
            items += f"<li class='soft'>{_could_show(rows, places)}</li>"
        if rows:
            head = f'<h2><span aria-hidden="true">{sign} </span>{heading}</h2>'
            cards.append(f'<div class="card {key}">{head}<ul>{items}</ul></div>')
    notes = "".join(f"<li>{note}</li>" for note in _notes(c))
    return (
        f"<p class='lead'>The baseline, {_name(base)}, {told}.</p>"
        + (f'<div class="cards">{"".join(cards)}</div>' if cards else "")
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _in_words(r: Row, places: int) -> str:
    if r.failed:
        over = f"; over the seeds that finished {with_interval(r.difference, places)}" if r.difference else ""
        return f"{len(r.failed)} of {count(len(r.scores), 'run')}{over}"
    if r.difference is None:
        return f"score {num(r.score[0], places)}"
    return with_interval(r.difference, places)


def _could_show(rows: list[Row], places: int) -> str:
    """What the recipes without a verdict could have been called for; the table has it one by one."""
    shown = sorted(r.difference.shown for r in rows if r.difference)
    ends = dict.fromkeys(num(x, places) for x in (shown[0], shown[-1]))
    return f'A difference of {" to ".join(ends)} <a href="#table">would have been seen</a> in four of five tables.'


def _notes(c: Comparison) -> Iterator[str]:
    """What a reader should know before believing the headline."""
    if c.seeds == 1:
        yield f"One seed: no intervals; they need two seeds, and mean something from {FEW_SEEDS} on."
    elif len(c.rows) > 1 and c.seeds < FEW_SEEDS:
        yield f"{count(c.seeds, 'seed')} only: intervals are wide, and mean something from {FEW_SEEDS} on."
    for r in c.rows:
        d, t = r.difference, r.at_equal_time
        if d and t and d.verdict != t.verdict:
            yield f"Given equal seconds instead of equal steps, {_name(r)}: {t.verdict}."
    if c.repeatable is False:
        yield (
            "The task is not deterministic: the same run carried out twice gave two results. Verdicts hold all the same, "
            "for what is drawn anew in every run is part of the spread; a repetition of this table will differ."
        )
    at_ends = [f"{_name(r)} ({_of_units(r.edge, len(r.scores))})" for r in c.rows if r.edge]
    if at_ends:
        yield f"The best point still lies at an end of the space, so that a better one may lie beyond: {listed(at_ends)}."
    lost = [f"{_name(r)} ({listed(f'{n} {w}' for w, n in r.lost.items())})" for r in c.rows if r.lost and not r.failed]
    if lost:
        yield f"Trials that did not finish, each a trial that lost: {listed(lost)}."
    if any(r.failed and r.difference for r in c.rows):
        yield "A difference over the seeds that finished flatters a recipe that fails on the others."


# -- the table --------------------------------------------------------------------------------------------------------


def _table(c: Comparison, places: int) -> str:
    heads = "".join(f'<th scope="col">{h}</th>' for h in COLUMNS)
    caption = (
        f"Mean test {escape(c.task.settings.score)} over {count(c.seeds, 'seed')} with its 95% interval; differences "
        "paired over seeds, their intervals at 95% for all recipes at once. Times are medians."
    )
    rows = "".join(_row(i, r, places) for i, r in enumerate(c.rows))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results, scrolls sideways">'
        f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(i: int, r: Row, places: int) -> str:
    mean, low, high = r.score
    several = len(r.finished) > 1
    spread = f"[{num(low, places)}, {num(high, places)}]" if several else "one seed" if r.finished else ""
    edge = f'<span class="edge">at an end in {r.edge} of {len(r.scores)}</span>' if r.edge else ""
    found = sorted({p.rate for p in r.chosen if p})
    edge += f"<small>{rate(found[0])} to {rate(found[-1])}</small>" if len(found) > 1 else ""
    if r.recipe.spaces and r.point:
        values = ", ".join(f"{arg} {short(value)}" for (_, arg), value in r.point.values)
        edge += f'<small class="words">{escape(values)}</small>'
    target = f"{r.target[0]:.0f} steps<small>{seconds(r.target[1])}</small>" if r.target else DASH
    d = r.difference
    could = "" if r.failed else undecided(d, places)
    could = f'<small class="words">{escape(could)}</small>' if could else ""
    verdict = _mark(kind(r), r.verdict) if r.failed or (d is None and not r.baseline) else ""
    cells = (
        f"{rate(r.rate)}{edge}",
        f"{num(mean, places)}<small>{spread}</small>",
        "baseline" if kind(r) == "baseline" else _difference_cell(d, places) + verdict + could,
        (num(d.standardised, 2) if d else DASH) + ("<small>large</small>" if d and d.large else ""),
        _difference_cell(r.at_equal_time, places),
        target,
        f"{seconds(r.step_seconds)}<small>{seconds(r.start_seconds)}</small>",
    )
    head = f'<th scope="row"><span class="key">{_swatch(i)}{_name(r)}</span></th>'
    return f"<tr{' class=base' if r.baseline else ''}>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _difference_cell(d: Difference | None, places: int) -> str:
    if d is None:
        return DASH
    key = "none" if d.verdict == "no difference shown" else d.verdict
    spread = f"<small>[{signed(d.low, places)}, {signed(d.high, places)}]</small>"
    return f"{signed(d.mean, places)}{spread}{_mark(key, d.verdict)}"


def _mark(key: str, words: str) -> str:
    return f'<span class="mark {key}"><span aria-hidden="true">{SIGNS[key]} </span>{escape(words)}</span>'


# -- the figures ------------------------------------------------------------------------------------------------------


def _differences(c: Comparison, places: int, plots: list[Figure]) -> str:
    figure = figures.differences(c, places)
    if figure is None:
        why = "there is one recipe" if len(c.rows) < 2 else "no recipe shares two finished seeds with the baseline"
        return f"<p>Nothing to draw: {why}.</p>"
    return _figure(figure, CAPTIONS["differences"], plots)


def _curves(c: Comparison, places: int, plots: list[Figure], small: bool) -> str:
    figure = figures.curves(c, places)
    if figure is None:
        return "<p>No run got as far as a score.</p>"
    toggle = (
        "<fieldset><legend>Horizontal axis</legend>"
        '<label><input type="radio" name="horizontal" value="step" checked>steps</label>'
        '<label><input type="radio" name="horizontal" value="second">seconds</label></fieldset>'
    )
    if figure.closeup:
        whole, close = ("", " checked") if figure.close else (" checked", "")
        toggle += (
            "<fieldset><legend>Vertical axis</legend>"
            f'<label><input type="radio" name="vertical" value="all"{whole}>whole run</label>'
            f'<label><input type="radio" name="vertical" value="close"{close}>close-up of the second half</label></fieldset>'
        )
    caption = CAPTIONS["curves"]
    if figure.close:
        caption += (
            " Over the whole run the curves lie on each other, so the close-up of the second half is shown first."
        )
    if small:
        caption = caption.replace("is shown first", "is drawn")
    above = _keys(c, small) if small else f'<div class="toggles">{toggle}</div>{_keys(c, small)}'
    return _figure(figure, caption, plots, above)


def _sensitivity(c: Comparison, places: int, plots: list[Figure]) -> str:
    found = figures.sensitivity(c, places)
    if not found:
        return f"<p>There is one rate, {rate(c.rates[0])}; no rate was tuned.</p>"
    plots += found
    parts = "".join(
        f'<div><h3 class="key">{_swatch(i)}{_name(r)}</h3>{plot(f)}</div>'
        for i, (r, f) in enumerate(zip(c.rows, found))
    )
    return f'<figure><div class="small">{parts}</div><figcaption>{CAPTIONS["rates"]}</figcaption></figure>'


def _searched(c: Comparison, places: int, plots: list[Figure]) -> str:
    found = searched(c, places)
    plots += [f for _, _, f in found]
    parts = "".join(
        f'<div><h3 class="key">{_swatch(i)}<span>{_name(c.rows[i])}<br>{escape(axis_name(where))}</span></h3>{plot(f)}</div>'
        for i, where, f in found
    )
    return f'<figure><div class="small">{parts}</div><figcaption>{CAPTIONS["space"]}</figcaption></figure>'


def _sizes(c: Comparison, places: int, plots: list[Figure]) -> str:
    found = figures.sizes(c, places)
    plots += found
    heads = ("Recipe", f"{escape(c.task.settings.score)} [95%]", "Size", "Numbers", "Multiplications")
    rows = ""
    for i, r in enumerate(c.rows):
        mean, low, high = r.score
        spread = f"<small>[{num(low, places)}, {num(high, places)}]</small>" if math.isfinite(low) else ""
        size = (
            (size_in_words(r.size.bytes), f"{r.size.numbers:,.0f}", f"{r.size.multiplications:,.0f}")
            if r.size
            else None
        )
        cells = (f"{num(mean, places)}{spread}", *(size or (DASH,) * 3))
        head = f'<th scope="row"><span class="key">{_swatch(i)}{_name(r)}</span></th>'
        rows += f"<tr{' class=base' if r.baseline else ''}>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Sizes, scrolls sideways"><table><caption>What the trained '
        f"models take.</caption><thead><tr>{''.join(f'<th scope=col>{h}</th>' for h in heads)}</tr></thead><tbody>{rows}"
        "</tbody></table></div>"
    )
    parts = "".join(f"<div>{plot(f)}</div>" for f in found)
    drawn = (
        f'<figure><div class="small">{parts}</div><figcaption>{CAPTIONS["size"]}</figcaption></figure>' if found else ""
    )
    return drawn + table


def _signal(c: Comparison, plots: list[Figure], small: bool) -> str:
    figure = figures.signal(c)
    if figure is None:
        return "<p>The signal was not looked at for these runs.</p>"
    return _figure(figure, CAPTIONS["signal"], plots, _keys(c, small))


def _figure(figure: Figure, caption: str, plots: list[Figure], above: str = "") -> str:
    plots.append(figure)
    return f"<figure>{above}{plot(figure)}<figcaption>{caption}</figcaption></figure>"


def _keys(c: Comparison, small: bool) -> str:
    return keys([(i, _swatch(i), _name(r)) for i, r in enumerate(c.rows)], "Recipes", small)


def _swatch(i: int) -> str:
    symbol, stroke = SYMBOLS[i % len(SYMBOLS)], STROKES[DASHES[i % len(DASHES)]]
    line = f'<path d="M0 7h30" fill="none" stroke-width="2" stroke-dasharray="{stroke}"/>'
    paint = f'style="fill:{colour(i)};stroke:{colour(i)}"'
    return f'<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true" {paint}>{line}{SHAPES[symbol]}</svg>'


# -- failures and code -------------------------------------------------------------------------------------------


def _failures(c: Comparison) -> str:
    items = []
    for r in c.rows:
        reasons: dict[str, list[str]] = defaultdict(list)
        for seed, why in r.failed.items():
            reasons[why].append(str(seed))
        for why, seeds in reasons.items():
            items.append(f"<li>{_name(r)}, seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}: {escape(why)}</li>")
        lost = {x: f["failed"] for x, f in figures.fate(r).items() if f["failed"]}
        if lost and r.finished:
            told = listed(f"{rate(x)} ({count(n, 'unit')})" for x, n in lost.items())
            why = next(t.failed for unit in r.trials for t in unit if t.failed)
            items.append(f"<li>{_name(r)}, while tuning: no score at {told}; the first: {escape(why)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else "<p>None: every recipe finished all its seeds.</p>"


def _code(c: Comparison) -> str:
    s = c.task.settings
    parts = []
    opened = next(iter(_of_kind(c, "better")), c.rows[0])
    for r in c.rows:
        text = ""
        if math.isfinite(r.rate):
            with suppress(BadInput):  # a method of one's own that is not here any more
                text = snippet(r.setting, r.rate, steps=c.steps, optim=s.optim, schedule=s.schedule, adapt=c.task.adapt)
        body = "<p>Nothing to advise: no learning rate finished, or the method is not here any more.</p>"
        if text:
            body = '<button type="button" class="copy" hidden>copy</button>'
            body += f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
        summary = f"<summary>{_name(r)}</summary>"
        parts.append(f'<details{" open" if r is opened else ""}>{summary}<div class="body">{body}</div></details>')
    own = "<code>model</code>, <code>loss_fn(output, target)</code> and <code>loader</code>"
    told = (
        "<p>Each recipe as code for your own training script, at the middle of what its units were tuned to; "
        f"{own} are yours.</p>"
    )
    return told + "".join(parts)


# -- small things -----------------------------------------------------------------------------------------------------


def _name(r: Row) -> str:
    """The recipe's name, to be broken where it is made of parts."""
    return f'<span class="name">{"<wbr>".join(escape(part) for part in re.split("(?<=[+(,_])", r.name))}</span>'


def _of_units(n: int, of: int) -> str:
    return f"{n} of {count(of, 'unit')}"
