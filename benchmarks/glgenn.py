"""Layers of geometric algebra: products by pairs of blades beside one einsum with a dense table, as GLGENN and CGENN have it.

The same numbers come out. One thread, float32; forward, and forward with backward.
"""

import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.optim import interleaved
from pondera.nn import GeometricProduct

CHANNELS = 8
CASES = ((3, 32), (5, 32), (5, 128), (7, 32))


class Dense(torch.nn.Module):
    """The same layer with weights laid out as a table of 8^n entries a channel, and one einsum: what both repositories do."""

    def __init__(self, layer: GeometricProduct) -> None:
        super().__init__()
        self.layer = layer
        n = layer.blades
        self.cayley = torch.zeros(n, n, n).scatter_(2, layer.other.unsqueeze(2), layer.sign.unsqueeze(2))
        of, each = layer.share, layer.shares
        ids = torch.full((each, each, each), len(layer.triples))
        for number, triple in enumerate(layer.triples):
            ids[triple] = number
        self.at = ids[of[:, None, None], of[:, None], of]

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        weight = torch.nn.functional.pad(layer.weight, (0, 1))[:, self.at] * self.cayley
        return torch.einsum("bni,nijk,bnk->bnj", x, weight, layer.norm(layer.right(x)))


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            compared(n, batch, backward) for n, batch in CASES[: 2 if quick else None] for backward in (False, True)
        ]
    finally:
        torch.set_num_threads(threads)


def compared(n: int, batch: int, backward: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = GeometricProduct((n,), CHANNELS)
    dense = Dense(layer)
    x = torch.randn(batch, CHANNELS, layer.blades)
    apart = float((layer(x) - dense(x)).detach().abs().max())

    def step(net: torch.nn.Module) -> None:
        if backward:
            net(x).sum().backward()
        else:
            with torch.no_grad():
                net(x)

    a, b = interleaved(lambda: step(layer), lambda: step(dense))
    note = f"table of {4 * CHANNELS * 4**n:,} B beside {4 * CHANNELS * 8**n:,} B; outputs {apart:.0e} apart"
    way = "forward and backward" if backward else "forward"
    row = {"name": f"n = {n}, {CHANNELS} channels, batch {batch}, {way}", "ours": "GeometricProduct"}
    return row | {
        "peer": "torch einsum, dense table",
        "seconds_ours": a,
        "seconds_peer": b,
        "ratio": a / b,
        "note": note,
    }


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
