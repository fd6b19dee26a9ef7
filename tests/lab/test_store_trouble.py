"""Places that cannot be used: one sentence that names the store and says what to do, at once, and nothing lost."""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import warnings

import pytest
import sqlalchemy as sa

from pondera.errors import BadInput
from pondera.lab import store as module
from pondera.lab.store import Store

from .test_store import OK, A, B, Spec, opened, sql  # noqa: F401

LONG = OK | {"curve": [[i, 0.1 * i, 1.0 / (i + 1)] for i in range(300)]}


def sentence(caught, *words):
    text = str(caught.value)
    assert "\n" not in text
    for w in words:
        assert w in text, text


def filled(path, n=60):
    kept = Store(path)
    for i in range(n):
        assert kept.claim(Spec(f"{i:032}"))
        kept.finish(Spec(f"{i:032}"), LONG)
    kept.close()
    return [f"{i:032}" for i in range(n)]


def test_a_full_disk_and_the_same_disk_mended(opened, tmp_path):  # noqa: F811
    keys = filled(tmp_path / "runs.db")
    kept, full = opened(), [True]

    @sa.event.listens_for(kept.engine, "begin")
    def limit(c):
        pages = c.exec_driver_sql("PRAGMA page_count").scalar() if full[0] else 10**9
        c.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    with pytest.raises(BadInput) as caught:
        for i in range(1000):
            kept.claim(Spec(f"new {i}"))
            kept.finish(Spec(f"new {i}"), LONG)
    sentence(caught, "runs.db", "its disk is full; make room and give the same command again")
    kept.release()  # no second error while the command ends
    assert len(Store(tmp_path / "runs.db").results(keys)) == len(keys)
    full[0] = False
    assert kept.claim(A)
    kept.finish(A, OK)
    assert opened().results([A.key]) == {A.key: OK}


