"""Results for other programs: frames, files, notebooks; and the memory that a run takes."""

import csv
import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from pondera.errors import BadInput
from pondera.lab import Recipe, compare, train
from pondera.lab.results import Row
from pondera.lab.space import Point
from pondera.lab.train import RunSpec, run

TINY = str(Path(__file__).with_name("tiny.py"))
QUICK = {"store": "sqlite://", "workers": 1, "progress": False}
SEARCHED = "optim=AdamW(weight_decay=log(1e-3,1))"


@pytest.fixture(scope="module")
def found():
    bad = "bad <b>: optim=SGD(momentum=0.0,weight_decay=1e30)"
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # memory is measured in every run, whatever that costs on a busy machine
        patch.setattr(train, "MEMORY_COST", 1e9)
        patch.setattr(train, "_account", [0.0])
        return compare(TINY, ["", SEARCHED, bad], seeds=3, first_seed=4, **QUICK)


# -- frames and files --------------------------------------------------------------------------------------------------


def test_a_row_a_recipe(found):
    pytest.importorskip("pandas")
    frame = found.to_frame()
    assert list(frame["recipe"]) == [r.name for r in found.rows]
    assert list(frame["failed"]) == [0, 0, 3]
    assert list(frame["units"]) == [3, 3, 3]
    assert frame["score"][0] == found.rows[0].score[0]
    assert frame["difference"].dtype == float
    assert math.isnan(frame["difference"][0])
    assert not any(isinstance(v, (list, dict)) for column in frame for v in frame[column])


def test_a_row_a_unit(found):
    pytest.importorskip("pandas")
    frame = found.to_frame(units=True)
    assert list(frame["seed"]) == [4, 5, 6] * 3
    assert list(frame["score"][:6]) == found.rows[0].scores + found.rows[1].scores
    chosen = [p[("optim", "weight_decay")] for p in found.rows[1].chosen]
    assert list(frame["optim.weight_decay"][3:6]) == chosen
    assert frame["optim.weight_decay"][:3].isna().all()
    assert list(frame["status"]) == ["ok"] * 6 + ["failed"] * 3
    assert frame["why"][8].startswith("no learning rate finished (diverged")
    assert list(frame["seconds"][:3]) == [c[-1][1] for c in found.rows[0].curves]


