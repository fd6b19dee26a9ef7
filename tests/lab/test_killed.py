"""Killed at random points and started again: the same table, nothing finished repeated, the store always readable."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from pondera.lab.store import Store

from .conftest import table_of
from .test_execute import descendants, gone

pytestmark = pytest.mark.slow


def test_ten_kills_leave_the_same_table(command, tmp_path):
    undisturbed = table_of(command("--workers", "2", store=tmp_path / "calm.db"))
    store, chance, seen = tmp_path / "killed.db", random.Random(0), {}
    kills = interrupted = 0
    while kills < 10:
        process = command("--workers", "2", store=store, pause=0.02)
        began, early = time.monotonic(), kills % 3 == 2  # every third kill may fall anywhere, start-up included
        patience = chance.uniform(0.0, 8.0 if early else 1.5)
        while process.poll() is None and time.monotonic() - began < 120:
            if early and time.monotonic() - began > patience:
                break
            if not early and store.exists() and len(Store(store).executions()) > len(seen):
                time.sleep(patience)  # the others fall while runs are under way
                break
            time.sleep(0.1)
        interrupted += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        if store.exists():
            now = Store(store)
            done = now.executions()  # readable after every kill
            results = now.results(done)
            assert all(results[k] == r for k, r in seen.items()), "a finished run has changed"
            seen = results
            now.close()
    assert interrupted >= 5, "the kills came too late to mean anything"
    assert seen, "nothing was finished between the kills"
    again = table_of(command("--workers", "2", store=store))
    assert again == undisturbed
    counts = Store(store).executions()
    assert set(counts.values()) == {1}, "a finished run was carried out again"


def test_workers_end_with_their_parent(command):
    process = command("--workers", "2", pause=0.05)
    for _ in range(600):
        below = descendants(process.pid)
        if len(below) >= 4:  # the server that forks workers, its helper, two workers
            break
        time.sleep(0.1)
    assert len(below) >= 4
    process.kill()
    process.communicate()
    assert gone(below)


def test_a_worker_that_is_killed_costs_nothing(command, tmp_path):
    """Workers are killed from outside, one after the other: their runs are tried again, and the table is the same."""
    undisturbed = table_of(command("--workers", "1", store=tmp_path / "calm.db"))
    process = command("--workers", "2", store=tmp_path / "killed.db", pause=0.05)
    kept, kills, seen = None, 0, 0
    for _ in range(2400):
        if process.poll() is not None or kills == 4:
            break
        time.sleep(0.05)
        if kept is None and (tmp_path / "killed.db").exists():
            kept = Store(tmp_path / "killed.db")
        workers = [p for p in descendants(process.pid) if forked(p)]
        done = len(kept.executions()) if kept else 0
        if workers and done >= seen + 3:  # never the same run twice: that one would be a result
            os.kill(workers[kills % len(workers)], signal.SIGKILL)
            kills, seen = kills + 1, done
    assert kills >= 2
    assert table_of(process) == undisturbed
    assert set(kept.executions().values()) == {1}
    kept.close()


def forked(pid):
    """Whether a process is one that the server of processes forked (and not the server itself)."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return all("forkserver" in Path(f"/proc/{p}/cmdline").read_text() for p in (pid, parent))
    except (OSError, IndexError):
        return False
