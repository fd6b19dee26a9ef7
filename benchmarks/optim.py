"""Optimizers beside torch's own: time of a step, memory of state and step, and how the cost grows with the matrix.

Run `python -m benchmarks optim`. Steps are interleaved in one process on one thread; times are medians. A block is the four
matrices of GPT-2 small's: 2304 x 768, 768 x 768, 3072 x 768, 768 x 3072. Peak is what a step holds beside weights and state.
"""

import importlib.util
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pondera.optim.auon import AuON, HybridAuON
from pondera.optim.decoupled_decay import SGDW
from pondera.optim.normuon import NorMuon
from pondera.optim.novograd import NovoGrad
from pondera.optim.trust_region_muon import TrustRegion
from pondera.replications.adapters.oftv2 import peak_bytes

Make = Callable[[list[nn.Parameter]], Optimizer]
BLOCK = ((2304, 768), (768, 768), (3072, 768), (768, 3072))  # of GPT-2 small
SIZES = (128, 256, 512)
LINEAR_SIZES = (512, 1024, 2048)
REPEATS = 9


def as_muon(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Muon(params, lr=0.02, weight_decay=0.0)


def as_trust_region(params: list[nn.Parameter]) -> Optimizer:
    return TrustRegion(params, momentum=0.95, nesterov=True, scale="original", start="zero", ns_dtype=torch.bfloat16)


def kept_adamp(params: list[nn.Parameter]) -> Optimizer:
    from pytorch_optimizer import AdamP

    return AdamP(params)


PAIRS: dict[str, tuple[Make, str, Make, str]] = {
    "NorMuon": (
        NorMuon,
        "torch.optim.Muon",
        as_muon,
        "ours iterates in bfloat16 where the CPU has it, else in float32, torch's always in bfloat16",
    ),
    "NorMuon(bfloat16)": (
        lambda p: NorMuon(p, ns_dtype=torch.bfloat16),
        "torch.optim.Muon",
        as_muon,
        "the iteration in bfloat16 on both sides: the price of evening out the rows",
    ),
    "HybridAuON": (HybridAuON, "torch.optim.Muon", as_muon, "as NorMuon"),
    "AuON": (AuON, "torch.optim.AdamW", torch.optim.AdamW, "one state tensor beside two"),
    "SGDW": (SGDW, "torch.optim.SGD", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), "foreach on both sides"),
    "TrustRegion(spectral)": (
        as_trust_region,
        "torch.optim.Muon",
        as_muon,
        "the same steps, in bfloat16 on both sides",
    ),
    "NovoGrad": (NovoGrad, "torch.optim.AdamW", torch.optim.AdamW, "one state tensor beside two"),
}
if importlib.util.find_spec("pytorch_optimizer"):
    note = "pytorch_optimizer's: a cosine of every row, and a projection where it is small"
    PAIRS["AdamP"] = (kept_adamp, "torch.optim.Adam", torch.optim.Adam, note)
LINEAR: tuple[Make, ...] = (AuON, SGDW, NovoGrad, kept_adamp)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """One row a method and matrix size, then the fitted exponents of the cost in matrix entries."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [
            compared(name, *pair, n)
            for name, pair in PAIRS.items()
            for n in sizes_of(pair[0], SIZES)[: 1 if quick else None]
        ]
        return rows if quick else [*rows, *blocks(), *growth()]
    finally:
        torch.set_num_threads(threads)


def sizes_of(make: Make, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes if make not in LINEAR else LINEAR_SIZES


def matrix(n: int) -> list[nn.Parameter]:
    p = nn.Parameter(torch.zeros(n, n))
    p.grad = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    return [p]


def compared(name: str, make: Make, peer: str, make_peer: Make, note: str, n: int) -> dict[str, Any]:
    ours, theirs = make(matrix(n)), make_peer(matrix(n))
    a, b = interleaved(ours.step, theirs.step)
    memory = f"state {state_bytes(ours):,} B beside {state_bytes(theirs):,} B"
    row = {"name": f"{name} {n} x {n}", "ours": name, "peer": peer, "seconds_ours": a, "seconds_peer": b}
    return row | {"ratio": a / b, "note": f"{memory}; {note}"}


ON_BLOCKS: dict[str, tuple[Make, str, Make]] = {
    "NorMuon": (NorMuon, "torch.optim.Muon", as_muon),
    "HybridAuON": (HybridAuON, "torch.optim.Muon", as_muon),
    "TrustRegion(spectral)": (as_trust_region, "torch.optim.Muon", as_muon),
    "AuON": (AuON, "torch.optim.AdamW", torch.optim.AdamW),
    "SGDW": (SGDW, "torch.optim.SGD", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)),
    "NovoGrad": (NovoGrad, "torch.optim.AdamW", torch.optim.AdamW),
}


def blocks() -> list[dict[str, Any]]:
    """A step on one block of GPT-2 small, in both precisions of the parameters."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (make, peer, make_peer) in ON_BLOCKS.items():
            ours, theirs = make(of_block(dtype)), make_peer(of_block(dtype))
            a, b = interleaved(ours.step, theirs.step)
            held = [peak_bytes(o.step) / 2**20 for o in (ours, theirs)]
            states = [state_bytes(o) / 2**20 for o in (ours, theirs)]
            note = f"state {states[0]:.1f} MiB beside {states[1]:.1f}; peak of a step {held[0]:.1f} MiB beside {held[1]:.1f}"
            row = {
                "name": f"{name}, a block of GPT-2 small, {str(dtype).partition('.')[2]}",
                "ours": name,
                "peer": peer,
            }
            rows.append(row | {"seconds_ours": a, "seconds_peer": b, "ratio": a / b, "note": note})
    return rows


def of_block(dtype: torch.dtype) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in BLOCK]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(dtype)
    return params


def growth() -> list[dict[str, Any]]:
    """Fitted exponents of step time in entries: ours in seconds_ours' place is the time at the largest size."""
    rows = []
    for name, make, peer, make_peer, expected in (
        ("AuON", AuON, "NorMuon", NorMuon, "linear (1) beside n^3 (1.5)"),
        ("NorMuon", NorMuon, "torch.optim.Muon", as_muon, "n^3 (1.5) on both sides"),
    ):
        times = {n: interleaved(make(matrix(n)).step, make_peer(matrix(n)).step) for n in SIZES}
        slopes = [exponent({n: t[k] for n, t in times.items()}) for k in (0, 1)]
        a, b = times[SIZES[-1]]
        note = f"time grows like entries to the {slopes[0]:.2f}, the peer's to the {slopes[1]:.2f}; expected {expected}"
        row = {"name": f"growth of {name}, n = {SIZES[0]} to {SIZES[-1]}", "ours": name, "peer": peer}
        rows.append(row | {"seconds_ours": a, "seconds_peer": b, "ratio": a / b, "note": note})
    return rows


def interleaved(a: Callable[[], Any], b: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of each, run in turn after one warm-up."""
    a(), b()
    times = [(timed(a), timed(b)) for _ in range(REPEATS)]
    first, second = (sorted(t)[REPEATS // 2] for t in zip(*times, strict=True))
    return first, second


def timed(f: Callable[[], Any]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def exponent(times: dict[int, float]) -> float:
    """Slope of log time over log entries of n x n matrices, by least squares."""
    x = torch.tensor([2 * math.log(n) for n in times])
    y = torch.tensor([math.log(t) for t in times.values()])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def state_bytes(optimizer: Optimizer) -> int:
    return sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
