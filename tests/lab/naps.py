"""Runs that do what they are told, for tests of where runs are carried out."""

import os
import sys  # noqa: F401
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Nap:
    """A run that executes a line of Python; what it puts into `out` comes back."""

    key: str
    do: str = ""


def work(nap):
    out = {}
    exec(nap.do, globals() | {"out": out})
    return {"status": "ok", "pid": os.getpid(), "wall": 0.0} | out


def carry_out(hands, naps, seconds=120):
    """Results by key, and how long it took; the executor is closed."""
    todo, results, began = list(naps), {}, time.monotonic()
    try:
        while len(results) < len(naps):
            assert time.monotonic() - began < seconds, f"only {sorted(results)} came back"
            while todo and hands.free:
                hands.submit(todo.pop(0))
            results |= {spec.key: result for spec, result in hands.wait(0.5)}
    finally:
        hands.close()
    return results
