"""The stand-in that carries out many runs at once: the same as the tool, run by run and table by table."""

import math

import pytest
import torch

from pondera.errors import BadInput
from pondera.lab import compare, load_task
from pondera.lab._compare import _undecided
from pondera.lab.calibration import (
    Batched,
    Tuned,
    called,
    carry_out,
    decided,
    design_of,
    plant,
    rate,
    redrawn,
    stopped_at_will,
    tables,
    tuned,
    tuned_once,
)
from pondera.lab.plan import Plan
from pondera.lab.stats import looks
from pondera.lab.train import run

AA = ["salt=1", "salt=2"]


def close(one, other, examples):
    """Whether two scores agree: to rounding where they are continuous, but for one example where they are shares."""
    return abs(one - other) <= (1 / examples + 1e-9 if examples else 1e-4 * max(1.0, abs(one)))


@pytest.mark.parametrize("name", ["noisy", "wine"])
def test_each_run_is_that_of_the_tool(name):
    task = load_task(name)
    d = design_of(task, [*AA, "init=orthogonal+optim=SGD(momentum=0.9)"], range(40, 42))
    phases = [("rung", d.rates[4]), ("rung", d.rates[6]), ("tuned", d.rates[5]), ("final", d.rates[6])]
    specs = [d.spec(r, p, seed, phase) for phase, p in _points(phases) for r in d.recipes for seed in d.seeds]
    found = Batched(task, width=3).run(specs)
    assert len(found) == len(specs) == 24
    train, test = task.data()
    discrete = not test[1].is_floating_point()
    for s in specs:
        one, other = run(s), found[s.key]
        assert one["status"] == other["status"] == "ok"
        assert one["parameters"] == other["parameters"]
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        if s.phase != "final":
            assert other["valid_loss"] == pytest.approx(one["valid_loss"], rel=1e-4)
            assert close(one["valid"], other["valid"], discrete and len(train[1]) // 5)
        if s.phase == "rung":
            assert one["score"] is other["score"] is None
        else:
            assert close(one["score"], other["score"], discrete and len(test[1]))
            assert other["curve"][-1][::2] == [s.stop, other["score"]]
            assert one["curve"][-1][3] == pytest.approx(other["curve"][-1][3], rel=1e-4)


def _points(phases):
    from pondera.lab.space import Point

    return [(phase, Point(r)) for phase, r in phases]


def test_a_run_that_diverges_does_so_as_in_the_tool_and_takes_no_other_along():
    task = load_task("noisy")
    d = design_of(task, ["optim=SGD(momentum=0.9)", "optim=SGD"], range(2))
    specs = [
        d.spec(r, p, seed, "tuned") for _, p in _points([("", 30.0), ("", 0.01)]) for r in d.recipes for seed in d.seeds
    ]
    found = Batched(task).run(specs)
    status = [run(s)["status"] for s in specs]
    assert [found[s.key]["status"] for s in specs] == status
    assert status[:2] == ["diverged"] * 2
    assert status[-2:] == ["ok"] * 2
    bad = found[specs[0].key]["reason"]
    assert bad.rpartition(" ")[2] == run(specs[0])["reason"].rpartition(" ")[2]  # at the same step


def test_a_whole_comparison_is_that_of_the_tool():
    recipes = ["salt=1", "salt=2", "optim=SGD"]
    theirs = compare("noisy", recipes, seeds=5, first_seed=60, store="sqlite://", workers=1, progress=False)
    ours = tuned("noisy", recipes, range(60, 65))
    same = [t.rates[a] == row.chosen[i].rate for a, row in enumerate(theirs.rows) for i, t in enumerate(ours)]
    assert sum(same) >= len(same) - 1
    for a, row in enumerate(theirs.rows):
        assert [t.scores[a] for t in ours] == pytest.approx(row.scores, abs=1e-3)
    verdicts = [r.verdict for r in theirs.rows[1:]]
    (table,) = tables(ours, 5)
    assert called(table, theirs.task) == any(v != "no difference shown" for v in verdicts)
    runs = theirs.runs - 2  # but for the two that show whether the task gives the same again
    wholes = sum(sum(t.costs) for t in ours)
    assert wholes == 15 * 5.25 + (runs - 15 * 12)  # a further trial is one whole run


def test_until_decided_stops_where_the_tool_does():
    task, at = load_task("wine"), looks(5, 12)
    plan = carry_out(Plan(design_of(task, ["optim=SGD", "salt=2"], range(70, 82))), Batched(task))
    plan.stops = at
    scores = [[u.result["score"] for u in plan.of(arm)] for arm in (0, 1)]
    for difference in (0.0, -0.2, 0.04):
        for u, s in zip(plan.of(1), plant(scores, difference)[1]):
            u.result["score"] = s
        stop = next((n for n in at if not _undecided(plan.blocks[:n], plan)), None)
        assert decided(plant(scores, difference), task, at) == (stop is not None, stop or 12)
        assert not called(plant(scores, difference), task) or stop is not None
    assert stopped_at_will(plant(scores, -0.2), 5)


def test_the_rule_before_tunes_once_for_all_units():
    found = tuned_once("wine", AA, range(3), units=4, steps=8)
    assert len(found) == 3
    assert all(len(table) == 2 and len(arm) == 4 for table in found for arm in table)
    again = tuned_once("wine", AA, range(1, 2), units=4, steps=8)
    assert all(a == pytest.approx(b) for a, b in zip(again[0], found[1]))
    assert found[0] != found[1]


def test_tables_share_no_unit_and_redrawn_ones_swap_equal_arms():
    pool = [Tuned(s, (float(s), s + 0.5), (), (), 0) for s in range(10)]
    found = tables(pool, 3)
    assert [t[0] for t in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    drawn = redrawn(pool, 4, 50, seed=0)
    assert drawn == redrawn(pool, 4, 50, seed=0)
    gaps = [b - a for t in drawn for a, b in zip(*t)]
    assert set(gaps) == {0.5, -0.5}
    assert abs(sum(gaps)) < 25
    assert plant([[1.0], [2.0]], 0.5) == [[1.0], [2.5]]


def test_verdict_of_a_table_with_lost_units():
    task = load_task("wine")
    assert not called([[0.9, math.nan, 0.9], [math.nan, 0.8, 0.8]], task)  # one shared unit
    assert called([[0.9, 0.9, 0.91, math.nan], [0.5, 0.52, 0.5, 0.9]], task)


def test_bounds_of_a_rate_by_hand():
    # one of one: the bound solves p = 0.05 / cells; k = 0 has none
    assert rate([True]).least == pytest.approx(0.05)
    assert rate([True], cells=5).least == pytest.approx(0.01)
    assert rate([False] * 9).least == 0.0
    assert (rate([True] * 3 + [False] * 5).k, rate([True] * 3 + [False] * 5).rate) == (3, 0.375)


@pytest.mark.parametrize(("name", "recipe", "words"), [
    ("gpt", "", "has its own"),
    ("mnist", "", "Sequential of linear layers"),
    ("wine", "optim=NorMuon", "elementwise"),
    ("wine", "penalty=norm_loss", "cannot be run in batches"),
])  # fmt: skip
def test_what_cannot_be_stacked_is_refused(name, recipe, words):
    with pytest.raises(BadInput, match=words):
        tuned(name, [recipe, "salt=1"], range(1), steps=4)


@pytest.mark.parametrize("name", ["noisy", "cancer", "wine"])
def test_small_tasks_are_plain_fixed_and_clean(name):
    task = load_task(name)
    (x, y), (x_test, y_test) = task.data()
    again = task._call("data")
    assert torch.equal(again[0][0], x)
    assert torch.equal(again[1][1], y_test)
    assert x.dtype == x_test.dtype == torch.float32
    sizes = {"noisy": (160, 400), "cancer": (370, 199), "wine": (107, 71)}
    assert (len(x), len(x_test)) == (len(y), len(y_test)) == sizes[name]
    if name != "noisy":
        assert x.mean(0).abs().max() < 1e-5
        assert x.std(0).sub(1).abs().max() < 1e-5
        assert set(y.tolist()) == set(y_test.tolist()) == set(range(int(y.max()) + 1))
    rows = {tuple(r) for r in x.tolist()}
    assert not rows & {tuple(r) for r in x_test.tolist()}
    assert len(task.split("tune", 0)[1][0]) == {"noisy": 32, "cancer": 74, "wine": 21}[name]


def test_small_tasks_can_be_learned():
    (one,) = tuned("noisy", [""], range(1))
    (two,) = tuned("cancer", [""], range(1))
    (three,) = tuned("wine", [""], range(1))
    assert 0.2 < one.scores[0] < 0.7  # the noise leaves 0.76 to the best there is
    assert two.scores[0] > 0.94
    assert three.scores[0] > 0.9
