"""Tangent kernels: the pseudo kernel beside the full one at 10 and 100 outputs, and the full one beside a plain Jacobian product.

Times are medians of runs in turn on one thread; peak memory is what a fresh process grows by over its imports and a first
small run.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from pondera.probe.ntk import ntk
from pondera.probe.pseudo_ntk import pseudo_ntk

REPEATS = 3
ROOT = Path(__file__).resolve().parent.parent


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """The kernel as torch's documentation builds it: the Jacobians of all examples at once, multiplied tensor by tensor."""
    params = {k: p.detach() for k, p in model.named_parameters()}

    def one(p: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, p, (example.unsqueeze(0),)).squeeze(0)

    jacobian = vmap(jacrev(one), (None, 0))(params, x)
    return sum(torch.einsum("iap,jbp->ijab", j.flatten(2), j.flatten(2)) for j in jacobian.values())


def mlp(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def cnn(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * 16, outputs),
    )  # fmt: skip


PROBES: dict[str, Callable[[nn.Module, Tensor], Any]] = {"ntk": ntk, "pseudo_ntk": pseudo_ntk, "plain": plain}
CASES: dict[str, tuple[Callable[[int, int], nn.Module], int, int, tuple[int, ...]]] = {
    # build, width, examples, shape of one
    "mlp": (mlp, 128, 16, (64,)),
    "wide mlp": (mlp, 256, 64, (64,)),
    "cnn": (cnn, 16, 32, (1, 8, 8)),
}


def case(name: str, outputs: int) -> tuple[nn.Module, Tensor]:
    build, width, n, shape = CASES[name]
    torch.manual_seed(0)
    return build(width, outputs), torch.randn(n, *shape)


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if quick:
            return [compared(ours, peer, "mlp", 10) for ours, peer in (("pseudo_ntk", "ntk"), ("ntk", "plain"))]
        rows, ratios = [], {}
        for outputs in (10, 100):
            rows.append(compared("pseudo_ntk", "ntk", "mlp", outputs))
            ratios[outputs] = 1 / rows[-1]["ratio"]
        power = math.log10(ratios[100] / ratios[10])
        rows[-1]["note"] += f"; from 10 to 100 outputs the gain in time grows by outputs to the {power:.2f}"
        rows += [compared("ntk", "plain", name, 10) for name in ("mlp", "wide mlp", "cnn")]
        rows.append(compared("ntk", "plain", "mlp", 100))
        return rows
    finally:
        torch.set_num_threads(threads)


def compared(ours: str, peer: str, name: str, outputs: int) -> dict[str, Any]:
    model, x = case(name, outputs)
    a, b = interleaved(lambda: PROBES[ours](model, x), lambda: PROBES[peer](model, x))
    row = {"name": f"{name}, {len(x)} examples, {outputs} outputs", "ours": ours, "peer": peer}
    row |= {"seconds_ours": a, "seconds_peer": b, "ratio": a / b}
    mine, theirs = peak(ours, name, outputs), peak(peer, name, outputs)
    return row | {"note": f"peak memory {mine:.0f} MiB beside {theirs:.0f} MiB"}


def interleaved(a: Callable[[], Any], b: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of each, run in turn after one warm-up."""
    a(), b()
    times = [(timed(a), timed(b)) for _ in range(REPEATS)]
    first, second = (sorted(t)[REPEATS // 2] for t in zip(*times, strict=True))
    return first, second


def timed(f: Callable[[], Any]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def peak(probe: str, name: str, outputs: int) -> float:
    """MiB by which the peak of a fresh process grows."""
    command = [sys.executable, "-m", "benchmarks.ntk", probe, name, str(outputs)]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def grown(probe: str, name: str, outputs: int) -> float:
    torch.set_num_threads(1)
    small, x = case(name, 2)
    PROBES[probe](small, x[:2])
    before = high_water()
    model, x = case(name, outputs)
    PROBES[probe](model, x)
    return (high_water() - before) / 1024


def high_water() -> float:
    """KiB of this program's peak (Linux; getrusage would also count what the parent held before it started this one)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(grown(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    else:
        for line in run():
            print(json.dumps(line))
