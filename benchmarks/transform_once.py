"""T1 beside the Fourier neural operator: forward and backward of four layers at growing resolution.

Run `python -m benchmarks transform_once`. Batch 4, 24 channels, one thread, medians of runs in turn; neuralop's FNO where it is
installed, else the plain one of the replication. Memory is what autograd keeps for the way back.
"""

import importlib.util
import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from benchmarks.state_space import interleaved, kept
from pondera.nn import T1
from pondera.replications.nn._pde import FNO

SIDES, BATCH, WIDTH, MODES = (32, 64, 128, 256), 4, 24, 12


def peers() -> dict[str, Callable[[], nn.Module]]:
    # two corners of 6 x 6 complex modes are as many waves as 12 x 12 cosines
    found: dict[str, Callable[[], nn.Module]] = {"plain FNO": lambda: FNO(1, 1, (MODES // 2, MODES // 2), width=WIDTH)}
    if importlib.util.find_spec("neuralop"):
        from neuralop.models import FNO as Kept

        found["neuraloperator FNO"] = lambda: Kept((MODES, MODES), 1, 1, hidden_channels=WIDTH, n_layers=4)
    return found


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [at(side, peer, build) for peer, build in peers().items() for side in SIDES[: 2 if quick else None]]
    finally:
        torch.set_num_threads(threads)
    return rows


def at(side: int, peer: str, build: Callable[[], nn.Module]) -> dict[str, Any]:
    torch.manual_seed(0)
    ours, theirs = T1(1, 1, (MODES, MODES), (side, side), width=WIDTH), build()
    x = torch.randn(BATCH, 1, side, side)
    first, second = interleaved(lambda: ours(x), lambda: theirs(x))
    reals = [sum(p.numel() * (1 + p.is_complex()) for p in net.parameters()) for net in (ours, theirs)]
    note = f"{reals[0]:,} real parameters beside {reals[1]:,}; kept for the way back {kept(lambda: ours(x)) / 2**20:.1f} MB "
    note += f"beside {kept(lambda: theirs(x)) / 2**20:.1f} MB"
    row = {"name": f"T1 on {side} x {side}", "ours": "T1", "peer": peer, "seconds_ours": first, "seconds_peer": second}
    row |= {"version": version("neuraloperator")} if peer.startswith("neuraloperator") else {}
    return row | {"ratio": first / second, "note": note}


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
