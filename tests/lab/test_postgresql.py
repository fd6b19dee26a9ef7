"""A store that two comparisons share at once, on a real PostgreSQL server started here on loopback."""

import glob
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time

import pytest

from pondera.errors import BadInput
from pondera.lab import store as module
from pondera.lab.store import Store

from .conftest import table_of
from .test_store import LAYOUT_1, OK, A, B, Spec

pytestmark = [pytest.mark.postgresql, pytest.mark.slow]
C = Spec("c" * 32)
BIN = max(glob.glob("/usr/lib/postgresql/*/bin"), default=None) or os.path.dirname(shutil.which("postgres") or "")


class Server:
    """A PostgreSQL server of these tests' own, which can be stopped and started."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="pondera-pg-")
        self._as = []
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(self.folder, "postgres")
            self._as = ["runuser", "-u", "postgres", "--"]
        self.data = f"{self.folder}/data"
        initdb = [*self._as, f"{BIN}/initdb", "-D", self.data, "-A", "trust", "-U", "pondera"]
        subprocess.run(initdb, check=True, capture_output=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"postgresql://pondera@127.0.0.1:{self.port}/postgres"

    def _control(self, *options):
        command = [*self._as, f"{BIN}/pg_ctl", "-D", self.data, "-w", *options]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr

    def start(self):
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories={self.folder}"
        self._control("-l", f"{self.folder}/log", "-o", options + " -c fsync=off", "start")

    def stop(self, how="fast"):
        self._control("-m", how, "stop")

    def sql(self, statement):
        import psycopg

        with psycopg.connect(self.url) as c:
            cursor = c.execute(statement)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="module")
def running():
    if not BIN:
        pytest.skip("no PostgreSQL server is installed")
    one = Server()
    one.start()
    yield one
    try:
        one.stop()
    finally:
        shutil.rmtree(one.folder, ignore_errors=True)


@pytest.fixture
def server(running):
    """The server's address, with no table of ours on it."""
    running.sql("drop table if exists pondera_runs, pondera_layout")
    return running.url


def test_two_comparisons_split_the_work(running, server, command, tmp_path):
    alone = table_of(command("--workers", "1", store=tmp_path / "alone.db"))
    both = [command("--workers", "1", store=server, pause=0.01) for _ in range(2)]
    tables = [table_of(p) for p in both]
    assert tables[0] == tables[1] == alone
    store = Store(server)
    counts = store.executions()
    assert len(counts) == len(Store(tmp_path / "alone.db").executions())
    assert set(counts.values()) == {1}, "a run was repeated"
    owners = [n for (n,) in running.sql("select count(*) from pondera_runs group by owner")]
    assert len(owners) == 2, "one of the two did everything"
    assert min(owners) >= 0.2 * sum(owners)


def test_wrong_server_is_one_sentence():
    with pytest.raises(BadInput, match="cannot be used"):
        Store("postgresql://pondera@127.0.0.1:1/none")


@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_a_server_that_is_restarted_is_waited_for(running, server, command, tmp_path, how):
    alone = table_of(command("--workers", "1", store=tmp_path / "alone.db"))
    process = command("--workers", "2", store=server, pause=0.03)
    watcher = Store(server)
    for _ in range(1200):
        time.sleep(0.1)
        if len(watcher.executions()) >= 6:
            break
    assert process.poll() is None, "it finished before the restart"
    running.stop(how)
    time.sleep(4.0)
    running.start()
    assert table_of(process) == alone
    assert set(watcher.executions().values()) == {1}, "a run was repeated"
    watcher.close()


def test_every_method_waits_for_the_server(running, server):
    one = Store(server)
    assert one.claim(A)
    assert one.claim(B)
    calls = {
        "beat": one.beat,
        "claim": lambda: one.claim(C),
        "finish": lambda: one.finish(A, OK),
        "results": lambda: one.results([A.key]),
        "executions": one.executions,
    }
    answers = {}
    for name, call in calls.items():
        running.stop("immediate")
        later = threading.Timer(2.0, running.start)
        later.start()
        answers[name] = call()
        later.join()
    assert answers == {"beat": None, "claim": True, "finish": None, "results": {A.key: OK}, "executions": {A.key: 1}}
    one.release()
    assert running.sql("select key, executions from pondera_runs") == [(A.key, 1)]
    one.close()


def test_a_server_that_stays_away_is_one_sentence(running, server, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 6.0)
    one = Store(server)
    assert one.claim(A)
    running.stop()
    try:
        with pytest.warns(UserWarning, match="does not answer .*; waiting for it"):
            with pytest.raises(
                BadInput, match="cannot be used: its server has gone .* for \\d+ seconds now; see to it"
            ) as e:
                one.finish(A, OK)
        assert "\n" not in str(e.value)
        began = time.monotonic()
        one.release()  # the command ends, and does not wait for minutes once more
        one.close()
        assert time.monotonic() - began < 30
    finally:
        running.start()
    two = Store(server)
    assert two.results([A.key]) == {}
    two.close()


def test_the_stamps_are_the_servers(running, server, monkeypatch):
    right, wrong, true = Store(server), Store(server), time.time
    for hours, spec in ((-24, A), (24, B)):
        with monkeypatch.context() as m:
            m.setattr(time, "time", lambda h=hours: true() + 3600 * h)
            assert wrong.claim(spec)
        assert not right.claim(spec)
    assert running.sql("select max(abs(beat - extract(epoch from now()))) < 300 from pondera_runs") == [(True,)]
    running.sql("update pondera_runs set beat = beat - 1000")
    assert right.claim(A)
    wrong.finish(B, {"status": "killed", "reason": "?"})
    assert right.claim(B)
    right.close()
    wrong.close()


def test_many_clients_claim_each_run_once(server):
    stores = [Store(server) for _ in range(4)]
    specs = [Spec(f"{i:032}") for i in range(30)]
    got = [[] for _ in stores]

    def work(n):
        for spec in specs:
            if stores[n].claim(spec):
                got[n].append(spec)
                stores[n].finish(spec, OK)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(s.key for g in got for s in g) == [s.key for s in specs]
    assert set(stores[0].executions().values()) == {1}
    for s in stores:
        s.close()


def test_an_old_store_is_brought_to_this_layout_by_one_of_many(running, server):
    running.sql(LAYOUT_1)
    row = f"insert into pondera_runs values ('{A.key}', '{{}}', 'elsewhere/1/2/3', 1.0, '{json.dumps(OK)}', 1.0, 1)"
    running.sql(row)
    stores, failed = [], []

    def start():
        try:
            stores.append(Store(server))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert [s.results([A.key]) for s in stores] == [{A.key: OK}] * 4
    assert running.sql("select version from pondera_layout") == [(module.VERSION,)]
    running.sql("update pondera_layout set version = 99")
    with pytest.raises(BadInput, match="written by a newer pondera"):
        Store(server)
    for s in stores:
        s.close()


def test_a_read_only_server_is_one_sentence(server):
    Store(server).close()
    with pytest.raises(BadInput, match="it is read-only; make it writable"):
        Store(server + "?options=-c%20default_transaction_read_only%3Don")
