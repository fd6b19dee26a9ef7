"""Killed at random points and started again: the same table, nothing finished repeated, the store always readable."""

import random
import signal
import time

import pytest

from pondera.lab.store import Store

from .conftest import table_of

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


def test_workers_end_with_their_parent(command, tmp_path):
    import os

    process = command("--workers", "2", pause=0.05)
    children = []
    for _ in range(200):
        time.sleep(0.1)
        children = [int(p) for p in os.popen(f"pgrep -P {process.pid}").read().split()]
        if len(children) >= 2:
            break
    assert len(children) >= 2
    process.kill()
    process.communicate()
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{c}") for c in children):
            break
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{c}") for c in children)
