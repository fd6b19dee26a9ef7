"""Still figures: what the pages ask of plotly, drawn here as SVG, for a page of tens of kB.

Every figure is drawn twice, for a wide place and for a phone; the stylesheet shows the one that fits. Colours are the
stylesheet's names, so that the light and the dark page share one drawing. The words on it are hidden from screen readers:
its place in the page has the alternative text.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pondera.report._figures import Figure, Json
from pondera.report._ticks import LETTER, Scale, scale

WIDE, NARROW = 1060, 350  # units of the drawing, about pixels
TOP, RIGHT, BELOW = 10, 14, 44
DASH = {"dash": "6 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "10 4"}
SHAPES = {  # paths about the origin, for a marker of size 2
    "square": "M-1-1h2v2h-2z",
    "diamond": "M0-1.300L1.300 0 0 1.300-1.300 0z",
    "triangle-up": "M0-1.200L1.100.8h-2.200z",
    "triangle-down": "M0 1.200L1.100-.8h-2.200z",
    "cross": "M-.4-1.200h.8v.8h.8v.8h-.8v.8h-.8v-.8h-.8v-.8h.8z",
    "pentagon": "M0-1.200L1.140-.37.71.97h-1.420L-1.140-.37z",
    "star": "M0-1.400L.36-.45 1.380-.45.56.15.85 1.130 0 .55-.85 1.130-.56.15-1.380-.45-.36-.45z",
    "x": "M-1-1L1 1M-1 1L1-1",
    "line-ns": "M0-1V1",
}
OPEN = ("x", "line-ns")  # shapes that are lines alone


def drawn(f: Figure) -> str:
    """The figure as two SVG elements."""
    return "".join(_one(f, width, kind) for width, kind in ((WIDE, "wide"), (NARROW, "narrow")))


def _one(f: Figure, width: int, kind: str) -> str:
    first = next(iter(f.axes), None)
    data = [t for t in f.data if (t.get("meta") or {}).get("mode", first) == first]
    x_axis = f.axes[first] if first else f.layout["xaxis"]
    y_axis = f.layout["yaxis"] | ({"range": f.closeup} if f.close else {})
    shapes = f.layout.get("shapes", [])
    ys = [v for t in data for v in t["y"]] + [s[k] for s in shapes for k in ("y0", "y1") if s.get("yref") != "paper"]
    xs = [v for t in data for v in t["x"]] + [s[k] for s in shapes for k in ("x0", "x1") if s.get("xref") != "paper"]
    if any(t.get("type") == "bar" for t in data):
        ys.append(0.0)
    y = scale(y_axis, ys, f.height - BELOW - TOP, upright=True)
    shown = y_axis.get("visible", True)
    left = 22 + LETTER * max((len(_bare(w)) for _, w in y.ticks), default=0) if shown else 8
    title = _title(y_axis)
    left += 16 if title and shown else 0
    box = (left, TOP, width - RIGHT, f.height - BELOW)
    x = scale(x_axis, xs, box[2] - box[0])
    parts = [*_grid(x, y, box, shown), *_words(_title(x_axis), title if shown else "", box, f.height)]
    if x_axis.get("zeroline") and 0 <= x.share(0.0) <= 1:
        at = _r(_place(x.share(0.0), box[0], box[2]))
        parts.append(f'<path d="M{at} {box[1]}V{box[3]}" style="stroke:var(--ink)" stroke-width="1.5"/>')
    parts += [_shape(s, x, y, box) for s in shapes]
    clip = f"{f.id}-{kind}"
    marks = "".join(_trace(t, x, y, box) for t in data)
    parts.append(
        f'<clipPath id="{clip}"><path d="M{_r(box[0] - 8)} {box[1] - 8}H{box[2] + 8}V{box[3] + 8}H{_r(box[0] - 8)}z"/></clipPath>'
        f'<g clip-path="url(#{clip})">{marks}</g>'
    )
    parts += [_note(n, y, box) for n in f.layout.get("annotations", [])]
    return f'<svg class="{kind}" viewBox="0 0 {width} {f.height}" aria-hidden="true">{"".join(parts)}</svg>'


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _place(share: float, start: float, end: float) -> float:
    return start + share * (end - start)


def _grid(x: Scale, y: Scale, box: Box, shown: bool) -> Iterator[str]:
    lines, words = "", ""
    for v, text in x.ticks:
        at = _r(_place((v - x.low) / (x.high - x.low), box[0], box[2]))
        lines += f"M{at} {_r(box[1])}V{_r(box[3])}"
        words += f'<text x="{at}" y="{_r(box[3] + 16)}" text-anchor="middle">{text}</text>'
    for v, text in y.ticks if shown else ():
        at = _r(_place((v - y.low) / (y.high - y.low), box[3], box[1]))
        lines += f"M{_r(box[0])} {at}H{_r(box[2])}"
        words += f'<text x="{_r(box[0] - 6)}" y="{at}" dy=".35em" text-anchor="end">{text}</text>'
    yield f'<path d="{lines}" fill="none" style="stroke:var(--line)"/>{words}'


def _words(below: str, beside: str, box: Box, height: float) -> Iterator[str]:
    if below:
        yield f'<text x="{_r((box[0] + box[2]) / 2)}" y="{_r(height - 8)}" text-anchor="middle">{below}</text>'
    if beside:
        at = _r((box[1] + box[3]) / 2)
        yield f'<text transform="translate(12 {at}) rotate(-90)" text-anchor="middle">{beside}</text>'


def _shape(s: Json, x: Scale, y: Scale, box: Box) -> str:
    def along(which: str, scale: Scale, start: float, end: float) -> list[str]:
        whole = s.get(f"{which}ref") == "paper"
        shares = [s[f"{which}{k}"] if whole else scale.share(s[f"{which}{k}"]) for k in (0, 1)]
        return [_r(_place(share, start, end)) for share in shares]

    (x0, x1), (y0, y1) = along("x", x, box[0], box[2]), along("y", y, box[3], box[1])
    return f'<path d="M{x0} {y0}L{x1} {y1}" {_stroke(s["line"])}/>'


def _trace(t: Json, x: Scale, y: Scale, box: Box) -> str:
    at = [
        (_place(x.share(a), box[0], box[2]), _place(y.share(b), box[3], box[1])) if b is not None else (math.nan,) * 2
        for a, b in zip(t["x"], t["y"])
    ]
    if t.get("type") == "bar":
        return _bars(t, at, y, box, len(x.names))
    parts = ""
    if "lines" in t["mode"] and len(at) > 1:
        paint = _stroke(t["line"])
        if t.get("fill") == "toself":
            paint = f'style="fill:{t["fillcolor"][5:-1]}" fill-opacity=".16"'
        parts += f'<path d="{_path(at)}" {paint}/>'
    if "markers" in t["mode"]:
        m, n = t["marker"], len(at)
        each = (_each(m["symbol"], n), _each(m.get("size", 7), n), at)
        parts += _markers(m, "".join(_mark(s, size, *p) for s, size, p in zip(*each) if math.isfinite(sum(p))))
    return parts


def _path(at: Sequence[tuple[float, float]]) -> str:
    """A line through the points, broken where one has no place."""
    pieces, pen = [], "M"
    for a, b in at:
        if math.isfinite(a + b):
            pieces.append(f"{pen}{_r(a)} {_r(b)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(pieces)


def _bars(t: Json, at: Sequence[tuple[float, float]], y: Scale, box: Box, count: int) -> str:
    half, foot = 0.4 * (box[2] - box[0]) / max(1, count), _r(_place(y.share(0.0), box[3], box[1]))
    path = "".join(f"M{_r(a - half)} {foot}V{_r(b)}H{_r(a + half)}V{foot}z" for a, b in at if math.isfinite(b))
    return f'<path d="{path}" style="fill:{t["marker"]["color"]}"/>'


def _mark(symbol: str, size: float, a: float, b: float) -> str:
    name, half = symbol.removesuffix("-open"), size / 2
    if name == "circle":
        return f'<circle cx="{_r(a)}" cy="{_r(b)}" r="{_r(half)}"/>'
    # the outline keeps its width whatever the size of the marker
    move = f'transform="translate({_r(a)} {_r(b)}) scale({_r(half)})" vector-effect="non-scaling-stroke"'
    return f'<path d="{SHAPES[name]}" {move}/>'


def _markers(m: Json, marks: str) -> str:
    symbols = m["symbol"] if isinstance(m["symbol"], list) else [m["symbol"]]
    lines_only = any(s.removesuffix("-open") in OPEN for s in symbols)
    edge = m.get("line", {})
    colour = edge.get("color") or m.get("color")
    hollow = all(s.endswith("-open") for s in symbols)
    fill = "none" if hollow else m.get("color") or colour
    width = edge.get("width", 2 if lines_only else 0 if not hollow else 1.5)
    if m["symbol"] == "x" or (lines_only and isinstance(m["symbol"], list)):
        colour, width = m["color"], 2
    faint = f' opacity="{m["opacity"]}"' if m.get("opacity", 1) != 1 else ""
    return f'<g style="fill:{fill};stroke:{colour}" stroke-width="{width}"{faint}>{marks}</g>'


def _stroke(line: Json) -> str:
    dash = f' stroke-dasharray="{DASH[line["dash"]]}"' if line.get("dash", "solid") != "solid" else ""
    return f'fill="none" style="stroke:{line["color"]}" stroke-width="{line.get("width", 2)}"{dash}'


def _note(n: Json, y: Scale, box: Box) -> str:
    """Words at the left edge; they are markup already (`_figures.label`), of line breaks and italics alone."""
    top = _place(y.share(n["y"]), box[3], box[1])
    lines = n["text"].replace("<i>", '<tspan font-style="italic">').replace("</i>", "</tspan>").split("<br>")
    return "".join(
        f'<text x="{_r(box[0])}" y="{_r(top + 13 + 17 * k)}" class="note">{line}</text>' for k, line in enumerate(lines)
    )


def _title(axis: Json) -> str:
    return axis.get("title", {}).get("text", "")


def _bare(words: str) -> str:
    return re.sub("<[^>]*>", "", words)


def _each(value: Any, n: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * n


def _r(x: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{x:.1f}".removesuffix(".0")
