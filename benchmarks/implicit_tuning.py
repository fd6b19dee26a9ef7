"""The implicit hypergradient beside reverse mode through training: time, and the most bytes autograd's graphs hold.

A decay for each of 26,000 weights of an MLP, batch 256. Interleaved in one process on one thread; times are medians.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.optim import interleaved
from pondera.optim.implicit_tuning import implicit_hypergradient
from pondera.replications.optim.implicit_tuning import kept_bytes

SHAPES = ((64, 128), (128, 128), (128, 10))
BATCH, RATE = 256, 0.05


def problem() -> tuple[list[Tensor], list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    g = torch.Generator().manual_seed(0)
    weights = [(torch.randn(s, generator=g) / s[0] ** 0.5).requires_grad_() for s in SHAPES]
    decays = [torch.full(s, -6.0, requires_grad=True) for s in SHAPES]
    x, v = torch.randn(2, BATCH, 64, generator=g)
    y, u = torch.randint(10, (2, BATCH), generator=g)

    def out(x: Tensor, ws: list[Tensor]) -> Tensor:
        for w in ws[:-1]:
            x = torch.tanh(x @ w)
        return x @ ws[-1]

    def train(ws: list[Tensor], ds: list[Tensor]) -> Tensor:
        penalty = torch.stack([(d.exp() * w.square()).sum() for w, d in zip(ws, ds, strict=True)]).sum() / 2
        return F.cross_entropy(out(x, ws), y) + penalty

    def val(ws: list[Tensor]) -> Tensor:
        return F.cross_entropy(out(v, ws), u)

    return weights, decays, train, val


def run(quick: bool = False) -> list[dict[str, Any]]:
    """One row for each length of unrolling."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [compared(steps) for steps in (20, 100)[: 1 if quick else None]]
    finally:
        torch.set_num_threads(threads)


def compared(steps: int) -> dict[str, Any]:
    weights, decays, train, val = problem()

    def ours() -> None:
        implicit_hypergradient(train(weights, decays), val(weights), weights, decays, steps=20, alpha=RATE)

    def theirs() -> None:
        moved = weights
        for _ in range(steps):
            grads = torch.autograd.grad(train(moved, decays), moved, create_graph=True)
            moved = [w - RATE * g for w, g in zip(moved, grads, strict=True)]
        torch.autograd.grad(val(moved), decays)

    a, b = interleaved(ours, theirs)
    held, held_by_peer = kept_bytes(ours), kept_bytes(theirs)
    row = {
        "name": f"hypergradient of 26,000 decays, against {steps} steps",
        "ours": "20 products",
        "peer": f"unrolling {steps}",
    }
    note = f"graphs hold {held:,} B beside {held_by_peer:,} B, {held / held_by_peer:.3f} of it"
    return row | {"seconds_ours": a, "seconds_peer": b, "ratio": a / b, "note": note}


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
