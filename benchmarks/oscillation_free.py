"""StatsQ beside learned step size and beside no rounding: time of a training step of one linear layer, and memory of its forward.

Run `python -m benchmarks oscillation_free`. Steps are interleaved in one process on one thread; times are medians. Learned step size is
torchao's (its ParetoQ prototype) where that is installed, else the one our replication compares with.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.optim import interleaved
from pondera.compress.oscillation_free import StatsQ
from pondera.replications.adapters.oftv2 import peak_bytes
from pondera.replications.compress.oscillation_free import LearnedStep

SIZES = ((768, 768, 64), (3072, 768, 64), (3072, 768, 1024))  # outputs, inputs, rows of a batch
BITS = 4


class TorchaoStep(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        from torchao.prototype.paretoq.models.utils_quant import LsqBinaryTernaryExtension

        self.step = nn.Parameter(LearnedStep(BITS).start(weight).step.detach())
        self.apply_to: Callable[..., torch.Tensor] = LsqBinaryTernaryExtension.apply

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.apply_to(weight, self.step, BITS, False)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """One row a size and peer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for size in SIZES[: 1 if quick else None] for row in beside(*size)]
    finally:
        torch.set_num_threads(threads)


def beside(out: int, inn: int, rows: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x, w = torch.randn(rows, inn), nn.Linear(inn, out).weight
    peers: dict[str, Callable[[], nn.Module | None]] = {"no rounding": lambda: None}
    if importlib.util.find_spec("torchao"):
        peers["torchao learned step size"] = lambda: TorchaoStep(w)
    else:
        peers["learned step size (our replication's)"] = lambda: LearnedStep(BITS).start(w)
    ours, ours_peak = step(out, inn, x, StatsQ(BITS))
    found = []
    for peer, make in peers.items():
        theirs, theirs_peak = step(out, inn, x, make())
        a, b = interleaved(ours, theirs)
        note = f"forward and backward; peak beside the weights {ours_peak:.1f} MiB beside {theirs_peak:.1f} MiB"
        name = f"StatsQ({BITS}) {out} x {inn}, {rows} rows"
        found.append(
            {
                "name": name,
                "ours": "StatsQ",
                "peer": peer,
                "seconds_ours": a,
                "seconds_peer": b,
                "ratio": a / b,
                "note": note,
            }
        )
    return found


def step(out: int, inn: int, x: torch.Tensor, rounding: nn.Module | None) -> tuple[Callable[[], None], float]:
    torch.manual_seed(0)
    layer = nn.Linear(inn, out)
    if rounding is not None:
        parametrize.register_parametrization(layer, "weight", rounding, unsafe=True)

    def both() -> None:
        layer.zero_grad()
        layer(x).square().sum().backward()

    return both, peak_bytes(both) / 2**20
