"""judge: tables worked by hand, agreement with the authors' metrics, false alarms, and refusals in one sentence."""

import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from pondera.errors import BadInput
from pondera.lab import Judgement, judge, outside, over_tasks
from pondera.lab._judge import _family
from pondera.lab.outside import UNTUNED
from pondera.lab.over_tasks import interquartile_mean, mean_ranks, probability_of_improvement
from pondera.lab.stats import LEVEL, family, welch


def records(scores, **more):
    """{method: [score, ...]} as rows, seeds counted from 0."""
    return [{"method": m, "seed": i, "score": s} | more for m, x in scores.items() for i, s in enumerate(x)]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- one task, by hand -------------------------------------------------------------------------------------------------


def test_three_paired_seeds_by_hand():
    """Differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1; t(0.975, 2) = 4.302653, so 0.2 -+ 4.302653 * 0.1 / sqrt(3)."""
    found = judge(records({"a": [1.0, 2.0, 3.0], "b": [1.1, 2.2, 3.3]}), resolution=0)
    d = found["b"].difference
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (d.mean, d.low, d.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-6)
    assert d.paired
    assert d.standardised == pytest.approx(0.2 / math.sqrt((1.0 + 1.21) / 2))
    assert found["b"].verdict == "no difference shown"
    assert found["a"].verdict == "baseline"
    assert found["a"].score == pytest.approx((2.0, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-6)
    assert d.shown > 0.2 / 2 and d.needed > 3


def test_rows_may_come_in_any_order_and_are_paired_by_seed():
    rows = records({"a": [1.0, 2.0, 3.0, 4.0], "b": [1.1, 2.1, 3.1, 4.2]})
    assert judge(rows[:4] + rows[:3:-1])["b"].difference == judge(rows)["b"].difference


def test_lower_is_better_turns_the_verdict_and_not_the_numbers():
    rows = records({"a": [1.0, 1.1, 1.2, 1.1], "b": [0.5, 0.61, 0.7, 0.6]})
    up, down = judge(rows), judge(rows, lower_is_better=True)
    assert (up["b"].verdict, down["b"].verdict) == ("worse", "better")
    assert up["b"].difference.mean == down["b"].difference.mean < 0
    assert judge(rows, baseline="b")["a"].verdict == "better"


def test_paired_families_are_those_of_the_lab():
    """Holm's steps here, over paired and unpaired alike, are the lab's where all are paired."""
    rng = np.random.default_rng(0)
    for shift in (0.0, 1.0, 2.0, 4.0):
        table = {"base": rng.normal(size=5), "a": rng.normal(size=5) + shift, "b": rng.normal(size=5) + shift / 2}
        table["c"] = rng.normal(size=5)
        found = judge(records({k: v.tolist() for k, v in table.items()}))
        expected = family([(table[m].tolist(), table["base"].tolist()) for m in "abc"])
        for m, e in zip("abc", expected):
            assert {k: getattr(found[m].difference, k) for k in vars(e)} == vars(e)


def test_holm_counts_members_that_could_not_be_judged():
    rows = records({"a": [1.0, 2.0, 3.1], "b": [1.2, 2.2, 3.31], "c": [9.0]})
    found = judge(rows)
    assert found["c"].verdict == "too few seeds to say"
    expected = family([([1.2, 2.2, 3.31], [1.0, 2.0, 3.1]), None])[0]
    assert (found["b"].difference.low, found["b"].difference.p) == (expected.low, expected.p)


def test_no_shared_seeds_are_compared_unpaired():
    rows = records({"a": [1.0, 2.0, 3.0]}) + [
        {"method": "b", "seed": s, "score": x} for s, x in ((7, 5.0), (8, 6.0), (9, 8.0))
    ]
    found = judge(rows)
    d = found["b"].difference
    assert not d.paired and d.units == (3, 3)
    assert any("unpaired" in n and "Welch" in n for n in found.notes)
    # by hand: means 2 and 19/3, variances 1 and 7/3; se^2 = 10/9; df = (10/9)^2 / ((1/9)/2 + (49/81)/2)
    se, df = math.sqrt(10 / 9), (10 / 9) ** 2 / ((1 / 9) / 2 + (49 / 81) / 2)
    from scipy import stats

    half = stats.t.isf(0.025, df) * se
    assert (d.mean, d.low, d.high) == pytest.approx((13 / 3, 13 / 3 - half, 13 / 3 + half))


def test_welch_agrees_with_scipy_and_its_needed_units_suffice():
    from scipy import stats

    rng = np.random.default_rng(1)
    for n, m, ratio in ((5, 5, 1), (4, 9, 3), (2, 3, 0.1), (30, 8, 1)):
        a, b = rng.normal(0.4, 1, n), rng.normal(0, ratio, m)
        theirs = stats.ttest_ind(a, b, equal_var=False)
        d = welch(a.tolist(), b.tolist())
        assert d.p == pytest.approx(theirs.pvalue)
        assert (d.low, d.high) == pytest.approx(tuple(theirs.confidence_interval()))
        assert d.n == min(n, m)
    big = welch([0.0, 1.0] * 50, [0.3, 1.4] * 50)
    assert 2 < big.needed < 200
    assert welch([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]).verdict == "no difference shown"
    assert welch([1.0] * 3, [0.99] * 3, resolution=0.01).verdict == "no difference shown"
    assert welch([0.9, 1.0], [0.0, 0.1], bounds=(0.0, 1.0)).high == 1.0
    with pytest.raises(ValueError, match="at least two units of each"):
        welch([1.0], [1.0, 2.0])


def test_missing_seeds_are_said():
    rows = records({"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [1.1, 2.1, 3.2]})
    found = judge(rows)
    assert found["b"].difference.n == 3
    assert "seeds paired with the baseline: b 3 of 5" in found.notes


def test_failed_runs_are_counted_and_said():
    for bad in (math.nan, math.inf, None, "", "OOM", "1_0"):
        found = judge(records({"a": [1.0, 2.0, 3.0], "b": [1.1, bad, 3.2]}))
        assert found["b"].verdict == "failed in 1 of 3"
        assert found["b"].difference.n == 2
        assert not found.ok
        assert any(n.startswith("runs without a finite score count as failed: 1 of 6") for n in found.notes)
        assert any("flatters" in n for n in found.notes)
    assert judge(records({"a": [1.0, 2.0], "b": [1.1, 2.3]})).ok


def test_which_runs_failed_does_not_decide_how_they_are_paired():
    """Both have five seeds in common; that only one finished in both is too few, and not unpaired."""
    nan = math.nan
    found = judge(records({"a": [1.0, 2.0, 3.0, nan, nan], "b": [nan, nan, 3.3, 4.0, 5.0]}))
    assert found["b"].difference is None


def test_resolution_as_given_and_as_the_scores_tell():
    rows = records({"a": [0.90] * 6, "b": [0.91] * 6})
    assert judge(rows)["b"].verdict == "no difference shown"  # one step apart, six times
    assert judge(rows, resolution=0.001)["b"].verdict == "better"
    assert any("0.01" in n and "smallest step" in n for n in judge(rows).notes)
    assert not any("smallest step" in n for n in judge(rows, resolution=0.01).notes)
    assert judge(records({"a": [0.90] * 7, "b": [0.91] * 7}))["b"].verdict == "better"


def test_bounds_hold():
    found = judge(records({"a": [0.1, 0.9], "b": [0.2, 0.95]}), bounds=(0.0, 1.0))
    assert found["a"].score == (0.5, 0.0, 1.0)
    assert found["b"].difference.low >= -1.0
    assert found["b"].difference.high <= 1.0


# -- tunings -----------------------------------------------------------------------------------------------------------


def blocks(scores):
    """{method: [[score, ...] of a tuning, ...]} as rows; every run has its own seed."""
    seed = itertools.count()
    return [
        {"method": m, "tuning": t, "seed": next(seed), "score": s}
        for m, x in scores.items()
        for t, ys in enumerate(x)
        for s in ys
    ]


def test_seeds_of_one_tuning_are_one_unit():
    found = judge(blocks({"a": [[1.0, 3.0], [2.0, 4.0], [3.0]], "b": [[2.5, 2.7], [4.1], [4.0, 5.0]]}))
    assert found.unit == "tuning"
    assert found["a"].scores == (2.0, 3.0, 3.0)
    assert found["b"].scores == pytest.approx((2.6, 4.1, 4.5))
    assert found["b"].difference.mean == pytest.approx((0.6 + 1.1 + 1.5) / 3)
    assert found["b"].difference.n == 3
    assert UNTUNED not in found.notes
    assert not any("recur" in n for n in found.notes)


def test_one_tuning_has_no_honest_interval():
    found = judge(blocks({"a": [[1.0, 1.1, 1.2, 1.1]], "b": [[9.0, 9.1, 9.2, 9.1]]}))
    assert found["b"].verdict == "too few tunings to say"
    assert any(n.startswith("one tuning: no interval can be honest: a, b") for n in found.notes)
    assert "too few tunings to say" in found.summary()


def test_seeds_that_recur_in_tunings_are_warned_of():
    rows = [
        {"method": m, "tuning": t, "seed": s, "score": s + t + (m == "b")} for m in "ab" for t in (0, 1) for s in (0, 1)
    ]
    assert any("seeds recur" in n for n in judge(rows).notes)


def test_the_step_of_a_tuning_is_that_of_a_mean():
    rows = blocks({"a": [[0.90, 0.91], [0.91, 0.90]], "b": [[0.91, 0.91], [0.90, 0.90]]})
    assert judge(rows)["a"].resolution == pytest.approx(0.005)


def simulated(rng, tuning_noise, tunings=5, seeds=4):
    """Equals whose tunings differ: what a sweep that tunes each method a few times gives."""
    return {
        m: [(tuning_noise * rng.normal() + rng.normal(size=seeds)).tolist() for _ in range(tunings)] for m in "abcd"
    }


def test_false_alarms_on_noise_stay_at_five_percent():
    """400 tables of four equal methods at five seeds: at most 5% hold a verdict, but for three standard errors."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        found = judge(records({m: rng.normal(size=5).tolist() for m in "abcd"}))
        alarms += any(r.verdict in ("better", "worse") for r in found.rows)
    assert alarms / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_false_alarms_unpaired():
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(200):
        rows = [{"method": m, "seed": f"{m}{i}", "score": rng.normal()} for m in "abcd" for i in range(5)]
        alarms += any(r.verdict in ("better", "worse") for r in judge(rows).rows)
    assert alarms / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_shared_tunings_need_their_column():
    """Five tunings a method, four seeds each, tuning noise as large as a seed's: with the column the rate is right,
    without it, each seed taken for a unit, equals are called far too often."""
    rng = np.random.default_rng(2)
    tables = [blocks(simulated(rng, 1.0)) for _ in range(200)]
    with_column = without = 0
    for rows in tables:
        with_column += any(r.verdict in ("better", "worse") for r in judge(rows).rows)
        bare = [
            {"method": r["method"], "seed": i % 20, "score": r["score"]} for i, r in enumerate(rows)
        ]  # the same runs, their tuning not told
        without += any(r.verdict in ("better", "worse") for r in judge(bare).rows)
    assert with_column / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    assert without / 200 > 0.2


# -- several tasks -----------------------------------------------------------------------------------------------------


def numbers(seed, n, tasks, ladder):
    """Numbers any version of any library repeats: a linear congruence, as (n, tasks)."""
    found = []
    for _ in range(n * tasks):
        seed = (1103515245 * seed + 12345) % 2**31
        found.append(seed // 65536 % 8 / 8 if ladder else seed % 1000 / 1000)
    return np.array(found).reshape(n, tasks)


@pytest.mark.parametrize(
    ("x_seed", "y_seed", "n", "m", "tasks", "ladder", "iqm", "improvement"),
    [  # the last two by rliable 1.2.0: aggregate_iqm(x), probability_of_improvement(x, y)
        (1, 2, 5, 5, 1, False, 0.5463333333333332, 0.56),
        (3, 4, 5, 7, 3, False, 0.43799999999999994, 0.5904761904761905),
        (5, 6, 10, 10, 26, False, 0.4858615384615385, 0.5119230769230769),
        (7, 8, 4, 6, 5, True, 0.4625, 0.5166666666666666),
        (9, 10, 7, 3, 4, True, 0.4107142857142857, 0.3392857142857143),
    ],
)
def test_metrics_are_those_of_the_authors(x_seed, y_seed, n, m, tasks, ladder, iqm, improvement):
    x, y = numbers(x_seed, n, tasks, ladder), numbers(y_seed, m, tasks, ladder)
    assert interquartile_mean(x.ravel(), np.ones((1, x.size)))[0] == pytest.approx(iqm, abs=1e-12)
    each = [probability_of_improvement(x[:, t], y[:, t], np.ones((1, n)), np.ones((1, m)))[0] for t in range(tasks)]
    assert np.mean(each) == pytest.approx(improvement, abs=1e-12)


def test_counts_are_the_same_as_taking_values_so_often():
    """The bootstrap's weighted forms against brute force on the resampled values."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 7) / 6, rng.integers(0, 6, 5) / 6
    picks_x, picks_y = rng.integers(7, size=(50, 7)), rng.integers(5, size=(50, 5))
    wx = np.stack([np.bincount(p, minlength=7) for p in picks_x]).astype(float)
    wy = np.stack([np.bincount(p, minlength=5) for p in picks_y]).astype(float)
    p = probability_of_improvement(x, y, wx, wy)
    middle = interquartile_mean(x, wx)
    for i in range(50):
        a, b = x[picks_x[i]], y[picks_y[i]]
        brute = np.mean([(u > v) + 0.5 * (u == v) for u in a for v in b])
        assert p[i] == pytest.approx(brute, abs=1e-12)
        assert middle[i] == pytest.approx(np.sort(a)[1:6].mean(), abs=1e-12)


def test_ranks_are_means_over_ties():
    from scipy import stats

    x = np.random.default_rng(0).integers(0, 3, (20, 5)).astype(float)
    assert mean_ranks(x) == pytest.approx(stats.rankdata(x, axis=1))


def two_tasks(noise=0.0):
    """b beats a on both, c is best on the first and worst on the second; by hand below."""
    rng = np.random.default_rng(0)
    means = {"easy": {"a": 1.0, "b": 2.0, "c": 3.0}, "hard": {"a": 200.0, "b": 300.0, "c": 100.0}}
    rows = []
    for task, of in means.items():
        unit = 1.0 if task == "easy" else 100.0
        for m, mean in of.items():
            rows += records({m: (mean + unit * noise * rng.normal(size=6)).tolist()}, task=task)
    return rows


def test_two_tasks_by_hand():
    found = judge(two_tasks())
    rank = {a.method: a.rank for a in found.aggregates}
    assert rank == {"a": (2.5, 2.5, 2.5), "b": (1.5, 1.5, 1.5), "c": (2.0, 2.0, 2.0)}
    improvement = {a.method: a.improvement for a in found.aggregates}
    assert improvement == {"a": None, "b": (1.0, 1.0, 1.0), "c": (0.5, 0.5, 0.5)}
    # normalised: easy a 0, b 0.5, c 1; hard a 0.5, b 1, c 0; the middle half of six of each is their mean
    assert {a.method: a.iqm[0] for a in found.aggregates} == {"a": 0.25, "b": 0.75, "c": 0.5}
    assert {a.verdict for a in found.aggregates[1:]} == {"no difference shown"}  # six times the same step
    bare = judge(two_tasks(), resolution=0).aggregates
    assert {a.verdict for a in bare[1:]} == {"not judged: no spread on easy to standardise by"}
    down = judge(two_tasks(), lower_is_better=True)
    assert {a.method: a.rank[0] for a in down.aggregates} == {"a": 1.5, "b": 2.5, "c": 2.0}
    assert {a.method: a.iqm[0] for a in down.aggregates} == {"a": 0.75, "b": 0.25, "c": 0.5}
    assert down.aggregates[1].improvement[0] == 0.0


def test_normalise():
    rows = two_tasks()
    by = {n: {a.method: a.iqm[0] for a in judge(rows, normalise=n).aggregates} for n in ("none", "baseline")}
    assert by["none"] == {"a": 100.5, "b": 151.0, "c": 51.5}
    assert by["baseline"] == pytest.approx({"a": 1.0, "b": 1.75, "c": 1.75})
    with pytest.raises(BadInput, match="only where it is positive; it is -1 on the task easy"):
        judge([r | {"score": r["score"] - 2} for r in rows], normalise="baseline")


def test_overall_difference_by_hand():
    """Two tasks, four shared seeds: unit means of d / s, Student's interval with the spread inflated by nu / (nu - 2)."""
    from scipy import stats

    a = {"t": [1.0, 2.0, 3.0, 5.0], "u": [10.0, 30.0, 20.0, 10.0]}
    b = {"t": [2.0, 2.5, 5.0, 5.5], "u": [30.0, 35.0, 45.0, 20.0]}
    rows = [r for t in a for r in records({"a": a[t], "b": b[t]}, task=t)]
    found = next(x for x in judge(rows, resolution=0).aggregates if x.method == "b").overall
    units, inflation = np.zeros(4), 0.0
    for t in a:
        va, vb = np.var(a[t], ddof=1), np.var(b[t], ddof=1)
        units += (np.array(b[t]) - a[t]) / math.sqrt((va + vb) / 2) / 2
        nu = (va + vb) ** 2 / ((va**2 + vb**2) / 3)
        inflation += nu / (nu - 2) / 2
    se = math.sqrt(inflation) * units.std(ddof=1) / 2
    half = stats.t.isf(LEVEL / 4, 3) * se  # half of 5% for one method, two-sided
    assert (found.mean, found.low, found.high) == pytest.approx(
        (units.mean(), units.mean() - half, units.mean() + half)
    )
    assert found.n == 4


def test_overall_differences_with_other_seeds_on_each_task():
    """No seed in common between tasks: variances add up, and each task counts by itself."""
    rng = np.random.default_rng(0)
    rows = []
    for k, task in enumerate("tuvw"):
        for m, shift in (("a", 0.0), ("b", 2.0), ("c", 0.0)):
            rows += [
                {"task": task, "method": m, "seed": 10 * k + i, "score": 10**k * (rng.normal() + shift)}
                for i in range(5)
            ]
    found = {a.method: a for a in judge(rows).aggregates}
    assert not found["b"].overall.paired
    assert (found["b"].verdict, found["c"].verdict) == ("better", "no difference shown")


def over_noise(rng, shared, tasks, ratio):
    rows = []
    for k in range(tasks):
        for m, sd in (("a", 1.0), ("b", ratio)):
            start = 0 if shared else 10 * k
            rows += [
                {"task": f"t{k}", "method": m, "seed": start + i, "score": 10.0**k * sd * rng.normal()}
                for i in range(5)
            ]
    return rows


@pytest.mark.parametrize(("shared", "ratio"), [(True, 1.0), (False, 1.0), (False, 5.0)])
def test_false_alarms_over_tasks(shared, ratio, monkeypatch):
    """Half of the 5% is the verdict's over all tasks; scales of tasks differ by decades, arms by a factor."""
    monkeypatch.setattr(over_tasks, "DRAWS", 10)
    rng = np.random.default_rng(3)
    each = over = 0
    for _ in range(250):
        found = judge(over_noise(rng, shared, 6, ratio))
        each += any(r.verdict in ("better", "worse") for r in found.rows)
        over += found.aggregates[1].verdict in ("better", "worse")
    limit = 0.025 + 3 * math.sqrt(0.025 * 0.975 / 250)
    assert each / 250 <= limit
    assert over / 250 <= limit


def test_overall_verdict_says_why_there_is_none():
    few = judge([r for t in "tu" for r in records({"a": [1.0, 2.0, 3.0], "b": [1.5, 2.0, 4.0]}, task=t)])
    assert few.aggregates[1].verdict == "not judged: fewer than 4 seeds on t"
    rows = [r for t in "tu" for r in records({"a": [1.0] * 5, "b": [1.0] * 5}, task=t)]
    assert judge(rows).aggregates[1].verdict == "not judged: no spread on t to standardise by"
    some = records({"a": [1.0, 2.0], "b": [1.0, 2.5], "c": [3.0, 1.0]}, task="t")
    some += records({"a": [1.0, 2.0], "b": [1.0, 2.5]}, task="u") + records(
        {"b": [1.0, 2.5], "c": [2.0, 2.0]}, task="v"
    )
    found = judge(some)
    assert [a.method for a in found.aggregates] == []
    assert found["v", "c"].verdict == "no baseline here"
    assert "left out over all tasks, for want of a finished run on some: a and c" in found.notes


def test_one_unit_has_no_bootstrap_interval():
    found = judge([r for t in "tu" for r in records({"a": [1.0], "b": [2.0]}, task=t)])
    assert found.aggregates[1].rank[0] == 1.0
    assert math.isnan(found.aggregates[1].rank[1])
    assert "nan" not in found.summary()


def test_identical_methods_share_the_draw_and_stay_tied():
    rng = np.random.default_rng(0)
    rows = []
    for t in "tuv":
        x = rng.normal(size=5).tolist()
        rows += records({"a": x, "b": x, "c": rng.normal(size=5).tolist()}, task=t)
    found = {a.method: a for a in judge(rows).aggregates}
    assert found["a"].rank == found["b"].rank
    assert found["b"].improvement[0] == 0.5
    assert found["a"].iqm == found["b"].iqm


def test_equal_input_gives_equal_output():
    rows = two_tasks(noise=0.3)
    assert judge(rows).to_json() == judge(rows).to_json()


# -- reading -----------------------------------------------------------------------------------------------------------

TABLE = [("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 3.0), ("b", 0, 1.5), ("b", 1, 2.4), ("b", 2, 3.6)]


def text(header="method,seed,score", between=","):
    return "\n".join([header.replace(",", between), *(between.join(map(str, r)) for r in TABLE)]) + "\n"


@pytest.mark.parametrize("between", [",", ";", "\t"])
@pytest.mark.parametrize("header", ["method,seed,score", "Algorithm,RUN,Accuracy", "optimizer, trial ,value"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_are_read_whatever_their_dialect(tmp_path, between, header, encoding):
    path = write(tmp_path / "r.csv", text(header, between).replace("\n", "\r\n").encode(encoding))
    found = judge(path)
    assert found["b"].scores == (1.5, 2.4, 3.6)
    assert any("columns read" in n for n in found.notes) == (header != "method,seed,score")
    assert UNTUNED in found.notes


def test_other_inputs_give_the_same(tmp_path):
    pd = pytest.importorskip("pandas")
    rows = [dict(zip(("method", "seed", "score"), r)) for r in TABLE]
    path = write(tmp_path / "r.csv", text())
    frame = pd.DataFrame(rows)
    frame["seed"] = frame["seed"].astype(float)
    gaps = [{"method": m, "seed": str(float(s)), "score": str(x)} for m, s, x in TABLE]
    expected = judge(str(path)).rows
    for given in (path, rows, iter(rows), frame, pd.read_csv(path), gaps):
        assert judge(given).rows == expected


def test_pandas_is_not_imported(tmp_path):
    path = write(tmp_path / "r.csv", text())
    code = f"import sys; from pondera.lab import judge; judge({str(path)!r}); print('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_columns_by_name_and_those_not_used(tmp_path):
    path = write(tmp_path / "r.csv", "model,optimizer,seed,acc,hours\nx,a,0,1,3\nx,a,1,2,3\nx,b,0,2,3\nx,b,1,4,3\n")
    found = judge(path, columns={"method": "optimizer", "score": "ACC"})
    assert found["b"].scores == (2.0, 4.0)
    assert "columns read: optimizer as method, acc as score" in found.notes
    assert "columns not used: model, hours" in found.notes


REFUSED = {
    "": "is empty; judge needs a header",
    "\n \n": "is empty",
    "method,seed,score\n": "has a header and no rows",
    "method seed score\na 0 1\n": "has one column, 'method seed score'",
    "a,0,1\na,1,2\n": r"has no column for the method \(it has 'a', '0', '1'\); name it with --method-column",
    "method,score\na,1\n": "no column for the seed .* number the runs of each method if they have none",
    "method,seed,accuracy,value\na,0,1,1\n": "several columns that may be the score: 'accuracy' and 'value'",
    "method,seed,score\na,0,1\na,1,2\n": "holds one method, 'a', and no other",
    "method,seed,score\na,0,1\na,0,2\nb,0,1\n": r"has method 'a', seed '0', twice, in lines 2 and 3; one row is one run",
    "method,seed,score\na,0,x\nb,0,y\n": r"no run of r\.csv has a number in the column 'score' \(the first says 'x'\)",
    "method,seed,score\n,0,1\nb,0,1\n": r"r\.csv, line 2: there is no method in the column 'method'",
    "method,seed,score\na,,1\nb,0,1\n": r"r\.csv, line 2: there is no seed",
    "method,seed,tuning,score\na,0,,1\nb,0,1,1\n": r"r\.csv, line 2: there is no tuning",
    "method,seed,score\na,0,0,91\nb,0,0,92\n": "line 2: 4 fields where the header has 3 .*written with a point",
    "method;seed;score\na;0;0,91\nb;0;0,92\n": "line 2: the score '0,91' has a comma in it",
    'method,seed,score\na,0,"1\nb,0,1\n': "unexpected end of data",
    b"PK\x03\x04\xff\xfe\x00\x00": "is not a table in plain text",
    b"\xff\xfea": "is not a table in plain text",
}


@pytest.mark.parametrize("given", REFUSED, ids=lambda g: repr(REFUSED[g])[:40])
def test_bad_files_are_refused_in_one_sentence(tmp_path, given):
    path = write(tmp_path / "r.csv", given)
    with pytest.raises(BadInput, match=REFUSED[given]) as caught:
        judge(path)
    assert "\n" not in str(caught.value)


def test_bad_places_and_sizes(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="there is no file"):
        judge(tmp_path / "none.csv")
    with pytest.raises(BadInput, match="^judge needs a file of results, got the folder"):
        judge(tmp_path)
    with pytest.raises(BadInput, match="cannot be read"):
        judge("x" * 5000)
    path = write(tmp_path / "r.csv", text())
    monkeypatch.setattr(outside, "MOST_ROWS", 5)
    with pytest.raises(BadInput, match="more than 5 rows"):
        judge(path)
    monkeypatch.setattr(outside, "MOST_BYTES", 10)
    with pytest.raises(BadInput, match="is too large"):
        judge(path)


def test_bad_arguments(tmp_path):
    rows = records({"adam": [1.0, 2.0], "lion": [1.5, 2.4]})
    for more, words in (
        ({"baseline": "adm"}, r"no method in results is called 'adm'; did you mean adam\? \(methods: adam, lion\)"),
        ({"normalise": "rang"}, "did you mean range"),
        ({"resolution": -1.0}, "resolution must be at least 0"),
        ({"resolution": math.nan}, "resolution must be at least 0"),
        ({"bounds": (1.0, 0.0)}, "lowest and the highest possible score, got 1 and 0"),
        ({"bounds": (0.0, 1.0)}, "row 1: the score 2 lies outside the bounds 0 to 1"),
        ({"columns": {"score": "scores"}}, "no column called 'scores' for the score; did you mean score"),
        ({"columns": {"scores": "score"}}, "columns are named for .* did you mean score"),
        ({"columns": {"score": "seed", "seed": "seed"}}, "cannot be two things at once"),
    ):
        with pytest.raises(BadInput, match=words):
            judge(rows, **more)
    for bad, words in (
        (3, "needs a path, a list of dicts or a data frame, got int"),
        ([1, 2], "needs a dict for every run, got int"),
        ([], "are empty"),
        ({"method": ["a"]}, "got dict"),
    ):
        with pytest.raises(BadInput, match=words):
            judge(bad)
    again = [*rows, {"method": "adam", "seed": 0.0, "score": 3.0}]
    with pytest.raises(BadInput, match="twice, in rows 0 and 4"):
        judge(again)


# -- what it says ------------------------------------------------------------------------------------------------------


class Words(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.inside = [], "", [""]
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        self.inside.append("")

    def handle_data(self, data):
        self.words += data if self.inside[-1] not in ("script", "style") else ""


def figures(page):
    block = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    return json.loads(block[1], parse_constant=lambda w: pytest.fail(w))


def test_json_is_plain(tmp_path):
    found = judge([*two_tasks(noise=0.5), {"task": "easy", "method": "a", "seed": 99, "score": math.nan}])
    back = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert {r["verdict"] for r in back["rows"] if r["method"] == "a"} == {"failed in 1 of 7", "baseline"}
    assert back["over_tasks"][1]["overall"]["mean"] == pytest.approx(found.aggregates[1].overall.mean)
    assert back["rows"][0]["scores"]["99"] is None


def test_report_of_one_task(tmp_path):
    evil = '<script>alert("1")</script>'
    found = judge(
        records({"adam": [1.0, 2.0, 3.0, 2.0], "lion": [5.0, 6.1, 7.0, 6.0], evil: [1.0, math.nan, 3.3, 2.2]})
    )
    path = found.report(tmp_path / "r.html")
    page = path.read_text()
    words = Words(page)
    assert [t for t, _ in words.tags].count("script") == 3
    assert "1 of 2 methods better than the baseline" in words.words
    assert "failed in 1 of 4" in words.words
    assert words.words.count(evil) >= 2
    assert "nan" not in words.words.replace("(nan)", "")
    assert all("src" not in a for _, a in words.tags)
    specs = figures(page)
    (name,) = specs
    means = [t["x"][0] for t in specs[name]["data"] if t["mode"] == "markers" and len(t["x"]) == 1]
    assert means[0] == pytest.approx(4.025)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(BadInput, match="there is no folder"):
        found.report(tmp_path / "no" / "r.html")


def test_report_of_several_tasks(tmp_path):
    found = judge(two_tasks(noise=0.3))
    page = found.report(tmp_path / "r.html").read_text()
    specs = figures(page)
    assert {"overall", "chance", "rank", "middle", "profile"} < set(specs)
    assert len(specs) == 7
    words = Words(page)
    for part in ("Over all tasks", "Performance profiles", "Task by task", "hard", "Interquartile mean", "too narrow"):
        assert part in words.words
    ids = [a["id"] for _, a in words.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    levels = [int(t[1]) for t, _ in words.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))
    # the profile starts with every run and ends with none
    share = specs["profile"]["data"][0]["y"]
    assert all(a >= b for a, b in itertools.pairwise(share))


@pytest.mark.parametrize(
    "rows",
    [
        records({"a": [1.0], "b": [2.0]}),
        records({"a": [math.nan, math.nan], "b": [2.0, 3.0]}),
        [r for t in "tu" for r in records({"a": [1.0], "b": [math.nan]}, task=t)],
        [r for t in "tu" for r in records({"a": [1.0, 1.0], "b": [1.0, 1.0]}, task=t)],
        records({"a": [1.0, 1.1, 1.2]}, task="t") + records({"b": [1.0, 1.1, 1.2]}, task="u"),
    ],
)
def test_poor_tables_still_give_a_page(tmp_path, rows):
    found = judge(rows)
    assert isinstance(found, Judgement)
    assert "nan" not in found.summary().replace("(nan", "")
    assert "inf" not in found.summary()
    assert "None" not in Words(found.report(tmp_path / "r.html").read_text()).words
    json.dumps(found.to_json(), allow_nan=False)


def test_family_takes_mixed_pairs():
    rows = records({"a": [1.0, 2.0, 3.0], "b": [1.1, 2.1, 3.2]}) + [
        {"method": "c", "seed": s, "score": float(s)} for s in (7, 8, 9)
    ]
    found = judge(rows)
    assert (found["b"].difference.paired, found["c"].difference.paired) == (True, False)
    again = _family([(found[m], found["a"]) for m in "bc"], LEVEL, False)
    assert again == [found[m].difference for m in "bc"]
