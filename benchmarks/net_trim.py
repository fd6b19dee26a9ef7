"""Net-Trim's program for one ReLU layer: ADMM beside a conic solver, cvxpy with clarabel, at the same objective.

Run `python -m benchmarks net_trim` with cvxpy and clarabel installed. Inputs of 16 hidden directions, a third of the weights,
epsilon a twentieth of the outputs' norm. The cost of a layer; the conic solver forms the program anew each time.
"""

import importlib.util
import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.optim import timed
from pondera.compress import net_trim_weight

SIZES = ((32, 32, 100), (64, 48, 200), (128, 64, 300))  # inputs, outputs, samples


def case(width: int, out: int, samples: int) -> tuple[Tensor, Tensor, float]:
    g = torch.Generator().manual_seed(width)
    draw = {"generator": g, "dtype": torch.float64}
    x = torch.randn(samples, 16, **draw) @ torch.randn(16, width, **draw) + 0.3 * torch.randn(samples, width, **draw)  # type: ignore[arg-type]
    w = torch.randn(out, width, **draw) * (torch.rand(out, width, **draw) < 0.3) / width**0.5  # type: ignore[arg-type]
    y = (x.clamp_min(0) @ w.T).clamp_min(0)
    return x.clamp_min(0), y, 0.05 * float(y.norm())


def conic(x: Tensor, y: Tensor, epsilon: float) -> float:
    import cvxpy as cp

    on = (y > 1e-6).double().numpy()
    w = cp.Variable((y.shape[1], x.shape[1]))
    out = x.numpy() @ w.T
    limits = [cp.norm(cp.multiply(on, out - y.numpy()), "fro") <= epsilon, cp.multiply(1 - on, out) <= 0]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.abs(w))), limits)
    return float(problem.solve(solver=cp.CLARABEL))


def run(quick: bool = False) -> list[dict[str, Any]]:
    if not (importlib.util.find_spec("cvxpy") and importlib.util.find_spec("clarabel")):
        print("net_trim: skipped, its peer is not installed: pip install cvxpy clarabel")
        return []
    import cvxpy

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for width, out, samples in SIZES[: 1 if quick else None]:
            x, y, epsilon = case(width, out, samples)
            found: dict[str, Any] = {}

            def ours(x: Tensor = x, y: Tensor = y, epsilon: float = epsilon, found: dict[str, Any] = found) -> None:
                found["ours"] = net_trim_weight(x, y, epsilon, active=y > 1e-6)

            def theirs(x: Tensor = x, y: Tensor = y, epsilon: float = epsilon, found: dict[str, Any] = found) -> None:
                found["theirs"] = conic(x, y, epsilon)

            times = [(timed(ours), timed(theirs)) for _ in range(3)]
            a, b = (sorted(t)[1] for t in zip(*times, strict=True))
            norm = float(found["ours"].weight.abs().sum())
            note = (
                f"L1 {norm:.5g} beside {found['theirs']:.5g} ({norm / found['theirs'] - 1:+.1g}), {found['ours'].iterations} iterations, "
                f"off by {found['ours'].error / epsilon - 1:+.1g} of epsilon, {found['ours'].excess:.1g} above 0 where inactive"
            )
            row = {
                "name": f"{width} to {out}, {samples} samples",
                "ours": "net_trim_weight",
                "peer": "cvxpy with clarabel",
            }
            rows.append(
                row | {"version": cvxpy.__version__, "seconds_ours": a, "seconds_peer": b, "ratio": a / b, "note": note}
            )
        return rows
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
