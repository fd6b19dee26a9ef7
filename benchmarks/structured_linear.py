"""Structured linear layers beside `nn.Linear` of the same sizes: time of forward and backward, memory of weights and of what is saved.

Float32, 256 rows, one thread, interleaved; medians.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pondera.nn.structured_linear import TT, Btt, Kronecker, Monarch

ROWS, REPEATS = 256, 5
WIDTHS = (1024, 2048, 4096)
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Btt(rank=1)": Btt,
    "Btt(rank=4)": partial(Btt, rank=4),
    "Monarch(blocks=4)": Monarch,
    "Monarch(blocks=32)": partial(Monarch, blocks=32),
    "TT(rank=8)": TT,
    "Kronecker": Kronecker,
}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """One row a layer and width."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [compared(name, make, d) for d in WIDTHS[: 1 if quick else None] for name, make in LAYERS.items()]
    finally:
        torch.set_num_threads(threads)


def compared(name: str, make: Callable[..., nn.Module], d: int) -> dict[str, Any]:
    torch.manual_seed(0)
    ours, peer, x = make(d, d), nn.Linear(d, d), torch.randn(ROWS, d, requires_grad=True)
    once(ours, x), once(peer, x)
    times = [(once(ours, x), once(peer, x)) for _ in range(REPEATS)]
    a, b = (sorted(t)[REPEATS // 2] for t in zip(*times, strict=True))
    count = ours.n_multiplications / (d * d)  # type: ignore[operator]
    weights = [sum(p.nbytes for p in layer.parameters()) for layer in (ours, peer)]
    kept = [saved(layer, x) for layer in (ours, peer)]
    note = (
        f"multiplications {count:.3f} of the dense ones; weights {weights[0]:,} B beside {weights[1]:,} B, saved for the "
        f"backward pass beside weights {kept[0]:,} B and {kept[1]:,} B"
    )
    row = {"name": f"{name} {d} to {d}", "ours": name, "peer": "torch.nn.Linear", "seconds_ours": a, "seconds_peer": b}
    return row | {"ratio": a / b, "note": note}


def once(layer: nn.Module, x: Tensor) -> float:
    began = time.perf_counter()
    layer(x).sum().backward()
    return time.perf_counter() - began


def saved(layer: nn.Module, x: Tensor) -> int:
    """Bytes of all tensors that autograd holds for the backward pass, the layer's own weights apart."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if (at := t.untyped_storage().data_ptr()) not in own:
            found[at] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    del y
    return sum(found.values())


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
