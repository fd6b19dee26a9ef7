"""What figures are made of, as plotly's own JSON: plain dicts; colours are names that the page's stylesheet values."""

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
COLOURS = 7  # --c0 (the baseline's, neutral) ... --c6
NARROW = 46  # characters that fit beside each other on a phone


@dataclass(frozen=True)
class Figure:
    """One plot. alt: what it shows, in words. axes: the horizontal axis in each mode it can be switched to, the first first.

    closeup: the range its vertical axis can be narrowed to. close: whether that is what is shown first.
    """

    id: str
    alt: str
    data: list[Json]
    layout: Json
    height: int = 380
    axes: dict[str, Json] = field(default_factory=dict)
    closeup: tuple[float, float] | None = None
    close: bool = False

    @property
    def spec(self) -> Json:
        layout = self.layout | {"height": self.height}
        return {"data": self.data, "layout": layout, "axes": self.axes, "closeup": self.closeup, "close": self.close}


def colour(i: int) -> str:
    return f"var(--c{0 if i == 0 else 1 + (i - 1) % (COLOURS - 1)})"


def label(name: str, width: int = NARROW) -> str:
    """A name as plotly takes it: escaped, broken after '+' and where it is too long.

    >>> label("init=<b>+optim=SGD", 10)
    'init=&lt;b&gt;+<br>optim=SGD'
    """
    lines = textwrap.wrap(name.replace("+", "+ "), width)
    return "<br>".join(html.escape(line.replace("+ ", "+")) for line in lines)


def line(x: Sequence[float], y: Sequence[float], i: int, width: float = 2, dash: str = "solid", **more: Any) -> Json:
    line = {"color": colour(i), "width": width, "dash": dash}
    return {"x": list(x), "y": list(y), "mode": "lines", "line": line, "hoverinfo": "skip"} | more


def marked(x: Sequence[float], y: Sequence[float], marker: Json, hover: str, **more: Any) -> Json:
    skip = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}
    return {"x": list(x), "y": list(y), "mode": "markers", "marker": marker} | skip | more


def marker(i: int, hollow: bool = False, size: int = 7) -> Json:
    fill, line = ("var(--paper)" if hollow else colour(i)), {"color": colour(i), "width": 1.5}
    return {"symbol": SYMBOLS[i % len(SYMBOLS)], "size": size, "color": fill, "opacity": 1, "line": line}


def axis(title: str = "", **more: Any) -> Json:
    text = {"text": html.escape(title), "standoff": 8, "font": {"size": 13}}
    return {"title": text, "automargin": True, "zeroline": False} | more


def counts(title: str, low: int, high: int, marks: int = 8, **more: Any) -> Json:
    """An axis that counts: marks at whole numbers alone, as many as a phone has room for.

    >>> counts("layer", 1, 3)["tickvals"], counts("layer", 1, 79)["tickvals"]
    ([1, 2, 3], [10, 20, 30, 40, 50, 60, 70])
    """
    steps = (k * 10**d for d in range(12) for k in (1, 2, 5))
    step = next(s for s in steps if high // s - (low - 1) // s <= marks)
    return axis(title, tickvals=[k for k in range(low, high + 1) if k % step == 0], tickformat=",d", **more)


def note(text: str, y: float) -> Json:
    """Words at the left edge, over the grid."""
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": y, "yanchor": "top", "align": "left", "showarrow": False}
    return {"text": text, "font": {"size": 13}, "bgcolor": "var(--paper)", "borderpad": 1} | place
