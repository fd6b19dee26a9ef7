"""The figures of what recipes search besides the rate: every trial where it lay, how it validated, what was chosen."""

import math
import re
from dataclasses import replace

import pytest

from pondera.lab.plan import Tried
from pondera.lab.space import Point
from pondera.report._comparison import render
from pondera.report._space import searched
from tests.report.test_report import BASE, NAN, Page, comparison, row

nan = math.nan
DECAY, RANK = ("optim", "weight_decay"), ("optim", "eps")
SCORES = (0.7, 0.9, 0.8)  # after a quarter, of the trials at three rates


def trials(axis, values):
    """A unit: the second is trained to the end and chosen, the last fails."""
    tried = [Tried(Point(10.0**-k, ((axis, v),)), s, nan) for k, (v, s) in enumerate(zip(values, SCORES), 1)]
    tried[1] = replace(tried[1], late=0.95)
    return [*tried, Tried(Point(1.0, ((axis, values[0]),)), nan, nan, NAN)]


def searching(text, axis, values, at=None):
    units = [trials(axis, values) for _ in BASE]
    if at is not None:
        units = [[replace(t, point=replace(t.point, rate=at)) for t in unit] for unit in units]
    return row(text, BASE, BASE, trials=units, chosen=[unit[1].point for unit in units])


LOG = searching("optim=AdamW(weight_decay=log(0.001,1))", DECAY, [0.5, 0.02, 0.004])
ONE_OF = searching("optim=Adam(eps=choice(1e-8,1e-6,1e-4))", RANK, [1e-8, 1e-6, 1e-4])


def parts(figure):
    """(after a quarter, at the end, failed, chosen) as lists of (x, y)."""
    return [list(zip(t["x"], t["y"])) for t in figure.data]


def test_trials_lie_at_their_rate_and_value():
    ((i, axis, figure),) = searched(comparison(row("", BASE), LOG), 3)
    assert (i, axis) == (1, DECAY)
    early, late, failed, chosen = parts(figure)
    assert early == [(0.1, 0.5), (0.001, 0.004)] * 3
    assert late == [(0.01, 0.02)] * 3
    assert failed == [(1.0, 0.5)] * 3
    assert chosen == late
    assert figure.layout["yaxis"]["type"] == figure.layout["xaxis"]["type"] == "log"
    assert "12 trials of optim weight_decay and the learning rate; chosen 0.02 by 3 units; 3 failed" in figure.alt
    best, worst = max(figure.data[1]["marker"]["size"]), min(figure.data[0]["marker"]["size"])
    assert best == 15
    assert best > worst > 5  # the larger the better it validated


def test_values_to_choose_from_lie_on_strips():
    ((_, _, figure),) = searched(comparison(row("", BASE), ONE_OF), 3)
    assert figure.layout["yaxis"]["ticktext"] == ["1e-08", "1e-06", "0.0001"]
    late = [y for _, y in parts(figure)[1]]
    assert [round(y) for y in late] == [1, 1, 1]
    assert len(set(late)) == 3  # units beside each other


def test_with_one_rate_the_other_axis_is_the_score():
    one = searching("optim=AdamW(weight_decay=log(0.001,1))", DECAY, [0.5, 0.02, 0.004], at=0.01)
    ((_, _, figure),) = searched(comparison(row("", BASE), one), 3)
    early, late, failed, _ = parts(figure)
    assert late == [(0.02, 0.95)] * 3
    assert early[0] == (0.5, 0.7)
    assert failed[0][1] < 0.7  # below all scores
    assert figure.layout["xaxis"]["type"] == "log"


@pytest.mark.parametrize("small", [False, True])
def test_the_page_has_a_figure_an_axis_and_none_without_one(small):
    text = render(comparison(row("", BASE), LOG, ONE_OF), small=small)
    page = Page(text)
    assert "What else was searched" in page.words
    assert "Rings: what units chose" in page.words
    places = [a for a in page.all("div") if (a.get("id") or "").startswith("space")]
    assert [a["id"] for a in places] == ["space1-0", "space2-0"]
    assert all(a["role"] == "img" and "trials of optim" in str(a["aria-label"]) for a in places)
    assert re.search("What else was searched", render(comparison(row("", BASE)), small=small)) is None
