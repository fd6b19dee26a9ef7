"""Interval bounds beside auto_LiRPA's: one certified training step (margins by IBP, cross-entropy, backward) and bounds alone.

Run `python -m benchmarks bounds` where auto_LiRPA is installed; without it there is nothing to compare with and no row.
The two are interleaved in one process on one thread; times are medians.
"""

import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pondera.init.fast_certified import certified_loss, interval_bounds

EPS, REPEATS = 0.1, 15
NETS: dict[str, Callable[[], nn.Module]] = {
    "MLP 784-256-256-256-10": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 10),
    ),
    "CNN, 3 convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10),
    ),
}  # fmt: skip


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Two rows a net: a training step, and the bounds of a batch without gradient."""
    warnings.simplefilter("ignore")
    try:
        import auto_LiRPA
    except ImportError:
        return []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            row
            for name, build in list(NETS.items())[: 1 if quick else None]
            for row in compared(name, build(), auto_LiRPA)
        ]
    finally:
        torch.set_num_threads(threads)


def compared(name: str, net: nn.Module, lirpa: Any) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(128, 1, 28, 28, generator=g), torch.randint(10, (128,), generator=g)
    bounded = lirpa.BoundedModule(net, x)
    eye = torch.eye(10)
    rows = (eye[y].unsqueeze(1) - eye)[eye[y] == 0].view(len(y), 9, 10)

    def box() -> Any:
        lower, upper = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
        norm = lirpa.PerturbationLpNorm(norm=float("inf"), eps=EPS, x_L=lower, x_U=upper)
        return lirpa.BoundedTensor(x, norm)

    def their_bounds() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return bounded.compute_bounds(x=(box(),), IBP=True, method=None)

    def our_bounds() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return interval_bounds(net, x, EPS, clip=(0, 1))

    def their_step() -> Tensor:
        bounded(box())
        lower, _ = bounded.compute_bounds(IBP=True, C=rows, method=None, bound_upper=False)
        worst = torch.cat([lower.new_zeros(len(y), 1), -lower], dim=1)
        loss = nn.functional.cross_entropy(worst, torch.zeros_like(y))
        loss.backward()
        return loss.detach()

    def our_step() -> Tensor:
        loss = certified_loss(net, x, y, EPS, clip=(0, 1))
        loss.backward()
        return loss.detach()

    found = []
    for what, ours, theirs in (("training step", our_step, their_step), ("bounds", our_bounds, their_bounds)):
        apart = max(float((a - b).abs().max()) for a, b in zip(together(ours()), together(theirs()), strict=True))
        a, b = interleaved(ours, theirs)
        row = {"name": f"{name}, {what}", "ours": "pondera._bounds", "peer": "auto_LiRPA", "version": lirpa.__version__}
        note = f"batch 128; results differ by at most {apart:.1g}"
        found.append(row | {"seconds_ours": a, "seconds_peer": b, "ratio": a / b, "note": note})
    return found


def together(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def interleaved(a: Callable[[], Any], b: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of each, run in turn."""
    times = [(timed(a), timed(b)) for _ in range(REPEATS)]
    first, second = (sorted(t)[REPEATS // 2] for t in zip(*times, strict=True))
    return first, second


def timed(f: Callable[[], Any]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
