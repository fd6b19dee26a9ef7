"""DWSLayer beside the authors' layer of deep weight spaces: time and memory of a pass, and how they grow with depth.

A pass is forward and backward, in turn in one process on one thread; times are medians. The peer is AvivNavon/DWSNets, which is
not on PyPI: put its folder on PYTHONPATH (its package is called `nn`); where it is missing there is nothing to compare with.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.optim import interleaved
from pondera.replications.adapters.oftv2 import peak_bytes
from pondera.weightspace import DWSLayer

PEER = "AvivNavon/DWSNets"
NETS, CHANNELS, WIDTH = 32, 16, 32
DEPTHS = (2, 4, 8, 16)


def run(quick: bool = False) -> list[dict[str, Any]]:
    if not there():
        print(f"weightspace: {PEER} cannot be imported here; put its folder on PYTHONPATH")
        return []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        depths = DEPTHS[:2] if quick else DEPTHS
        found = {(pool, depth): passes(depth, pool) for pool in ("mean", "max") for depth in depths}
        rows = [compared(*key, *both) for key, both in found.items()]
        return rows + [
            growth(pool, {d: rows[i] for i, (p, d) in enumerate(found) if p == pool}) for pool in ("mean", "max")
        ]
    finally:
        torch.set_num_threads(threads)


def there() -> bool:
    try:
        return importlib.util.find_spec("nn.layers") is not None
    except ImportError:
        return False


def passes(depth: int, pool: str) -> tuple[nn.Module, nn.Module, Callable[[], None], Callable[[], None]]:
    """A SIREN 2-32-...-32-1 with so many hidden layers, 32 of them, 16 features in and out."""
    from nn.layers import DWSLayer as Theirs  # type: ignore[import-not-found]

    sizes = list(pairwise([2, *[WIDTH] * depth, 1]))
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in sizes))
    torch.manual_seed(0)
    ours = DWSLayer(net, CHANNELS, CHANNELS, pool=pool)
    theirs = Theirs(
        tuple(sizes), tuple((b,) for _, b in sizes), CHANNELS, CHANNELS, reduction=pool, set_layer="ds"
    )  # fmt: skip
    states = {n: torch.randn(NETS, *x.shape, CHANNELS) for n, x in net.state_dict().items()}
    weights = tuple(x.transpose(1, 2).contiguous() for x in states.values() if x.ndim == 4)
    biases = tuple(x for x in states.values() if x.ndim == 3)

    def back(outs: list[Tensor]) -> None:
        sum(x.square().mean() for x in outs).backward()  # type: ignore[union-attr]

    def first() -> None:
        back(list(ours(states).values()))

    def second() -> None:
        w, b = theirs((weights, biases))
        back([*w, *b])

    return ours, theirs, first, second


def compared(
    pool: str, depth: int, ours: nn.Module, theirs: nn.Module, first: Callable[[], None], second: Callable[[], None]
) -> dict[str, Any]:
    a, b = interleaved(first, second)
    held = [peak_bytes(f) / 2**20 for f in (first, second)]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
    note = f"peak {held[0]:.1f} MiB beside {held[1]:.1f}; weights {sizes[0]:,} beside {sizes[1]:,}"
    row = {"name": f"{depth} hidden layers of {WIDTH}, {pool}", "ours": "DWSLayer", "peer": PEER, "version": "2001d52"}
    return row | {"seconds_ours": a, "seconds_peer": b, "ratio": a / b, "note": note}


def growth(pool: str, rows: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The exponents of time in depth; in the columns of seconds the time at the largest."""
    x = torch.tensor([math.log(d) for d in rows])
    slopes = []
    for key in ("seconds_ours", "seconds_peer"):
        y = torch.tensor([math.log(row[key]) for row in rows.values()])
        slopes.append(float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()))
    note = f"time grows like depth to the {slopes[0]:.2f}, the peer's to the {slopes[1]:.2f}; both have one map a pair of tensors"
    return rows[max(rows)] | {"name": f"growth with depth, {min(rows)} to {max(rows)}, {pool}", "note": note}


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
