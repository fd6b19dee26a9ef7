"""The store by itself: who may run what, which results count, and whose clock is asked."""

import json
import sqlite3
import threading
import time
from dataclasses import dataclass

import pytest
import sqlalchemy as sa

from pondera.errors import BadInput
from pondera.lab import store as module
from pondera.lab.store import Store


@dataclass(frozen=True)
class Spec:
    """All the store asks of a run."""

    key: str

    def facts(self):
        return {"key": self.key}


A, B = Spec("a" * 32), Spec("b" * 32)
OK, DIVERGED = {"status": "ok", "score": 0.5}, {"status": "diverged", "reason": "loss became nan at step 3"}
FAILURES = [{"status": s, "reason": "?", "wall": 0.0} for s in ("memory", "killed", "raised", "timeout")]


@pytest.fixture
def opened(tmp_path):
    """Open stores on one file; closed afterwards."""
    stores = []

    def start(place="runs.db", **options):
        stores.append(Store(tmp_path / place if "://" not in str(place) else place, **options))
        return stores[-1]

    yield start
    for s in stores:
        s.close()


def sql(path, *statements):
    with sqlite3.connect(path) as c:
        found = [c.execute(*s).fetchall() if isinstance(s, tuple) else c.execute(s).fetchall() for s in statements]
    c.close()
    return found[-1]


# -- claims ------------------------------------------------------------------------------------------------------------


def test_a_run_is_one_owners(opened):
    one, two = opened(), opened()
    assert one.claim(A)
    assert not two.claim(A)
    assert not one.claim(A)
    assert two.results([A.key]) == {}
    one.finish(A, OK)
    assert one.results([A.key]) == two.results([A.key]) == {A.key: OK}
    assert not two.claim(A)
    assert two.executions() == {A.key: 1}


def test_what_is_released_is_free(opened):
    one, two = opened(), opened()
    assert one.claim(A)
    assert one.claim(B)
    one.finish(B, OK)
    one.release()
    assert two.claim(A)
    assert not two.claim(B)
    one.release()  # gives back nothing that is another's
    assert not one.claim(A)


def test_the_first_good_result_stays(opened):
    """An owner that was slow for longer than its lease comes back with a result of its own."""
    slow, quick = opened(), opened()
    assert slow.claim(A)
    sql_of(slow, "update pondera_runs set beat = beat - 1000")
    assert quick.claim(A)
    quick.finish(A, OK)
    slow.finish(A, OK | {"score": 0.7})
    assert slow.results([A.key]) == {A.key: OK}
    assert quick.executions() == {A.key: 2}  # it is told that the work was done twice


def test_a_result_without_a_claim_is_kept(opened):
    one, two = opened(), opened()
    assert one.claim(A)
    one.release()
    one.finish(A, OK)
    assert two.results([A.key]) == {A.key: OK}


def sql_of(store, statement):
    with store.engine.begin() as c:
        c.execute(sa.text(statement))


# -- results for good, and failures of this machine -----------------------------------------------------------------------


@pytest.mark.parametrize("result", [OK, DIVERGED])
def test_good_results_are_everybodys(opened, result):
    one, two = opened(), opened()
    assert one.claim(A)
    one.finish(A, result)
    assert two.results([A.key]) == {A.key: result}
    assert not two.claim(A)


@pytest.mark.parametrize("result", FAILURES, ids=lambda r: r["status"])
def test_a_failure_is_its_owners_and_tried_again_by_others(opened, result):
    one, beside = opened(), opened()
    assert one.claim(A)
    one.finish(A, result)
    assert one.results([A.key]) == {A.key: result}
    assert not one.claim(A)  # not twice in one command
    later = opened()
    for other in (beside, later):
        assert other.results([A.key]) == {}
    assert beside.claim(A)
    assert not later.claim(A)
    assert one.results([A.key]) == {A.key: result}  # whatever others do with the row
    beside.finish(A, OK)
    assert later.results([A.key]) == {A.key: OK}
    assert later.executions() == {A.key: 1}


