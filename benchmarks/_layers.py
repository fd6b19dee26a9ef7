"""What the benchmarks of layers share: one forward and backward pass beside a peer's, time and peak memory."""

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]
REPEATS = 11


def compared(
    name: str, ours: str, layer: Layer, peer: str, other: Layer, x: Tensor, note: str = "", backward: bool = True
) -> dict[str, Any]:
    """A row: median CPU seconds (one thread, so that other programs hardly count) of each on `x`, run in turn, and what a pass makes the process grow by at its peak."""

    def run(f: Layer) -> None:
        if not backward:
            with torch.no_grad():
                f(x)
            return
        at = x.detach().requires_grad_()
        f(at).sum().backward()

    run(layer), run(other)
    times = [(_timed(lambda: run(layer)), _timed(lambda: run(other))) for _ in range(REPEATS)]
    a, b = (statistics.median(t) for t in zip(*times, strict=True))
    mine, theirs = (peak(lambda f=f: run(f)) for f in (layer, other))  # type: ignore[misc]
    memory = f"peak memory {mine:.1f} MiB beside {theirs:.1f} MiB"
    row = {"name": f"{name}, {'forward and backward' if backward else 'forward'}", "ours": ours, "peer": peer}
    row |= {"seconds_ours": a, "seconds_peer": b, "ratio": a / b}
    return row | {"note": "; ".join(filter(None, (note, memory)))}


def _timed(f: Callable[[], Any]) -> float:
    began = time.process_time()
    f()
    return time.process_time() - began


def saved(f: Layer, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once; what is a parameter does not count."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if not (t.is_leaf and t.requires_grad):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    at = x.detach().requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        f(at)
    return sum(kept.values())


def peak(f: Callable[[], Any]) -> float:
    """MiB by which a copy of this process grows while it runs `f` (Linux)."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far is forgotten
        before = _memory("VmRSS")
        f()
        os.write(writing, str((_memory("VmHWM") - before) / 1024).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = float(pipe.read())
    os.waitpid(child, 0)
    return found


def _memory(what: str) -> float:
    """KiB of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(what)))
