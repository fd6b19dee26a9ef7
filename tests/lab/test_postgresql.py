"""A store that two comparisons share at once, on a real PostgreSQL server started here on loopback."""

import glob
import os
import shutil
import socket
import subprocess
import tempfile

import pytest

from pondera.lab.store import Store

from .conftest import table_of

pytestmark = [pytest.mark.postgresql, pytest.mark.slow]
BIN = max(glob.glob("/usr/lib/postgresql/*/bin"), default=None) or os.path.dirname(shutil.which("postgres") or "")


@pytest.fixture(scope="module")
def server():
    if not BIN:
        pytest.skip("no PostgreSQL server is installed")
    folder = tempfile.mkdtemp(prefix="pondera-pg-")
    as_server = []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres")
        as_server = ["runuser", "-u", "postgres", "--"]
    data = f"{folder}/data"
    subprocess.run(
        [*as_server, f"{BIN}/initdb", "-D", data, "-A", "trust", "-U", "pondera"], check=True, capture_output=True
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    pg_ctl = [*as_server, f"{BIN}/pg_ctl", "-D", data]
    subprocess.run([*pg_ctl, "-l", f"{folder}/log", "-w", "-o", options, "start"], check=True, capture_output=True)
    yield f"postgresql://pondera@127.0.0.1:{port}/postgres"
    stopped = subprocess.run([*pg_ctl, "-m", "fast", "-w", "stop"], capture_output=True, text=True)
    shutil.rmtree(folder, ignore_errors=True)
    assert stopped.returncode == 0, stopped.stderr


def test_two_comparisons_split_the_work(server, command, tmp_path):
    alone = table_of(command("--workers", "1", store=tmp_path / "alone.db"))
    both = [command("--workers", "1", store=server, pause=0.01) for _ in range(2)]
    tables = [table_of(p) for p in both]
    assert tables[0] == tables[1] == alone
    store = Store(server)
    counts = store.executions()
    assert len(counts) == len(Store(tmp_path / "alone.db").executions())
    assert set(counts.values()) == {1}, "a run was repeated"
    with store.engine.connect() as c:
        import sqlalchemy as sa

        owners = [n for (n,) in c.execute(sa.text("select count(*) from pondera_runs group by owner"))]
    assert len(owners) == 2, "one of the two did everything"
    assert min(owners) >= 0.2 * sum(owners)


def test_wrong_server_is_one_sentence():
    from pondera.errors import BadInput

    with pytest.raises(BadInput, match="cannot be used"):
        Store("postgresql://pondera@127.0.0.1:1/none")