def test_fresh_takes_nothing_that_was_there(opened):
    old = opened()
    assert old.claim(A)
    old.finish(A, OK)
    fresh, beside = opened(fresh=True), opened()
    assert fresh.results([A.key]) == {}
    assert fresh.claim(A)
    assert beside.results([A.key]) == {A.key: OK}  # until there is a new one, the old one is not lost
    assert not beside.claim(A)
    new = OK | {"score": 0.7}
    fresh.finish(A, new)
    assert fresh.results([A.key]) == beside.results([A.key]) == {A.key: new}
    assert not fresh.claim(A)


def test_a_fresh_claim_given_back_leaves_the_old_result(opened):
    old = opened()
    assert old.claim(A)
    old.finish(A, OK)
    fresh = opened(fresh=True)
    assert fresh.claim(A)
    fresh.release()
    assert old.results([A.key]) == {A.key: OK}


def test_two_fresh_commands_share_the_work(opened):
    old = opened()
    for s in (A, B):
        assert old.claim(s)
        old.finish(s, OK)
    one, two = opened(fresh=True), opened(fresh=True)
    assert one.claim(A)
    assert not two.claim(A)
    one.finish(A, OK)
    assert two.results([A.key]) == {A.key: OK}


# -- signs of life ----------------------------------------------------------------------------------------------------------


def test_a_long_run_in_the_main_thread_keeps_its_claim(opened, monkeypatch):
    monkeypatch.setattr(module, "LEASE", 3.0)
    one, two = opened(), opened()
    before = threading.active_count()
    assert one.claim(A)
    assert threading.active_count() == before + 1
    for _ in range(8):
        time.sleep(1.0)  # the run
        assert not two.claim(A)
    one.close()
    assert threading.active_count() == before
    for _ in range(300):  # and is taken over once there is no sign of life
        if two.claim(A):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the claim never lapsed")


@pytest.mark.parametrize("hours", [-24, 24])
def test_a_wrong_clock_harms_nobody(opened, monkeypatch, hours):
    right, wrong = opened(), opened()
    true = time.time
    with monkeypatch.context() as m:
        m.setattr(time, "time", lambda: true() + 3600 * hours)
        assert wrong.claim(A)
        wrong.beat()
    assert not right.claim(A)  # it is alive, whatever its clock says
    assert right.claim(B)
    with monkeypatch.context() as m:
        m.setattr(time, "time", lambda: true() + 3600 * hours)
        assert not wrong.claim(B)
    wrong.close()
    monkeypatch.setattr(module, "LEASE", 0.5)  # and when it is gone, that shows in time
    for _ in range(200):
        if right.claim(A):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the claim of the wrong clock was never taken over")


def test_the_stamps_are_the_databases(opened, tmp_path, monkeypatch):
    one, now = opened(), time.time()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert one.claim(A)
    one.finish(A, OK)
    ((stamp,),) = sql(tmp_path / "runs.db", "select finished from pondera_runs")
    assert abs(stamp - now) < 600


@pytest.mark.parametrize("owner", ["", "here", "a/b", "host/pid/1/x", "host/1/2/3/4", "////", "a\nb"])
def test_a_malformed_owner_is_left_to_the_lease(opened, tmp_path, owner):
    one = opened()
    assert one.claim(A)
    sql(tmp_path / "runs.db", ("update pondera_runs set owner = ?", (owner,)))
    two = opened()
    assert not two.claim(A)
    sql(tmp_path / "runs.db", "update pondera_runs set beat = beat - 1000")
    assert two.claim(A)


@pytest.mark.parametrize("place", ["runs.db", "sqlite://"])
def test_many_threads(opened, place):
    kept, failed = opened(place), []

    def work(n):
        try:
            for i in range(20):
                spec = Spec(f"{n}-{i}")
                assert kept.claim(spec)
                kept.beat()
                kept.finish(spec, OK | {"n": n})
                assert kept.results([spec.key])[spec.key]["n"] == n
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert set(kept.executions().values()) == {1}
    assert len(kept.executions()) == 160


