"""What every page shares: the frame of the HTML, a place for a plot, and writing it by atomic rename."""

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from pondera._files import write_atomically
from pondera.errors import BadInput
from pondera.report import _svg
from pondera.report._figures import Figure


def put(path: str | Path, text: Callable[[], str]) -> Path:
    """Write a page by atomic rename, its path checked before the text is made."""
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


def shell(
    title: str,
    over: str,
    lead: str,
    sections: Sequence[tuple[str, str, str]],
    plots: Sequence[Figure],
    version: str,
    small: bool = False,
) -> str:
    """A whole page: heading, lead, linked sections (key, heading, HTML) and the figures; it loads nothing.

    The figures are drawn by plotly's script, which the page holds; with `small` they stand in it as SVG.
    """
    links = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, heading, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{heading}</h2>{content}</section>\n'
        for key, heading, content in sections
    )
    here = files("pondera.report")
    css, js, copy = ((here / f).read_text(encoding="utf-8") for f in ("report.css", "report.js", "copy.js"))
    scripts = ""
    for f in plots:
        body = body.replace(_place(f), _svg.drawn(f) if small else "")
    if not small:
        from plotly.offline import get_plotlyjs

        specs = _json({f.id: f.spec for f in plots})
        scripts = f'<script type="application/json" id="figures">{specs}</script>'
        scripts += f"\n<script>{get_plotlyjs()}</script>\n"
    scripts += f"<script>{copy if small else js + copy}</script>"
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
{scripts}
</body>
</html>
"""
    return text.encode("utf-8", "replace").decode("utf-8")


def plot(f: Figure) -> str:
    """Where a figure stands; how it is drawn is the shell's to say."""
    alt = escape(f.alt)
    return (
        f'<div class="plot" id="{f.id}" role="img" style="--height:{f.height}px" aria-label="{alt}">{_place(f)}</div>'
    )


def _place(f: Figure) -> str:
    return f"<!--figure {f.id}-->"


def keys(entries: Sequence[tuple[int, str, str]], what: str, still: bool) -> str:
    """The legend, an entry (place, swatch, name) each: buttons, pressed while it is shown, or on a still page words."""
    if still:
        items = (f"<li><span class='entry'>{swatch}{name}</span></li>" for _, swatch, name in entries)
    else:
        items = (
            f'<li><button type="button" data-recipe="{i}" aria-pressed="true" class="entry">{swatch}{name}</button></li>'
            for i, swatch, name in entries
        )
    return f'<ul class="keys" aria-label="{what}{"" if still else " shown"}">{"".join(items)}</ul>'


def _json(value: Any) -> str:
    """JSON that may stand in a script element: NaN as null, no '<'."""
    return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
