"""Still figures: small pages that draw all that plotly would, at the same places."""

import math
import re
from xml.etree import ElementTree

import pytest

from pondera.report import _svg
from pondera.report._comparison import render, write
from pondera.report._figures import Figure, axis, counts, line, marked, marker
from pondera.report._ticks import scale
from tests.report.test_report import ALL, Page

SMALL = 300_000  # bytes of a page, at most


def svgs(text):
    return [ElementTree.fromstring(s) for s in re.findall(r"<svg class=\"(?:wide|narrow)\".*?</svg>", text, re.S)]


def test_a_small_page_is_small_whole_and_without_plotly(tmp_path):
    path = write(ALL, tmp_path / "r.html", small=True)
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < SMALL
    page = Page(text)
    assert "Plotly" not in text
    assert len(page.all("script")) == 1  # copies code; the page says all without it
    assert page.all("input") == []
    assert [a for a in page.all("button") if "data-recipe" in a] == []
    assert all("src" not in attrs for _, attrs in page.tags)
    plots = [a for a in page.all("div") if a.get("class") == "plot"]
    assert [(a["id"], a["aria-label"]) for a in plots] == [
        (a["id"], a["aria-label"]) for a in Page(render(ALL)).all("div") if a.get("class") == "plot"
    ]
    assert all(a["role"] == "img" for a in plots)
    assert "<!--" not in text
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert render(ALL, small=True) == text
    drawn = svgs(text)
    assert len(drawn) == 2 * len(plots)
    for svg in drawn:
        assert svg.get("aria-hidden") == "true"
        numbers = re.findall(r"[ MLHV\"](-?[\d.]+|nan|inf)", ElementTree.tostring(svg, encoding="unicode"))
        assert "nan" not in numbers
        assert "inf" not in numbers


def test_marks_stand_where_the_axes_say():
    """Checked against ticks: a marker at a tick's value has the tick's place."""
    data = [line([0, 50, 100], [1.0, 10.0, 1000.0], 1), marked([40], [10.0], marker(0), "")]
    f = Figure("f", "", data, {"xaxis": counts("steps", 0, 100), "yaxis": axis("y", type="log")})
    for svg in svgs(_svg.drawn(f)):
        words = {"".join(t.itertext()): t for t in svg.iter("text")}
        (dot,) = svg.iter("circle")
        assert dot.get("cx") == words["40"].get("x")
        assert dot.get("cy") == words["10"].get("y")
        _, _, width, height = map(float, svg.get("viewBox").split())
        assert 0 < float(dot.get("cx")) < width
        assert 0 < float(dot.get("cy")) < height


@pytest.mark.parametrize(
    ("given", "values", "words"),
    [
        ({}, [0.0, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ({"rangemode": "tozero"}, [3.0, 9.0], ["0", "2", "4", "6", "8"]),
        ({"tickvals": [1, 2, 3]}, [1, 2, 3], ["1", "2", "3"]),
        ({"type": "log"}, [1e-4, 1.0], ["10−4", "10−3", "10−2", "10−1", "1"]),
        ({"type": "category"}, ["3", "7"], ["3", "7"]),
        ({"tickformat": ".0%"}, [0.0, 1.0], ["0%", "20%", "40%", "60%", "80%", "100%"]),
        ({}, [5.0, 5.0], ["4.8", "4.9", "5.0", "5.1", "5.2"]),
        ({"type": "log"}, [1.0, 1.0 + 1e-12], ["0.5", "1", "2"]),
        ({"type": "log"}, [2.0, 6.0], ["2", "3", "4", "5", "6"]),
        ({}, [math.nan, None], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_ticks_are_round_numbers(given, values, words):
    s = scale(given, values, 400)
    assert [re.sub("<[^>]*>", "", w) for _, w in s.ticks] == words
    assert all(s.low <= v <= s.high for v, _ in s.ticks)


def test_ticks_given_are_left_out_where_they_have_no_room():
    given = counts("layer", 1, 79)
    assert len(scale(given, [1, 79], 300).ticks) == 7
    assert len(scale(given, [1, 79], 60).ticks) < 7


def test_what_has_no_place_is_not_drawn():
    data = [line([1, 2, 3, 4], [1.0, math.nan, 2.0, None], 0, mode="lines+markers", marker=marker(0))]
    for svg in svgs(_svg.drawn(Figure("f", "", data, {"xaxis": axis(), "yaxis": axis()}))):
        assert len(list(svg.iter("circle"))) == 2
        path = next(p.get("d") for p in svg.iter("path") if "var(--c0)" in (p.get("style") or ""))
        assert path.count("M") == 2
