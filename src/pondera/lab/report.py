"""The report of a comparison: one HTML file that opens offline, for eyes, keyboards and screen readers."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.errors import BadInput
from pondera.lab import _figures as figures
from pondera.lab._figures import DASHES, SYMBOLS, Figure, colour
from pondera.lab._snippet import snippet
from pondera.lab._words import DASH, decimals, listed, num, rate, seconds, signed, with_interval

if TYPE_CHECKING:
    from pondera.lab._compare import Comparison, Row
    from pondera.lab.stats import Difference

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
    *("Difference at equal time", "Time a step", "Start-up"),
)
CAPTIONS = {
    "differences": "Filled marker and thick line: mean difference at an equal number of steps, with its interval. "
    "Hollow marker and dotted line: at equal seconds. Short ticks: single seeds. An interval that crosses the vertical "
    "line shows no difference.",
    "curves": "Mean over the seeds that finished; the band runs from the lowest seed to the highest. A thin line that "
    "ends in a cross is a run that failed.",
    "rates": "Mean validation score of the tuning runs at each learning rate. Hollow markers on a dotted line: after a "
    "quarter of the steps; filled on a solid line: at the end, for the rates that went on. Hollow only: dropped. A "
    "cross at the foot: failed. The ring marks the rate chosen.",
    "signal": "What tells examples apart: the variance over a batch of each unit a layer puts out, averaged over its units, "
    "at the first seed and before the first step. A line that falls or climbs by decades is a signal that fades or explodes.",
}
STROKES = {"solid": "", "dash": "6 3", "dot": "2 2", "dashdot": "6 2 2 2", "longdash": "9 3"}


def write(comparison: "Comparison", path: str | Path) -> Path:
    """Write the report to `path`: a reader finds the old file or the whole new one.

    Raises: BadInput: if the path is a folder, lies in a folder that does not exist, or cannot be written.
    """
    return put(path, lambda: render(comparison))


def put(path: str | Path, text: Callable[[], str]) -> Path:
    """Write a page by atomic rename, its path checked before the text is made."""
    from pondera.replications._claims import write_atomically

    path = check_path(path)
    try:
        write_atomically(path, text())
    except OSError as error:
        raise BadInput(f"the report cannot be written to {path}: {error.strerror or error}") from None
    return path


def check_path(path: str | Path) -> Path:
    """Return the path a report can be written to; BadInput for a folder, or a file in a folder that does not exist."""
    path = Path(path)
    try:
        if path.is_dir():
            raise BadInput(f"the report needs the path of a file, got the folder {path}")
        if not path.parent.is_dir():
            raise BadInput(f"the report cannot be written to {path}: there is no folder {path.parent}")
    except OSError as error:
        raise BadInput(f"the report cannot be written to {path}: {error.strerror or error}") from None
    return path


def render(comparison: "Comparison") -> str:
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


def shell(
    title: str, over: str, lead: str, sections: Sequence[tuple[str, str, str]], plots: Sequence[Figure], version: str
) -> str:
    """A whole page: heading, lead, linked sections (key, heading, HTML) and the figures' script; it loads nothing."""
    from plotly.offline import get_plotlyjs

    links = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, heading, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{heading}</h2>{content}</section>\n'
        for key, heading, content in sections
    )
    here = files("pondera.lab")
    css, js = ((here / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<div class="page">
<header>
<p class="over">{over}</p>
<h1>{escape(title)}</h1>
</header>
<main id="main" tabindex="-1">
{lead}
<nav aria-label="Sections"><ul>{links}</ul></nav>
{body}</main>
<footer>Written by pondera {escape(version)}.
This file holds everything it shows; it loads nothing.</footer>
</div>
<script type="application/json" id="figures">{_json({f.id: f.spec for f in plots})}</script>
<script>{get_plotlyjs()}</script>
<script>{js}</script>
</body>
</html>
"""
    return text.encode("utf-8", "replace").decode("utf-8")


# -- the headline -----------------------------------------------------------------------------------------------------


def kind(r: "Row") -> str:
    """Where a row belongs in the headline: one of GROUPS, or "baseline"."""
    if r.failed:
        return "failed"
    if r.baseline:
        return "baseline"
    if r.difference is None:
        return "unsure"
    return r.difference.verdict if r.difference.verdict != "no difference shown" else "none"


def _title(c: "Comparison") -> str:
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


def _headline(c: "Comparison", places: int) -> str:
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


def _in_words(r: "Row", places: int) -> str:
    if r.failed:
        over = f"; over the seeds that finished {with_interval(r.difference, places)}" if r.difference else ""
        return f"{len(r.failed)} of {_count(len(r.scores), 'run')}{over}"
    return with_interval(r.difference, places) if r.difference else f"score {num(r.score[0], places)}"


def _notes(c: "Comparison") -> Iterator[str]:
    """What a reader should know before believing the headline."""
    if c.seeds == 1:
        yield f"One seed: no intervals; they need two seeds, and mean something from {FEW_SEEDS} on."
    elif len(c.rows) > 1 and c.seeds < FEW_SEEDS:
        yield f"{_count(c.seeds, 'seed')} only: intervals are wide, and mean something from {FEW_SEEDS} on."
    for r in c.rows:
        d, t = r.difference, r.at_equal_time
        if d and t and d.verdict != t.verdict:
            yield f"Given equal seconds instead of equal steps, {_name(r)}: {t.verdict}."
    edge = [r for r in c.rows if r.edge]
    if edge:
        yield (
            f"The best rate of {listed(_name(r) for r in edge)} lies at the end of the grid; a better one may lie "
            "beyond (widen it with <code>rates</code>)."
        )
    if any(r.failed and r.difference for r in c.rows):
        yield "A difference over the seeds that finished flatters a recipe that fails on the others."


# -- the table --------------------------------------------------------------------------------------------------------


def _table(c: "Comparison", places: int) -> str:
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


def _row(i: int, r: "Row", places: int) -> str:
    mean, low, high = r.score
    spread = f"[{num(low, places)}, {num(high, places)}]" if math.isfinite(low) else "one seed" if r.finished else ""
    edge = '<span class="edge">at the grid’s edge</span>' if r.edge else ""
    d = r.difference
    verdict = _mark(kind(r), r.verdict) if r.failed or (d is None and not r.baseline) else ""
    cells = (
        f"{rate(r.rate)}{edge}",
        f"{num(mean, places)}<small>{spread}</small>",
        "baseline" if kind(r) == "baseline" else _difference_cell(d, places) + verdict,
        (num(d.standardised, 2) if d else DASH) + ("<small>large</small>" if d and d.large else ""),
        _difference_cell(r.at_equal_time, places),
        seconds(r.step_seconds),
        seconds(r.start_seconds),
    )
    head = f'<th scope="row"><span class="key">{_swatch(i)}{_name(r)}</span></th>'
    return f"<tr{' class=base' if r.baseline else ''}>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _difference_cell(d: "Difference | None", places: int) -> str:
    if d is None:
        return DASH
    key = "none" if d.verdict == "no difference shown" else d.verdict
    spread = f"<small>[{signed(d.low, places)}, {signed(d.high, places)}]</small>"
    return f"{signed(d.mean, places)}{spread}{_mark(key, d.verdict)}"


def _mark(key: str, words: str) -> str:
    return f'<span class="mark {key}"><span aria-hidden="true">{SIGNS[key]} </span>{escape(words)}</span>'


# -- the figures ------------------------------------------------------------------------------------------------------


def _differences(c: "Comparison", places: int, plots: list[Figure]) -> str:
    figure = figures.differences(c, places)
    if figure is None:
        why = "there is one recipe" if len(c.rows) < 2 else "no recipe shares two finished seeds with the baseline"
        return f"<p>Nothing to draw: {why}.</p>"
    return _figure(figure, CAPTIONS["differences"], plots)


def _curves(c: "Comparison", places: int, plots: list[Figure]) -> str:
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


def _sensitivity(c: "Comparison", places: int, plots: list[Figure]) -> str:
    found = figures.sensitivity(c, places)
    if not found:
        return f"<p>The grid holds one rate, {rate(c.rates[0])}; nothing was tuned.</p>"
    plots += found
    parts = "".join(
        f'<div><h3 class="key">{_swatch(i)}{_name(r)}</h3>{_plot(f)}</div>'
        for i, (r, f) in enumerate(zip(c.rows, found))
    )
    return f'<figure><div class="small">{parts}</div><figcaption>{CAPTIONS["rates"]}</figcaption></figure>'


def _signal(c: "Comparison", plots: list[Figure]) -> str:
    figure = figures.signal(c)
    if figure is None:
        return "<p>The signal was not looked at for these runs.</p>"
    return _figure(figure, CAPTIONS["signal"], plots, _keys(c))


def _figure(figure: Figure, caption: str, plots: list[Figure], above: str = "") -> str:
    plots.append(figure)
    return f"<figure>{above}{_plot(figure)}<figcaption>{caption}</figcaption></figure>"


def _plot(f: Figure) -> str:
    alt = escape(f.alt)
    return f'<div class="plot" id="{f.id}" role="img" style="height:{f.height}px" aria-label="{alt}"></div>'


def _keys(c: "Comparison") -> str:
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


def _failures(c: "Comparison") -> str:
    items = []
    for r in c.rows:
        reasons: dict[str, list[str]] = defaultdict(list)
        for seed, why in r.failed.items():
            reasons[why].append(str(seed))
        for why, seeds in reasons.items():
            items.append(f"<li>{_name(r)}, seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}: {escape(why)}</li>")
        lost = [x for x, f in figures.fate(r).items() if f == "failed"]
        if lost and math.isfinite(r.rate):
            items.append(f"<li>{_name(r)}, while tuning: no score at {listed(rate(x) for x in lost)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else "<p>None: every recipe finished all its seeds.</p>"


def _code(c: "Comparison") -> str:
    s = c.task.settings
    parts = []
    opened = next((r for r in c.rows if kind(r) == "better"), c.rows[0])
    for r in c.rows:
        text = ""
        if math.isfinite(r.rate):
            with suppress(BadInput):  # a method of one's own that is not here any more
                text = snippet(r.recipe, r.rate, steps=c.steps, optim=s.optim, schedule=s.schedule, adapt=c.task.adapt)
        body = "<p>Nothing to advise: no learning rate finished, or the method is not here any more.</p>"
        if text:
            body = '<button type="button" class="copy" hidden>copy</button>'
            body += f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
        summary = f"<summary>{_name(r)}</summary>"
        parts.append(f'<details{" open" if r is opened else ""}>{summary}<div class="body">{body}</div></details>')
    own = "<code>model</code>, <code>loss_fn(output, target)</code> and <code>loader</code>"
    return (
        f"<p>Each recipe as code for your own training script, at its tuned rate; {own} are yours.</p>{''.join(parts)}"
    )


def _method(c: "Comparison") -> str:
    from pondera.lab._compare import KEEP, RUNG, TUNE_SEEDS

    s, k = c.task.settings, len(c.rates)
    tuned = (
        f"Each recipe’s learning rate is tuned on the same grid of {k}: all run for {RUNG:.0%} of the steps on "
        f"{TUNE_SEEDS} tuning seeds, the best third ({max(1, math.ceil(KEEP * k))}) goes on to the end, and the best "
        "mean validation score wins."
        if k > 1
        else f"All recipes run at the one learning rate given, {rate(c.rates[0])}; nothing is tuned."
    )
    sentences = (
        f"Every recipe trains the same model on the same data for {_count(c.steps, 'step')}, and recipes share their "
        "seeds: the same order of the data, and the same draw of every weight a recipe leaves alone.",
        tuned,
        f"Then {_count(c.seeds, 'fresh seed')} train on all training data at that rate and are scored on test data "
        "that nothing was chosen by.",
        "Differences to the baseline are paired over seeds, with t-intervals that hold at 95% for "
        f"{_count(max(1, len(c.rows) - 1), 'comparison')} at once (Bonferroni); “no difference shown” says that the "
        "interval holds zero, not that recipes are equal.",
        "At equal time both are stopped when the first of the two would be done, start-up counted, and scored between "
        "the points of their learning curves.",
    )
    facts = {
        "Task": f"{c.task.name} ({c.task.fingerprint})",
        "Data": _splits(c),
        "Seeds": f"{c.seeds}, the same for every recipe",
        "Rates": ", ".join(rate(x) for x in c.rates),
        "Steps": f"{c.steps:,} of batch {s.batch}, {s.schedule} schedule",
        "Optimizer": f"{s.optim} where a recipe chooses none",
        "Parameters": _parameters(c),
        "Runs": f"{c.runs:,}, of which {c.repeated:,} came from the store; this call took {seconds(c.seconds)}",
        "Versions": ", ".join(f"{name} {v}" for name, v in c.versions.items()) or DASH,
    }
    listing = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<p>{' '.join(sentences)}</p><dl>{listing}</dl>"


def _splits(c: "Comparison") -> str:
    try:
        (fit, held), (train, test) = ((len(a[0]), len(b[0])) for a, b in (c.task.split("tune"), c.task.split("final")))
    except Exception:  # the report must not depend on data that may be gone
        return DASH
    return f"{train:,} to train on (while tuning {fit:,}, and {held:,} to validate on), {test:,} to test on"


def _parameters(c: "Comparison") -> str:
    counts: dict[int, list[str]] = defaultdict(list)
    for r in c.rows:
        if r.parameters:
            counts[r.parameters].append(r.name)
    if len(counts) < 2:
        return f"{next(iter(counts)):,}" if counts else DASH
    return "; ".join(f"{n:,} ({listed(names)})" for n, names in counts.items())


# -- small things -----------------------------------------------------------------------------------------------------


def _name(r: "Row") -> str:
    """The recipe's name, to be broken where it is made of parts."""
    return f'<span class="name">{"<wbr>".join(escape(part) for part in re.split("(?<=[+(,_])", r.name))}</span>'


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _json(value: Any) -> str:
    """JSON that may stand in a script element: NaN as null, no '<'."""
    return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
