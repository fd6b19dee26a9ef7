"""The report of a comparison: one HTML file that opens offline, for eyes, keyboards and screen readers."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from html import escape
from pathlib import Path

from pondera._words import DASH, decimals, listed, num, rate, seconds, signed, with_interval
from pondera.doctor._snippet import snippet
from pondera.errors import BadInput
from pondera.lab.plan import EXTENSIONS, RUNG, kept
from pondera.lab.results import Comparison, Row, undecided
from pondera.lab.stats import Difference
from pondera.report import _drawn as figures
from pondera.report._figures import DASHES, SYMBOLS, Figure, colour
from pondera.report._shell import plot, put, shell

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
    *("Difference at equal time", "To the baseline’s score", "Time a step", "Start-up"),
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
    "signal": "What tells examples apart: the variance over a batch of each unit a layer puts out, averaged over its units, "
    "at the first seed and before the first step. A line that falls or climbs by decades is a signal that fades or explodes.",
}
STROKES = {"solid": "", "dash": "6 3", "dot": "2 2", "dashdot": "6 2 2 2", "longdash": "9 3"}


def write(comparison: Comparison, path: str | Path) -> Path:
    """Write the report to `path`: a reader finds the old file or the whole new one.

    Raises: BadInput: if the path is a folder, lies in a folder that does not exist, or cannot be written.
    """
    return put(path, lambda: render(comparison))


def render(comparison: Comparison) -> str:
    """The report as text: equal comparisons give equal text, and nothing in it is loaded from elsewhere."""
    c = comparison
    halves = [(d.high - d.low) / 2 for r in c.rows if (d := r.difference)]
    places = decimals(halves or [(r.score[2] - r.score[1]) / 2 for r in c.rows if r.finished])
    plots: list[Figure] = []
    sections = [
        ("table", "Results", _table(c, places)),
        ("intervals", "Difference to the baseline", _differences(c, places, plots)),
        ("learning", "Learning curves", _curves(c, places, plots)),
        ("rates", "Sensitivity to the learning rate", _sensitivity(c, places, plots)),
        ("start", "Signal before training", _signal(c, plots)),
        ("failures", "Failures", _failures(c)),
        ("code", "Code to paste", _code(c)),
        ("method", "How it was done", _method(c)),
    ]
    over = (
        f'pondera compare · task <span class="name">{escape(c.task.name)}</span> · {escape(c.task.settings.score)}, '
        f"higher is better · {_count(c.seeds, 'seed')} · {_count(c.steps, 'step')}"
    )
    return shell(_title(c), over, _headline(c, places), sections, plots, c.versions.get("pondera", ""))


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


def _title(c: Comparison) -> str:
    base, others = c.rows[0], c.rows[1:]
    better = [r for r in others if kind(r) == "better"]
    if not others:
        told = "one recipe, and no other to compare it with" if base.finished else "the one recipe failed"
    elif not base.finished:
        told = "the baseline failed, so nothing can be compared with it"
    elif better:
        told = f"{len(better)} of {_count(len(others), 'recipe')} better than the baseline"
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
    told = f"reaches {num(mean, places)}{spread}" if base.finished else "did not finish a single run"
    cards = []
    for key, heading, sign in GROUPS:
        rows = [r for r in c.rows if kind(r) == key]
        items = "".join(f"<li>{_name(r)}<br><span class='soft'>{_in_words(r, places)}</span></li>" for r in rows)
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
        return f"{len(r.failed)} of {_count(len(r.scores), 'run')}{over}"
    if r.difference is None:
        return f"score {num(r.score[0], places)}"
    could = undecided(r.difference, places)
    return with_interval(r.difference, places) + (f". {could}" if could else "")


def _notes(c: Comparison) -> Iterator[str]:
    """What a reader should know before believing the headline."""
    if c.seeds == 1:
        yield f"One seed: no intervals; they need two seeds, and mean something from {FEW_SEEDS} on."
    elif len(c.rows) > 1 and c.seeds < FEW_SEEDS:
        yield f"{_count(c.seeds, 'seed')} only: intervals are wide, and mean something from {FEW_SEEDS} on."
    for r in c.rows:
        d, t = r.difference, r.at_equal_time
        if d and t and d.verdict != t.verdict:
            yield f"Given equal seconds instead of equal steps, {_name(r)}: {t.verdict}."
    if c.repeatable is False:
        yield (
            "The task is not deterministic: the same run carried out twice gave two results. Verdicts hold all the same, "
            "for what is drawn anew in every run is part of the spread; a repetition of this table will differ."
        )
    for r in c.rows:
        if r.edge:
            yield (
                f"The best point of {_name(r)} still lies at an end of its space in {_count(r.edge, 'unit')} of {len(r.scores)} "
                "after it was extended; a better one may lie beyond."
            )
        if r.lost and not r.failed:
            told = listed(f"{n} {why}" for why, n in r.lost.items())
            yield f"Trials of {_name(r)} that did not finish: {told}; each is a trial that lost."
    if any(r.failed and r.difference for r in c.rows):
        yield "A difference over the seeds that finished flatters a recipe that fails on the others."


# -- the table --------------------------------------------------------------------------------------------------------


def _table(c: Comparison, places: int) -> str:
    heads = "".join(f'<th scope="col">{h}</th>' for h in COLUMNS)
    caption = (
        f"Mean test {escape(c.task.settings.score)} over {_count(c.seeds, 'seed')} with its 95% interval; differences "
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
        values = ", ".join(f"{arg} {value}" for (_, arg), value in r.point.values)
        edge += f"<small>{escape(values)}</small>"
    target = f"{r.target[0]:.0f} steps<small>{seconds(r.target[1])}</small>" if r.target else DASH
    d = r.difference
    verdict = _mark(kind(r), r.verdict) if r.failed or (d is None and not r.baseline) else ""
    cells = (
        f"{rate(r.rate)}{edge}",
        f"{num(mean, places)}<small>{spread}</small>",
        "baseline" if kind(r) == "baseline" else _difference_cell(d, places) + verdict,
        (num(d.standardised, 2) if d else DASH) + ("<small>large</small>" if d and d.large else ""),
        _difference_cell(r.at_equal_time, places),
        target,
        seconds(r.step_seconds),
        seconds(r.start_seconds),
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


def _curves(c: Comparison, places: int, plots: list[Figure]) -> str:
    figure = figures.curves(c, places)
    if figure is None:
        return "<p>No run got as far as a score.</p>"
    toggle = (
        "<fieldset><legend>Horizontal axis</legend>"
        '<label><input type="radio" name="horizontal" value="step" checked>steps</label>'
        '<label><input type="radio" name="horizontal" value="second">seconds</label></fieldset>'
    )
    if figure.closeup:
        toggle += (
            "<fieldset><legend>Vertical axis</legend>"
            '<label><input type="radio" name="vertical" value="all" checked>whole run</label>'
            '<label><input type="radio" name="vertical" value="close">close-up of the second half</label></fieldset>'
        )
    above = f'<div class="toggles">{toggle}</div>{_keys(c)}'
    return _figure(figure, CAPTIONS["curves"], plots, above)


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


def _signal(c: Comparison, plots: list[Figure]) -> str:
    figure = figures.signal(c)
    if figure is None:
        return "<p>The signal was not looked at for these runs.</p>"
    return _figure(figure, CAPTIONS["signal"], plots, _keys(c))


def _figure(figure: Figure, caption: str, plots: list[Figure], above: str = "") -> str:
    plots.append(figure)
    return f"<figure>{above}{plot(figure)}<figcaption>{caption}</figcaption></figure>"


def _keys(c: Comparison) -> str:
    """The legend: a button a recipe, pressed while it is shown."""
    buttons = (
        f'<li><button type="button" aria-pressed="true" data-recipe="{i}">{_swatch(i)}{_name(r)}</button></li>'
        for i, r in enumerate(c.rows)
    )
    return f'<ul class="keys" aria-label="Recipes shown">{"".join(buttons)}</ul>'


def _swatch(i: int) -> str:
    symbol, stroke = SYMBOLS[i % len(SYMBOLS)], STROKES[DASHES[i % len(DASHES)]]
    line = f'<path d="M0 7h30" fill="none" stroke-width="2" stroke-dasharray="{stroke}"/>'
    paint = f'style="fill:{colour(i)};stroke:{colour(i)}"'
    return f'<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true" {paint}>{line}{SHAPES[symbol]}</svg>'


# -- failures, code, method -------------------------------------------------------------------------------------------


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
            told = listed(f"{rate(x)} ({_count(n, 'unit')})" for x, n in lost.items())
            why = next(t.failed for unit in r.trials for t in unit if t.failed)
            items.append(f"<li>{_name(r)}, while tuning: no score at {told}; the first: {escape(why)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else "<p>None: every recipe finished all its seeds.</p>"


def _code(c: Comparison) -> str:
    s = c.task.settings
    parts = []
    opened = next((r for r in c.rows if kind(r) == "better"), c.rows[0])
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


def _method(c: Comparison) -> str:
    s, k = c.task.settings, c.trials
    budgets = (
        f"Three budgets are equal, each said apart. Equal steps: every run to the end takes {_count(c.steps, 'step')}. Equal "
        f"trials: every unit tries {_count(k, 'point')}, whatever its recipe searches. Equal time: a second verdict, where both "
        "are stopped when the first of the two would be done, start-up counted, and read between the points of their curves."
    )
    tuned = (
        f"A unit is a recipe at a seed, tuned for itself: its {k} points run for {RUNG:.0%} of the steps under a schedule "
        f"of that length, the best {kept(k)} by validation are trained to the end, and the one that validates best there "
        "gives the unit’s score, on test data that nothing was chosen by. It is not trained again on the data held out. "
        "Where the best point of any recipe lies at an end of its space, the space is extended by a step and every recipe "
        f"of that seed gets a further trial, {EXTENSIONS} times at most."
        if c.tuned
        else f"All recipes run at the one learning rate given, {rate(c.rates[0])}; nothing is tuned, every unit trains on all "
        "training data, and a verdict is one at this rate."
    )
    drawn = (
        "Everything that is drawn is drawn anew for every seed: the weights, the order of the data, the part held out to "
        "validate, the trials of the space. Recipes share what they can of it: the split, the order, and every weight they "
        "leave alone."
    )
    many = _count(max(1, len(c.rows) - 1), "comparison")
    looked = (
        f"Seeds were added until decided, with looks at {listed(str(n) for n in c.looks)}; every look is taken at one level, so "
        f"that the chance of a false call over all of them and over {many} is 5% (Pocock; Bonferroni)."
        if c.looks
        else f"Differences to the baseline are paired over units. The intervals of {many} hold at once, and the verdicts "
        "follow Holm’s steps; of the 5% of error 4% go to verdicts at equal steps, 1% to those at equal time. The spread of a "
        "difference is taken to be at least one step of the score."
    )
    sentences = (
        budgets, tuned, drawn, looked,
        "“No difference shown” says that the interval holds zero, not that recipes are equal; beside it stands the difference "
        "that so many seeds show four times of five.",
    )  # fmt: skip
    facts = {
        "Task": f"{c.task.name} ({c.task.fingerprint})",
        "Data": _splits(c),
        "Seeds": f"{c.seeds}, the same for every recipe" + ("" if not c.looks else " that was not decided before"),
        "Rates": ", ".join(rate(x) for x in c.rates),
        "Searched": "; ".join(f"{r.name}: {_spaces(r)}" for r in c.rows if r.recipe.spaces) or "the rate alone",
        "Steps": f"{c.steps:,} of batch {s.batch}, {s.schedule} schedule",
        "Optimizer": f"{s.optim} where a recipe chooses none",
        "Parameters": _parameters(c),
        "Runs": f"{c.runs:,}, of which {c.repeated:,} came from the store; this call took {seconds(c.seconds)}",
        "Depends on": ", ".join(f"{name} {v}" for name, v in c.depends.items()) or DASH,
        "Versions": ", ".join(f"{name} {v}" for name, v in c.versions.items()) or DASH,
    }
    listing = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return "".join(f"<p>{sentence}</p>" for sentence in sentences) + f"<dl>{listing}</dl>"


def _spaces(r: Row) -> str:
    return ", ".join(f"{room} {arg} over {space!r}" for (room, arg), space in r.recipe.spaces.items())


def _splits(c: Comparison) -> str:
    try:
        (fit, held), (train, test) = ((len(a[0]), len(b[0])) for a, b in (c.task.split("tune"), c.task.split("final")))
    except Exception:  # the report must not depend on data that may be gone
        return DASH
    return f"{train:,} to train on (while tuning {fit:,}, and {held:,} to validate on), {test:,} to test on"


def _parameters(c: Comparison) -> str:
    counts: dict[int, list[str]] = defaultdict(list)
    for r in c.rows:
        if r.parameters:
            counts[r.parameters].append(r.name)
    if len(counts) < 2:
        return f"{next(iter(counts)):,}" if counts else DASH
    return "; ".join(f"{n:,} ({listed(names)})" for n, names in counts.items())


# -- small things -----------------------------------------------------------------------------------------------------


def _name(r: Row) -> str:
    """The recipe's name, to be broken where it is made of parts."""
    return f'<span class="name">{"<wbr>".join(escape(part) for part in re.split("(?<=[+(,_])", r.name))}</span>'


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
