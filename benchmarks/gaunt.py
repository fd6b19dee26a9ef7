"""The Gaunt tensor product beside e3nn: the same function (its even paths alone), and its full tensor product.

Degrees 0 to L of both factors, to 2 L, warmed up first: e3nn compiles at its first calls. One thread, float32.
"""

import importlib.util
import json
from math import log
from typing import Any

import torch

from benchmarks.optim import interleaved
from pondera.nn import GauntTensorProduct

BATCH, CHANNELS = 8, 128
DEGREES = (1, 2, 4, 6)


def run(quick: bool = False) -> list[dict[str, Any]]:
    if importlib.util.find_spec("e3nn") is None:
        return []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for name, make, own in (("even paths", even, CHANNELS), ("full", full, CHANNELS)):
            times = {}
            for degree in DEGREES[: 2 if quick else None]:
                for backward in (False, True):
                    row = compared(name, make(degree), degree, own, backward)
                    rows.append(row)
                    if not backward:
                        times[degree] = row["seconds_ours"], row["seconds_peer"]
            if len(times) > 2:
                (a, (x, y)), (b, (z, w)) = list(times.items())[-2:]
                slopes = [log(late / early) / log(b / a) for early, late in ((x, z), (y, w))]
                rows[-1]["note"] += (
                    f"; forward time grows like L to the {slopes[0]:.2f} from {a} to {b}, the peer's to the {slopes[1]:.2f}"
                )
        return rows
    finally:
        torch.set_num_threads(threads)


def irreps(degree: int, channels: int) -> Any:
    from e3nn import o3

    return o3.Irreps([(channels, (l, (-1) ** l)) for l in range(degree + 1)])


def even(degree: int) -> Any:
    """The function that ours is, up to factors: a path for each (l1, l2, l3) of even sum, channel by channel."""
    from e3nn import o3

    one, out = irreps(degree, CHANNELS), irreps(2 * degree, CHANNELS)
    paths = [
        (a, b, c, "uuu", False)
        for a in range(degree + 1)
        for b in range(degree + 1)
        for c in range(abs(a - b), a + b + 1)
        if (a + b + c) % 2 == 0
    ]
    return o3.TensorProduct(one, one, out, paths), one.dim


def full(degree: int) -> Any:
    """Every path, odd ones as well, each to an output of its own; one channel, and the channels in the batch."""
    from e3nn import o3

    one = irreps(degree, 1)
    return o3.FullTensorProduct(one, one), one.dim


def compared(name: str, peer: Any, degree: int, channels: int, backward: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    product, width = peer
    layer = GauntTensorProduct(channels, degree, degree, weighted=False)
    x, y = torch.randn(2, BATCH, channels, (degree + 1) ** 2)
    rows = BATCH if width == channels * (degree + 1) ** 2 else BATCH * channels
    u, v = torch.randn(2, rows, width)
    if backward:
        for t in (x, y, u, v):
            t.requires_grad_()

    def step(f: Any, a: torch.Tensor, b: torch.Tensor) -> None:
        out = f(a, b)
        if backward:
            out.sum().backward()

    for _ in range(3):
        step(product, u, v)
    a, b = interleaved(lambda: step(layer, x, y), lambda: step(product, u, v))
    way = "forward and backward" if backward else "forward"
    tables = sum(t.nbytes for t in layer.buffers())
    note = f"tables of {tables:,} B; {layer(x, y).shape[-1]} entries a channel beside {product.irreps_out.dim // (width // (degree + 1) ** 2)}"
    row = {"name": f"L = {degree}, {BATCH} x {channels} channels, {way}", "ours": "GauntTensorProduct"}
    peer_name = "e3nn TensorProduct, even paths" if name == "even paths" else "e3nn FullTensorProduct"
    return row | {
        "peer": peer_name,
        "version": version(),
        "seconds_ours": a,
        "seconds_peer": b,
        "ratio": a / b,
        "note": note,
    }


def version() -> str:
    from importlib.metadata import version

    return version("e3nn")


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
