"""The rules of inference, against numbers worked by hand and against simulation."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pondera.lab.stats import LEVEL, STEPS_SHARE, Difference, difference, family, interval, looks, nominal_level


def test_floor_of_one_step_by_hand():
    # five times one example of a hundred: mean 0.01, spread taken as 0.01, t(0.975, 4) = 2.7764: half 0.01242
    d = difference([0.91] * 5, [0.90] * 5, resolution=0.01)
    assert (d.low, d.high) == pytest.approx((0.01 - 0.012416, 0.01 + 0.012416), abs=1e-5)
    assert d.verdict == "no difference shown"
    # seven equal signs have a chance of 2 / 2**7 < 5%, six have not: 7 is where it is called
    calls = [difference([0.91] * n, [0.90] * n, resolution=0.01).verdict == "better" for n in range(2, 10)]
    assert calls == [False] * 5 + [True] * 3
    # once proven by a zero width: two seeds, one example apart
    assert difference([0.91, 0.91], [0.90, 0.90], resolution=0.01).verdict == "no difference shown"
    # above the floor it changes nothing
    a, b = [0.9, 0.95, 0.99], [0.8, 0.82, 0.81]
    assert difference(a, b, resolution=0.001).low == difference(a, b).low


def test_the_floor_is_safe_where_pairs_differ_by_a_step_by_chance():
    """The worst case: every pair differs by one step, the sign by a coin. All 2^n patterns, counted."""
    for n in range(2, 13):
        called = 0
        for ups in range(n + 1):
            x = [0.51] * ups + [0.49] * (n - ups)
            d = difference(x, [0.5] * n, resolution=0.01)
            called += math.comb(n, ups) * (d.verdict != "no difference shown")
        assert called / 2**n <= LEVEL


def test_intervals_stay_inside_the_bounds():
    mean, low, high = interval([1.0, 0.99, 1.0], bounds=(0.0, 1.0))
    assert low < mean < high == 1.0
    d = difference([1.0, 0.0], [0.0, 0.0], bounds=(0.0, 1.0))
    assert (d.low, d.high) == (-1.0, 1.0)
    assert interval([0.5], bounds=(0.0, 1.0)) == (0.5, 0.0, 1.0)


def test_holm_calls_what_bonferroni_does_not_and_by_hand():
    """p = 0.011, 0.02, 0.9 of three: Bonferroni (0.0167) calls one, Holm goes on to 0.05 / 2 and calls two."""

    def with_p(p, n=6):
        base = np.array([-1.0, 1.0, -0.5, 0.5, -0.2, 0.2])
        sd = base.std(ddof=1)
        t = scipy_stats.t.isf(p / 2, n - 1)
        return list(base + t * sd / math.sqrt(n)), [0.0] * n

    found = family([with_p(0.02), with_p(0.011), with_p(0.9)])
    assert [d.p for d in found] == pytest.approx([0.02, 0.011, 0.9])
    assert [d.verdict for d in found] == ["better", "better", "no difference shown"]
    # simultaneous intervals are Bonferroni's; where Holm alone calls, the interval is drawn up to zero
    plain = [difference(*with_p(p), comparisons=3) for p in (0.02, 0.011)]
    assert plain[0].low < 0 == found[0].low
    assert found[1].low == plain[1].low > 0
    assert [d.high for d in found[:2]] == [d.high for d in plain]
    none = family([with_p(0.03), with_p(0.04)])  # the first step fails, and with it all
    assert [d.verdict for d in none] == ["no difference shown"] * 2
    worse = family([tuple(reversed(with_p(1e-4)))])
    assert worse[0].verdict == "worse"


def test_absent_members_count():
    one = ([0.9, 0.91, 0.92], [0.8, 0.82, 0.81])
    alone, (with_absent, none) = family([one])[0], family([one, None])
    assert none is None
    assert with_absent.low < alone.low


def test_family_wise_error_of_many_equal_recipes_is_kept():
    """2,000 tables of five recipes against a shared baseline, n = 5: at most 5%, and Holm is what Bonferroni is there."""
    rng = np.random.default_rng(7)
    called = 0
    for _ in range(2000):
        x = rng.standard_normal((6, 5))
        called += any(d.verdict != "no difference shown" for d in family([(list(a), list(x[0])) for a in x[1:]]))
    assert called / 2000 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)


def test_intervals_of_a_family_hold_at_once_where_some_recipes_differ():
    """One of three differs: its interval and the others' all hold the truth in 95% of 2,000 tables."""
    rng = np.random.default_rng(8)
    truth, held = [3.0, 0.0, 0.0], 0
    for _ in range(2000):
        x = rng.standard_normal((4, 5)) + np.array([0.0, *truth])[:, None]
        found = family([(list(a), list(x[0])) for a in x[1:]])
        held += all(d.low <= t <= d.high for d, t in zip(found, truth))
    assert held / 2000 >= 0.95 - 2 * math.sqrt(0.05 * 0.95 / 2000)


def test_looks():
    assert looks(5, 30) == (5, 8, 12, 18, 27, 30)
    assert looks(2, 4) == (2, 3, 4)
    assert looks(5, 5) == (5,)


@pytest.mark.parametrize(("level", "at"), [(0.05, (5, 8, 12, 18, 27, 30)), (0.02, (3, 5, 8))])
def test_nominal_level_keeps_the_chance_over_all_looks(level, at):
    """Against other draws and scipy's own t-test; looking at 5% each time is far above."""
    rng = np.random.default_rng(123)
    x = rng.standard_normal((20_000, at[-1]))
    p = np.stack([scipy_stats.ttest_1samp(x[:, :n], 0.0, axis=1).pvalue for n in at])
    each = nominal_level(level, at)
    assert abs((p.min(0) < each).mean() - level) < 4 * math.sqrt(level / 20_000)
    assert (p.min(0) < level).mean() > 1.7 * level
    assert each > level / len(at)  # less is given away than by Bonferroni over looks


def test_what_could_be_shown_and_what_it_would_take():
    rng = np.random.default_rng(5)
    sd, n = 0.02, 10
    d = difference(list(rng.standard_normal(n) * sd), [0.0] * n)
    spread = (d.high - d.mean) / scipy_stats.t.isf(0.025, n - 1) * math.sqrt(n)
    # power of a t-test at the difference said to be shown: 80%, by the noncentral t
    shift = d.shown / (spread / math.sqrt(n))
    crit = scipy_stats.t.isf(0.025, n - 1)
    assert scipy_stats.nct.sf(crit, n - 1, shift) == pytest.approx(0.8, abs=0.02)
    assert d.needed is not None
    more = difference([0.01] * 5 + [0.03] * 5, [0.0] * 10)
    assert more.needed < 10
    assert difference([0.1, -0.1], [0.0, 0.0]).needed is None
    with pytest.raises(ValueError, match="at least two units"):
        difference([1.0], [0.0])


def test_verdict_of_a_difference_without_steps_is_its_intervals():
    assert Difference(0.1, 0.05, 0.15, 1.0, 5).verdict == "better"
    assert Difference(0.1, 0.05, 0.15, 1.0, 5, called=False).verdict == "no difference shown"
    assert Difference(-0.1, -0.15, 0.0, 1.0, 5, called=True).verdict == "worse"
    assert 0 < STEPS_SHARE < 1