@pytest.mark.slow
def test_a_full_disk_ends_a_comparison_at_once(command, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs to be root")
    try:
        ballast = small / "ballast"
        process = command("--workers", "2", store=small / "runs.db", pause=0.02)
        for _ in range(1200):
            if (small / "runs.db").exists() and len(Store(small / "runs.db").executions()) >= 2:
                break
            time.sleep(0.05)
        try:
            ballast.write_bytes(b"x" * 10**6)
        except OSError:
            pass
        _, err = process.communicate(timeout=240)
        assert process.returncode == 2, err
        assert "Traceback" not in err
        assert "runs.db cannot be used" in err.strip().splitlines()[-1]
        shutil.copy(small / "runs.db", tmp_path / "mended.db")
        if (small / "runs.db-wal").exists():
            shutil.copy(small / "runs.db-wal", tmp_path / "mended.db-wal")
        assert len(Store(tmp_path / "mended.db").executions()) >= 2
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_file_that_may_not_grow(tmp_path):
    """A quota, or a limit on the size of files."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "from pondera.errors import BadInput\n"
        "from pondera.lab.store import Store\n"
        "class Spec:\n"
        "    def __init__(self, key): self.key = key\n"
        "    def facts(self): return {}\n"
        "try:\n"
        f"    kept = Store({str(tmp_path / 'runs.db')!r})\n"
        "    for i in range(100):\n"
        "        kept.claim(Spec(str(i))); kept.finish(Spec(str(i)), {'status': 'ok', 'x': 'y' * 2000})\n"
        "except BadInput as error: print(i, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    n, _, text = done.stdout.partition(" ")
    assert "runs.db cannot be used" in text
    assert "see that its disk has room" in text or "its disk is full" in text
    assert len(Store(tmp_path / "runs.db").executions()) >= int(n) - 1


@pytest.mark.parametrize("seed", range(12))
def test_flipped_pages(tmp_path, seed):
    """Whatever is damaged, a method gives what was stored or one sentence."""
    path, chance = tmp_path / "runs.db", random.Random(seed)
    keys = filled(path)
    Store(path).close()
    sql(path, "pragma wal_checkpoint(truncate)")
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 5, 50])):
        at = chance.randrange(100, len(data))
        data[at : at + 40] = chance.randbytes(len(data[at : at + 40]))
    path.write_bytes(data)
    try:
        kept = Store(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which the test after next looks at
            for _ in range(2):
                found = kept.results(keys)
                assert all(r == LONG for r in found.values()), "a result has changed without a word"
                for key in keys:
                    if key not in found and kept.claim(Spec(key)):
                        kept.finish(Spec(key), LONG)
        kept.executions()
        kept.release()
        kept.close()
    except BadInput as error:
        assert "runs.db" in str(error)
        assert "\n" not in str(error)


def test_a_damaged_file_says_what_to_do(tmp_path):
    path = tmp_path / "runs.db"
    keys = filled(path)
    sql(path, "pragma wal_checkpoint(truncate)")
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[4096 * page : 4096 * page + 200] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.raises(BadInput) as caught:
        Store(path).results(keys)
    sentence(caught, "runs.db", "it is damaged (database disk image is malformed); move it away, or save", ".recover")


@pytest.mark.parametrize(
    "damage",
    ["substr(result, 1, 20)", "''", "'[]'", "'null'", "replace(result, '0.5', '0.6')", "cast(x'7bff' as text)"],
)
def test_a_damaged_result_is_run_again(opened, tmp_path, damage):  # noqa: F811
    one = opened()
    for s in (A, B):
        assert one.claim(s)
        one.finish(s, OK)
    sql(tmp_path / "runs.db", f"update pondera_runs set result = {damage} where key = '{A.key}'")
    two = opened()
    with pytest.warns(UserWarning, match="runs.db holds 1 results that cannot be read; they are run again"):
        assert two.results([A.key, B.key]) == {B.key: OK}
    assert two.claim(A)
    two.finish(A, OK)
    assert opened().results([A.key, B.key]) == {A.key: OK, B.key: OK}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:secret@host:port/db", "is no database URL"),
        ("postgresql://me:secret@127.0.0.1:99999/db", "invalid port number"),
        ("postgresql://me:secret@127.0.0.1:1/db", "cannot be used: connection failed"),
        ("postgresql://me:secret@127.0.0.1:1/db?nonsense=1", "cannot be used: .*nonsense"),
        ("mysql://me:secret@host/db", "a store is a file, sqlite:// or postgresql://, got mysql://"),
        ("nothing://", "a store is a file, sqlite:// or postgresql://, got nothing://"),
        ("://", "is no database URL"),
    ],
)
def test_a_wrong_address(url, words):
    began = time.monotonic()
    with pytest.raises(BadInput, match=words) as caught:
        Store(url)
    sentence(caught)
    assert "secret" not in str(caught.value)
    assert time.monotonic() - began < 60


def test_a_read_only_store(opened, tmp_path):  # noqa: F811
    filled(tmp_path / "runs.db", 3)
    with pytest.raises(BadInput) as caught:
        Store(f"sqlite:///file:{tmp_path / 'runs.db'}?mode=ro&uri=true")
    sentence(caught, "runs.db", "it is read-only; make it writable, or name another one")
    kept = opened()
    with kept.engine.connect() as c:
        c.exec_driver_sql("PRAGMA query_only=1")
    with pytest.raises(BadInput) as caught:
        kept.claim(A)
    sentence(caught, "it is read-only")


def test_a_file_of_something_else(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("nothing of a database here\n" * 100)
    with pytest.raises(BadInput) as caught:
        Store(notes)
    sentence(caught, "notes.txt", "file is not a database, or no longer; name another one")
    assert notes.read_text().startswith("nothing of a database")
    sql(tmp_path / "other.db", "create table pondera_runs (something integer)")
    with pytest.raises(BadInput) as caught:
        Store(tmp_path / "other.db")
    sentence(caught, "other.db", "not of pondera's layout")


def test_a_locked_file_is_waited_for_and_not_for_ever(opened, tmp_path, monkeypatch):  # noqa: F811
    kept = opened()
    other = sqlite3.connect(tmp_path / "runs.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(module, "LOCKED", 2.0)
    with pytest.raises(BadInput) as caught:
        kept.claim(A)
    sentence(caught, "runs.db", "another program keeps it locked")
    monkeypatch.setattr(module, "LOCKED", 60.0)
    threading.Timer(2.0, lambda: other.execute("ROLLBACK")).start()
    assert kept.claim(A)
    other.close()


def test_a_folder_that_goes_away(opened, tmp_path):  # noqa: F811
    place = tmp_path / "there"
    place.mkdir()
    kept = Store(place / "runs.db")
    kept.engine.dispose()
    shutil.rmtree(place)
    with pytest.raises(BadInput) as caught:
        kept.claim(A)
    sentence(caught, "runs.db", "unable to open database file; see that its folder may be written")
    assert not os.path.exists(place)
