"""The criteria of the lab's own claims: the promise fails where it should, and tables are made of the units they say."""

import pytest

from pondera.lab.calibration import Tuned, rate
from pondera.replications.lab import calibration


def share(k, n, cells=1):
    return rate([True] * k + [False] * (n - k), cells)


def test_the_promise_is_kept_by_what_keeps_it_and_by_nothing_else():
    assert calibration._keeps([share(15, 300), share(12, 300)])
    assert not calibration._keeps([share(60, 300, 24), share(0, 3000)])  # one cell is too high for chance
    assert not calibration._keeps([share(18, 300, 24)] * 10)  # no cell is, all together are


def test_a_large_pool_gives_tables_without_common_units_and_a_small_one_is_drawn_again():
    large = [Tuned(s, (float(s), s + 0.5), (), (), 0) for s in range(6000)]
    for n, count in ((3, 500), (10, 500), (20, 300)):
        found = calibration._cell(large, n)
        seen = [s for t in found for s in t[0]]
        assert len(found) == count
        assert len(set(seen)) == len(seen) == n * count
    assert len(calibration._cell(large[:100], 5)) == 300


def test_pools_come_back_as_they_were_kept(monkeypatch):
    calls = []

    def kept(name, function, parts, about):
        calls.extend(parts)
        return [{"units": [[s, [0.1, 0.2], [0.01, 0.1], [5.25, 6.25], 1] for s in range(p[2], p[3])]} for p in parts]

    monkeypatch.setattr(calibration, "run_all", kept)
    (one, two) = calibration._pools([("wine", ["salt=1", "salt=2"], 10, 700), ("deep", ["", "init=lsuv"], 0, 60)])
    assert [t.seed for t in one] == list(range(10, 710))
    assert [t.seed for t in two] == list(range(60))
    assert one[0] == Tuned(10, (0.1, 0.2), (0.01, 0.1), (5.25, 6.25), 1)
    assert calls[-1] == ["deep", ["", "init=lsuv"], 50, 60, 60]


def test_parts_share_no_seed():
    c = calibration
    pools = [range(c.QUICK, c.QUICK + 150), range(c.FIRST, c.FIRST + 9000), range(c.FIVE, c.FIVE + 1500)]
    pools += [range(c.APART, c.APART + 50), range(c.REGRET, c.REGRET + max(c.REGRETS.values()))]
    pools += [range(c.ONCE * 22, (c.ONCE + c.FEWER) * 22), range(c.ONCE * 12, (c.ONCE + 20) * 12)]
    seeds = [s for p in pools for s in p]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.slow
def test_the_quick_claim_tells_the_rules_apart():
    found = calibration.claimed_errors_are_the_true_ones.find(calibration.Lab("calibration"))
    spread = found.measured["true_variance_over_claimed"]
    assert found.verdict == "holds"
    assert spread["tuned once"] > 2 * spread["the method"]
