"""What keeping a run costs: a claim and its end on a disk, beside the same two rows committed by sqlite3 alone."""

import json
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

from pondera.lab.store import Store

RUNS = 300
RESULT = {"status": "ok", "score": 0.9, "train_loss": 0.1, "curve": [[i, 0.1 * i, 0.9, 0.1] for i in range(20)]}


class Spec:
    """What the store asks of a run."""

    def __init__(self, key: str):
        self.key = key

    def facts(self) -> dict[str, Any]:
        return {"recipe": "init=lsuv", "rate": 0.01, "seed": 3, "steps": 300}


def ours(folder: Path, runs: int) -> list[float]:
    kept, times = Store(folder / "ours.db"), []
    for i in range(runs):
        spec, began = Spec(f"{i:032}"), time.perf_counter()
        assert kept.claim(spec)
        kept.finish(spec, RESULT)
        times.append(time.perf_counter() - began)
    kept.close()
    return times


def bare(folder: Path, runs: int) -> list[float]:
    """An insert and an update, each committed to the disk as SQLite does by default."""
    c, times = sqlite3.connect(folder / "bare.db"), []
    c.execute("create table runs (key text primary key, facts text, owner text, beat real, result text)")
    for i in range(runs):
        began = time.perf_counter()
        with c:
            c.execute("insert into runs values (?, ?, 'me', 0.0, null)", (f"{i:032}", json.dumps(Spec("").facts())))
        with c:
            c.execute("update runs set result = ? where key = ?", (json.dumps(RESULT), f"{i:032}"))
        times.append(time.perf_counter() - began)
    c.close()
    return times


def run(quick: bool = False) -> list[dict[str, Any]]:
    runs = 50 if quick else RUNS
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # a disk: the place for temporary files may be memory
        a, b = (sorted(f(Path(folder), runs))[runs // 2] for f in (ours, bare))
    return [
        {
            "name": "claim and end of one run",
            "ours": "pondera.lab.store",
            "peer": "sqlite3 alone",
            "seconds_ours": a,
            "seconds_peer": b,
            "ratio": a / b,
            "note": "the mark is 0.005 s",
        }
    ]


if __name__ == "__main__":
    print(*run(), sep="\n")
