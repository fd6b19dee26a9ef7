"""Layers of diagrams: their product by factors beside one dense multiplication by the formed matrix, in time, memory and growth.

Forming the dense matrix is not timed. One thread, float32, without gradients.
"""

import json
from collections.abc import Callable
from math import log
from typing import Any

import torch

from benchmarks.optim import interleaved
from pondera.nn import BrauerLinear, PermutationLinear

CHANNELS = BATCH = 8
CASES: dict[str, tuple[Callable[[int], Any], int, tuple[int, ...]]] = {
    "O(n), 2 to 2": (lambda n: BrauerLinear(f"O({n})", 2, 2, CHANNELS, CHANNELS, bias=False), 2, (4, 8, 16, 32)),
    "Sp(n), 2 to 2": (lambda n: BrauerLinear(f"Sp({n})", 2, 2, CHANNELS, CHANNELS, bias=False), 2, (4, 8, 16, 32)),
    "S_n, 2 to 2": (lambda n: PermutationLinear(n, 2, 2, CHANNELS, CHANNELS, bias=False), 2, (4, 8, 16, 32)),
    "O(n), 3 to 3": (lambda n: BrauerLinear(f"O({n})", 3, 3, CHANNELS, CHANNELS, bias=False), 3, (4, 6, 8, 10)),
    "S_n, 3 to 3": (lambda n: PermutationLinear(n, 3, 3, CHANNELS, CHANNELS, bias=False), 3, (4, 6, 8, 10)),
    "SO(3), 3 to 2": (lambda n: BrauerLinear("SO(3)", 3, 2, CHANNELS, CHANNELS, bias=False), 3, (3,)),
}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """One row a group, orders and n, with the slope of log time over log n between smallest and largest at the last."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for name, (make, order, sizes) in CASES.items():
            times = {}
            for n in sizes[: 2 if quick else None]:
                times[n] = a, b, note = compared(make(n), order)
                row = {"name": f"{name}, n = {n}", "ours": "by factors", "peer": "torch matmul, formed"}
                rows.append(row | {"seconds_ours": a, "seconds_peer": b, "ratio": a / b, "note": note})
            if len(times) > 2:
                (m, (a, b, _)), *_, (n, (c, d, _)) = times.items()
                ours, peer = (log(later / first) / log(n / m) for first, later in ((a, c), (b, d)))
                rows[-1]["note"] += (
                    f"; time grows like n to the {ours:.2f} from {m} to {n}, the peer's to the {peer:.2f}"
                )
        return rows
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def compared(layer: Any, order: int) -> tuple[float, float, str]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, CHANNELS, *[layer.n] * order)
    matrix = layer.dense_weight().reshape(CHANNELS * layer.n**layer.order_out, -1)
    flat, dense = x.flatten(1), matrix.mT
    apart = float((layer(x).flatten(1) - flat @ dense).abs().max())
    a, b = interleaved(lambda: layer(x), lambda: flat @ dense)
    return a, b, f"weights {layer.weight.nbytes:,} B beside {matrix.nbytes:,} B; outputs {apart:.0e} apart"


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