# -- tried again ----------------------------------------------------------------------------------------------------------


def test_every_method_may_be_tried_again_after_an_answer_that_was_lost(opened, monkeypatch):
    """The commit went through and the client did not hear of it: the second try changes nothing."""
    one = opened()
    whole, lost = one._transaction, []

    def forgetful(writes):
        from contextlib import contextmanager

        @contextmanager
        def transaction():
            with whole(writes) as c:
                yield c
            if len(lost) % 2 == 0:
                lost.append(1)
                raise sa.exc.OperationalError("commit", {}, Exception("database is locked"))
            lost.append(0)

        return transaction()

    monkeypatch.setattr(one, "_transaction", forgetful)
    assert one.claim(A)
    one.beat()
    one.finish(A, OK)
    assert one.claim(B)
    one.finish(B, FAILURES[0])
    assert one.results([A.key, B.key]) == {A.key: OK, B.key: FAILURES[0]}
    assert one.executions() == {A.key: 1}
    one.release()
    assert lost.count(1) == lost.count(0) >= 7
    ((n,),) = [tuple(r) for r in whole_count(one, whole)]
    assert n == 1


def whole_count(store, whole):
    with whole(False) as c:
        return c.execute(sa.text(f"select executions from pondera_runs where key = '{B.key}'")).all()


# -- the layout, and how it grows -------------------------------------------------------------------------------------------

LAYOUT_1 = """create table pondera_runs (key varchar(32) not null primary key, facts text not null, owner text not null,
    beat float not null, result text, finished float, executions integer not null)"""


@pytest.fixture
def old(tmp_path):
    """A store as the first layout had it: a result, a failure, a cut result and a claim of somebody living."""
    path, now = tmp_path / "runs.db", time.time()
    rows = [("ok", json.dumps(OK), now), ("killed", json.dumps(FAILURES[1]), now), ("cut", '{"status": "ok", "sc', now)]
    rows += [("claimed", None, now)]
    sql(path, LAYOUT_1)
    for key, result, beat in rows:
        values = (key, "{}", "elsewhere/1/2/3", beat, result, beat if result else None, int(result is not None))
        sql(path, ("insert into pondera_runs values (?, ?, ?, ?, ?, ?, ?)", values))
    return path


def test_an_old_store_is_brought_to_this_layout(old, opened):
    kept = opened()
    assert kept.results(["ok", "killed", "cut", "claimed"]) == {"ok": OK}
    assert kept.executions() == {"ok": 1}
    assert [kept.claim(Spec(k)) for k in ("ok", "killed", "cut", "claimed")] == [False, True, True, False]
    assert sql(old, "select version from pondera_layout") == [(module.VERSION,)]
    assert opened().results(["ok"]) == {"ok": OK}


def test_a_migration_that_is_cut_short_changes_nothing(old, opened, monkeypatch):
    before = sql(old, "select * from pondera_runs")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(module, "_read", stop)
        with pytest.raises(KeyboardInterrupt):
            opened()
    assert sql(old, "select * from pondera_runs") == before
    assert opened().results(["ok"]) == {"ok": OK}


def test_a_newer_store_is_refused(opened, tmp_path):
    assert opened().claim(A)
    sql(tmp_path / "runs.db", "update pondera_layout set version = 99")
    with pytest.raises(BadInput, match="written by a newer pondera \\(layout 99, this one knows 2\\); update pondera"):
        opened()


def test_many_open_a_new_store_at_once(tmp_path):
    failed, stores = [], []

    def start():
        try:
            stores.append(Store(tmp_path / "new.db"))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert sql(tmp_path / "new.db", "select count(*) from pondera_layout") == [(1,)]
    for s in stores:
        s.close()