def test_without_pandas_one_sentence(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(BadInput, match="to_frame needs pandas: pip install pandas") as caught:
        found.to_frame()
    assert "\n" not in str(caught.value)


def test_csv_without_pandas(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    path = found.to_csv(tmp_path / "units.csv")
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert [float(r["score"]) for r in rows[:6]] == found.rows[0].scores + found.rows[1].scores
    assert [r["score"] for r in rows[6:]] == [""] * 3
    assert [r["recipe"] for r in rows] == [r.name for r in found.rows for _ in range(3)]
    assert [p.name for p in tmp_path.iterdir()] == ["units.csv"]
    with pytest.raises(BadInput, match="got the folder"):
        found.to_csv(tmp_path)
    with pytest.raises(BadInput, match="there is no folder"):
        found.to_csv(tmp_path / "no" / "units.csv")


def test_judge_reads_the_csv(found, tmp_path):
    from pondera.lab import judge

    judged = judge(str(found.to_csv(tmp_path / "units.csv")))
    assert judged.baseline == "as built"
    assert judged[found.rows[1].name].score[0] == pytest.approx(found.rows[1].score[0])


def test_json_holds_everything_and_comes_back(found):
    plain = found.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    base, searched, bad = plain["rows"]
    assert set(found.table()[0]) <= set(base)
    assert plain["design"] | {"task": "tiny", "seeds": 3, "trials": 3, "steps": 24} == plain["design"]
    assert {"versions", "depends", "runs", "repeated", "seconds", "repeatable"} <= set(plain)
    unit = searched["units"][1]
    assert unit["seed"] == 5
    assert unit["score"] == found.rows[1].scores[1]
    assert set(unit["chosen"]) == {"rate", "optim.weight_decay"}
    assert len(unit["trials"]) == len(found.rows[1].trials[1])
    assert unit["curve"][0] == {"step": 0, "seconds": 0.0, "score": found.rows[1].curves[1][0][2], "train_loss": None}
    assert searched["to_the_baseline"]["needed"] == found.rows[1].difference.needed
    assert {"mean", "low", "high", "p", "shown", "standardised", "verdict"} <= set(searched["at_equal_time"])
    assert searched["searched"] == {"optim.weight_decay": "log(0.001,1)"}
    assert bad["score"] is None
    assert all(t["failed"] for t in bad["units"][0]["trials"])


def test_ends_of_units_are_those_that_the_row_counts(found):
    for r in found.rows:
        assert sum(bool(u["ends"]) for u in r.units()) == r.edge


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_one_line_each(found):
    for thing in (found, *found.rows):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 200
    assert repr(found).startswith("Comparison(tiny: 3 recipes, 3 seeds, 24 steps; ")
    assert repr(found).endswith("1 failed)")
    assert repr(found.rows[0]).startswith("Row('as built': 0.")
    assert "failed in 3 of 3 units" in repr(found.rows[2])


def test_the_table_of_a_notebook_is_escaped_and_closed(found):
    class Words(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.seen = [], []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)
            self.seen.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    page = found._repr_html_()
    words = Words()
    words.feed(page)
    assert words.open == []
    assert words.seen.count("tr") == 4
    assert "b" not in words.seen
    assert "bad &lt;b&gt;" in page
    assert "✕ failed in 3 of 3 units" in page


# -- memory ------------------------------------------------------------------------------------------------------------

BIG = """import torch
from torch import nn
settings = dict(steps=2, batch=8, rates=[0.1], optim="SGD")
def build():
    return nn.Linear(4, 2)
def data():
    x = torch.randn(40, 4); y = (x[:, 0] > 0).long(); return (x[:30], y[:30]), (x[30:], y[30:])
def loss(model, batch):
    big = torch.ones(32 * 2**20 // 4)
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) + 0 * big.sum()
"""
linux = pytest.mark.skipif(train._trim() is None, reason="the system does not say")


def spec_of(source, name="big", **over):
    given = {"recipe": Recipe(), "rate": 0.1, "seed": 0, "steps": 2, "stop": 2, "phase": "final"} | over
    return RunSpec(name, f"{name}.py", source, **given)


@linux
def test_peak_is_what_a_run_takes_whatever_ran_before():
    assert run(spec_of(BIG))["peak_memory"] is None  # the first of the task here
    train._account[0] = 1.0
    peaks = [run(spec_of(BIG, seed=s))["peak_memory"] for s in range(1, 4)]
    assert all(31 * 2**20 < p < 40 * 2**20 for p in peaks), peaks  # the system counts to some dozens of pages
    assert run(spec_of(BIG, phase="rung"))["peak_memory"] is None


@linux
def test_measuring_is_paid_for(monkeypatch):
    run(spec_of(BIG, "paid"))
    monkeypatch.setattr(train, "_account", [-1.0])
    assert run(spec_of(BIG, "paid"))["peak_memory"] is not None  # each recipe once
    assert run(spec_of(BIG, "paid", seed=1))["peak_memory"] is None
    train._account[0] = 1.0
    assert run(spec_of(BIG, "paid", seed=2))["peak_memory"] is not None


@linux
def test_a_system_that_does_not_say_is_no_error(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    run(spec_of(BIG, "mute"))
    monkeypatch.setattr(train, "open", refuse, raising=False)
    result = run(spec_of(BIG, "mute"))
    assert (result["status"], result["peak_memory"]) == ("ok", None)


def test_on_cuda_it_is_what_torch_counts(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: calls.append(d))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 1234)
    spec = spec_of(BIG, "card", device="cuda:1", phase="rung")
    assert train._memory_peak(spec, train._memory_mark(spec)) == 1234
    assert calls == ["cuda:1"]


def test_the_row_has_the_median_and_older_results_none(found):
    table = found.table()
    for r, row in zip(found.rows[:2], table):
        assert row["peak_memory"] == r.peak_memory or (row["peak_memory"] is None and math.isnan(r.peak_memory))
    assert not any("peak_memory" in row for row in found.table(timing=False))
    if train._trim() is not None:
        assert found.rows[0].peak_memory >= 0
    old = Row(
        **{
            f: getattr(found.rows[0], f)
            for f in found.rows[0].__dataclass_fields__
            if f not in ("seeds", "peak_memory")
        }
    )
    assert math.isnan(old.peak_memory)
    assert [u["seed"] for u in old.units()] == [0, 1, 2]
    assert replace(old, chosen=[Point(0.1)] * 3).rate == 0.1
