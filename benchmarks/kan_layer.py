"""KANLinear beside pykan's layer and efficient-kan's, on the same numbers, and beside a linear layer with silu.

Passes run in turn in one process on one thread; times are medians. A peer that is not installed is left out; efficient-kan
is not on PyPI (Blealtan/efficient-kan, src/efficient_kan).
"""

import importlib.util
import json
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._layers import Layer, compared
from pondera.nn.kan import KANLinear

CASES = ((64, 5), (256, 5), (64, 20))
BATCH = 256


def pykan(layer: KANLinear) -> Layer:
    from kan.KANLayer import KANLayer

    other = KANLayer(layer.in_features, layer.out_features, num=layer.grid, k=3)
    other.grid.data = layer.knots.clone()
    other.coef.data = layer.coef.detach().transpose(0, 1).contiguous()
    other.scale_base.data = layer.base_weight.detach().T.contiguous()
    other.scale_sp.data = layer.spline_scale.detach().T.contiguous()
    return lambda x: other(x)[0]


def efficient_kan(layer: KANLinear) -> Layer:
    from efficient_kan import KANLinear as Other

    other = Other(layer.in_features, layer.out_features, layer.grid)
    with torch.no_grad():
        other.grid.copy_(layer.knots)
        other.spline_weight.copy_(layer.coef)
        other.base_weight.copy_(layer.base_weight)
        other.spline_scaler.copy_(layer.spline_scale)
    return other


def silu_linear(layer: KANLinear) -> Layer:
    return nn.Sequential(nn.SiLU(), nn.Linear(layer.in_features, layer.out_features))


PEERS = {
    "pykan": ("kan", pykan),
    "efficient-kan": ("efficient_kan", efficient_kan),
    "silu and Linear": ("", silu_linear),
}


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for case in CASES[: 1 if quick else None] for row in rows(*case)]
    finally:
        torch.set_num_threads(threads)


def rows(width: int, grid: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layer, x = KANLinear(width, width, grid), torch.rand(BATCH, width) * 2 - 1
    found = []
    for peer, (package, make) in PEERS.items():
        if package and not importlib.util.find_spec(package):
            continue
        other = make(layer)
        note = f"outputs differ by {apart(layer(x), other(x)):.0e}" if package else "another function: what a KAN costs"
        name = f"{width} x {width}, G {grid}, batch {BATCH}"
        found += [compared(name, "KANLinear", layer, peer, other, x, note, backward) for backward in (False, True)]
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
